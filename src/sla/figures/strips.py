"""Frames of videos side by side: a block a prompt, in it a row a model, a column a frame."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sla.figures.analysis import new_figure, save

_CELL = 0.72  # inches of a frame's width
_GAP = 2  # white pixels between frames


@dataclass(frozen=True)
class StripRow:
    """A row of every block.

    Attributes:
        label: at its side.
        frames: uint8 (prompts, columns, H, W, 3).
    """

    label: str
    frames: NDArray[np.uint8]


def block(rows: Sequence[StripRow], prompt: int) -> NDArray[np.uint8]:
    """All rows' frames of a prompt, side by side and below each other, with white gaps.

    Returns:
        uint8 (rows * (H + gap) - gap, columns * (W + gap) - gap, 3).
    """
    _, columns, height, width, _ = rows[0].frames.shape
    steps = (height + _GAP, width + _GAP)
    size = (len(rows) * steps[0] - _GAP, columns * steps[1] - _GAP, 3)
    picture = np.full(size, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for k in range(columns):
            top, left = i * steps[0], k * steps[1]
            picture[top : top + height, left : left + width] = row.frames[prompt, k]
    return picture


def draw_strips(
    rows: Sequence[StripRow],
    prompts: Sequence[str],
    indices: Sequence[int],
    out: Path,
    name: str,
    caption: str,
) -> list[Path]:
    """Write name.png, .pdf and .txt to a folder.

    Args:
        rows: of equal shapes.
        prompts: what stands above each block.
        indices: of the columns' frames.
    """
    _, columns, height, width, _ = rows[0].frames.shape
    beside = min(len(prompts), 2 if columns > 1 else 8)
    below = -(-len(prompts) // beside)
    figure = new_figure(
        1.3 + beside * (columns * _CELL + 0.2),
        below * (len(rows) * _CELL * height / width + (0.6 if columns > 1 else 0.8)),
    )
    for prompt, text in enumerate(prompts):
        axes = figure.add_subplot(below, beside, prompt + 1)
        axes.imshow(block(rows, prompt), interpolation="nearest")
        axes.set_title(textwrap.fill(f"{prompt + 1}: {text}", max(14, 12 * columns)), fontsize=7)
        middles = [i * (height + _GAP) + height / 2 for i in range(len(rows))]
        labels = [row.label for row in rows] if prompt % beside == 0 else []
        axes.set_yticks(middles if labels else [], labels, fontsize=7)
        middles = [k * (width + _GAP) + width / 2 for k in range(columns)]
        frames = [f"frame {index}" for index in indices] if columns > 1 else []
        axes.set_xticks(middles if frames else [], frames, fontsize=6)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return save(figure, out, name, caption)
