"""The tables of Wan2.1 on several GPUs, from `results/multigpu/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sla.figures.markdown import markdown, origin
from sla.results import RESULTS, Measurement, read_newest_rows

Row = dict[str, Any]
IDENTITY = (
    *("what", "strategy", "ranks", "size", "device", "batch", "launcher"),
    *("source", "task", "mode", "killed_rank"),
)
NAMES = {
    "single": "one GPU",
    "ddp": "`ddp`",
    "fsdp2": "`fsdp2`",
    "sequence": "`ddp`, ranks share each sample",
}
TASKS = {"step": "denoising step", "generation": "short generation"}
NOTHING = (
    "(not measured yet: `make bench BENCH=multigpu ARGS=--record` where there are several GPUs)"
)


def multi_gpu(root: Path = RESULTS) -> str:
    """Training by strategy, one video's inference, going on from checkpoints, killed ranks."""
    rows: list[Measurement] = []
    for found in read_newest_rows("multigpu", IDENTITY, root).values():
        rows = rows or [m for m in found if m.row["device"] == "cuda" and m.row["size"] == "1.3b"]
    rows.sort(key=lambda m: m.source.provenance["date"])
    by: dict[str, list[Row]] = {}
    for m in rows:
        by.setdefault(m.row["what"], []).append(m.row)
    parts = [
        markdown(head, [cells(row) for row in sorted(by[what], key=_place)])
        for what, (head, cells) in _TABLES.items()
        if what in by
    ]
    if not parts:
        return NOTHING
    sources = {m.source.path: m.source for m in rows}
    return "\n\n".join([*parts, origin(list(sources.values()))])


def _place(row: Row) -> tuple[int, int]:
    return row["ranks"], list(NAMES).index(row["strategy"])


def _train(row: Row) -> list[str]:
    if row.get("ms_median") is None:
        return [NAMES[row["strategy"]], str(row["ranks"]), "failed", *[""] * 5]
    return [
        NAMES[row["strategy"]],
        str(row["ranks"]),
        f"{row['ms_median']:.0f}",
        f"{row['samples_per_s']:.2f}",
        f"{row['tokens_per_s']:,.0f}",
        _scaling(row),
        " / ".join(dict.fromkeys(f"{peak / 2**30:.1f}" for peak in row["peak_bytes"])),
        _difference(row),
    ]


def _inference(row: Row) -> list[str]:
    if row.get("ms_median") is None:
        return ["failed", str(row["ranks"]), *[""] * 5]
    return [
        TASKS[row["task"]],
        str(row["ranks"]),
        row["mode"],
        f"{row['ms_median']:.0f}",
        f"{row['ms_alone']:.0f}",
        _scaling(row),
        _difference(row),
    ]


def _resume(row: Row) -> list[str]:
    if row.get("from_step") is None:
        return [f"{row.get('source', '')}", str(row["ranks"]), NAMES[row["strategy"]], "failed", ""]
    strategy, _, ranks = row["source"].rpartition("-")
    of = NAMES[strategy] + (f" on {ranks}" if ranks != "1" else "")
    differs = f"{_difference(row)} in {row['compared_steps']} steps"
    return [of, str(row["ranks"]), NAMES[row["strategy"]], f"{row['load_s']:.0f}", differs]


def _kill(row: Row) -> list[str]:
    seconds = row.get("seconds_to_end")
    return [
        f"rank {row['killed_rank']} of {row['ranks']}, {NAMES[row['strategy']]}",
        "not all ended" if seconds is None else f"{seconds:.1f}",
        str(row["exit_status"]),
    ]


def _scaling(row: Row) -> str:
    if not row.get("speedup"):
        return ""
    return f"{row['speedup']:.2f} ({row['efficiency']:.0%})"


def _difference(row: Row) -> str:
    value = row.get("difference_max")
    return "" if value is None else f"{value:.1e}"


_TABLES = {
    "train": (
        [
            *("training", "GPUs", "step, ms", "samples/s", "tokens/s", "x one GPU (efficiency)"),
            *("peak of a rank, GiB", "losses: largest relative difference to one GPU"),
        ],
        _train,
    ),
    "inference": (
        [
            *("one video shared by all", "GPUs", "mode", "ms", "one GPU, ms"),
            *("x one GPU (efficiency)", "relative difference of the output"),
        ],
        _inference,
    ),
    "resume": (
        ["checkpoint of", "GPUs that go on", "by", "loading, s", "losses: largest difference"],
        _resume,
    ),
    "kill": (["killed (`kill -9`)", "all processes ended after, s", "exit status"], _kill),
}

__all__ = ["multi_gpu"]
