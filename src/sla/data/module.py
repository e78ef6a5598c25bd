"""The stream of training samples and the fixed validation windows, as a LightningDataModule.

Training never ends and has no state: sample i is a pure function of (seed, i). A seeded permutation
of the clips per pass decides which clip (every clip once per pass), a generator seeded by (seed, i)
decides everything else. With batch size b on w ranks, a step reads the next b * w indices, and rank
r takes the r-th run of b of them: the ranks' batches, joined in order, are the batch that one
process with batch size b * w would read. Hence exact resume (only the number of consumed samples is
stored; what workers had fetched ahead does not matter), equality of one and many processes, and
paired samples across experiments.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypedDict

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sla.data.manifest import NO_DATA, Clip, ClipSet, DataError, FaultLog, load_clips
from sla.data.video import Frames, VideoError, VideoInfo, read_frames, resize_crop, to_tensor
from sla.files import sha256

log = logging.getLogger(__name__)

# What a random generator is for; part of its seed, so that the draws are independent.
_ORDER, _SAMPLE = 0, 1


@dataclass
class DataConfig:
    """Which clips, and how samples are cut from them. The only home of these defaults.

    Attributes:
        root: folder of the set.
        manifest: JSONL or CSV file in `root` (or a path); empty: manifest.jsonl or manifest.csv in
            `root` if there is one, else every video below `root` with a .txt caption beside it.
        num_frames: frames of a sample, T.
        height: height of a sample in pixels.
        width: width of a sample in pixels.
        frame_stride: [lowest, highest] distance between sampled source frames in training, drawn
            evenly, lowered where a clip is too short for it; [n] for always n. Validation takes the
            lowest.
        crop_scale: [lowest, highest] side of the training crop relative to the largest window of
            the sample's aspect ratio, drawn evenly; its place is drawn evenly too. [1.0] for no
            scaling. Validation takes the largest centre window.
        horizontal_flip: mirror half of the training samples. Off: captions may say left or right.
        caption_dropout: share of training samples whose caption is replaced by the empty one, for
            classifier-free guidance.
        batch_size: samples per step on each rank.
        num_workers: loader processes per rank; 0 reads in the main process, which is fastest for
            the demo set once its clips are cached.
        cache_mib: MiB of decoded clips that each process keeps; 0 keeps none. The demo set needs
            about 95.
        seed: of the order and of every random choice.
        val_fraction: share of clips that validate where the manifest does not say (by a hash of the
            clip's id).
        val_clips: validation clips that are used, evenly spaced over the list; 0 for all.
        val_windows: evenly spaced windows per validation clip; 1 takes the middle.
        max_bad_fraction: tolerated share of clips that cannot be used, in [0, 1); more end the run.
        probe_videos: open every video at set-up (a few milliseconds each), so that faults are known
            before training; off, they are met when a clip is first used.
    """

    root: str = "data/demo"
    manifest: str = ""
    num_frames: int = 16
    height: int = 64
    width: int = 64
    frame_stride: list[int] = field(default_factory=lambda: [1, 2])
    crop_scale: list[float] = field(default_factory=lambda: [0.85, 1.0])
    horizontal_flip: bool = False
    caption_dropout: float = 0.1
    batch_size: int = 4
    num_workers: int = 0
    cache_mib: int = 256
    seed: int = 0
    val_fraction: float = 0.1
    val_clips: int = 0
    val_windows: int = 1
    max_bad_fraction: float = 0.1
    probe_videos: bool = True

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "batch_size", "val_windows"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("num_workers", "cache_mib", "seed", "val_clips"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("caption_dropout", "val_fraction"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        limit = self.max_bad_fraction
        _require("max_bad_fraction", limit, 0 <= limit < 1, "in [0, 1)")
        stride, scale = self.frame_stride, self.crop_scale
        ordered = len(stride) in (1, 2) and 1 <= stride[0] <= stride[-1]
        _require("frame_stride", stride, ordered, "[n] or [low, high] with 1 <= low <= high")
        ordered = len(scale) in (1, 2) and 0 < scale[0] <= scale[-1] <= 1
        _require("crop_scale", scale, ordered, "[s] or [low, high] with 0 < low <= high <= 1")


def _require(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"data.{name} must be {allowed}, got {value!r}")


class VideoBatch(TypedDict):
    """What the loaders yield.

    video: float32 (B, 3, T, H, W) in [-1, 1].
    caption: B strings; empty where dropped.
    sample_index: int64 (B,): place in the training stream, or in the list of validation windows.
    clip_id: B strings.
    weight: float32 (B,): 1; 0 for the filling of validation batches, see `VideoDataModule`.
    """

    video: Tensor
    caption: list[str]
    sample_index: Tensor
    clip_id: list[str]
    weight: Tensor


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


@lru_cache(maxsize=4)
def pass_order(seed: int, pass_index: int, clips: int) -> np.ndarray:
    """int64 (clips,): the order of the clips in one pass over the set."""
    order = np.random.default_rng([seed, _ORDER, pass_index]).permutation(clips)
    order.flags.writeable = False  # it is shared
    return order


def draw_sample(config: DataConfig, clips: int, index: int) -> SampleDraw:
    """The random choices of training sample `index`: a pure function of (config, clips, index).

    All numbers are drawn whatever the config, so that changing one option leaves the others' draws.
    """
    pass_index, place = divmod(index, clips)
    u = np.random.default_rng([config.seed, _SAMPLE, index]).random(7)
    low, high = config.frame_stride[0], config.frame_stride[-1]
    small, large = config.crop_scale[0], config.crop_scale[-1]
    return SampleDraw(
        clip=int(pass_order(config.seed, pass_index, clips)[place]),
        stride=low + int(u[0] * (high - low + 1)),
        start=float(u[1]),
        scale=float(small + u[2] * (large - small)),
        center=(float(u[3]), float(u[4])),
        flip=config.horizontal_flip and bool(u[5] < 0.5),
        drop_caption=bool(u[6] < config.caption_dropout),
    )


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


class ClipReader:
    """Reads windows of clips; keeps decoded clips up to `cache_mib` in memory."""

    def __init__(self, cache_mib: int) -> None:
        self._left = cache_mib * 2**20
        self._cache: dict[str, Frames] = {}

    def __getstate__(self) -> dict[str, int | dict[str, Frames]]:
        # A spawned worker starts with an empty cache instead of a pickled one.
        return {"_left": self._left + sum(f.nbytes for f in self._cache.values()), "_cache": {}}

    def read(self, clip: Clip, num_frames: int, stride: int, start: float) -> Frames:
        """uint8 (num_frames, H, W, 3) of the clip, see `frame_window`. Raises VideoError.

        A clip that fits into the cache is decoded as a whole, so it is bad if any frame is.
        """
        frames = self._cache.get(clip.id)
        if frames is None:
            keep = False

            def choose(info: VideoInfo) -> range:
                nonlocal keep
                window = _window(clip, info.frames, num_frames, stride, start)
                keep = info.frames * info.height * info.width * 3 <= self._left
                return range(info.frames) if keep else window

            frames = read_frames(clip.video, choose)
            if not keep:
                return frames
            self._cache[clip.id] = frames
            self._left -= frames.nbytes
        window = _window(clip, len(frames), num_frames, stride, start)
        return frames[window.start : window.stop : window.step]


def _window(clip: Clip, available: int, num_frames: int, stride: int, start: float) -> range:
    try:
        return frame_window(available, num_frames, stride, start)
    except ValueError as error:
        raise VideoError(str(clip.video), str(error)) from None


Sample = dict[str, Any]


class TrainStream(Dataset[Sample]):
    """Training sample by index, any index from 0 on; see the head of this file.

    A clip that cannot be read is reported once and replaced by the next readable clip of the same
    pass, with the sample's own draws. It is tried again whenever its turn comes, so that samples
    depend on the files alone and not on what was read before.

    Raises:
        DataError: from `__getitem__`, when the share of bad clips exceeds the limit.
    """

    def __init__(self, clips: Sequence[Clip], config: DataConfig, faults: FaultLog) -> None:
        self.clips = clips
        self.config = config
        self.faults = faults
        self.reader = ClipReader(config.cache_mib)

    def __getitem__(self, index: int) -> Sample:
        config, count = self.config, len(self.clips)
        draw = draw_sample(config, count, index)
        order = pass_order(config.seed, index // count, count)
        for step in range(count):
            position = int(order[(index + step) % count])
            clip = self.clips[position]
            try:
                frames = self.reader.read(clip, config.num_frames, draw.stride, draw.start)
            except VideoError as error:
                self.faults.report(position, clip.id, error.reason)
                continue
            frames = resize_crop(
                frames, config.height, config.width, scale=draw.scale, center=draw.center
            )
            if draw.flip:
                frames = np.ascontiguousarray(frames[:, :, ::-1])
            caption = "" if draw.drop_caption else clip.caption
            return _sample(frames, caption, index, clip.id, 1.0)
        raise DataError(f"none of the {count} training clips can be read: {NO_DATA}")


class ValidationWindows(Dataset[Sample]):
    """Fixed windows of the validation clips: `val_windows` per clip, largest centre crop.

    Index j is window `j % val_windows` of clip `j // val_windows`. Indices from `len` on are
    filling (weight 0), and so are clips that cannot be read, which are reported: nothing else is
    evaluated in their place.
    """

    def __init__(
        self, clips: Sequence[Clip], config: DataConfig, faults: FaultLog, offset: int
    ) -> None:
        self.clips = clips
        self.config = config
        self.faults = faults
        self.offset = offset  # of these clips in the fault log
        self.reader = ClipReader(config.cache_mib)

    def __len__(self) -> int:
        return len(self.clips) * self.config.val_windows

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        if index >= len(self):
            return self._filling(index, "")
        position, window = divmod(index, config.val_windows)
        clip = self.clips[position]
        start = (window + 0.5) / config.val_windows
        try:
            frames = self.reader.read(clip, config.num_frames, config.frame_stride[0], start)
        except VideoError as error:
            self.faults.report(self.offset + position, clip.id, error.reason)
            return self._filling(index, clip.id)
        frames = resize_crop(frames, config.height, config.width)
        return _sample(frames, clip.caption, index, clip.id, 1.0)

    def _filling(self, index: int, clip_id: str) -> Sample:
        config = self.config
        gray = np.full((config.num_frames, config.height, config.width, 3), 127, dtype=np.uint8)
        return _sample(gray, "", index, clip_id, 0.0)


def _sample(frames: Frames, caption: str, index: int, clip_id: str, weight: float) -> Sample:
    return {
        "video": to_tensor(frames),
        "caption": caption,
        "sample_index": index,
        "clip_id": clip_id,
        "weight": weight,
    }


def collate(samples: Sequence[Sample]) -> VideoBatch:
    """Stacks samples into a `VideoBatch`."""
    return {
        "video": torch.stack([s["video"] for s in samples]),
        "caption": [s["caption"] for s in samples],
        "sample_index": torch.tensor([s["sample_index"] for s in samples], dtype=torch.int64),
        "clip_id": [s["clip_id"] for s in samples],
        "weight": torch.tensor([s["weight"] for s in samples], dtype=torch.float32),
    }


class StreamBatches(Sampler[list[int]]):
    """Endless batches of training indices for one rank, from sample `start` of the stream on.

    Batch g of rank r: `start + (g * world_size + r) * batch_size` and the batch_size - 1 after it.
    """

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start = start
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.world_size * self.batch_size


class RankShare(Sampler[int]):
    """Indices rank, rank + world_size, ... of a list, filled up to be as many on every rank."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, -(-length // world_size) * world_size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class VideoDataModule(lightning.LightningDataModule):
    """Video-caption batches (`VideoBatch`) from the demo set, a manifest, or a folder.

    The training loader is endless: limit the run by `max_steps`, give `val_check_interval` in
    steps, and set `use_distributed_sampler=False` (ranks are dealt with here). For exact resume the
    training loop calls `set_consumed` after every step; checkpoints store that number, and the next
    `train_dataloader()` starts there.

    Validation windows are dealt out to the ranks in turn, so each is evaluated once. All ranks get
    the same number of batches, or collective operations inside a step would hang; where the windows
    do not divide evenly, the rest is filling with `weight` 0. A metric is `sum(weight * value) /
    sum(weight)`, both sums taken over all ranks.

    Args:
        config: see `DataConfig`.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config
        self.start_sample = 0
        self._consumed = 0
        self._clips: ClipSet | None = None
        self._faults: FaultLog | None = None

    # Set-up

    def setup(self, stage: str | None = None) -> None:
        """Reads the list of clips (once).

        Raises:
            DataError: no clips, no training or no validation clips, or too many bad ones.
        """
        if self._clips is not None:
            return
        config = self.config
        clips = load_clips(
            config.root,
            config.manifest,
            val_fraction=config.val_fraction,
            max_bad_fraction=config.max_bad_fraction,
            min_frames=config.num_frames,
            probe_videos=config.probe_videos,
        )
        if not clips.train:
            short = f"; {len(clips.short)} are shorter than data.num_frames={config.num_frames}"
            raise DataError(
                f"no training clips in {config.root} ({len(clips.val)} validate"
                f"{short if clips.short else ''}): {NO_DATA}"
            )
        everything = len(clips.train) + len(clips.val)
        self._faults = FaultLog(everything, clips.total, clips.faults, config.max_bad_fraction)
        self._clips = clips
        log.info(
            "%s: %d training and %d validation clips, %d left out",
            config.root,
            len(clips.train),
            len(clips.val),
            len(clips.faults) + len(clips.short),
        )

    @property
    def clips(self) -> ClipSet:
        """The clips, after `setup`."""
        self.setup()
        assert self._clips is not None
        return self._clips

    @property
    def faults(self) -> FaultLog:
        """The count of clips that could not be read, after `setup`."""
        self.setup()
        assert self._faults is not None
        return self._faults

    @property
    def val_clips(self) -> list[Clip]:
        """The validation clips that are used (`config.val_clips` of them, evenly spaced)."""
        clips = self.clips.val
        wanted = self.config.val_clips
        if not 0 < wanted < len(clips):
            return clips
        return [clips[int((k + 0.5) * len(clips) / wanted)] for k in range(wanted)]

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Endless batches from `start_sample` on."""
        rank, world_size = self._rank()
        stream = TrainStream(self.clips.train, self.config, self.faults)
        batches = StreamBatches(self.start_sample, self.config.batch_size, rank, world_size)
        return self._loader(stream, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The fixed validation windows, this rank's share; an empty list if there are none."""
        rank, world_size = self._rank()
        clips = self.val_clips
        if not clips:
            return []
        windows = ValidationWindows(clips, self.config, self.faults, len(self.clips.train))
        share = RankShare(len(windows), rank, world_size)
        return self._loader(windows, sampler=share, batch_size=self.config.batch_size)

    def _loader(self, dataset: Dataset[Sample], **how: Any) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.config.num_workers,
            persistent_workers=self.config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **how,
        )

    def _rank(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    # Resume

    def set_consumed(self, samples: int) -> None:
        """Tells how many samples of the stream training has used, over all ranks and steps."""
        if samples < 0:
            raise ValueError(f"samples must be at least 0, got {samples}")
        self._consumed = samples

    @property
    def consumed(self) -> int:
        """Samples of the stream that training has used."""
        return self._consumed

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: the position, and what the stream depends on besides."""
        return {
            "consumed_samples": self._consumed,
            "seed": self.config.seed,
            "train_clips": sha256("\n".join(clip.id for clip in self.clips.train).encode()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the stream where the checkpoint left it.

        Another seed or another list of training clips makes another stream; then a warning says
        that the continuation is not exact.
        """
        self._consumed = self.start_sample = int(state_dict["consumed_samples"])
        now = self.state_dict()
        for name in ("seed", "train_clips"):
            if state_dict.get(name) != now[name]:
                log.warning(
                    "the checkpoint's data had another %s: samples from %d on are not the ones the "
                    "interrupted run would have seen",
                    name,
                    self._consumed,
                )
