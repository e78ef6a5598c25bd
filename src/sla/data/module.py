"""The stream of training samples and the fixed validation windows, as a LightningDataModule.

Training never ends and has no state: sample i is a pure function of (seed, i). A seeded permutation
of the clips per pass decides which clip (every clip once per pass), a generator seeded by (seed, i)
decides everything else. With batch size b on w ranks, a step reads the next b * w indices, and rank
r takes the r-th run of b of them: the ranks' batches, joined in order, are the batch that one
process with batch size b * w would read. Hence exact resume (only the number of consumed samples is
stored; what workers had fetched ahead does not matter), equality of one and many processes, and
paired samples across experiments. Shards are read in another order (`sla.data.order`), which is a
pure function of (seed, i) too.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sla.data.decode import Cut, Track, read_window, shown_size, time_window
from sla.data.faults import FailureCount
from sla.data.latents import CachedTrainStream, CachedWindows, LatentCache
from sla.data.manifest import NO_DATA, Clip, ClipSet, DataError, FaultLog, load_clips
from sla.data.order import (
    SAMPLE,
    BucketOrder,
    Order,
    PassOrder,
    ShardOrder,
    nearest_bucket,
    pass_order,
)
from sla.data.shards import Shard, ShardSource, ShardStore, plan_shards
from sla.data.streaming import (
    Sample,
    SampleDraw,
    ShardStream,
    ShardWindows,
    bucket_sizes,
    choose,
    filling,
    make_sample,
    size_of,
)
from sla.data.video import Frames, VideoError, resize_crop
from sla.files import sha256

log = logging.getLogger(__name__)
T = TypeVar("T")

SOURCES = ("manifest", "folder", "webdataset", "latents")


@dataclass
class DataConfig:
    """Which clips, and how samples are cut from them. The only home of these defaults.

    Attributes:
        root: folder of the set.
        manifest: JSONL, CSV or Parquet file in `root` (or a path); empty: manifest.jsonl, .csv or
            .parquet in `root` if there is one, else every video below `root` with a .txt caption
            beside it.
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
        source: where samples come from: `manifest` (a list of videos, by `root` and `manifest`),
            `folder` (every video below `root`, whatever lists lie there), `webdataset` (tar files,
            by `shards`) or `latents` (a cache of encoded samples, by `cache`).
        cache: folder of a latent cache: `make latents` writes it, the source `latents` reads it.
        verify_cache: compare a shard's checksum when it is first opened, which reads it as a whole.
        video_field: manifest field (column) with the video's path.
        caption_field: field with the caption, of a manifest and of the .json of a shard's sample.
        fps: frames per second to which videos are resampled, by their time stamps; `frame_stride`
            then counts resampled frames. 0 takes the frames as they are.
        decode_to_size: resize while colours are converted, so that no frame exists at its own size:
            faster and smaller for large videos, with slightly other pixels. Clips are not cached.
        buckets: sizes "HEIGHTxWIDTH"; a sample goes to the size that is nearest in aspect ratio,
            and a batch is of one size. Empty: all samples are `height` x `width`. Validation is of
            that size in any case.
        shards: tar files of the source `webdataset`: paths and URLs, with `*` and
            `{00000..00009}`; relative to the working folder.
        val_shards: the same for validation; empty: `val_fraction` of the samples of `shards`.
        shuffle_window: of the source `webdataset`: samples of a lane among which the order is
            random. Of the other sources the order of a pass is a permutation of all.
        shard_lanes: sequences of shards that are read side by side. A worker has shards of its own
            if this is a multiple of ranks x workers. The order depends on it, and on no number of
            ranks or workers.
        shard_cache: folder of what was found out of shards (names and places of their samples) and
            of copies of remote ones.
        shard_cache_gib: GiB of copies of remote shards that are kept.
        url_retries: how often a remote shard is asked for again.
        timeout: seconds without progress after which a transfer or the decoding of a sample fails.
        max_file_mib: MiB of the largest video in a shard that is read.
        max_failure_share: tolerated share of the samples tried that cannot be read, of the source
            `webdataset`, in [0, 1); more end the run. (Of a list, see `max_bad_fraction`.)
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
    source: str = "manifest"
    cache: str = ""
    verify_cache: bool = True
    video_field: str = "video"
    caption_field: str = "caption"
    fps: float = 0.0
    decode_to_size: bool = False
    buckets: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    val_shards: list[str] = field(default_factory=list)
    shuffle_window: int = 1024
    shard_lanes: int = 8
    shard_cache: str = "data/cache"
    shard_cache_gib: float = 20.0
    url_retries: int = 4
    timeout: float = 60.0
    max_file_mib: int = 1024
    max_failure_share: float = 0.1

    def __post_init__(self) -> None:
        _require("source", self.source, self.source in SOURCES, f"one of {', '.join(SOURCES)}")
        named = bool(self.cache) or self.source != "latents"
        _require("cache", self.cache, named, "the folder of a latent cache (`make latents`)")
        for name in ("num_frames", "height", "width", "batch_size", "val_windows"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("num_workers", "cache_mib", "seed", "val_clips"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("caption_dropout", "val_fraction"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("max_bad_fraction", "max_failure_share"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("shuffle_window", "shard_lanes", "max_file_mib"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("fps", "url_retries", "shard_cache_gib"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _require("timeout", self.timeout, self.timeout > 0, "positive")
        given = bool(self.shards) or self.source != "webdataset"
        _require("shards", self.shards, given, "at least one tar file for data.source=webdataset")
        sizes = all(re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", size) for size in self.buckets)
        _require("buckets", self.buckets, sizes, 'sizes like "480x832" (height x width)')
        _require("buckets", self.buckets, len({*self.buckets}) == len(self.buckets), "distinct")
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

    video: float32 (B, 3, T, H, W) in [-1, 1]; from a latent cache latents (B, C, T', H', W').
    caption: B strings; empty where dropped.
    sample_index: int64 (B,): place in the training stream, or in the list of validation windows.
    clip_id: B strings.
    weight: float32 (B,): 1; 0 for the filling of validation batches, see `VideoDataModule`.

    From a latent cache only, of the captions (empty where dropped):
    token_ids: int64 (B, L), where the text encoder is trained with the model.
    text: float32 (B, L, text_dim), where it is frozen.
    text_mask: bool (B, L), True for real tokens.
    """

    video: Tensor
    caption: list[str]
    sample_index: Tensor
    clip_id: list[str]
    weight: Tensor
    token_ids: NotRequired[Tensor]
    text: NotRequired[Tensor]
    text_mask: NotRequired[Tensor]


def draw_sample(config: DataConfig, clips: int, index: int) -> SampleDraw:
    """The random choices of training sample `index`: a pure function of (config, clips, index)."""
    pass_index, place = divmod(index, clips)
    clip = int(pass_order(config.seed, pass_index, clips)[place])
    return choose(config, clip, _numbers(config, index))


def _numbers(config: DataConfig, index: int) -> np.ndarray:
    return np.random.default_rng([config.seed, SAMPLE, index]).random(7)


class ClipReader:
    """Reads windows of clips; keeps decoded clips up to `cache_mib` in memory.

    Args:
        config: how clips are read.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        # A clip that was resized while it was decoded is of one sample alone.
        self._left = 0 if config.decode_to_size else config.cache_mib * 2**20
        self._cache: dict[str, tuple[Track, Frames]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker starts with an empty cache instead of a pickled one.
        kept = sum(frames.nbytes for _, frames in self._cache.values())
        return {**self.__dict__, "_left": self._left + kept, "_cache": {}}

    def read(self, clip: Clip, stride: int, start: float, cut: Cut) -> Frames:
        """uint8 (num_frames, cut.height, cut.width, 3) of the clip, see `time_window`.

        A clip that fits into the cache is decoded as a whole, so it is bad if any frame is.

        Raises:
            VideoError: it cannot be read, or is too short.
        """
        config = self._config

        def window(track: Track) -> Sequence[int]:
            name = str(clip.video)
            return time_window(track, config.num_frames, stride, start, config.fps, name)

        if config.decode_to_size:
            return read_window(clip.video, window, cut, timeout=config.timeout)
        cached = self._cache.get(clip.id)
        if cached is None:
            opened: Track | None = None

            def which(track: Track) -> Sequence[int]:
                nonlocal opened
                chosen = window(track)
                if track.frames * track.height * track.width * 3 > self._left:
                    return chosen
                opened = track
                return range(track.frames)

            frames = read_window(clip.video, which, timeout=config.timeout)
            if opened is None:
                return self._crop(frames, cut)
            cached = self._cache[clip.id] = opened, frames
            self._left -= frames.nbytes
        track, frames = cached
        chosen = window(track)
        if isinstance(chosen, range):  # a view, no copy
            return self._crop(frames[chosen.start : chosen.stop : chosen.step], cut)
        return self._crop(frames[list(chosen)], cut)

    @staticmethod
    def _crop(frames: Frames, cut: Cut) -> Frames:
        return resize_crop(frames, cut.height, cut.width, scale=cut.scale, center=cut.center)


class TrainStream(Dataset[Sample]):
    """Training sample by index, any index from 0 on; see the head of this file.

    A clip that cannot be read is reported once and replaced by the next readable clip of the same
    pass, with the sample's own draws. It is tried again whenever its turn comes, so that samples
    depend on the files alone and not on what was read before.

    Args:
        clips: the training clips.
        config: how samples are cut.
        faults: where bad clips are counted.
        order: of the clips; a permutation per pass if None.

    Raises:
        DataError: from `__getitem__`, when the share of bad clips exceeds the limit.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        config: DataConfig,
        faults: FaultLog | FailureCount,
        order: Order | None = None,
    ) -> None:
        self.clips = clips
        self.config = config
        self.faults = faults
        self.order = order or PassOrder(config.seed, len(clips))
        self.reader = ClipReader(config)

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        first = self.order.place(index)[1]
        draw = choose(config, first, _numbers(config, index))
        cut = Cut(*size_of(config, self.order, index), draw.scale, draw.center)
        for position in itertools.chain([first], self.order.instead(index)):
            clip = self.clips[position]
            try:
                frames = self.reader.read(clip, draw.stride, draw.start, cut)
            except VideoError as error:
                self.faults.report(position, clip.id, error.reason)
                continue
            if draw.flip:
                frames = np.ascontiguousarray(frames[:, :, ::-1])
            caption = "" if draw.drop_caption else clip.caption
            return make_sample(frames, caption, index, clip.id, 1.0)
        raise DataError(f"none of the {len(self.clips)} training clips can be read: {NO_DATA}")


class ValidationWindows(Dataset[Sample]):
    """Fixed windows of the validation clips: `val_windows` per clip, largest centre crop.

    Index j is window `j % val_windows` of clip `j // val_windows`. Indices from `len` on are
    filling (weight 0), and so are clips that cannot be read, which are reported: nothing else is
    evaluated in their place.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        config: DataConfig,
        faults: FaultLog | FailureCount,
        offset: int,
    ) -> None:
        self.clips = clips
        self.config = config
        self.faults = faults
        self.offset = offset  # of these clips in the fault log
        self.reader = ClipReader(config)

    def __len__(self) -> int:
        return len(self.clips) * self.config.val_windows

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        if index >= len(self):
            return filling(config, index, "")
        position, window = divmod(index, config.val_windows)
        clip = self.clips[position]
        start = (window + 0.5) / config.val_windows
        try:
            cut = Cut(config.height, config.width)
            frames = self.reader.read(clip, config.frame_stride[0], start, cut)
        except VideoError as error:
            self.faults.report(self.offset + position, clip.id, error.reason)
            return filling(config, index, clip.id)
        return make_sample(frames, clip.caption, index, clip.id, 1.0)


def collate(samples: Sequence[Sample]) -> VideoBatch:
    """Stacks samples into a `VideoBatch`."""
    batch: VideoBatch = {
        "video": torch.stack([s["video"] for s in samples]),
        "caption": [s["caption"] for s in samples],
        "sample_index": torch.tensor([s["sample_index"] for s in samples], dtype=torch.int64),
        "clip_id": [s["clip_id"] for s in samples],
        "weight": torch.tensor([s["weight"] for s in samples], dtype=torch.float32),
    }
    for name in ("token_ids", "text", "text_mask"):
        if name in samples[0]:
            batch[name] = torch.stack([s[name] for s in samples])  # type: ignore[literal-required]
    return batch


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

    Attributes:
        ranks_per_sample: P neighbouring ranks are given the same samples; may be set before the
            loaders are made.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config
        self.ranks_per_sample = 1
        self.start_sample = 0
        self._consumed = 0
        self._clips: ClipSet | None = None
        self._faults: FaultLog | FailureCount | None = None
        self._order: Order | None = None
        self._shards: tuple[ShardSource, ShardSource] | None = None
        self._cache: LatentCache | None = None

    # Set-up

    def setup(self, stage: str | None = None) -> None:
        """Reads the list of clips (once).

        Raises:
            DataError: no clips, no training or no validation clips, or too many bad ones.
        """
        if self._clips is not None or self._shards is not None:
            return
        config = self.config
        if config.source == "webdataset":
            self._set_up_shards()
            return
        if config.source == "latents":
            cache = self.cache
            cache.check_cut(config)
            self._faults = FaultLog(1, cache.clips.total, {}, config.max_bad_fraction)
            self._clips = cache.clips
            log.info(
                "%s: latents of %d training and %d validation clips, %d passes",
                config.cache,
                len(cache.clips.train),
                len(cache.clips.val),
                cache.passes,
            )
            if config.buckets:
                self._order = cache.order(config)
            return
        clips = load_clips(
            config.root,
            config.manifest,
            val_fraction=config.val_fraction,
            max_bad_fraction=config.max_bad_fraction,
            # Of resampled videos only the time stamps tell whether they are too short.
            min_frames=1 if config.fps else config.num_frames,
            probe_videos=config.probe_videos,
            video_field=config.video_field,
            caption_field=config.caption_field,
            folder_only=config.source == "folder",
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
        if config.buckets:
            shapes = [_shape(clip) for clip in clips.train]
            base = PassOrder(config.seed, len(clips.train))
            self._order = BucketOrder(base, self._buckets(shapes), config.batch_size)
        log.info(
            "%s: %d training and %d validation clips, %d left out",
            config.root,
            len(clips.train),
            len(clips.val),
            len(clips.faults) + len(clips.short),
        )

    def _set_up_shards(self) -> None:
        config = self.config
        store = ShardStore(
            config.shard_cache,
            limit_gib=config.shard_cache_gib,
            retries=config.url_retries,
            timeout=config.timeout,
        )
        rank, world_size = self._rank()
        plan = plan_shards(
            config.shards,
            config.val_shards,
            store,
            val_fraction=config.val_fraction,
            max_failure_share=config.max_failure_share,
            sizes=bool(config.buckets),
            first=rank,
        )
        if not plan.train:
            raise DataError(f"no training samples in data.shards={config.shards}: {NO_DATA}")

        def source(shards: list[Shard]) -> ShardSource:
            return ShardSource(
                shards,
                store,
                caption_field=config.caption_field,
                max_file_mib=config.max_file_mib,
            )

        train, val = source(plan.train), source(plan.val)
        order: Order = ShardOrder(
            config.seed,
            train.counts,
            lanes=config.shard_lanes,
            run=config.batch_size,
            window=config.shuffle_window,
        )
        if config.buckets:
            shapes = [tuple(row) for s in plan.train if s.sizes is not None for row in s.sizes]
            order = BucketOrder(order, self._buckets(shapes), config.batch_size)
        workers = world_size * max(1, config.num_workers)
        if config.shard_lanes % workers:
            log.info(
                "data.shard_lanes=%d is no multiple of ranks x workers, %d: workers share shards",
                config.shard_lanes,
                workers,
            )
        self._order = order
        self._faults = FailureCount(len(train) + len(val), config.max_failure_share, plan.faults)
        self._shards = train, val
        log.info(
            "%d shards: %d training and %d validation samples",
            len({shard.url for shard in [*plan.train, *plan.val]}),
            len(train),
            len(val),
        )

    def _buckets(self, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
        """int8: bucket of each sample; of those whose size is not known, the first."""
        sizes = bucket_sizes(self.config)
        found = [nearest_bucket(h, w, sizes) if h and w else 0 for h, w in shapes]
        return np.asarray(found, dtype=np.int8)

    @property
    def cache(self) -> LatentCache:
        """The latent cache that `config.cache` names.

        Raises:
            CacheError: there is none, or it is not finished.
        """
        if self._cache is None:
            self._cache = LatentCache(self.config.cache, verify=self.config.verify_cache)
        return self._cache

    @property
    def clips(self) -> ClipSet:
        """The clips, after `setup`.

        Raises:
            DataError: shards have no list of clips.
        """
        self.setup()
        if self._clips is None:
            raise DataError(
                "data.source=webdataset has no list of clips; this needs data.source=manifest or "
                "folder"
            )
        return self._clips

    @property
    def faults(self) -> FaultLog | FailureCount:
        """The count of clips or samples that could not be read, after `setup`."""
        self.setup()
        assert self._faults is not None
        return self._faults

    @property
    def val_clips(self) -> list[Clip]:
        """The validation clips that are used (`config.val_clips` of them, evenly spaced).

        Of shards: at most 64 of those samples, for their captions; `video` is the shard.
        """
        self.setup()
        wanted = self.config.val_clips
        if self._shards is None:
            return _evenly(self.clips.val, wanted)
        source = self._shards[1]
        found = []
        for position in _evenly(_evenly(range(len(source)), wanted), 64):
            shard = source.shards[source.locate(position)[0]]
            try:
                caption = source.caption(position)
            except VideoError:
                continue  # counted when it is validated
            found.append(Clip(source.name(position), Path(shard.url), caption, "val"))
        return found

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Endless batches from `start_sample` on."""
        rank, world_size = self._rank()
        config = self.config
        self.setup()
        stream: Dataset[Sample]
        if self._shards is not None:
            assert self._order is not None
            assert isinstance(self._faults, FailureCount)
            stream = ShardStream(self._shards[0], self._order, config, self._faults)
        elif config.source == "latents":
            stream = CachedTrainStream(self.cache, config)
        else:
            stream = TrainStream(self.clips.train, config, self.faults, self._order)
        batches = StreamBatches(self.start_sample, self.config.batch_size, rank, world_size)
        return self._loader(stream, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The fixed validation windows, this rank's share; an empty list if there are none."""
        rank, world_size = self._rank()
        self.setup()
        windows: ValidationWindows | CachedWindows | ShardWindows
        if self._shards is not None:
            assert isinstance(self._faults, FailureCount)
            train, val = self._shards
            chosen = _evenly(range(len(val)), self.config.val_clips)
            windows = ShardWindows(val, chosen, self.config, self._faults, len(train))
        elif self.config.source == "latents":
            windows = CachedWindows(self.cache, self.val_clips, self.config)
        else:
            windows = ValidationWindows(
                self.val_clips, self.config, self.faults, len(self.clips.train)
            )
        if len(windows) == 0:
            return []
        share = RankShare(len(windows), rank, world_size)
        return self._loader(windows, sampler=share, batch_size=self.config.batch_size)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """All but the sample indices: the host seeds noise with them, and reading them back from a
        GPU would wait for all that it was given."""
        rest = {name: value for name, value in batch.items() if name != "sample_index"}
        moved = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return {**moved, "sample_index": batch["sample_index"]}

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
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return rank // self.ranks_per_sample, world_size // self.ranks_per_sample

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
        self.setup()
        config = self.config
        if self._shards is None:
            names = [clip.id for clip in self.clips.train]
        else:
            shards = self._shards[0].shards
            names = [f"{shard.name} {len(shard.members)}" for shard in shards]
        state: dict[str, Any] = {
            "consumed_samples": self._consumed,
            "seed": config.seed,
            "train_clips": sha256("\n".join(names).encode()),
        }
        if config.source == "latents":  # the same as of the videos
            state["train_clips"] = self.cache.manifest["train_clips_sha256"]
        if self._order is not None:
            numbers = [config.batch_size, config.shard_lanes, config.shuffle_window]
            state["order"] = [*numbers, *config.buckets]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the stream where the checkpoint left it.

        Another seed or another list of training clips makes another stream; then a warning says
        that the continuation is not exact.
        """
        self._consumed = self.start_sample = int(state_dict["consumed_samples"])
        now = self.state_dict()
        for name in ("seed", "train_clips", "order"):
            if state_dict.get(name) != now.get(name):
                log.warning(
                    "the checkpoint's data had another %s: samples from %d on are not the ones the "
                    "interrupted run would have seen",
                    name,
                    self._consumed,
                )


def _shape(clip: Clip) -> tuple[int, int]:
    """(height, width) of a clip's video, from the manifest if it says so; (0, 0) if unreadable."""
    try:
        height, width = int(clip.info["height"]), int(clip.info["width"])
        if height > 0 < width:
            return height, width
    except (KeyError, TypeError, ValueError):
        pass
    try:
        return shown_size(clip.video)
    except VideoError:
        return 0, 0


def _evenly(items: Sequence[T], wanted: int) -> list[T]:
    """`wanted` of the items, evenly spaced; all of them for 0 or if there are fewer."""
    if not 0 < wanted < len(items):
        return list(items)
    return [items[int((k + 0.5) * len(items) / wanted)] for k in range(wanted)]
