"""Training samples and validation windows out of shards, and the random choices of any sample."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sla.data.decode import Cut, TooShort, read_window, time_window
from sla.data.faults import FailureCount
from sla.data.manifest import NO_DATA, DataError
from sla.data.order import SAMPLE, BucketOrder, Order
from sla.data.shards import ShardSource
from sla.data.video import Frames, VideoError, VideoSource, resize_crop, to_tensor

if TYPE_CHECKING:
    from sla.data.module import DataConfig

Sample = dict[str, Any]


@dataclass(frozen=True)
class SampleDraw:
    """The random choices of a training sample, made before the clip is opened.

    Attributes:
        clip: position in the list of training clips.
        stride: distance between frames that is wanted.
        start: where the window lies in time, 0 the first place it fits, 1 the last.
        scale: side of the crop relative to the largest.
        center: where the crop lies, (vertical, horizontal), each in [0, 1].
        flip: mirror the frames.
        drop_caption: replace the caption by the empty one.
    """

    clip: int
    stride: int
    start: float
    scale: float
    center: tuple[float, float]
    flip: bool
    drop_caption: bool


def choose(config: DataConfig, clip: int, u: NDArray[np.float64]) -> SampleDraw:
    """The choices that seven numbers in [0, 1) stand for.

    All are drawn whatever the config, so that changing one option leaves the others' draws.
    """
    low, high = config.frame_stride[0], config.frame_stride[-1]
    small, large = config.crop_scale[0], config.crop_scale[-1]
    return SampleDraw(
        clip=clip,
        stride=low + int(u[0] * (high - low + 1)),
        start=float(u[1]),
        scale=float(small + u[2] * (large - small)),
        center=(float(u[3]), float(u[4])),
        flip=config.horizontal_flip and bool(u[5] < 0.5),
        drop_caption=bool(u[6] < config.caption_dropout),
    )


def bucket_sizes(config: DataConfig) -> list[tuple[int, int]]:
    """(height, width) of each bucket."""
    return [(int(h), int(w)) for h, w in (size.split("x") for size in config.buckets)]


def size_of(config: DataConfig, order: Order, index: int) -> tuple[int, int]:
    """(height, width) of training sample `index`: the same throughout a batch."""
    if isinstance(order, BucketOrder):
        return bucket_sizes(config)[order.bucket(index)]
    return config.height, config.width


def read_cut(
    source: VideoSource, config: DataConfig, stride: int, start: float, cut: Cut, name: str
) -> Frames:
    """Decodes a sample's frames at its size: uint8 (num_frames, cut.height, cut.width, 3).

    Raises:
        TooShort: fewer frames than a sample has.
        VideoError: the video cannot be read.
    """
    frames = read_window(
        source,
        lambda track: time_window(track, config.num_frames, stride, start, config.fps, name),
        cut if config.decode_to_size else None,
        timeout=config.timeout,
    )
    if config.decode_to_size:
        return frames
    return resize_crop(frames, cut.height, cut.width, scale=cut.scale, center=cut.center)


def make_sample(frames: Frames, caption: str, index: int, clip_id: str, weight: float) -> Sample:
    """A sample as the loaders stack it into batches."""
    return {
        "video": to_tensor(frames),
        "caption": caption,
        "sample_index": index,
        "clip_id": clip_id,
        "weight": weight,
    }


class ShardStream(Dataset[Sample]):
    """Training sample by index, any index from 0 on.

    Which sample it is, is a function of the order; how it is cut, of (seed, pass, position in the
    set). One that cannot be read is counted, named once in the log and skipped: the next readable
    one in its neighbourhood takes the place, so that batches stay full and indices keep their
    meaning.

    Raises:
        DataError: from `__getitem__`, when the share of failures exceeds the limit.
    """

    def __init__(
        self, source: ShardSource, order: Order, config: DataConfig, faults: FailureCount
    ) -> None:
        self.source = source
        self.order = order
        self.config = config
        self.faults = faults

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        pass_index, first = self.order.place(index)
        height, width = size_of(config, self.order, index)
        for position in itertools.chain([first], self.order.instead(index)):
            random = np.random.default_rng([config.seed, SAMPLE, pass_index, position])
            draw = choose(config, position, random.random(7))
            cut = Cut(height, width, draw.scale, draw.center)
            try:
                raw = self.source.read(position)
                frames = read_cut(raw.video, config, draw.stride, draw.start, cut, raw.id)
            except TooShort as error:
                self.faults.too_short(position, self.source.name(position), error.reason)
                continue
            except VideoError as error:
                self.faults.report(position, self.source.name(position), error.reason)
                continue
            self.faults.succeeded(position)
            if draw.flip:
                frames = np.ascontiguousarray(frames[:, :, ::-1])
            caption = "" if draw.drop_caption else raw.caption
            return make_sample(frames, caption, index, raw.id, 1.0)
        raise DataError(f"none of the {len(self.source)} training samples can be read: {NO_DATA}")


class ShardWindows(Dataset[Sample]):
    """Fixed windows of validation samples, as `sla.data.module.ValidationWindows` are of clips.

    Args:
        source: the validation samples.
        positions: those that are used.
        config: how they are cut.
        faults: where failures are counted.
        offset: of these samples in the count of failures.
    """

    def __init__(
        self,
        source: ShardSource,
        positions: list[int],
        config: DataConfig,
        faults: FailureCount,
        offset: int,
    ) -> None:
        self.source = source
        self.chosen = positions
        self.config = config
        self.faults = faults
        self.offset = offset

    def __len__(self) -> int:
        return len(self.chosen) * self.config.val_windows

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        if index >= len(self):
            return filling(config, index, "")
        place, window = divmod(index, config.val_windows)
        position = self.chosen[place]
        start = (window + 0.5) / config.val_windows
        cut = Cut(config.height, config.width)
        try:
            raw = self.source.read(position)
            frames = read_cut(raw.video, config, config.frame_stride[0], start, cut, raw.id)
        except TooShort as error:
            name = self.source.name(position)
            self.faults.too_short(self.offset + position, name, error.reason)
            return filling(config, index, name)
        except VideoError as error:
            name = self.source.name(position)
            self.faults.report(self.offset + position, name, error.reason)
            return filling(config, index, name)
        self.faults.succeeded(self.offset + position)
        return make_sample(frames, raw.caption, index, raw.id, 1.0)


def filling(config: DataConfig, index: int, clip_id: str) -> Sample:
    """A gray sample of no weight, where there is nothing to evaluate."""
    gray = np.full((config.num_frames, config.height, config.width, 3), 127, dtype=np.uint8)
    return make_sample(gray, "", index, clip_id, 0.0)
