"""Frames of samples, a row a method, as in the paper's Figures 2, 5 and 7."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sla.figures import arms
from sla.figures.figure6a import FigureError
from sla.figures.strips import StripRow, draw_strips
from sla.results import RESULTS
from sla.study.frames import Strips, read_strips, real_clips_of
from sla.study.records import Key, Records, Run


@dataclass(frozen=True)
class Row:
    """A row of every block.

    Attributes:
        label: at its side.
        strips: its frames.
        run: that they are of; None of real clips.
    """

    label: str
    strips: Strips
    run: Run | None


@dataclass(frozen=True)
class Sheet:
    """What a figure shows.

    Attributes:
        rows: of the same prompts, noise and frames, and of models from the same weights.
        apart: arms whose frames are of other ones, which are not drawn.
        without: arms of the group that have no frames.
    """

    rows: list[Row]
    apart: list[str]
    without: list[str]


def sheet(records: Records, pictures: dict[Key, Strips], study: str, group: str) -> Sheet:
    """Frames of a group's arms, below those of the arms that stand first in every figure."""
    of_group = arms.groups(records, study)[group]
    wanted = dict.fromkeys([*arms.FIRST, *of_group])
    found: list[Row] = []
    for arm in wanted:
        runs = [run for run in records.of(study, arm) if run.key in pictures]
        if runs:
            found.append(Row(_label(runs[0]), pictures[runs[0].key], runs[0]))
    drawn = {row.strips.arm for row in found}
    newest = max(found, key=_date, default=None)
    alike = [row for row in found if newest is not None and _same(row, newest)]
    real = pictures.get(real_clips_of(study))
    rows = list(alike)
    if rows and real is not None and _shown(real) == _shown(rows[0].strips):
        rows.insert(0, Row("real clip", real, None))
    return Sheet(
        rows,
        [row.strips.arm for row in found if row not in alike],
        [arm for arm in of_group if arm not in drawn],
    )


def _label(run: Run) -> str:
    exact = run.value("exact_fraction")
    sparsity = "" if exact is None else f"\n{100 * (1 - exact):.3g} % sparse"
    return f"{run.arm}{sparsity}{'' if run.trained else ', not trained'}"


def _date(row: Row) -> str:
    return "" if row.run is None else str(row.run.end.get("date", ""))


def _same(row: Row, other: Row) -> bool:
    """Whether nothing but the model differs."""
    same_noise = row.strips.noise_seeds == other.strips.noise_seeds
    return same_noise and _shown(row.strips) == _shown(other.strips)


def _shown(strips: Strips) -> tuple[object, ...]:
    return (strips.prompts, strips.clips, strips.indices, strips.frames.shape)


def caption(found: Sheet, study: str, group: str) -> str:
    """What the figure shows, and from which files and commands."""
    runs = [row.run for row in found.rows if row.run is not None]
    seeds = sorted({run.seed for run in runs})
    trained = str(seeds[0]) if len(seeds) == 1 else ", ".join(f"{r.seed} ({r.arm})" for r in runs)
    noise = ", ".join(map(str, found.rows[-1].strips.noise_seeds))
    text = (
        f"Samples of the study '{study}', group '{group}', at held-out prompts. In a block, every "
        "row has the same prompt, initial noise and frames, and another model; all began from the "
        "same pretrained weights. Sparsity: share of the attention scores that are not computed "
        "exactly, mean over layers. The prompts were chosen evenly over the held-out ones, before "
        "any video was made. "
        f"Seeds of the noise: {noise}; of the training: {trained}."
    )
    if found.rows[0].run is None:
        text += " Real clip: the held-out clip whose caption the prompt is."
    if found.apart:
        text += f" Not drawn, as of other prompts or noise: {', '.join(found.apart)}."
    if found.without:
        text += f" No frames were kept of {', '.join(found.without)}."
    prompts = "\n".join(f"Prompt {i + 1}: {p}" for i, p in enumerate(found.rows[0].strips.prompts))
    return f"{text}\n{prompts}\n{arms.origin(runs)}"


def draw(out: Path, root: Path = RESULTS) -> list[Path]:
    """Write frames_STUDY_GROUP.png, .pdf and .txt to a folder, for each group of arms.

    Raises:
        FigureError: no frames of a finished arm.
    """
    records = arms.read(root)
    pictures = read_strips(root)
    written: list[Path] = []
    for study in records.studies():
        for group, members in arms.groups(records, study).items():
            found = sheet(records, pictures, study, group)
            # Nothing of its own, or nothing that the other groups' figures have not.
            of_group = {row.strips.arm for row in found.rows} & set(members)
            if not of_group or (of_group == {"pretrained"} and len(found.rows) > 2):
                continue
            first = found.rows[0].strips
            written += draw_strips(
                [StripRow(row.label, row.strips.frames) for row in found.rows],
                first.prompts,
                first.indices,
                out,
                f"frames_{study}_{group}",
                caption(found, study, group),
            )
    if not written:
        raise FigureError(
            f"{root}/study/frames has no frames of a finished arm; make study keeps them where "
            "measures.prompts and measures.frames of its config are not 0"
        )
    return written
