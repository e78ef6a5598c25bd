"""Figure 1: how attention's weights are spread, and what dropping the small ones costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sla.figures.analysis import COLOURS, describe, new_figure, newest, one, origin, rows_of, save
from sla.figures.paper import PAPER_DROP_ERRORS, PAPER_WEIGHTS_ABOVE, PAPER_WEIGHTS_BELOW
from sla.results import RESULTS, Results


def caption(results: Results) -> str:
    """What the figure shows, and from which file and commands."""
    capture, weights = one(results, "capture"), one(results, "weights", layer=None)
    return "\n".join(
        [
            "Left: distribution of attention weights, in units of 1/N, mean over all maps; colours "
            "are the paper's three classes (above 1/N; below 1/(100 N); between), each with its "
            "share of the weights and of the attention that they carry; the first bar holds all "
            "that is smaller. Right: relative L1 error "
            "of attention's output when all but the largest weights of each row are dropped, as "
            "they are and with rows normalised again (as sparse attention does); lines: mean, "
            f"bands: middle half of {weights['maps']} maps (layers, heads, timesteps). Hollow "
            "diamonds: "
            "published in the paper for Wan2.1, another model and more tokens (at 45 % 'less than "
            "3 %').",
            describe(capture),
            origin(results),
        ]
    )


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write figure1.png, figure1.pdf and their caption figure1.txt to a folder.

    Raises:
        FigureError: no capture was measured.
    """
    results = newest(root)
    figure = new_figure(11, 4.4)
    _distribution(figure.add_subplot(1, 2, 1), results)
    _errors(figure.add_subplot(1, 2, 2), results)
    return save(figure, out, "figure1", caption(results))


def _distribution(axes: Any, results: Results) -> None:
    histogram, weights = one(results, "histogram", layer=None), one(results, "weights", layer=None)
    edges = np.array(histogram["edges"])
    left = edges[:-1]
    bars = axes.bar(left, histogram["share"], np.diff(edges), align="edge", linewidth=0)
    for bar, start in zip(bars, left, strict=True):
        name = "critical" if start >= 0 else "negligible" if start < -2 else "marginal"
        bar.set_facecolor(COLOURS[name])
    above, below = weights["above"], weights["below"]
    shares = {
        "below 1/(100 N)": ("negligible", below, weights["sum_below"]),
        "between": (
            "marginal",
            1 - above - below,
            1 - weights["sum_above"] - weights["sum_below"],
        ),
        "above 1/N": ("critical", above, weights["sum_above"]),
    }
    for label, (name, share, carried) in shares.items():
        text = f"{label}: {share:.1%} of weights, {carried:.2%} of attention"
        axes.bar([0], [0], color=COLOURS[name], label=text)
    axes.plot(
        *([], []),
        linestyle="none",
        marker="D",
        markerfacecolor="none",
        markeredgecolor="black",
        label=f"paper (Wan2.1): {PAPER_WEIGHTS_BELOW:.0%} below, {PAPER_WEIGHTS_ABOVE:.1%} above",
    )
    for place in (-2, 0):
        axes.axvline(place, color="black", linewidth=0.8, linestyle=":")
    filled = np.flatnonzero(np.array(histogram["share"]) > 1e-4)
    axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
    axes.set_xlabel("log10(weight x N)")
    axes.set_ylabel("share of the weights")
    axes.margins(y=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _errors(axes: Any, results: Results) -> None:
    curve = one(results, "drop_error", layer=None)
    sparsity = 100 * np.array(curve["sparsity"])
    maps = [row for row in rows_of(results, "drop_error") if row["layer"] is not None]
    lines = {"dropped": "dropped", "renormalised": "dropped, rows normalised again"}
    for (name, label), colour in zip(lines.items(), ("crimson", "tab:gray"), strict=True):
        low, high = np.percentile([row[name] for row in maps], (25, 75), axis=0)
        axes.plot(
            sparsity, curve[name], "o-", color=colour, markersize=3, label=f"measured: {label}"
        )
        axes.fill_between(sparsity, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        [100 * s for s in PAPER_DROP_ERRORS],
        list(PAPER_DROP_ERRORS.values()),
        linestyle="none",
        marker="D",
        markerfacecolor="none",
        markeredgecolor="black",
        zorder=3,
        label="paper (Wan2.1)",
    )
    axes.set_xlabel("sparsity: share of each row's weights dropped, smallest first, %")
    axes.set_ylabel("relative L1 error of the output")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
