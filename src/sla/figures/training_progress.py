"""How arms come closer to full attention while they are trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sla.figures import arms, claims
from sla.figures.analysis import new_figure, save
from sla.figures.figure6a import FigureError
from sla.results import RESULTS
from sla.study.records import Records
from sla.study.statistics import Estimate, over_seeds

_SLA = "sla"
_BESIDE = 4  # groups in a row of the figure
Curve = dict[int, Estimate]


def losses(records: Records, study: str, arm: str) -> Curve:
    """{step: validation loss over full attention's at that step, minus 1}, over seeds.

    Empty for full attention itself, and for arms that are not trained.
    """
    reference = claims.full_for(records, study, arm)
    if arm == reference:
        return {}
    found = {
        s: claims.by_seed(records, study, arm, reference, s) for s in _steps(records, study, arm)
    }
    return {step: over_seeds(values) for step, values in found.items() if values}


def errors(records: Records, study: str, arm: str) -> Curve:
    """{step: relative L1 error of attention's output, mean over layers}, over seeds."""
    runs = records.of(study, arm)
    found: Curve = {}
    for step in _steps(records, study, arm):
        values = [run.value("attention_error_l1", step) for run in runs]
        known = [value for value in values if value is not None]
        if known:
            found[step] = over_seeds(known)
    return found


def _steps(records: Records, study: str, arm: str) -> list[int]:
    """Steps at which an arm that is trained was measured."""
    runs = records.of(study, arm)
    if not runs or not runs[0].last:
        return []
    return sorted({step for step, metric in runs[0].rows if metric == "val_loss"})


def caption(records: Records, study: str, drawn: dict[str, list[str]]) -> str:
    """What the figure shows, and from which files and commands."""
    runs = [r for names in drawn.values() for arm in names for r in records.of(study, arm)]
    text = (
        f"Arms of the study '{study}' while they are trained, by the group of arms that answer one "
        "question. Upper of each two panels: validation loss over that of full attention after as "
        "many steps, from the same weights, on the same clips, timesteps and noise, difference by "
        f"seed (linear within {arms.LINEAR:g} %, logarithmic beyond); step 0 is the method swapped "
        "in. Lower: relative L1 error of attention's output against exact attention on the same "
        "queries, keys and values, mean over layers, of which exact attention has none. Lines: "
        "mean over seeds; bands: one standard deviation over seeds to each side, none where there "
        f"is one seed. Black: arm {_SLA}."
    )
    few = {run.arm for run in runs if len(records.of(study, run.arm)) < claims.SEEDS}
    if few:
        text += f" Fewer than {claims.SEEDS} seeds: {', '.join(sorted(few))}."
    return "\n".join([text, arms.origin(runs)])


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write training_STUDY.png, .pdf and .txt to a folder.

    Raises:
        FigureError: no arm that was trained beside full attention.
    """
    records = arms.read(root)
    written: list[Path] = []
    for study in records.studies():
        drawn: dict[str, list[str]] = {}
        for group, members in arms.groups(records, study).items():
            trained = [arm for arm in members if losses(records, study, arm)]
            if trained:
                drawn[group] = _beside_sla(records, study, trained)
        if drawn:
            written += _draw(records, out, study, drawn)
    if not written:
        raise FigureError(
            f"{root}/study has no arm that was trained beside full attention; run: "
            'make study ARGS="--groups main"'
        )
    return written


def _beside_sla(records: Records, study: str, trained: list[str]) -> list[str]:
    """The arms, before them SLA's main one if it was trained as long."""
    (last, *_) = (records.of(study, arm)[0].last for arm in trained)
    sla = records.of(study, _SLA)
    with_it = bool(sla) and sla[0].last == last and bool(losses(records, study, _SLA))
    return list(dict.fromkeys([*([_SLA] if with_it else []), *trained]))


def _draw(records: Records, out: Path, study: str, drawn: dict[str, list[str]]) -> list[Path]:
    beside = min(_BESIDE, len(drawn))
    below = -(-len(drawn) // beside)
    figure = new_figure(max(5.0, 3.6 * beside), 5.0 * below)
    for index, (group, names) in enumerate(drawn.items()):
        row, column = divmod(index, beside)
        place = 2 * row * beside + column + 1
        upper = figure.add_subplot(2 * below, beside, place)
        lower = figure.add_subplot(2 * below, beside, place + beside)
        for number, arm in enumerate(names):
            colour = "black" if arm == _SLA else f"C{number}"
            _line(upper, losses(records, study, arm), colour, arm, 100)
            _line(lower, errors(records, study, arm), colour, arm, 1)
        arms.percent_axis(upper)
        lower.set_ylim(bottom=0)
        upper.set_title(group, fontsize=10)
        lower.set_xlabel("steps of training")
        if column == 0:
            upper.set_ylabel("loss over full's, %", fontsize=8)
            lower.set_ylabel("attention error, L1", fontsize=8)
        for axes in (upper, lower):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        upper.legend(frameon=False, fontsize=6)
    return save(figure, out, f"training_{study}", caption(records, study, drawn))


def _line(axes: Any, curve: Curve, colour: str, label: str, factor: float) -> None:
    steps = list(curve)
    values = [factor * estimate.value for estimate in curve.values()]
    axes.plot(steps, values, ".-", color=colour, linewidth=1, markersize=4, label=label)
    spreads = [factor * estimate.spread for estimate in curve.values()]
    if not any(math.isnan(spread) for spread in spreads):
        low = [value - spread for value, spread in zip(values, spreads, strict=True)]
        high = [value + spread for value, spread in zip(values, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
