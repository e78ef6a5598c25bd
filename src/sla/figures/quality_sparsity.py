"""Quality against sparsity and against attention's FLOPs, a mark an arm of the study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sla.figures import arms, claims
from sla.figures.analysis import new_figure, save
from sla.figures.figure6a import FigureError
from sla.figures.study import by_seed
from sla.results import RESULTS
from sla.study.records import FRECHET, Records, Run
from sla.study.statistics import Estimate, over_seeds

# Groups whose arms differ in something else than method and sparsity, and so crowd at one place.
_VARIANTS = (
    *("learning_rate", "feature_map", "negligible", "scope", "proj", "order", "distillation"),
    "steps",
)


@dataclass(frozen=True)
class Point:
    """An arm.

    Attributes:
        runs: its seeds.
        sparsity: share of the scores that are not computed exactly.
        flops: of attention, over full attention's.
        loss: validation loss over that of full attention trained as long, minus 1; paired by seed.
        frechet: the evaluator's Frechet distance to real clips, or None.
    """

    runs: list[Run]
    sparsity: float
    flops: float
    loss: Estimate
    frechet: Estimate | None

    @property
    def variant(self) -> bool:
        """Whether it is one of many arms of one method and sparsity, drawn small."""
        return self.runs[0].group in _VARIANTS


def points(records: Records, study: str) -> dict[str, Point]:
    """{arm: what is drawn of it}, those that can be compared with full attention, at the end."""
    found: dict[str, Point] = {}
    for arm in arms.ordered(records, study):
        runs = records.of(study, arm)
        losses = claims.by_seed(records, study, arm, claims.full_for(records, study, arm))
        exact, flops = (by_seed(runs, m) for m in ("exact_fraction", "attention_flops_ratio"))
        if losses and exact is not None and flops is not None:
            frechet = by_seed(runs, FRECHET)
            found[arm] = Point(runs, 1 - exact.value, flops.value, over_seeds(losses), frechet)
    return found


def caption(found: dict[str, Point], study: str) -> str:
    """What the figure shows, and from which files and commands."""
    text = (
        f"Arms of the study '{study}', against the share of the attention scores that are not "
        "computed exactly (left) and attention's FLOPs over full attention's (right), both as "
        "measured, mean over layers. Top: validation loss over that of full attention "
        "fine-tuned as long, from the same weights, on the same clips, timesteps and noise, "
        f"difference by seed; linear within {arms.LINEAR:g} %, logarithmic beyond."
    )
    if any(point.frechet is not None for point in found.values()):
        text += (
            " Bottom: Frechet distance of the evaluator network's features of samples at held-out "
            "prompts to those of real clips; comparable within this study only."
        )
    text += (
        " Bars: 95 % intervals over seeds (Student's); none where there is one seed. Colour and "
        "form tell the method, hollow marks arms that are not trained. Lower is better."
    )
    variants = [arm for arm, point in found.items() if point.variant]
    if variants:
        text += (
            " Small marks without number or bar: arms that differ from one of these in something "
            f"else ({', '.join(variants)}; their numbers: table study_arms)."
        )
    few = [f"{arm} ({p.loss.seeds})" for arm, p in found.items() if p.loss.seeds < claims.SEEDS]
    if few:
        text += f" Fewer than {claims.SEEDS} seeds: {', '.join(few)}."
    return "\n".join([text, arms.origin(run for p in found.values() for run in p.runs)])


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write quality_STUDY.png, .pdf and .txt to a folder.

    Raises:
        FigureError: no arm that can be compared with full attention.
    """
    records = arms.read(root)
    written: list[Path] = []
    for study in records.studies():
        found = points(records, study)
        if found:
            written += _draw(found, out, study)
    if not written:
        raise FigureError(
            f"{root}/study has no arm to compare with full attention; run: "
            'make study ARGS="--groups main"'
        )
    return written


def _draw(found: dict[str, Point], out: Path, study: str) -> list[Path]:
    of_loss = {arm: _percent(p.loss) for arm, p in found.items()}
    of_frechet = {arm: p.frechet for arm, p in found.items() if p.frechet is not None}
    measures: list[tuple[str, dict[str, Estimate]]] = [
        ("validation loss over full attention's, %", of_loss)
    ]
    if of_frechet:
        measures.append(("evaluator Frechet distance", of_frechet))
    numbers = [arm for arm, point in found.items() if not point.variant]
    figure = new_figure(12, 4.2 * len(measures))
    handles: dict[str, Any] = {}
    for row, (title, values) in enumerate(measures):
        for column, name in enumerate(("sparsity", "flops")):
            axes = figure.add_subplot(len(measures), 2, 2 * row + column + 1)
            for arm, value in values.items():
                point = found[arm]
                place = (100 * getattr(point, name), value.value)
                if point.variant:
                    _small_mark(axes, point.runs, place)
                    continue
                number = numbers.index(arm) + 1
                handles[arm] = _mark(axes, point.runs, place[0], value, f"{number} {arm}")
                axes.annotate(str(number), place, (4, 3), textcoords="offset points", fontsize=6)
            if row == 0:
                arms.percent_axis(axes)
            axes.set_ylabel(title)
            if name == "sparsity":
                axes.set_xlabel("sparsity: share of the scores not computed exactly, %")
            else:
                axes.set_xscale("log")
                axes.set_xlabel("attention's FLOPs over full attention's, %")
                axes.xaxis.set_major_formatter(_plain)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=[handles[arm] for arm in numbers],
        loc="outside right upper",
        frameon=False,
        fontsize=7,
    )
    return save(figure, out, f"quality_{study}", caption(found, study))


def _mark(axes: Any, runs: Sequence[Run], x: float, value: Estimate, label: str) -> Any:
    colour, form = arms.mark(runs[0])
    bar = None
    if not math.isnan(value.low):
        bar = [[value.value - value.low], [value.high - value.value]]
    return axes.errorbar(
        [x],
        [value.value],
        yerr=bar,
        color=colour,
        marker=form,
        markersize=6,
        markerfacecolor=colour if runs[0].trained else "none",
        linestyle="none",
        elinewidth=0.9,
        capsize=2,
        label=label,
    )


def _small_mark(axes: Any, runs: Sequence[Run], place: tuple[float, float]) -> None:
    colour, form = arms.mark(runs[0])
    axes.plot(*place, color=colour, marker=form, markersize=3, alpha=0.5, zorder=1)


def _percent(e: Estimate) -> Estimate:
    return replace(
        e, value=100 * e.value, low=100 * e.low, high=100 * e.high, spread=100 * e.spread
    )


def _plain(value: float, position: int) -> str:
    return f"{value:g}"
