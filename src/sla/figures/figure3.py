"""Figure 3: one attention map as the sum of its largest weights and a low-rank rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla.analysis.capture_files import Capture, Captured, Moment
from sla.analysis.measure import evenly
from sla.analysis.weights import attention_weights, split_top, stable_rank, weight_shares
from sla.figures.analysis import capture_origin, new_figure, open_capture, save
from sla.figures.paper import PAPER_STABLE_RANKS, PAPER_WEIGHTS_ABOVE

TOP = 0.08
# Rows of the map that is taken apart, and pixels of its picture.
_ROWS, _PIXELS = 4096, 512
_CHOICE_ROWS = 32


# What is said of the choice in captions.
CHOICE = (
    f"the map of the first sample whose share above 1/N is nearest to {PAPER_WEIGHTS_ABOVE:.1%}"
)


def choose_map(capture: Capture) -> tuple[Moment, int]:
    """A map to show, by a rule: `CHOICE`, which the paper reports. Measured at some rows."""
    distances: dict[tuple[Moment, int], float] = {}
    for moment in capture.moments:
        if moment.sample == 0:
            captured = capture.read(moment)
            rows = evenly(captured.rows, _CHOICE_ROWS)
            for index, head in enumerate(captured.heads):
                query, key = captured.query[index, rows], captured.key[index]
                above = weight_shares(attention_weights(query.float(), key.float())).above
                distances[moment, head] = abs(above - PAPER_WEIGHTS_ABOVE)
    return min(distances, key=distances.__getitem__)


def parts(captured: Captured) -> dict[str, tuple[Tensor, float]]:
    """Panel to weights (R, N) of the first head and their stable rank."""
    query, key = captured.query[0].float(), captured.key[0].float()
    weights = attention_weights(query[evenly(captured.rows, _ROWS)], key)
    top, rest = split_top(weights, TOP)
    panels = {
        "all weights": weights,
        f"top {TOP:.0%} of each row": top,
        f"bottom {1 - TOP:.0%}": rest,
    }
    return {name: (matrix, stable_rank(matrix)) for name, matrix in panels.items()}


def pooled(matrix: Tensor, pixels: int = _PIXELS) -> Tensor:
    """Means over equal parts, at most (pixels, pixels): small weights stay visible as such."""
    size = (min(pixels, matrix.shape[0]), min(pixels, matrix.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(matrix[None, None].float(), size)[0, 0]


def caption(capture: Capture, moment: Moment, head: int, rows: int, ranks: list[float]) -> str:
    """What the figure shows, and from which file and command."""
    tokens = capture.plan.tokens
    printed = ", ".join(f"{rank:,}" for rank in PAPER_STABLE_RANKS)
    return "\n".join(
        [
            f"Attention weights of layer {moment.layer}, head {head}, at timestep "
            f"{moment.timestep:g} ({CHOICE}): all, the largest {TOP:.0%} of each row, and the "
            f"others; {rows:,} query rows (down) against {tokens:,} keys (across) in raster order, "
            "means over parts of the map, on one logarithmic scale. Stable ranks "
            f"||A||_F^2 / ||A||_2^2 {'of the whole maps' if rows == tokens else 'of these rows'}: "
            f"{', '.join(f'{rank:.1f}' for rank in ranks)}; they cannot exceed the rows. The "
            f"paper's three, of a map of Wan2.1 with 32,760 tokens: {printed}.",
            capture_origin(capture, moment.file),
        ]
    )


def draw(out: Path, folder: Path) -> list[Path]:
    """Write figure3.png, figure3.pdf and their caption figure3.txt to a folder.

    Args:
        folder: of a capture.

    Raises:
        FigureError: there is no capture.
    """
    from matplotlib.colors import LogNorm

    capture = open_capture(folder)
    moment, head = choose_map(capture)
    found = parts(capture.read(moment, heads=[head]))
    figure = new_figure(11, 4)
    tokens = capture.plan.tokens
    scale = LogNorm(vmin=1e-3 / tokens, vmax=30 / tokens, clip=True)
    image: Any = None
    axes_of_all = []
    for index, (name, (matrix, rank)) in enumerate(found.items()):
        axes = figure.add_subplot(1, 3, index + 1)
        image = axes.imshow(
            pooled(matrix).numpy(), norm=scale, cmap="magma", aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"{name}\nstable rank {rank:,.1f}", fontsize=10)
        axes.set(xticks=[], yticks=[], xlabel="keys")
        axes_of_all.append(axes)
    axes_of_all[0].set_ylabel("queries")
    figure.colorbar(image, ax=axes_of_all, label="weight (1/N is average)", shrink=0.85)
    rows = len(next(iter(found.values()))[0])
    ranks = [rank for _, rank in found.values()]
    return save(figure, out, "figure3", caption(capture, moment, head, rows, ranks))
