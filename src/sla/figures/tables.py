"""The tables of our pages, between markers, from the files under results/.

<!-- table:NAME -->
(generated)
<!-- /table -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sla.figures import claims, study, study_attention
from sla.figures.markdown import markdown as _markdown
from sla.figures.markdown import origin as _origin
from sla.figures.multi_gpu import multi_gpu
from sla.figures.paper import (
    GPU_BLOCKS,
    NEGLIGIBLE,
    PAPER_DEVICE,
    PAPER_GENERATION,
    PAPER_TFLOPS,
    SPARSITY,
    WAN_1_3B,
    WAN_14B_720P,
)
from sla.results import (
    RESULTS,
    Measurement,
    read_all,
    read_newest_per_device,
    read_newest_rows,
)
from sla.study.records import read_records

Row = dict[str, Any]

_BLOCK = re.compile(r"(<!-- table:(?P<name>\S*) -->\n).*?(<!-- /table -->)", re.DOTALL)
_MARKER = re.compile(r"<!--\s*(/?)table\b.*?-->")


class TableError(ValueError):
    """A page whose markers cannot be filled."""


def pages(root: Path = Path()) -> list[Path]:
    """The pages of a checkout that may hold tables: README.md, REPRODUCTION.md, docs/*.md."""
    return [root / "README.md", root / "REPRODUCTION.md", *sorted(root.glob("docs/*.md"))]


def update_readme(path: Path, *, check: bool = False, root: Path = RESULTS) -> bool:
    """Fill every marked table.

    Args:
        path: the Markdown file.
        check: write nothing.
        root: the results folder.

    Returns:
        Whether the file differed from what the results give.

    Raises:
        TableError: a marker that names no table, or that lacks its other half.
    """
    old = path.read_text(encoding="utf-8")
    # Without this a table that is not closed would swallow the text up to the next one's end.
    kinds = [match[1] for match in _MARKER.finditer(old)]
    pairs = len(_BLOCK.findall(old))
    if kinds != ["", "/"] * pairs:
        raise TableError(
            f"{path}: each '<!-- table:NAME -->', on a line of its own, must be followed by one "
            f"'<!-- /table -->'; got {len(kinds)} markers that make {pairs} pairs"
        )

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise TableError(f"{path} asks for table {name!r}; known are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](root)}\n{match[3]}"

    new = _BLOCK.sub(fill, old)
    if new != old and not check:
        path.write_text(new, encoding="utf-8")
    return new != old


def finetune(root: Path = RESULTS) -> str:
    """What `make finetune` measured of the demo, a column a device."""
    return _finetune("finetune-demo", root)


def finetune_wan(root: Path = RESULTS) -> str:
    """What it measured of Wan2.1-1.3B."""
    return _finetune("finetune-wan2.1-1.3b", root)


def _finetune(run: str, root: Path) -> str:
    by_device = read_newest_rows("finetune", ["name"], root).values()
    columns = [m for rows in by_device for m in rows if m.row["name"] == run]
    if not columns:
        return "(no record yet: `make finetune RECORD=1`)"
    rows: list[tuple[str, Callable[[dict[str, float]], str]]] = [
        ("validation loss, full attention", lambda r: f"{r['full_val_loss']:.4f}"),
        ("validation loss, SLA swapped in", lambda r: f"{r['sla_val_loss_before']:.4f}"),
        ("validation loss, SLA fine-tuned", lambda r: f"{r['sla_val_loss_after']:.4f}"),
        ("attention error, SLA swapped in", lambda r: f"{r['attention_error_before']:.3f}"),
        ("attention error, SLA fine-tuned", lambda r: f"{r['attention_error_after']:.3f}"),
        ("attention FLOPs over full attention's", lambda r: f"{r['attention_flops_ratio']:.1%}"),
        ("steps", lambda r: str(r["steps"])),
        ("wall time", lambda r: f"{r['wall_seconds']:.0f} s"),
        ("peak memory", lambda r: f"{r['peak_bytes'] / 2**30:.1f} GiB"),
    ]
    head = ["measured by us", *(m.source.provenance["device"] for m in columns)]
    body = [[label, *(show(m.row) for m in columns)] for label, show in rows]
    return f"{_markdown(head, body)}\n\n{_origin([m.source for m in columns])}"


def kernels_cpu(root: Path = RESULTS) -> str:
    """The operator against exact attention on the CPU."""
    for found in read_all("kernels", root):
        if found.provenance["cuda"] is not None:
            continue
        rows = [r for r in found.rows if not r.get("suite") and r.get("map") != "skewed"]
        times = {(r["method"], r["direction"], r["tokens"]): r["ms_median"] for r in rows}
        wanted = [(m, d) for m in ("sdpa", "sla") for d in ("forward", "forward_backward")]
        lengths = sorted({r["tokens"] for r in rows})
        lengths = [n for n in lengths if all(times.get((*what, n)) for what in wanted)]
        if lengths:
            break
    else:
        return "(no record yet: `make bench ARGS=--record`)"
    head = ["tokens"]
    for what in ("forward", "forward + backward"):
        head += [f"{what}: SDPA, ms", "SLA, ms", "ratio"]
    body = []
    for tokens in lengths:
        line = [f"{tokens:,}"]
        for direction in ("forward", "forward_backward"):
            exact, sla = (times[method, direction, tokens] for method in ("sdpa", "sla"))
            line += [f"{exact:.1f}", f"{sla:.1f}", f"{exact / sla:.1f}x"]
        body.append(line)
    return f"{_markdown(head, body)}\n\n{_origin([found])}"


def kernels_gpu(root: Path = RESULTS) -> str:
    """All methods at the paper's shapes, 95 % sparsity."""
    rows = gpu_rows(root)
    head = ["heads x tokens", "method", "blocks"]
    head += [f"{what}, ms" for what in ("forward", "backward", "forward + backward")]
    head += [f"{what}: x FA2 / x cuDNN" for what in ("forward", "backward")]
    head += [f"extra memory {what}, MiB" for what in ("forward", "forward + backward")]
    body, used = [], []
    for shape in (WAN_1_3B, WAN_14B_720P):
        at_shape = [m for m in rows if is_at(m.row, shape) and is_standard(m.row)]
        names = [name for name in METHOD_NAMES if any(m.row["method"] == name for m in at_shape)]
        for name in names:
            of_method = [m for m in at_shape if m.row["method"] == name]
            blocks = {(m.row["block_q"], m.row["block_kv"]) for m in of_method}
            for pair in sorted(blocks, key=str):
                chosen = [m for m in of_method if (m.row["block_q"], m.row["block_kv"]) == pair]
                by = {m.row["direction"]: m.row for m in chosen}
                used += chosen
                body.append(
                    [
                        f"{shape[1]} x {shape[2]:,}",
                        METHOD_NAMES[name],
                        f"{pair[0]}x{pair[1]}" if pair[0] else "",
                        *(_ms(by.get(direction)) for direction in DIRECTIONS),
                        *(_ratios(by.get(d)) for d in ("forward", "backward")),
                        *(_mib(by.get(d)) for d in ("forward", "forward_backward")),
                    ]
                )
    return _gpu_table(head, body, used, "wan-1.3b")


def kernels_summary(root: Path = RESULTS) -> str:
    """SLA's whole operator beside exact attention at the paper's shapes, default blocks."""
    found = [m for m in gpu_rows(root) if _is_default(m.row)]
    head = ["one self-attention of", "method"]
    for direction in DIRECTIONS[:2]:
        head += [f"{direction}, ms", "x FA2", "x cuDNN"]
    body, used = [], []
    for model, shape in (("Wan2.1-1.3B, 480p", WAN_1_3B), ("Wan2.1-14B, 720p", WAN_14B_720P)):
        for name in ("flash_attention_2", "cudnn", "sla"):
            of_method = [m for m in found if is_at(m.row, shape) and m.row["method"] == name]
            by = {m.row["direction"]: m for m in of_method}
            chosen = [by[direction] for direction in DIRECTIONS[:2] if direction in by]
            if not chosen:
                continue
            used += chosen
            line = [f"{model}: {shape[1]} heads, {shape[2]:,} tokens", METHOD_NAMES[name]]
            for direction in DIRECTIONS[:2]:
                row = by[direction].row if direction in by else None
                line += [_ms(row), *_ratios(row).split(" / ")]
            body.append(line)
    return _gpu_table(head, body, used, "wan-1.3b", "wan-14b-720p")


def kernels_lengths(root: Path = RESULTS) -> str:
    """The operator and exact attention by length, default blocks, 12 heads of 128."""
    batch, heads, _, head_dim = WAN_1_3B
    found = [
        m
        for m in gpu_rows(root)
        if is_at(m.row, (batch, heads, m.row["tokens"], head_dim)) and _is_default(m.row)
    ]
    return _swept(found, "tokens", lambda row: f"{row['tokens']:,}", "lengths", "break-even")


def kernels_sparsity(root: Path = RESULTS) -> str:
    """The operator by sparsity at the Wan2.1-1.3B shape, default blocks."""
    found = [
        m
        for m in gpu_rows(root)
        if is_at(m.row, WAN_1_3B) and _is_default(m.row, sparsity=m.row["sparsity"])
    ]
    return _swept(found, "sparsity", lambda row: f"{row['sparsity']:.0%}", "sparsities")


def kernels_stages(root: Path = RESULTS) -> str:
    """Where the operator's time goes at the Wan2.1-1.3B shape: GPU kernels, default blocks."""
    head, body, used = ["kernel", "direction", "ms", "share"], [], []
    for direction in ("forward", "backward"):
        for m in gpu_rows(root):
            row = m.row
            if (row["method"], row["direction"]) != ("sla", direction) or not row.get("stages"):
                continue
            if is_at(row, WAN_1_3B) and _is_default(row):
                total = sum(row["stages"].values())
                used.append(m)
                body += [
                    [f"`{name}`", direction, f"{ms:.3f}", f"{ms / total:.0%}"]
                    for name, ms in row["stages"].items()
                ]
    return _gpu_table(head, body, used, "wan-1.3b")


def attention_methods(root: Path = RESULTS) -> str:
    """The attention methods on each GPU: exact work, what that predicts, and extras."""
    found = read_newest_rows("attention", ATTENTION_IDENTITY, root)
    empty = "(no record yet: `make bench ARGS=--record BENCH=attention` on a GPU)"
    return _a_part_each(_attention_methods, found, empty)


def _attention_methods(found: list[Measurement]) -> str:
    rows = [m for m in reversed(found) if m.row["dtype"] == "bfloat16"]
    head = ["method", "blocks", "exact scores"]
    for direction in DIRECTIONS[:2]:
        head += [f"{direction}: all, ms", "sparse branch", "predicted", "ratio", "extras"]
    labels = dict.fromkeys(m.row["method"] for m in rows)
    body = []
    for label in labels:
        by = {m.row["direction"]: m.row for m in rows if m.row["method"] == label}
        row = next(iter(by.values()))
        blocks = f"{row['block_q']}x{row['block_kv']}"
        fraction = row["exact_fraction"]
        line = [label, blocks, "" if fraction is None else f"{fraction:.1%}"]
        for direction in DIRECTIONS[:2]:
            one: Row = by.get(direction, {})
            line.append(_ms(one or None))
            for key in ("sparse_ms", "predicted_ms", "ratio", "extras_ms"):
                line.append(f"{one[key]:.2f}" if one.get(key) is not None else "")
        body.append(line)
    if not body:
        return ""
    sources = {m.source.path: m.source for m in rows}
    return f"{_markdown(head, body)}\n\n{_origin(list(sources.values()))}"


def end_to_end(root: Path = RESULTS) -> str:
    """Wan2.1 with random weights on each GPU: a denoising step, a training step, a generation."""
    return _a_part_each(_end_to_end, end_to_end_by_device(root), _NO_END_TO_END)


def _a_part_each(
    write: Callable[[list[Measurement]], str],
    by_device: Mapping[str, list[Measurement]],
    empty: str,
) -> str:
    """Devices one below the other, each named, as their times do not compare."""
    parts = {device: write(rows) for device, rows in by_device.items()}
    parts = {device: part for device, part in parts.items() if part}
    if not parts:
        return empty
    return "\n\n".join(f"{device}:\n\n{part}" for device, part in parts.items())


def _end_to_end(rows: list[Measurement]) -> str:
    by = {tuple(m.row[name] for name in ("size", "method", "mode", "what")): m for m in rows}
    head = ["model", "method", "blocks", "mode"]
    for what in ("denoising step, ms", "training step, ms", "generation, s"):
        head += [what, "x FA2 / x cuDNN"]
    head += ["attention's share", "training: peak, GiB", "estimated, GiB"]
    body, used = [], []
    lines = dict.fromkeys(key[:3] for key in by if key[3] != "decode")
    methods, modes = list(END_TO_END_NAMES), ("eager", "compiled", "graph")
    order = {
        key: (key[0], methods.index(key[1]) if key[1] in methods else len(methods), key[1], i)
        for i, mode in enumerate(modes)
        for key in lines
        if key[2] == mode
    }
    for size, method, mode in sorted(order, key=order.__getitem__):
        of_line = {what: by.get((size, method, mode, what)) for what in END_TO_END}
        blocks = next((m.row["block_q"], m.row["block_kv"]) for m in of_line.values() if m)
        name = END_TO_END_NAMES.get(method, method)
        line = [size, name, f"{blocks[0]}x{blocks[1]}" if blocks[0] else "", mode]
        for m in of_line.values():
            line += [_end_to_end_time(m), _times_faster(m, by)]
        whole = of_line["generation"] or of_line["step"]
        share = whole.row["attention_share"] if whole else None
        line.append("" if share is None else f"{share:.0%}")
        train = of_line["train"].row if of_line["train"] else {}
        for name in ("peak_bytes", "estimated_bytes"):
            size_of = train.get(name)
            line.append("" if size_of is None else f"{size_of / 2**30:.1f}")
        body.append(line)
        used += [m for m in of_line.values() if m is not None]
    decoders = [m for m in rows if m.row["what"] == "decode" and m.row["ms_median"]]
    if not body and not decoders:
        return ""
    parts = [_markdown(head, body)] if body else []
    parts += [
        f"The autoencoder's decoder at {m.row['size']}'s size: {m.row['ms_median'] / 1e3:.2f} s."
        for m in decoders
    ]
    sources = {m.source.path: m.source for m in (*used, *decoders)}
    return "\n\n".join([*parts, _origin(list(sources.values()))])


def end_to_end_summary(root: Path = RESULTS) -> str:
    """A line a method of `end_to_end`: each task compiled, or eager where that is all there is."""
    return _a_part_each(_end_to_end_summary, end_to_end_by_device(root), _NO_END_TO_END)


def _end_to_end_summary(rows: list[Measurement]) -> str:
    by = {tuple(m.row[name] for name in ("size", "method", "mode", "what")): m for m in rows}
    head = ["model", "method"]
    for what in ("denoising step, ms", "training step, ms", "generation, s"):
        head += [what, "x FA2 / x cuDNN"]
    body, used = [], []
    for size in sorted({key[0] for key in by}):
        for method, name in END_TO_END_NAMES.items():
            line = [f"Wan2.1-{size.upper()}", name]
            for what in END_TO_END:
                keys = [(size, method, mode, what) for mode in ("compiled", "eager")]
                found = next((by[key] for key in keys if key in by), None)
                if found and found.row["block_q"]:
                    line[1] = f"{name}, blocks of {found.row['block_q']}x{found.row['block_kv']}"
                note = " (eager)" if found and found.row["mode"] == "eager" else ""
                line += [_end_to_end_time(found) + note, _times_faster(found, by)]
                used += [] if found is None else [found]
            if any(line[2:]):
                body.append(line)
    if not body:
        return ""
    sources = {m.source.path: m.source for m in used}
    return f"{_markdown(head, body)}\n\n{_origin(list(sources.values()))}"


def paper_speed(root: Path = RESULTS) -> str:
    """What the paper publishes of speed; nothing of ours."""
    exact, sla = PAPER_TFLOPS["FlashAttention2"], PAPER_TFLOPS["SLA-95%"]
    full, fast = PAPER_GENERATION["full attention"], PAPER_GENERATION["SLA"]
    times = [
        *((f"kernel, {d}: x FA2", a / b) for d, a, b in zip(DIRECTIONS, sla, exact, strict=False)),
        ("attention of a generation: x full attention", full[0] / fast[0]),
        ("whole generation: x full attention", sum(full) / sum(fast)),
    ]
    body = [[name, f"{value:.1f}"] for name, value in times]
    seconds = f"{sum(full)} s against {sum(fast)} s, attention {full[0]} s against {fast[0]} s"
    note = (
        f"<sub>{PAPER_DEVICE}, Wan2.1-1.3B at 480p, SLA at 95 % sparsity; the generation takes "
        f"{seconds}. Not measured by us; `make figures` draws both.</sub>"
    )
    return f"{_markdown(['the paper', 'times as fast'], body)}\n\n{note}"


def claims_summary(root: Path = RESULTS) -> str:
    """The paper's claims that we have judged, and how many of them are left."""
    records = read_records(root)
    verdicts = [(claim, claim.judge(records, root)) for claim in claims.CLAIMS]
    left = dict.fromkeys((claims.MISSING, claims.BEYOND), 0)
    body = []
    for claim, verdict in verdicts:
        if verdict.status in left:
            left[verdict.status] += 1
        else:
            body.append([claim.text, str(verdict)])
    counts = ", ".join(f"{count} {status}" for status, count in left.items() if count)
    note = f"Of {len(verdicts)} claims: {len(body)} judged"
    note += f", {counts}." if counts else "."
    if left[claims.MISSING]:
        note += " What is missing is run by `make study`."
    return f"{_markdown(['claim', 'here'], body)}\n\n{note}" if body else note


def metrics_speed(root: Path = RESULTS) -> str:
    """Videos that the metrics score a second, each device's newest rows."""
    head = ["device", "metric", "networks' weights", "videos", "frames x height x width"]
    head += ["processes or threads", "videos/s", "videos/s a core", "GPU at work"]
    newest: dict[tuple[Any, ...], Measurement] = {}
    for device, found in read_newest_rows("eval", METRICS_IDENTITY, root).items():
        for m in found:
            if m.row.get("what") == "throughput":  # scores of videos are in the same folder
                same = (device, *(m.row[n] for n in METRICS_IDENTITY[:-1]), _weights_of(m.row))
                newest.setdefault(same, m)
    body, used = [], []
    for (device, *_), m in reversed(newest.items()):  # a file's in the order of their measurement
        row = m.row
        size = f"{row['frames']} x {row['height']} x {row['width']}"
        line = [device, row["metric"], _weights_of(row), str(row["videos"]), size]
        line.append(str(max(1, row["workers"])))
        rates = (row["videos_per_s"], row["videos_per_s_core"])
        line += ["" if rate is None else f"{rate:.1f}" for rate in rates]
        busy = row.get("gpu_busy")  # older rows do not say
        body.append([*line, "" if busy is None else f"{busy:.0%}"])
        used.append(m)
    if not body:
        return "(no record yet: `make bench BENCH=eval ARGS=--record`)"
    sources = {m.source.path: m.source for m in used}
    return f"{_markdown(head, body)}\n\n{_origin(list(sources.values()))}"


def _weights_of(row: Row) -> str:
    """Of the networks that a row was measured with; older rows do not say."""
    return str(row.get("weights") or ("published" if row["needs_weights"] else "none"))


def data_speed(root: Path = RESULTS) -> str:
    """Samples that the data pipeline gives a second, each device's newest file."""
    head = ["device", "reader", "workers", "samples/s", "decoded frames/s", "first batch, s"]
    head += ["going on, s"]
    body, used = [], []
    for results in read_newest_per_device("data", root):
        rows = [row for row in results.rows if row["what"] == "pipeline"]
        used += [results] if rows else []
        body += [
            [
                *(results.provenance["device"], row["reader"], str(row["workers"])),
                *(f"{row['samples_per_s']:.0f}", f"{row['decoded_per_s']:.0f}"),
                *(f"{row['first_batch_s']:.2f}", f"{row['resume_s']:.2f}"),
            ]
            for row in rows
        ]
    if not body:
        return "(no record yet: `make bench BENCH=data ARGS=--record`)"
    return f"{_markdown(head, body)}\n\n{_origin(used)}"


END_TO_END = ("step", "train", "generation")
_NO_END_TO_END = "(no record yet: `make bench-e2e ARGS=--record` on a GPU)"
END_TO_END_NAMES = {
    "flash_attention_2": "FlashAttention-2",
    "cudnn": "cuDNN attention",
    "sparse_only": "sparse branch only",
    "sla": "SLA",
    "sla-64x64": "SLA",
    "sla2": "SLA2",
    "sparse_pooled": "sparse pooled",
}
END_TO_END_IDENTITY = ("method", "mode", "what", "size", "device", "dtype")
METRICS_IDENTITY = (
    *("what", "metric", "device", "workers", "videos", "frames", "height", "width"),
    "weights",
)
DIRECTIONS = ("forward", "backward", "forward_backward")
ATTENTION_IDENTITY = ("method", "direction", "tokens", "heads", "head_dim", "dtype")
METHOD_NAMES = {
    "sdpa": "SDPA",
    "flash_attention_2": "FlashAttention-2",
    "cudnn": "cuDNN attention",
    "flex_block_sparse": "FlexAttention, sparse branch only",
    "sparse_only": "ours, sparse branch only",
    "sparse_only_fp8": "ours, sparse branch only, FP8",
    "sla_given_map": "SLA, routing not timed",
    "sla": "SLA, whole operator",
}
# What tells one kernel measurement from another.
KERNEL_IDENTITY = (
    *("method", "direction", "device", "batch", "heads", "tokens", "head_dim", "dtype"),
    *("sparsity", "negligible", "block_q", "block_kv", "feature_map", "map"),
)


def gpu_rows(root: Path = RESULTS) -> list[Measurement]:
    """Newest bfloat16 rows of the GPU that was measured last."""
    for rows in read_newest_rows("kernels", KERNEL_IDENTITY, root).values():
        found = [m for m in rows if m.row.get("device") == "cuda" and m.row["dtype"] == "bfloat16"]
        if found:
            return found
    return []


def end_to_end_by_device(root: Path = RESULTS) -> dict[str, list[Measurement]]:
    """GPU to its newest bfloat16 rows of the end-to-end benchmark; the most measured GPU first."""
    found = {
        device: [m for m in rows if m.row["device"] == "cuda" and m.row["dtype"] == "bfloat16"]
        for device, rows in read_newest_rows("e2e", END_TO_END_IDENTITY, root).items()
    }
    order = sorted(found, key=lambda device: len(found[device]), reverse=True)
    return {device: found[device] for device in order if found[device]}


def is_at(row: Row, shape: tuple[int, int, int, int]) -> bool:
    """Whether a row was measured at (batch, heads, tokens, head_dim)."""
    return (row["batch"], row["heads"], row["tokens"], row["head_dim"]) == shape


def is_standard(row: Row, sparsity: float = SPARSITY) -> bool:
    """Whether it is an exact method's row, or one at the paper's fractions on the uniform map."""
    given = (row["sparsity"], row["negligible"], row["map"])
    return given in ((None, None, None), (sparsity, NEGLIGIBLE, "uniform"))


def _is_default(row: Row, sparsity: float = SPARSITY) -> bool:
    blocks = (row["block_q"], row["block_kv"])
    return is_standard(row, sparsity) and blocks in ((None, None), GPU_BLOCKS)


def _swept(rows: list[Measurement], head: str, label: Callable[[Row], str], *suites: str) -> str:
    """A line a value of one field: SLA's times and how many times exact attention takes."""
    heads = [head]
    for direction in ("forward", "backward"):
        heads += [f"{direction}: SLA, ms", "x FA2", "x cuDNN"]
    # Launches from Python cost nothing visible at the long end.
    graphs = {
        (m.row["tokens"], m.row["method"]): m.row["ms_graph"]
        for m in rows
        if head == "tokens" and m.row.get("ms_graph")
    }
    if graphs:
        heads += ["forward in a CUDA graph: SLA, ms", "x cuDNN"]
    ours = [m for m in rows if m.row["method"] == "sla" and m.row["direction"] != DIRECTIONS[2]]
    lines: dict[float, dict[str, Row]] = {}
    for m in ours:
        lines.setdefault(m.row[head], {})[m.row["direction"]] = m.row
    body = []
    for value, by in sorted(lines.items()):
        line = [label(next(iter(by.values())))]
        for direction in ("forward", "backward"):
            row = by.get(direction)
            line += [_ms(row), *_ratios(row).split(" / ")]
        if graphs:
            sla, cudnn = graphs.get((value, "sla")), graphs.get((value, "cudnn"))
            line.append(f"{sla:.3f}" if sla else "")
            line.append(f"{cudnn / sla:.1f}" if sla and cudnn else "")
        body.append(line)
    return _gpu_table(heads, body, ours, *suites)


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    if row["ms_median"] is None:
        return "out of memory" if row["error"] == "out of memory" else "failed"
    return f"{row['ms_median']:.2f}"


def _end_to_end_time(m: Measurement | None) -> str:
    if m is None or m.row["ms_median"] is None:
        return "" if m is None else "failed"
    row = m.row
    if row["what"] == "generation":
        return f"{row['ms_median'] / 1e3:.1f} ({row['steps']} steps)"
    return f"{row['ms_median']:.0f}{' (blocks recomputed)' if row['checkpointing'] else ''}"


def _times_faster(m: Measurement | None, by: dict[tuple[Any, ...], Measurement]) -> str:
    """Times over the two exact methods' at the same task, FlashAttention-2 first; with a ~ where
    they were measured on another day or commit, and so on another machine of that kind."""
    if m is None:
        return ""
    row, ratios = m.row, []
    for name in ("flash_attention_2", "cudnn"):
        other = by.get((row["size"], name, row["mode"], row["what"]))
        same = other and all(other.row[k] == row[k] for k in ("steps", "checkpointing"))
        exact = other.row["ms_median"] if other and same else None
        if not exact or not row["ms_median"]:
            ratios.append("-")
            continue
        assert other is not None
        apart = "" if _session(other) == _session(m) else "~"
        ratios.append(f"{apart}{exact / row['ms_median']:.2f}")
    return " / ".join(ratios)


def _session(m: Measurement) -> tuple[str, str]:
    """Commit and day of a measurement."""
    provenance = m.source.provenance
    return str(provenance["commit"]), str(provenance["date"])[:10]


def _ratios(row: Row | None) -> str:
    found = [(row or {}).get(f"ratio_{name}") for name in ("flash_attention_2", "cudnn")]
    return " / ".join("-" if ratio is None else f"{ratio:.1f}" for ratio in found)


def _mib(row: Row | None) -> str:
    peak = (row or {}).get("peak_extra_bytes")
    return "" if peak is None else f"{peak / 2**20:,.0f}"


def _gpu_table(
    head: list[str], body: list[list[str]], used: list[Measurement], *suites: str
) -> str:
    if not body:
        commands = " and ".join(f'`make bench ARGS="--suite {s} --record"`' for s in suites)
        return f"(no record yet: {commands} on a GPU)"
    sources = {m.source.path: m.source for m in used}
    return f"{_markdown(head, body)}\n\n{_origin(list(sources.values()))}"


TABLES: dict[str, Callable[[Path], str]] = {
    "attention_methods": attention_methods,
    "claims_summary": claims_summary,
    "data_speed": data_speed,
    "end_to_end": end_to_end,
    "end_to_end_summary": end_to_end_summary,
    "finetune": finetune,
    "finetune_wan": finetune_wan,
    "kernels_cpu": kernels_cpu,
    "kernels_gpu": kernels_gpu,
    "kernels_lengths": kernels_lengths,
    "kernels_sparsity": kernels_sparsity,
    "kernels_stages": kernels_stages,
    "kernels_summary": kernels_summary,
    "metrics_speed": metrics_speed,
    "multi_gpu": multi_gpu,
    "paper_speed": paper_speed,
    "study_attention": study_attention.attention,
    "study_stages": study_attention.stages,
    **study.TABLES,
}
