"""Videos in: the files of a folder, and their frames as tensors.

decord and av are imported where they are used, so that metrics work on tensors without them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

_MIN_DECORD_WIDTH = 128


class VideoError(Exception):
    """A video that cannot be read; the message names the file and says why.

    Attributes:
        source: the file, as text.
        reason: why, one line.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)  # both in args: the error survives pickling
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read video {self.source}: {self.reason}"


def find_videos(folder: str | os.PathLike[str]) -> list[Path]:
    """The videos directly in a folder, sorted by name; hidden files and sub-folders are left out.

    Raises:
        ValueError: `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be an existing folder, got {os.fspath(folder)!r}")
    return sorted(
        (
            path
            for path in folder.iterdir()
            if path.suffix.lower() in VIDEO_SUFFIXES
            and not path.name.startswith(".")
            and not path.is_dir()
        ),
        key=lambda path: path.name,
    )


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """Decodes all frames of a video.

    Args:
        path: the file.

    Returns:
        uint8 (T, 3, H, W), RGB, levels 0 to 255, contiguous.

    Raises:
        VideoError: missing, empty, not a video, damaged, or without frames.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise VideoError(str(path), error.strerror or str(error)) from None
    if path.is_dir():
        raise VideoError(str(path), "it is a folder")
    if size == 0:
        raise VideoError(str(path), "the file is empty")
    frames = _read_with_decord(path)
    if frames is None:
        frames = _read_with_av(path)
    return frames.permute(0, 3, 1, 2).contiguous()


def _read_with_decord(path: Path) -> Tensor | None:
    """uint8 (T, H, W, 3), or None where decord's answer cannot be trusted."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # faults are reported once, by our own errors
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        count = len(reader)
        if count == 0:
            raise VideoError(str(path), "it has no frames")
        # decord takes the padded length of a row for its channels: a video narrower than 128
        # pixels can come out with 4 or more of them (dmlc/decord issue 336).
        _, width, channels = reader[0].shape
        if channels != 3 or width < _MIN_DECORD_WIDTH:
            return None
        reader.seek(0)
        return torch.from_numpy(reader.get_batch(list(range(count))).asnumpy())
    except VideoError:
        raise
    except Exception as error:  # decord raises its own errors and RuntimeError, with a stack dump
        raise VideoError(str(path), _reason(error)) from None


def _read_with_av(path: Path) -> Tensor:
    import av

    try:
        with av.open(str(path), mode="r") as container:
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
            if not frames:
                raise VideoError(str(path), "it has no frames")
            return torch.stack(frames)
    except VideoError:
        raise
    except Exception as error:  # av raises subclasses of OSError, ValueError, LookupError...
        raise VideoError(str(path), _reason(error)) from None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "cannot find video stream" in text:
        return "no video stream"
    if text.startswith("Error reading"):
        return "not a video container, or cut off"
    # "[time] /build/path/file.cc:151: Check failed: ..." -> "Check failed: ..."
    return "damaged (" + re.sub(r"^.*\.cc:\d+:\s*", "", text)[:160] + ")"
