"""The tables of README.md, between markers, from the newest files under results/.

<!-- table:NAME -->
(generated)
<!-- /table -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sla.results import RESULTS, Results, read_newest_per_device

_BLOCK = re.compile(r"(<!-- table:(?P<name>\S*) -->\n).*?(<!-- /table -->)", re.DOTALL)
_MARKER = re.compile(r"<!--\s*(/?)table\b.*?-->")


class TableError(ValueError):
    """A README whose markers cannot be filled."""


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
    """What `make finetune` measured, a column a device."""
    columns = read_newest_per_device("finetune", root)
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
    head = ["measured by us", *(c.provenance["device"] for c in columns)]
    body = [[label, *(show(c.rows[0]) for c in columns)] for label, show in rows]
    return f"{_markdown(head, body)}\n\n{_origin(columns)}"


def kernels_cpu(root: Path = RESULTS) -> str:
    """The operator against exact attention on the CPU."""
    found = [c for c in read_newest_per_device("kernels", root) if c.provenance["cuda"] is None]
    if not found:
        return "(no record yet: `make bench ARGS=--record`)"
    rows = found[0].rows
    times = {(r["method"], r["direction"], r["tokens"]): r["ms_median"] for r in rows}
    head = ["tokens"]
    for what in ("forward", "forward + backward"):
        head += [f"{what}: SDPA, ms", "SLA, ms", "ratio"]
    body = []
    for tokens in sorted({r["tokens"] for r in rows}):
        line = [f"{tokens:,}"]
        for direction in ("forward", "forward_backward"):
            exact, sla = (times[method, direction, tokens] for method in ("sdpa", "sla"))
            line += [f"{exact:.1f}", f"{sla:.1f}", f"{exact / sla:.1f}x"]
        body.append(line)
    return f"{_markdown(head, body)}\n\n{_origin(found[:1])}"


TABLES: dict[str, Callable[[Path], str]] = {"finetune": finetune, "kernels_cpu": kernels_cpu}


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin(columns: list[Results]) -> str:
    lines = []
    for column in columns:
        origin = column.provenance
        dirty = " with local changes" if origin["dirty"] else ""
        lines.append(
            f"{origin['device']}, torch {origin['torch']}, {origin['date'][:10]}, commit "
            f"{origin['commit'][:8]}{dirty}, `{origin['command']}`"
        )
    return "<sub>" + "; ".join(lines) + "</sub>"
