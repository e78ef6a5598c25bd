"""Videos in: the files of a folder, and their frames as tensors.

decord and av are imported where they are used, so that metrics work on tensors without them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

# All metrics look at the same frames, so that all of a video are in memory: ten seconds of 4K fit.
MAX_BYTES = 6 * 2**30

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


@dataclass(frozen=True)
class Video:
    """A decoded video.

    Attributes:
        frames: uint8 (T, 3, H, W), RGB, levels 0 to 255, contiguous.
        fps: frames a second, by the file; None where it does not say.
    """

    frames: Tensor
    fps: float | None


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """All frames of a video, uint8 (T, 3, H, W); see `decode_video`."""
    return decode_video(path).frames


def decode_video(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Video:
    """Decodes all frames of a video.

    Args:
        path: the file.
        max_bytes: the most that the frames may take in memory.

    Raises:
        VideoError: missing, empty, not a video, damaged, without frames, or too large.
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
    frames, fps = _read_with_decord(path, max_bytes) or _read_with_av(path, max_bytes)
    return Video(frames.permute(0, 3, 1, 2).contiguous(), fps)


def _read_with_decord(path: Path, max_bytes: int) -> tuple[Tensor, float | None] | None:
    """uint8 (T, H, W, 3) and frames a second, or None where decord cannot be trusted."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # faults are reported once, by our own errors
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        count = len(reader)
        if count == 0:
            raise VideoError(str(path), "it has no frames")
        # decord takes the padded length of a row for its channels: a video narrower than 128
        # pixels can come out with 4 or more of them (dmlc/decord issue 336).
        first = reader[0]
        _, width, channels = first.shape
        if channels != 3 or width < _MIN_DECORD_WIDTH:
            return None
        _check_size(path, count * first.asnumpy().nbytes, max_bytes)
        reader.seek(0)
        frames = torch.from_numpy(reader.get_batch(list(range(count))).asnumpy())
        return frames, float(reader.get_avg_fps()) or None
    except VideoError:
        raise
    except Exception as error:  # decord raises its own errors and RuntimeError, with a stack dump
        raise VideoError(str(path), _reason(error)) from None


def _read_with_av(path: Path, max_bytes: int) -> tuple[Tensor, float | None]:
    import av

    frames: list[Tensor] = []
    try:
        with av.open(str(path), mode="r") as container:
            rate = container.streams.video[0].average_rate
            for frame in container.decode(video=0):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                _check_size(path, len(frames) * frames[0].numel(), max_bytes)
            if not frames:
                raise VideoError(str(path), "it has no frames")
            return torch.stack(frames), float(rate) if rate else None
    except VideoError:
        raise
    except Exception as error:  # av raises subclasses of OSError, ValueError, LookupError...
        raise VideoError(str(path), _reason(error)) from None


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise VideoError(
            str(path),
            f"too large: its frames take more than {max_bytes / 2**30:.1f} GiB; cut it into parts",
        )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "cannot find video stream" in text:
        return "no video stream"
    if text.startswith("Error reading"):
        return "not a video container, or cut off"
    # "[time] /build/path/file.cc:151: Check failed: ..." -> "Check failed: ..."
    return "damaged (" + re.sub(r"^.*\.cc:\d+:\s*", "", text)[:160] + ")"
