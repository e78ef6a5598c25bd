"""Figure 6a: kernel speed of sparse attention, forward and backward, ours beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sla.figures.captions import origin_of
from sla.figures.paper import (
    PAPER_BLOCKS,
    PAPER_DEVICE,
    PAPER_TFLOPS,
    WAN_1_3B,
)
from sla.figures.tables import gpu_rows, is_at, is_standard
from sla.results import RESULTS, Measurement

# Our methods by the name of the bar; names that the paper has too get its marker.
_NAMES = {
    "flash_attention_2": "FlashAttention2",
    "cudnn": "cuDNN",
    "flex_block_sparse": "Flex sparse-95%",
    "sparse_only": "ours sparse-95%",
    "sla": "SLA-95%",
}
DIRECTIONS = ("forward", "backward")


class FigureError(RuntimeError):
    """There is nothing to draw."""


def bars(root: Path = RESULTS) -> dict[str, dict[str, Measurement]]:
    """Name of a bar to direction to our measurement, at Wan2.1-1.3B's shape and 95 % sparsity.

    SLA at the paper's block sizes has the paper's name; at others the sizes are added.
    """
    found: dict[str, dict[str, Measurement]] = {}
    for m in gpu_rows(root):
        row = m.row
        if row["direction"] not in DIRECTIONS or row["method"] not in _NAMES:
            continue
        if not is_at(row, WAN_1_3B) or not is_standard(row) or row["tflops_full"] is None:
            continue
        name = _NAMES[row["method"]]
        blocks = (row["block_q"], row["block_kv"])
        if blocks not in ((None, None), PAPER_BLOCKS):
            name += f"\n{blocks[0]}x{blocks[1]}"
        found.setdefault(name, {})[row["direction"]] = m
    return found


def caption(measured: dict[str, dict[str, Measurement]]) -> str:
    """What the figure shows, and from which files and commands."""
    sources = {m.source.path: m.source for by in measured.values() for m in by.values()}
    lines = [
        "FLOPs of full attention over time, at the self-attention of Wan2.1-1.3B (12 heads of 128, "
        "32,760 tokens). Bars: measured by us; SLA is the whole operator, routing and projection "
        f"included, at blocks of {PAPER_BLOCKS[0]}x{PAPER_BLOCKS[1]} unless another size is named; "
        "'sparse' (ours, FlexAttention's) is exact attention on the critical blocks alone. "
        "Hollow markers: numbers published in the "
        f"paper, measured on an {PAPER_DEVICE}, not comparable in height across devices."
    ]
    lines += map(origin_of, sources.values())
    return "\n".join(lines)


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write figure6a.png, figure6a.pdf and their caption figure6a.txt to a folder.

    Raises:
        FigureError: no GPU measurements at that shape.
    """
    measured = bars(root)
    if not measured:
        raise FigureError(
            f"{root}/kernels has no GPU measurements of the Wan2.1-1.3B shape; make them on a GPU: "
            'make bench ARGS="--suite wan-1.3b --record"'
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    exact = [name for name in measured if name in ("FlashAttention2", "cuDNN")]
    names = list(dict.fromkeys([*exact, *PAPER_TFLOPS, *measured]))
    names.sort(key=lambda name: name.startswith("SLA"))
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    device = next(iter(next(iter(measured.values())).values())).source.provenance["device"]
    for i, direction in enumerate(DIRECTIONS):
        axes: Any = figure.add_subplot(1, 2, i + 1)
        heights = {
            name: by[direction].row["tflops_full"]
            for name, by in measured.items()
            if direction in by
        }
        drawn = axes.bar(
            [names.index(name) for name in heights],
            list(heights.values()),
            color=["tab:red" if name.startswith("SLA") else "tab:gray" for name in heights],
            label=f"measured, {device}",
        )
        axes.bar_label(drawn, fmt="{:.0f}", fontsize=8)
        axes.plot(
            [names.index(name) for name in PAPER_TFLOPS],
            [both[i] for both in PAPER_TFLOPS.values()],
            linestyle="none",
            marker="D",
            markerfacecolor="none",
            markeredgecolor="black",
            zorder=3,
            label=f"paper, {PAPER_DEVICE}",
        )
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axes.set_title(direction)
        axes.margins(y=0.3)  # room for the legend
        axes.set_ylabel("TFLOPS (full attention's FLOPs / time)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    out.mkdir(parents=True, exist_ok=True)
    png, pdf, text = (out / f"figure6a.{ending}" for ending in ("png", "pdf", "txt"))
    figure.savefig(png, dpi=160)
    figure.savefig(pdf, metadata={"CreationDate": None})
    text.write_text(caption(measured) + "\n", encoding="utf-8")
    return [png, pdf, text]
