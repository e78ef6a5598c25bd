"""Decoding for training: only the frames needed, resampled in time, resized on the way.

PyAV does it, not decord. Some damaged files make decord crash, and a crash takes the loader's
worker with it; PyAV decodes or refuses them. The pixels are the same, and with one colour converter
for all frames of a file and no threads the speed is close (`python -m sla.benchmark data`). PyAV
also gives each frame's time stamp, which a variable frame rate needs, and its rotation.
"""

from __future__ import annotations

import io
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sla.data.video import Frames, VideoError, VideoSource, check_source, resize_crop

# Containers of video alone: pictures, playlists and scripts, through which a file could name other
# files or addresses, are refused whatever the file's ending says.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,m4v"
_MAX_FRAME_PIXELS = 2**26  # 8192 x 8192; a damaged header may ask for any size


class TooShort(VideoError):
    """A sound video that is shorter than a sample: left out, but no fault."""


@dataclass(frozen=True)
class Track:
    """The video track of a file, from its container alone; nothing is decoded.

    Attributes:
        times: float64 (frames,): seconds of each frame from the first, in the order shown.
        height, width: in pixels, as coded: what is shown may be turned by 90 degrees.
    """

    times: NDArray[np.float64]
    height: int
    width: int

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.times)


@dataclass(frozen=True)
class Cut:
    """Size and place of what is cut out of each frame, see `resize_crop`.

    Attributes:
        height, width: pixels of the result.
        scale: side of the window relative to the largest of that aspect ratio.
        center: place of the window, (vertical, horizontal), each in [0, 1].
    """

    height: int
    width: int
    scale: float = 1.0
    center: tuple[float, float] = (0.5, 0.5)


