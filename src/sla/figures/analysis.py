"""What the figures of attention share: the newest record, captures, files and captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sla.analysis.capture_files import Capture
from sla.analysis.capture_qkv import CaptureError
from sla.figures.captions import origin_of
from sla.figures.figure6a import FigureError
from sla.results import Results, read_all

Row = dict[str, Any]
# Classes of weights and of blocks, in every figure.
COLOURS = {"critical": "crimson", "marginal": "cornflowerblue", "negligible": "lightgray"}
_HOW = "make capture, then make analyse ARGS=--record"


def newest(root: Path) -> Results:
    """The newest record of a capture's measures, but for those of a stage of training.

    Raises:
        FigureError: there is none.
    """
    found = [r for r in read_all("analysis", root) if rows_of(r, "capture", stage=None)]
    if not found:
        raise FigureError(f"{root}/analysis has no record of attention; make one: {_HOW}")
    return found[0]


def rows_of(results: Results, measure: str, **values: Any) -> list[Row]:
    """Rows of a measure whose fields have these values; null is a mean over all."""
    return [
        row
        for row in results.rows
        if row.get("measure") == measure
        and all(row.get(name) == value for name, value in values.items())
    ]


def one(results: Results, measure: str, **values: Any) -> Row:
    """The only such row.

    Raises:
        FigureError: there is none.
    """
    rows = rows_of(results, measure, **values)
    if not rows:
        raise FigureError(f"{results.path} has no row {measure} {values}; record it anew: {_HOW}")
    return rows[0]


def open_capture(folder: Path) -> Capture:
    """The capture whose maps are drawn.

    Raises:
        FigureError: it is not there, or not whole.
    """
    try:
        return Capture(folder)
    except (FileNotFoundError, CaptureError) as error:
        raise FigureError(
            f"{error} (needs a few forwards of the model; another folder: --capture)"
        ) from error


def describe(capture: Mapping[str, Any]) -> str:
    """A `capture` row in words."""
    grid = " x ".join(map(str, capture["grid"]))
    kind = {"clip": "held-out clips with noise", "prompt": "videos being sampled"}
    timesteps = ", ".join(f"{t:g}" for t in capture["timesteps"])
    return (
        f"Model: {capture['model']} of {capture['weights']}, {capture['attention']} attention, "
        f"{capture['tokens']:,} tokens ({grid}), head_dim {capture['head_dim']}; "
        f"{capture['samples']} {kind.get(capture['kind'], capture['kind'])} at timesteps "
        f"{timesteps} (0 to 1000); {len(capture['layers'])} layers of {len(capture['heads'])} "
        f"heads; {capture['rows']:,} query rows of each map, evenly spaced, against all keys."
    )


def origin(results: Results) -> str:
    """Which file and commands the numbers are from."""
    command = one(results, "capture")["capture_command"]
    return f"{origin_of(results)}, from the capture of `{command}`"


def capture_origin(capture: Capture, file: str) -> str:
    """Which captured file and command a map is from."""
    of = capture.provenance
    dirty = " with changes" if of.get("dirty") else ""
    return (
        f"Data: {file} of the capture (weights {capture.plan.weights}, SHA-256 "
        f"{capture.plan.weights_sha256[:12]}; {of.get('device')}, torch {of.get('torch')}, commit "
        f"{str(of.get('commit'))[:8]}{dirty}), `{of.get('command')}`"
    )


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, out: Path, name: str, caption: str) -> list[Path]:
    """Write name.png, name.pdf and the caption name.txt."""
    out.mkdir(parents=True, exist_ok=True)
    png, pdf, text = (out / f"{name}.{ending}" for ending in ("png", "pdf", "txt"))
    figure.savefig(png, dpi=160)
    figure.savefig(pdf, metadata={"CreationDate": None})
    text.write_text(caption + "\n", encoding="utf-8")
    return [png, pdf, text]
