"""Error against sparsity for each method, swapped in without fine-tuning."""

from __future__ import annotations

from pathlib import Path

from sla.figures.analysis import describe, new_figure, newest, one, origin, rows_of, save
from sla.figures.figure6a import FigureError
from sla.results import RESULTS, Results

# Sparsity at which the drawing begins.
_LEAST = 0.5


def lines(results: Results) -> dict[str, list[dict[str, float]]]:
    """Label of a line to its points, in the order of their sparsity.

    A method's defaults are a line of their own, of one point.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows_of(results, "method", layer=None, timestep=None):
        if row["method"] == "full":
            continue
        label = f"{row['method']}, defaults" if row["default"] else row["method"]
        found.setdefault(label, []).append(row)
    return {
        label: sorted(points, key=lambda row: 1 - row["exact_fraction"])
        for label, points in found.items()
    }


def dropped(results: Results) -> tuple[list[float], list[float]]:
    """Sparsities, and the error when the smallest weights are dropped and rows normalised again:
    mean over the maps of the timesteps that methods were run at."""
    timesteps = {row["timestep"] for row in rows_of(results, "method")}
    curves = [
        row["renormalised"]
        for row in rows_of(results, "drop_error")
        if row["layer"] is not None and row["timestep"] in timesteps
    ]
    means = [sum(points) / len(points) for points in zip(*curves, strict=True)]
    return one(results, "drop_error", layer=None)["sparsity"], means


def caption(results: Results) -> str:
    """What the figure shows, and from which file and command."""
    capture = one(results, "capture")
    settings = capture["settings"]
    every = {row["timestep"] for row in rows_of(results, "method")} - {None}
    timesteps = [f"{timestep:g}" for timestep in sorted(every)]
    text = (
        "Relative L1 error of each method's output against exact attention on the same queries, "
        "keys and values, against the share of the scores that it does not compute exactly. "
        "Nothing is fine-tuned: methods are as built, with Proj, gates and routers at their "
        "initial values; so SLA at its defaults (Proj zero) is its sparse branch, and VSA (gates "
        "zero) its fine branch. Stars: the defaults, those of each method's paper. Mean over "
        f"layers, heads, timesteps {', '.join(timesteps)} and {settings['method_samples']} sample. "
        "VSA's line lies on that of sparse_only in tiles of its cubes. 'Dropped weights': "
        "the largest weights of each row are kept, one by one, which blocks are too coarse for "
        "(at the same timesteps, all samples)."
    )
    dense = [
        f"{label} (sparsity {1 - points[0]['exact_fraction']:.0%}, error "
        f"{points[0]['error_l1']:.3f})"
        for label, points in lines(results).items()
        if max(1 - point["exact_fraction"] for point in points) < _LEAST
    ]
    if dense:
        text += f" Not drawn, as nearly dense: {', '.join(dense)}."
    return "\n".join([text, describe(capture), origin(results)])


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write method_errors.png, .pdf and .txt to a folder.

    Raises:
        FigureError: no methods were measured.
    """
    results = newest(root)
    found = lines(results)
    if not found:
        raise FigureError(
            f"{results.path} has no methods; capture with --query-blocks all, and analyse without "
            "--no-methods"
        )
    figure = new_figure(9, 5)
    axes = figure.add_subplot()
    colours = {
        name: f"C{i}" for i, name in enumerate(dict.fromkeys(x.split(",")[0] for x in found))
    }
    for label, points in found.items():
        if max(1 - point["exact_fraction"] for point in points) < _LEAST:
            continue
        default = label.endswith(", defaults")
        tiles = "tiles" in label
        axes.plot(
            [100 * (1 - point["exact_fraction"]) for point in points],
            [point["error_l1"] for point in points],
            linestyle="none" if default else "--" if tiles else "-",
            marker="*" if default else "o",
            markersize=11 if default else 4,
            color=colours[label.split(",")[0]],
            zorder=3 if tiles or default else 2,
            label=label,
        )
    sparsity, errors = dropped(results)
    axes.plot(
        [100 * s for s in sparsity],
        errors,
        color="black",
        linewidth=0.9,
        label="dropped weights (renormalised)",
    )
    axes.set_xlabel("sparsity: share of the scores not computed exactly, %")
    axes.set_ylabel("relative L1 error of attention's output")
    axes.set_xlim(100 * _LEAST, 101)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, out, "method_errors", caption(results))