class VideoFile:
    """An open video. Use it as a context manager.

    Args:
        source: path, or the file's bytes in a BytesIO.
        timeout: seconds of decoding after which `read` gives up.

    Attributes:
        track: what the container says.
        decoded: frames that the decoder has put out, wanted or on the way to one that was.

    Raises:
        VideoError: missing, empty, not a video, no video stream, or no frames.
    """

    def __init__(self, source: VideoSource, timeout: float = math.inf) -> None:
        import av

        # Metadata that is no UTF-8 is no error; PyAV 19 takes it by itself.
        metadata: dict[str, Any] = (
            {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        )
        self._timeout = timeout
        self.decoded = 0
        self._name, target = _target(source)
        try:
            self._container: Any = av.open(
                target, mode="r", options={"format_whitelist": _FORMATS}, **metadata
            )
        except _errors():  # also of a format that is not on the list
            raise VideoError(self._name, "not a video container, or cut off") from None
        try:
            self._scan()
        except BaseException:
            self._container.close()
            raise

    def _scan(self) -> None:
        """Lists the packets, which decord does too when it opens a file."""
        if not self._container.streams.video:
            raise VideoError(self._name, "no video stream")
        self._stream: Any = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise VideoError(self._name, "no decoder for its codec")
        self._stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
        stamps: list[int] = []
        keys: list[int] = []
        try:
            for packet in self._container.demux(self._stream):
                stamp = packet.pts if packet.pts is not None else packet.dts
                if packet.size == 0 or stamp is None or packet.is_discard:
                    continue
                stamps.append(stamp)
                if packet.is_keyframe:
                    keys.append(stamp)
        except _errors() as error:
            raise VideoError(self._name, f"damaged ({_reason(error)})") from None
        self._stamps = sorted(set(stamps))
        self._keys = sorted(keys)
        self._used = True  # the demuxer stands at the end
        if not self._stamps:
            raise VideoError(self._name, "it has no frames")
        unit = float(self._stream.time_base or 0)
        times = (np.asarray(self._stamps, dtype=np.float64) - self._stamps[0]) * unit
        height, width = self._stream.codec_context.height, self._stream.codec_context.width
        if not 0 < height * width <= _MAX_FRAME_PIXELS:
            raise VideoError(self._name, f"frames of {width}x{height} pixels")
        self.track = Track(times, height, width)

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._container.close()

    def read(self, indices: Sequence[int], cut: Cut | None = None) -> Frames:
        """Decodes frames.

        Args:
            indices: of the frames, in any order and with repeats.
            cut: what to cut out of each frame; frames are then resized while their colours are
                converted, so that the whole picture never exists as RGB. None: the whole frame.

        Returns:
            uint8 (len(indices), H, W, 3), RGB, turned as the file says it is to be shown.

        Raises:
            VideoError: damaged, an index it does not have, or it took longer than the timeout.
        """
        if len(indices) == 0:
            raise ValueError(f"indices must name at least one frame, got {indices!r}")
        if not 0 <= min(indices) <= max(indices) < len(self._stamps):
            wrong = min(indices) if min(indices) < 0 else max(indices)
            reason = f"frame {wrong} was asked for, it has frames 0 to {len(self._stamps) - 1}"
            raise VideoError(self._name, reason)
        wanted = {self._stamps[index] for index in indices}
        found = self._decode(wanted, cut, from_start=False)
        if len(found) < len(wanted) and self._keys and min(wanted) > self._keys[0]:
            # Some containers seek to a later place than was asked for.
            found |= self._decode(wanted - found.keys(), cut, from_start=True)
        missing = wanted - found.keys()
        if missing:
            number = self._stamps.index(min(missing))
            raise VideoError(self._name, f"damaged (frame {number} is missing)")
        try:
            frames = np.stack([found[self._stamps[index]] for index in indices])
        except ValueError:  # the size changes within the file
            raise VideoError(self._name, "its frames differ in size") from None
        if cut is None or frames.shape[1:3] == (cut.height, cut.width):
            return frames
        return resize_crop(frames, cut.height, cut.width, scale=cut.scale, center=cut.center)

    def _decode(self, wanted: set[int], cut: Cut | None, *, from_start: bool) -> dict[int, Frames]:
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()
        deadline = time.monotonic() + self._timeout
        last = max(wanted)
        found: dict[int, Frames] = {}
        try:
            self._seek(min(wanted), from_start)
            for frame in self._container.decode(self._stream):
                self.decoded += 1
                if time.monotonic() > deadline:
                    reason = f"decoding took more than data.timeout={self._timeout:g} seconds"
                    raise VideoError(self._name, reason)
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is None:
                    continue
                if stamp in wanted:
                    if frame.is_corrupt:
                        number = self._stamps.index(stamp)
                        raise VideoError(self._name, f"damaged (frame {number})")
                    found[stamp] = _picture(frame, reformatter, cut)
                if stamp >= last:
                    break
        except _errors() as error:
            raise VideoError(self._name, f"damaged ({_reason(error)})") from None
        return found

    def _seek(self, stamp: int, from_start: bool) -> None:
        place = 0 if from_start else bisect_right(self._keys, stamp) - 1
        target = self._keys[place] if 0 <= place < len(self._keys) else self._stamps[0]
        self._container.seek(target, stream=self._stream, backward=True)


def read_window(
    source: VideoSource,
    choose: Callable[[Track], Sequence[int]],
    cut: Cut | None = None,
    *,
    timeout: float = math.inf,
) -> Frames:
    """Opens a video and decodes the frames that `choose` picks, see `VideoFile`."""
    with VideoFile(source, timeout) as video:
        return video.read(choose(video.track), cut)


def time_window(
    track: Track, num_frames: int, stride: int, start: float, fps: float, source: str
) -> Sequence[int]:
    """The frames of a sample.

    Args:
        track: the video's frames.
        num_frames: frames wanted.
        stride: distance wanted, in frames (resampled ones where `fps` is given); lowered to the
            largest that fits.
        start: place of the window among those that fit, 0 the first, 1 the last.
        fps: rate to which the video is resampled: of each moment the frame nearest in time, so
            that frames are left out or repeated. 0 takes the frames as they are.
        source: the video's name, for the error.

    Raises:
        TooShort: it has fewer frames, or lasts less.
    """
    if not fps:
        if track.frames < num_frames:
            raise TooShort(source, f"it has {track.frames} frames, {num_frames} are needed")
        return frame_window(track.frames, num_frames, stride, start)
    length = float(track.times[-1])
    # Half a frame of tolerance: 16 frames at 8 fps fit into 15/8 s, and stamps are rounded.
    room = length + 0.5 / fps
    if num_frames > 1:
        stride = min(stride, int(room * fps / (num_frames - 1)))
    if stride < 1:
        needed = (num_frames - 1) / fps
        raise TooShort(source, f"it lasts {length:.2f} s, {needed:.2f} s are needed")
    span = (num_frames - 1) * stride / fps
    first = start * max(0.0, length - span)
    moments = first + np.arange(num_frames) * (stride / fps)
    right = np.searchsorted(track.times, moments).clip(1, max(1, track.frames - 1))
    right = np.minimum(right, track.frames - 1)
    left = np.maximum(right - 1, 0)
    nearer = moments - track.times[left] <= track.times[right] - moments
    chosen: list[int] = np.where(nearer, left, right).tolist()
    return chosen


def frame_window(available: int, num_frames: int, stride: int, start: float) -> range:
    """The frames of a sample: `num_frames` of them, `stride` apart.

    Args:
        available: frames of the clip.
        num_frames: frames wanted.
        stride: distance wanted; lowered to the largest that fits.
        start: place of the window among those that fit, 0 the first, 1 the last.

    Raises:
        ValueError: the clip has fewer than `num_frames` frames.
    """
    if available < num_frames:
        raise ValueError(f"it has {available} frames, {num_frames} are needed")
    if num_frames > 1:
        stride = min(stride, (available - 1) // (num_frames - 1))
    span = (num_frames - 1) * stride + 1
    places = available - span + 1
    first = min(int(start * places), places - 1)
    return range(first, first + span, stride)


def shown_size(source: VideoSource) -> tuple[int, int]:
    """(height, width) of a video as it is shown; decodes its first frame.

    Raises:
        VideoError: as `VideoFile`.
    """
    with VideoFile(source) as video:
        _, height, width, _ = video.read([0]).shape
    return height, width


def _target(source: VideoSource) -> tuple[str, Any]:
    """Name for messages and what PyAV opens, or VideoError."""
    name = check_source(source)
    # A colon in the name is no protocol.
    return name, source if isinstance(source, io.BytesIO) else f"file:{name}"


def _errors() -> tuple[type[Exception], ...]:
    import av

    # Of damaged headers PyAV also raises Python's own: absent rates, sizes that overflow.
    python = (ValueError, IndexError, OverflowError, ZeroDivisionError, MemoryError, OSError)
    return (av.FFmpegError, *python)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:160]


def _picture(frame: Any, reformatter: Any, cut: Cut | None) -> Frames:
    """RGB of a decoded frame, upright; scaled and cropped where `cut` makes it smaller."""
    turns = round((frame.rotation or 0) / 90) % 4
    height, width = frame.height, frame.width
    if height * width > _MAX_FRAME_PIXELS:
        raise ValueError(f"a frame of {width}x{height} pixels")
    if turns % 2:
        height, width = width, height
    scaled: tuple[int, int] | None = None
    if cut is not None:
        unit = cut.scale * min(height / cut.height, width / cut.width)
        if unit > 1:
            # At this size the window that is wanted has just the pixels of the result.
            scaled = (max(cut.height, round(height / unit)), max(cut.width, round(width / unit)))
    if scaled is None:
        picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.rot90(picture, turns) if turns else picture
    shape = scaled if turns % 2 == 0 else scaled[::-1]
    picture = reformatter.reformat(
        frame,
        format="rgb24",
        height=shape[0],
        width=shape[1],
        interpolation="BILINEAR",
        threads=1,  # starting threads takes longer than a small picture
    ).to_ndarray()
    if turns:
        picture = np.rot90(picture, turns)
    assert cut is not None
    top = round(cut.center[0] * (scaled[0] - cut.height))
    left = round(cut.center[1] * (scaled[1] - cut.width))
    return np.ascontiguousarray(picture[top : top + cut.height, left : left + cut.width])
