"""What the figures of the study share: how an arm is marked, and which files are behind it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sla.figures.captions import origin_of
from sla.figures.figure6a import FigureError
from sla.study.records import Records, Run, read_records

# Colour and marker of each attention method.
_MARKS = {
    "full": ("black", "s"),
    "sla": ("tab:red", "o"),
    "sla2": ("tab:pink", "*"),
    "sparse_only": ("tab:blue", "v"),
    "linear_only": ("tab:green", "^"),
    "linear_plus_sparse": ("tab:olive", "P"),
    "sparse_pooled": ("tab:cyan", "<"),
    "sparge": ("tab:orange", "D"),
    "vsa": ("tab:purple", "p"),
    "vmoba": ("tab:brown", "h"),
}
# Arms that stand first, in this order.
FIRST = ("pretrained", "full", "sla")
_OTHER = ("tab:gray", "X")
LINEAR = 1.0  # percent


def read(root: Path) -> Records:
    """The study's records.

    Raises:
        FigureError: no arm is finished.
    """
    records = read_records(root)
    if not records.runs:
        raise FigureError(f"{root}/study has no finished arm; run some: make study")
    return records


def method(run: Run) -> str:
    """The attention method of a run."""
    return str(run.end.get("method", run.arm))


def mark(run: Run) -> tuple[str, str]:
    """(colour, marker) of its method."""
    return _MARKS.get(method(run), _OTHER)


def ordered(records: Records, study: str) -> list[str]:
    """Arms that have a finished run: those of `FIRST`, then in the order of the files."""
    found = records.arms(study)
    return list(dict.fromkeys([*(arm for arm in FIRST if arm in found), *found]))


def groups(records: Records, study: str) -> dict[str, list[str]]:
    """{group: its arms}, of finished runs, in the order of `ordered`."""
    found: dict[str, list[str]] = {}
    for arm in ordered(records, study):
        found.setdefault(records.of(study, arm)[0].group, []).append(arm)
    return found


def percent_axis(axes: Any) -> None:
    """Differences in percent: linear up to `LINEAR` on both sides of 0, logarithmic beyond."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    axes.axhline(0, color="lightgray", linewidth=0.8, zorder=0)
    axes.margins(y=0.08)  # of this scale, not of that before
    locator = SymmetricalLogLocator(base=10, linthresh=LINEAR, subs=[1, 2, 5])
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))


def origin(runs: Iterable[Run]) -> str:
    """Files and commands that runs are from."""
    sources = {run.source.path: run.source for run in runs}
    return "\n".join(map(origin_of, sources.values()))
