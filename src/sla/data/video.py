"""Videos in and out: decoding with decord, encoding with PyAV, pictures with PIL.

Frames are `uint8 (T, H, W, 3)` numpy arrays, RGB. decord and av are imported where they are used,
so that this module works (pictures, GIFs, resizing) on a machine that lacks them.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sla.files import atomic_path

Frames = NDArray[np.uint8]
VideoSource = str | os.PathLike[str] | io.BytesIO

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


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


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds: number of frames, frames per second, height and width in pixels."""

    frames: int
    fps: float
    height: int
    width: int


def _name(source: VideoSource) -> str:
    if isinstance(source, io.BytesIO):
        return f"<{source.getbuffer().nbytes} bytes in memory>"
    return os.fspath(source)


def check_source(source: VideoSource) -> str:
    """Name of a source for messages; bytes in memory are rewound.

    Raises:
        VideoError: there is nothing to decode.
    """
    name = _name(source)
    if isinstance(source, io.BytesIO):
        size = source.getbuffer().nbytes
        source.seek(0)
    else:
        try:
            path = Path(source)
            if path.is_dir():
                raise VideoError(name, "it is a folder")
            size = path.stat().st_size
        except FileNotFoundError:
            raise VideoError(name, "no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise VideoError(name, str(error)) from None
    if size == 0:
        raise VideoError(name, "the file is empty")
    return name


def _open(source: VideoSource) -> Any:
    """A decord VideoReader of `source` with at least one frame, or VideoError."""
    name = check_source(source)
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # faults are reported once, by our own errors
    try:
        # One thread: clips are short, and the data loader's workers are the parallelism.
        target = source if isinstance(source, io.BytesIO) else os.fspath(source)
        reader = decord.VideoReader(target, ctx=decord.cpu(0), num_threads=1)
        frames = len(reader)
    except Exception as error:
        # decord raises DECORDError or RuntimeError with a stack dump; keep what a person can use.
        raise VideoError(name, f"not a readable video ({_first_line(error)})") from None
    if frames == 0:
        raise VideoError(name, "it has no frames")
    return reader


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "cannot find video stream" in text:
        return "no video stream"
    if text.startswith("Error reading"):
        return "not a video container, or cut off"
    # "[time] /build/path/file.cc:151: Check failed: ..." -> "Check failed: ..."
    return re.sub(r"^.*\.cc:\d+:\s*", "", text)[:160]


def _decode(reader: Any, indices: Sequence[int], source: VideoSource) -> Frames:
    name = _name(source)
    try:
        # decord takes the padded length of a row for its channels: a video narrower than 128 pixels
        # can come out with 4, 6, 8 or 12 of them (dmlc/decord issue 336). Those go to PyAV.
        if reader[0].shape[-1] != 3:
            return _decode_with_av(indices, source)
        reader.seek(0)
        return reader.get_batch(list(indices)).asnumpy()
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(name, f"damaged ({_first_line(error)})") from None


def _decode_with_av(indices: Sequence[int], source: VideoSource) -> Frames:
    import av

    if isinstance(source, io.BytesIO):
        source.seek(0)
    wanted, found = set(indices), {}
    target = source if isinstance(source, io.BytesIO) else os.fspath(source)
    with av.open(target, mode="r") as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                found[index] = frame.to_ndarray(format="rgb24")
            if len(found) == len(wanted):
                return np.stack([found[index] for index in indices])
    raise VideoError(_name(source), f"damaged (frame {min(wanted - set(found))} is missing)")


def _info(reader: Any, source: VideoSource) -> VideoInfo:
    _, height, width, _ = _decode(reader, [0], source).shape
    return VideoInfo(len(reader), float(reader.get_avg_fps()), height, width)


def count_frames(source: VideoSource) -> int:
    """Number of frames of a video, from its container alone; nothing is decoded.

    Raises:
        VideoError: missing, unreadable, no video stream, or no frames.
    """
    return len(_open(source))


def probe(source: VideoSource) -> VideoInfo:
    """Number of frames, frame rate and size of a video; decodes its first frame.

    Raises:
        VideoError: missing, unreadable, no video stream, or no frames.
    """
    return _info(_open(source), source)


def read_frames(
    source: VideoSource,
    frames: range | Sequence[int] | Callable[[VideoInfo], Sequence[int]] | None = None,
) -> Frames:
    """Decodes frames of a video.

    Args:
        source: path, or the file's bytes in a BytesIO.
        frames: indices, in any order and with repeats; `range(start, stop, step)`; a function that
            chooses them when the video is open; None for all.

    Returns:
        uint8 (T, H, W, 3), RGB, in the order of `frames`.

    Raises:
        VideoError: missing, unreadable, no video stream, no frames, damaged, or an index it does
            not have. A file that is damaged in one place may give frames from another, but need
            not: the decoder works ahead.
    """
    reader = _open(source)
    if frames is None:
        indices: Sequence[int] = range(len(reader))
    else:
        indices = frames(_info(reader, source)) if callable(frames) else frames
    if len(indices) == 0:
        raise ValueError(f"frames must name at least one frame, got {frames!r}")
    for wrong in (min(indices), max(indices)):
        if not 0 <= wrong < len(reader):
            has = f"it has frames 0 to {len(reader) - 1}"
            raise VideoError(_name(source), f"frame {wrong} was asked for, {has}")
    return _decode(reader, indices, source)


def resize_crop(
    frames: Frames,
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    center: tuple[float, float] = (0.5, 0.5),
) -> Frames:
    """Cuts the largest window of the target's aspect ratio (times `scale`) and resizes it.

    The aspect ratio of what is seen never changes: equal to scaling the short side and cropping,
    but only the pixels that stay are resized (bilinear, antialiased).

    Args:
        frames: uint8 (T, H, W, 3).
        height, width: target size in pixels.
        scale: side of the window relative to the largest that fits, in (0, 1].
        center: where the window lies, (vertical, horizontal), 0 at the top or left edge, 1 at the
            bottom or right edge, 0.5 in the middle.

    Returns:
        uint8 (T, height, width, 3), contiguous.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    if not all(0 <= c <= 1 for c in center):
        raise ValueError(f"center must be in [0, 1] x [0, 1], got {center}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    source_height, source_width = frames.shape[1:3]
    unit = scale * min(source_height / height, source_width / width)
    window_height = min(source_height, max(1, round(unit * height)))
    window_width = min(source_width, max(1, round(unit * width)))
    top = round(center[0] * (source_height - window_height))
    left = round(center[1] * (source_width - window_width))
    window = frames[:, top : top + window_height, left : left + window_width]
    if (window_height, window_width) == (height, width):
        return np.ascontiguousarray(window)
    tensor = torch.from_numpy(window).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        tensor, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


def to_tensor(frames: Frames) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> float32 (3, T, H, W) in [-1, 1], the form models and batches use."""
    tensor = torch.from_numpy(frames).permute(3, 0, 1, 2).to(torch.float32)
    return tensor.div_(127.5).sub_(1.0).contiguous()


def to_frames(video: torch.Tensor) -> Frames:
    """Float (3, T, H, W) in [-1, 1], clamped -> uint8 (T, H, W, 3): the inverse of `to_tensor`."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"video must have shape (3, T, H, W), got {tuple(video.shape)}")
    levels = video.detach().float().cpu().clamp(-1, 1).add(1.0).mul(127.5).round()
    return np.ascontiguousarray(levels.to(torch.uint8).permute(1, 2, 3, 0).numpy())


def _check_frames(frames: Frames) -> None:
    if frames.dtype != np.uint8:
        raise TypeError(f"frames must be uint8, got {frames.dtype}")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must have shape (T, H, W, 3), none 0, got {frames.shape}")


def write_video(path: str | os.PathLike[str], frames: Frames, fps: float, *, crf: int = 14) -> None:
    """Writes an mp4 (H.264, yuv420p), atomically.

    Odd heights and widths grow by one repeated row or column, as yuv420p halves the colour planes.

    Args:
        path: file to write; its folder is made.
        frames: uint8 (T, H, W, 3).
        fps: frames per second; NTSC rates (30000/1001) are kept exact.
        crf: x264's quality, 0 (lossless) to 51; 14 is hard to tell from the source.

    Raises:
        OSError: the file cannot be written (no space left, no permission); nothing partial is left.
    """
    _check_frames(frames)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be positive, got {fps}")
    import av

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Small pictures. The bytes may differ from run to run all the same: x264's macroblock trees
        # do, and without them a file is twice as large.
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "medium"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def gif_bytes(frames: Frames, fps: float) -> bytes:
    """An animated, endlessly repeating GIF of uint8 (T, H, W, 3); time steps are 10 ms."""
    _check_frames(frames)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be positive, got {fps}")
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    duration = max(20, round(100 / fps) * 10)  # viewers slow down what is faster than 20 ms
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0
    )
    return buffer.getvalue()


def write_gif(path: str | os.PathLike[str], frames: Frames, fps: float) -> None:
    """Writes `gif_bytes(frames, fps)` atomically."""
    data = gif_bytes(frames, fps)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def picture_strip(frames: Frames, count: int = 8, *, gap: int = 2) -> NDArray[np.uint8]:
    """`count` evenly spaced frames (first and last included) side by side.

    Args:
        frames: uint8 (T, H, W, 3).
        count: pictures; at most T are taken.
        gap: white pixels between them.

    Returns:
        uint8 (H, count * W + (count - 1) * gap, 3).
    """
    _check_frames(frames)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return _tile([frames[i][None] for i in chosen], len(chosen), gap)[0]


def write_picture(path: str | os.PathLike[str], picture: NDArray[np.uint8]) -> None:
    """Writes uint8 (H, W, 3) as PNG or whatever the ending says, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def grid(
    videos: Sequence[Frames],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    gap: int = 2,
) -> Frames:
    """Videos of one shape in a grid, row by row, each under its label.

    Args:
        videos: uint8 (T, H, W, 3) each, all the same shape.
        labels: one line of text per video, shortened to fit; None for no label bars.
        columns: pictures per row; default: the smallest square that holds all.
        gap: white pixels between pictures.

    Returns:
        uint8 (T, rows * (H + bar) + (rows - 1) * gap, columns * W + (columns - 1) * gap, 3).
    """
    if not videos:
        raise ValueError("videos must not be empty")
    for video in videos:
        _check_frames(video)
        if video.shape != videos[0].shape:
            raise ValueError(f"videos must share one shape, got {[v.shape for v in videos]}")
    if labels is not None:
        if len(labels) != len(videos):
            raise ValueError(f"labels must be as many as videos, got {len(labels)}, {len(videos)}")
        videos = [_with_label(video, label) for video, label in zip(videos, labels, strict=True)]
    columns = math.ceil(math.sqrt(len(videos))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    return _tile(videos, columns, gap)


def side_by_side(videos: Mapping[str, Frames], *, gap: int = 2) -> Frames:
    """Videos of one shape in one row, each under its name (a `grid` of one row)."""
    return grid(list(videos.values()), list(videos), columns=max(1, len(videos)), gap=gap)


def _tile(videos: Sequence[Frames], columns: int, gap: int) -> Frames:
    count, height, width, _ = videos[0].shape
    rows = -(-len(videos) // columns)
    shape = (count, rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for k, video in enumerate(videos):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = video
    return canvas


def _with_label(video: Frames, label: str) -> Frames:
    font = ImageFont.load_default()
    bar_height, width = 14, video.shape[2]
    bar = Image.new("RGB", (width, bar_height), "white")
    draw = ImageDraw.Draw(bar)
    while len(label) > 1 and draw.textlength(label, font=font) > width - 4:
        label = label[:-1]
    draw.text((2, 1), label, fill="black", font=font)
    bars = np.broadcast_to(np.asarray(bar), (len(video), bar_height, width, 3))
    return np.concatenate([bars, video], axis=1)
