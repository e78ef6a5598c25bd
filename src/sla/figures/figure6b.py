"""Figure 6b: time of a whole generation with Wan2.1-1.3B, attention's part and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla.figures.captions import origin_of
from sla.figures.figure6a import FigureError
from sla.figures.paper import PAPER_DEVICE, PAPER_GENERATION
from sla.figures.tables import end_to_end_by_device
from sla.results import RESULTS, Measurement

# Our methods in the order of their bars, by the name of the bar.
_NAMES = {
    "flash_attention_2": "FlashAttention2",
    "cudnn": "cuDNN",
    "sparse_only": "sparse only",
    "sla": "SLA",
    "sla-64x64": "SLA\n64x64",
    "sla2": "SLA2",
    "sparse_pooled": "sparse\npooled",
}
_MODES = {"compiled": "compiled", "graph": "compiled,\nCUDA graph"}
_COLOURS = {"attention": "tab:red", "the rest": "tab:gray"}


@dataclass(frozen=True)
class Bar:
    """One generation.

    Attributes:
        attention, rest: seconds.
        measurements: the row of the whole, and that of attention's part.
    """

    attention: float
    rest: float
    measurements: tuple[Measurement, ...]


def bars(root: Path = RESULTS) -> dict[str, Bar]:
    """Name of a bar to our measurement of a generation with Wan2.1-1.3B, on the most measured GPU.

    All of as many steps, the most that were measured. Attention's part is what a single step of the
    uncompiled model spends in it, whose kernels are the same; without it there is no bar.
    """
    drawn = map(_bars, end_to_end_by_device(root).values())
    return next((bars for bars in drawn if bars), {})


def _bars(measured: list[Measurement]) -> dict[str, Bar]:
    rows = [
        m
        for m in measured
        if m.row["size"] == "1.3b" and m.row["method"] in _NAMES and m.row["ms_median"] is not None
    ]
    found = {tuple(m.row[name] for name in ("what", "method", "mode")): m for m in rows}
    most = max((m.row["steps"] for m in rows if m.row["what"] == "generation"), default=0)
    drawn: dict[str, Bar] = {}
    for method, name in _NAMES.items():
        for mode in ("eager", *_MODES):
            whole = found.get(("generation", method, mode))
            eager = found.get(("step", method, "eager"))
            if whole is None or whole.row["steps"] != most:
                continue
            if eager is None or eager.row["ms_attention"] is None:
                continue
            # Two forwards a step: with the text and without.
            attention = 2 * most * eager.row["ms_attention"] / 1e3
            label = name if mode == "eager" else f"{name}\n{_MODES[mode]}"
            seconds = whole.row["ms_median"] / 1e3
            drawn[label] = Bar(attention, seconds - attention, (whole, eager))
    return drawn


def caption(measured: dict[str, Bar]) -> str:
    """What the figure shows, and from which files and commands."""
    rows = [m for bar in measured.values() for m in bar.measurements]
    sources = {m.source.path: m.source for m in rows}
    lines = [
        "Seconds of a generation with Wan2.1-1.3B (480p, 81 frames; random weights, on which time "
        f"does not depend): {rows[0].row['steps']} steps of UniPC with guidance, from noise to "
        "latents, without text encoder and autoencoder. Filled bars: measured by us; attention is "
        "the time in self-attention's methods in one step of the uncompiled model, by events, once "
        "for each of the generation's forwards. Hollow bars: "
        f"numbers published in the paper, measured on an {PAPER_DEVICE}, not comparable in height "
        "across devices (what its sampler is and what its rest holds it does not say); SLA2's are "
        "of its own paper."
    ]
    lines += map(origin_of, sources.values())
    return "\n".join(lines)


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write figure6b.png, figure6b.pdf and their caption figure6b.txt to a folder.

    Raises:
        FigureError: no generation with Wan2.1-1.3B was measured on a GPU.
    """
    measured = bars(root)
    if not measured:
        raise FigureError(
            f"{root}/e2e has no generation with Wan2.1-1.3B measured on a GPU with attention's "
            'part; make one on a GPU: make bench-e2e ARGS="--what generation --record"'
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8, len(measured) + 5), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot(1, 1, 1)
    device = next(iter(measured.values())).measurements[0].source.provenance["device"]
    places = list(range(len(measured)))
    attention = [bar.attention for bar in measured.values()]
    rest = [bar.rest for bar in measured.values()]
    _stack(axes, places, attention, rest, f"measured, {device}")
    # The paper's stand apart: another device.
    apart = [len(measured) + 0.5 + i for i in range(len(PAPER_GENERATION))]
    published = list(PAPER_GENERATION.values())
    _stack(
        axes,
        apart,
        [both[0] for both in published],
        [both[1] for both in published],
        f"paper, {PAPER_DEVICE}",
        hollow=True,
    )
    names = [*measured, *(f"paper:\n{name}" for name in PAPER_GENERATION)]
    axes.set_xticks([*places, *apart], names, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("seconds of a generation")
    axes.margins(y=0.25)  # room for the legend
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    out.mkdir(parents=True, exist_ok=True)
    png, pdf, text = (out / f"figure6b.{ending}" for ending in ("png", "pdf", "txt"))
    figure.savefig(png, dpi=160)
    figure.savefig(pdf, metadata={"CreationDate": None})
    text.write_text(caption(measured) + "\n", encoding="utf-8")
    return [png, pdf, text]


def _stack(
    axes: Any,
    places: list[Any],
    attention: list[float],
    rest: list[float],
    label: str,
    *,
    hollow: bool = False,
) -> None:
    """Attention below, the rest on it, and their sum above."""
    bottom = [0.0] * len(places)
    for part, heights in (("attention", attention), ("the rest", rest)):
        style: dict[str, Any] = {"color": _COLOURS[part]}
        if hollow:
            style = {"facecolor": "none", "edgecolor": _COLOURS[part], "linestyle": "--"}
        drawn = axes.bar(places, heights, bottom=bottom, label=f"{part}: {label}", **style)
        axes.bar_label(
            drawn,
            [f"{height:.0f}" for height in heights],
            label_type="center",
            fontsize=8,
        )
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, height in zip(places, bottom, strict=True):
        axes.annotate(f"{height:.0f} s", (place, height), ha="center", va="bottom", fontsize=8)
