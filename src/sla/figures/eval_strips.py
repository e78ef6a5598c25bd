"""Frames of the videos that `make eval` made, a row a method, as in the paper's Figures 2, 5, 7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sla.data.video import VideoError, VideoInfo, read_frames
from sla.figures.captions import origin_line
from sla.figures.figure6a import FigureError
from sla.figures.strips import StripRow, draw_strips
from sla.study.frames import frame_indices, spread

PROMPTS = 4  # that are drawn, at most
_WIDTH = 208  # pixels of a drawn frame, at most


def draw(out: Path, folder: Path) -> list[Path]:
    """Write frames_eval.png, .pdf and .txt.

    Args:
        out: folder to write.
        folder: of `make eval`, with report.json and a folder of videos a method.

    Raises:
        FigureError: no such folder, or a video of it that is missing or cannot be read.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        prompts, methods = report["prompts"], report["methods"]
        files = {label: [folder / v for v in entry["videos"]] for label, entry in methods.items()}
    except FileNotFoundError as error:
        raise FigureError(f"no {path}; `make eval` writes it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FigureError(f"{path} is no report of `make eval`: {error!r}; run it again") from error
    if not prompts:
        raise FigureError(
            f"{path} has no videos; `make eval` makes them of eval's or sampling's prompts"
        )
    shown = spread(PROMPTS, len(prompts))
    rows: list[StripRow] = []
    indices: tuple[int, ...] = ()
    for label, videos in files.items():
        found = [_frames(videos[i]) for i in shown]
        indices = found[0][0]
        frames = [pictures for _, pictures in found]
        if any(pictures.shape != frames[0].shape for pictures in frames) or (
            rows and rows[0].frames.shape[1:] != frames[0].shape
        ):
            raise FigureError(f"videos of {folder} differ in size; run `make eval` again")
        rows.append(StripRow(label, np.stack(frames)))
    caption = _caption(report, folder)
    return draw_strips(rows, [prompts[i] for i in shown], indices, out, "frames_eval", caption)


def _frames(path: Path) -> tuple[tuple[int, ...], NDArray[np.uint8]]:
    """Evenly spaced frames of a video, no wider than `_WIDTH`, and their indices."""
    indices: tuple[int, ...] = ()

    def choose(info: VideoInfo) -> tuple[int, ...]:
        nonlocal indices
        indices = frame_indices(info.frames)
        return indices

    try:
        frames = read_frames(path, choose)
    except VideoError as error:
        raise FigureError(f"{error}; run `make eval` again") from error
    height, width = frames.shape[1:3]
    if width > _WIDTH:
        size = (_WIDTH, round(height * _WIDTH / width))
        frames = np.stack(
            [
                np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
                for frame in frames
            ]
        )
    return indices, frames


def _caption(report: dict[str, Any], folder: Path) -> str:
    models = "; ".join(
        f"{label}: {entry['attention']} attention, weights {entry['weights']}"
        for label, entry in report["methods"].items()
    )
    return (
        "Samples of `make eval`. In a block, every row has the same prompt, initial noise and "
        "frames, and another model; not fine-tuned: the method was put into a model that was "
        f"trained with another. The prompts are evenly spaced over those of the run. {models}.\n"
        f"{origin_line(str(folder), report['provenance'])}"
    )
