"""How attention's weights, rank and errors move with layer, head and timestep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sla.figures.analysis import describe, new_figure, newest, one, origin, rows_of, save
from sla.results import RESULTS, Results

# Share of the weights dropped at which the error is shown: the paper's top 8.1 % are kept.
DROPPED = 0.919
PANELS = {
    "above": "weights above 1/N",
    "below": "weights below 1/(100 N)",
    "stable_rank_top": "stable rank, top weights",
    "stable_rank_rest": "stable rank, the rest",
    "dropped": "error, top 8.1 % kept",
    "probe_error_l1": "error of the method",
}


def values(results: Results) -> list[dict[str, Any]]:
    """One row a map (layer, head, timestep), with the numbers of `PANELS`."""
    place = ("layer", "head", "timestep")
    curves = {tuple(row[name] for name in place): row for row in rows_of(results, "drop_error")}
    sparsity = one(results, "drop_error", layer=None)["sparsity"]
    at = int(np.argmin([abs(s - DROPPED) for s in sparsity]))
    found = []
    for row in rows_of(results, "weights"):
        if row["layer"] is not None:
            curve = curves[tuple(row[name] for name in place)]
            found.append({**row, "dropped": curve["dropped"][at]})
    return found


def caption(results: Results) -> str:
    """What the figure shows, and from which file and command."""
    capture = one(results, "capture")
    probe = capture["probe"]["name"]
    whose = "the model's own" if capture["probe_is_model"] else "swapped in, not fine-tuned"
    settings = capture["settings"]
    text = (
        "Attention by layer and timestep (0 is clean, 1000 noise): lines are means over heads, "
        "dots the heads. Share of the weights above 1/N and below 1/(100 N); stable rank of the "
        f"largest {settings['top']:.0%} of the weights of each row and of the others, over "
        f"{capture['rows']:,} rows; relative L1 error of the output when all but the largest "
        f"8.1 % of each row are dropped; and that of {probe} ({whose})."
    )
    return "\n".join([text, describe(capture), origin(results)])


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write attention_trends.png, .pdf and .txt to a folder.

    Raises:
        FigureError: no capture was measured.
    """
    from matplotlib import colormaps

    results = newest(root)
    maps = values(results)
    timesteps = sorted({row["timestep"] for row in maps})
    layers = sorted({row["layer"] for row in maps})
    figure = new_figure(11, 6)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(timesteps)))
    for index, (name, title) in enumerate(PANELS.items()):
        axes = figure.add_subplot(2, 3, index + 1)
        for timestep, shade in zip(timesteps, shades, strict=True):
            rows = [row for row in maps if row["timestep"] == timestep]
            axes.plot(
                [row["layer"] for row in rows],
                [row[name] for row in rows],
                ".",
                color=shade,
                markersize=3,
            )
            means = [np.mean([r[name] for r in rows if r["layer"] == layer]) for layer in layers]
            axes.plot(layers, means, color=shade, label=f"timestep {timestep:g}")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7)
    return save(figure, out, "attention_trends", caption(results))
