"""How good is P_c: mass of attention on the blocks that routing chooses, and that the best hold."""

from __future__ import annotations

from pathlib import Path

from sla.figures.analysis import Row, describe, new_figure, newest, one, origin, rows_of, save
from sla.figures.figure6a import FigureError
from sla.results import RESULTS, Results


def orders(results: Results) -> dict[str, Row]:
    """Token order to its mean over all maps."""
    return {row["order"]: row for row in rows_of(results, "recall", layer=None)}


def caption(results: Results) -> str:
    """What the figure shows, and from which file and command."""
    capture = one(results, "capture")
    block = capture["settings"]["block"]
    text = (
        "Share of the true attention mass that lies on the critical blocks, against the fraction "
        f"of critical blocks (blocks of {block} queries and {block} keys). Full lines: the blocks "
        "that pooled queries and keys choose, as SLA routes; dotted: as many blocks with the "
        "largest true mass of the row, the best that a choice of blocks can do. Raster order: a "
        "block is a strip of a frame; the others: a block is a tile of so many frames, rows and "
        "columns, as named. Left: mean over all maps; right: by layer, at the fraction that is "
        "marked left. The diagonal is a choice at random."
    )
    return "\n".join([text, describe(capture), origin(results)])


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write recall.png, recall.pdf and recall.txt to a folder.

    Raises:
        FigureError: no recall was measured.
    """
    results = newest(root)
    found = orders(results)
    if not found:
        raise FigureError(f"{results.path} has no recall of routing")
    figure = new_figure(11, 4.4)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    marked = 1
    for index, (order, row) in enumerate(found.items()):
        colour = f"C{index}"
        # What was taken, which short rows round to whole blocks.
        taken = [100 * b / n for b, n in zip(row["blocks"], row["key_blocks"], strict=True)]
        marked = min(1, len(taken) - 1)
        left.plot(taken, row["pooled"], "o-", color=colour, label=f"{order}: routed")
        left.plot(taken, row["oracle"], ":", color=colour, label=f"{order}: best blocks")
        left.plot(taken, [t / 100 for t in taken], color="lightgray", linewidth=0.8, zorder=0)
        layers: dict[int, list[Row]] = {}
        for of_map in rows_of(results, "recall", order=order):
            if of_map["layer"] is not None:
                layers.setdefault(of_map["layer"], []).append(of_map)
        for name, style in (("pooled", "o-"), ("oracle", ":")):
            means = [sum(r[name][marked] for r in rows) / len(rows) for rows in layers.values()]
            right.plot(list(layers), means, style, color=colour)
    left.axvline(taken[marked], color="lightgray", linewidth=0.8)
    left.set_xlabel("critical blocks of a row, %")
    left.set_ylabel("attention mass on them")
    right.set_xlabel("layer")
    right.set_title(f"{taken[marked]:.1f} % of the blocks", fontsize=10)
    for axes in (left, right):
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    return save(figure, out, "recall", caption(results))
