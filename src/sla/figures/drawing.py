"""Every figure of `python -m sla figures`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sla.figures import (
    attention_trends,
    eval_strips,
    figure1,
    figure3,
    figure4,
    figure6a,
    figure6b,
    frame_strips,
    method_errors,
    quality_sparsity,
    recall,
    training_progress,
)
from sla.figures.figure6a import FigureError


@dataclass(frozen=True)
class Sources:
    """Where figures take their data from.

    Attributes:
        results: the results folder.
        capture: folder of a capture of attention.
        videos: folder of `make eval`.
    """

    results: Path
    capture: Path
    videos: Path


Draw = Callable[[Path, Sources], list[Path]]


def _of_results(draw: Callable[[Path, Path], list[Path]]) -> Draw:
    return lambda out, sources: draw(out, sources.results)


def _of_capture(draw: Callable[[Path, Path], list[Path]]) -> Draw:
    return lambda out, sources: draw(out, sources.capture)


def _of_videos(draw: Callable[[Path, Path], list[Path]]) -> Draw:
    return lambda out, sources: draw(out, sources.videos)


# Each takes the folder to write and where its data is; returns what it has written, and raises
# FigureError where its data is missing.
FIGURES: tuple[Draw, ...] = (
    _of_results(figure1.draw),
    _of_capture(figure3.draw),
    _of_capture(figure4.draw),
    _of_results(figure6a.draw),
    _of_results(figure6b.draw),
    _of_results(method_errors.draw),
    _of_results(recall.draw),
    _of_results(attention_trends.draw),
    _of_videos(eval_strips.draw),
    _of_results(frame_strips.draw),
    _of_results(quality_sparsity.draw),
    _of_results(training_progress.draw),
)

__all__ = ["FIGURES", "FigureError", "Sources"]
