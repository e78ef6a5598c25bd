"""The latent cache: a set encoded once by the model's autoencoder and text encoder.

A cache holds finished training samples. Of every training clip it has `passes` samples, cut as the
training stream cuts them in its first passes (`sla.data.module`, `sla.data.order`). Training from a
cache of p passes sees, in its first p passes, what training from the same list of videos sees, and
then the same samples again, in the orders of later passes. (Shards of videos have an order of their
own; their cache is read in that of a list.) Captions are dropped at reading, not at encoding.

A text encoder that is trained with the model (`TrainedTextEncoder`) has no lasting outputs: of it
the cache holds token ids. Of a frozen one it holds the embeddings.

    DIR/plan.json                      what decides the content; written first
    DIR/train-00000.safetensors ...    shards, `shard_samples` samples each
    DIR/train-00000.json               checksum and samples of the shard; written when it is whole
    DIR/val-00000.safetensors ...      the validation windows
    DIR/manifest.json                  plan, clips and shards; written last

Shards are safetensors rather than tar files: samples are read in the order of the training stream,
so by index; a tensor is mapped into memory without reading its shard; bfloat16 is stored as it is.
Every file is written whole and then renamed, a shard's JSON after the shard. So a killed run goes
on with the first shard that is not there, and any number of processes may share the work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sla.data.manifest import Clip, ClipSet, DataError
from sla.data.order import BucketOrder, Order, PassOrder
from sla.data.streaming import ShardStream, bucket_sizes
from sla.files import atomic_path, file_sha256, sha256, write_text
from sla.models.autoencoders import VideoAutoencoder
from sla.models.identity import DTYPES
from sla.models.text import FrozenTextEncoder, TrainedTextEncoder, UMT5TextEncoder

if TYPE_CHECKING:
    from sla.data.module import DataConfig, TrainStream, VideoDataModule

FORMAT = "sla-latent-cache"
VERSION = 1
MANIFEST, PLAN = "manifest.json", "plan.json"
TOKENS, EMBEDDINGS = "tokens", "embeddings"
# Fields of DataConfig that say how samples are cut: a run must have the cache's.
CUT = (
    *("num_frames", "height", "width", "fps", "frame_stride", "decode_to_size"),
    *("crop_scale", "horizontal_flip", "buckets", "val_windows"),
)
_HEADER_KEY = "sla"
_OPEN_SHARDS = 128  # that a process keeps mapped

CacheTextEncoder = TrainedTextEncoder | FrozenTextEncoder | UMT5TextEncoder
Sample = dict[str, Any]


class CacheError(DataError):
    """A latent cache that cannot be written or read as asked; the message says what to do."""


@dataclass
class LatentsConfig:
    """How a latent cache is written.

    Attributes:
        passes: samples of each training clip, each with a window and crop of its own.
        shard_samples: samples of a shard; it is put together in memory.
        batch_size: videos that the autoencoder encodes at a time.
        dtype: of stored latents and embeddings: `float32`, `bfloat16` or `float16`.
        device: where to encode; `auto` takes a GPU if there is one.

    Raises:
        ValueError: a value that cannot be used; names the field and what would do.
    """

    passes: int = 1
    shard_samples: int = 64
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("passes", "shard_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"latents.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"latents.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}"
            )


@dataclass(frozen=True)
class CacheSummary:
    """What `write_cache` did.

    Attributes:
        folder: the cache.
        shards: shards of the whole cache.
        written: shards that this call wrote.
        missing: shards that other ranks still have to write; 0 once the manifest is there.
        samples, num_bytes: of the shards that are there.
    """

    folder: Path
    shards: int
    written: int
    missing: int
    samples: int
    num_bytes: int

    def __str__(self) -> str:
        left = f", {self.missing} left to other ranks" if self.missing else ", complete"
        return (
            f"{self.folder}: {self.samples} samples in {self.shards - self.missing} of "
            f"{self.shards} shards ({self.num_bytes / 2**20:.1f} MiB), {self.written} written now"
            f"{left}"
        )


# Writing


def write_cache(
    folder: str | os.PathLike[str],
    data: DataConfig,
    autoencoder: VideoAutoencoder,
    text_encoder: CacheTextEncoder,
    config: LatentsConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    notes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CacheSummary:
    """Encodes a rank's share of a set: shards rank, rank + world_size, ... that are not there yet.

    Whoever finds all shards there writes the manifest. Ranks need not run at the same time, and a
    run that goes on may have another number of them.

    Args:
        folder: of the cache; made, or an earlier attempt at the same one.
        data: the set, of videos. Its caption dropout does not matter.
        autoencoder, text_encoder: the model's; they are moved to `config.device`.
        rank, world_size: of this process.
        notes: JSON values kept in the manifest (who made the cache, and when).
        progress: show a progress bar on the terminal.

    Raises:
        CacheError: the folder holds another cache; lists the differences.
        DataError: no clips, or too many that cannot be read.
        ValueError: a rank that is not in range, or sizes that the autoencoder cannot encode.
        OSError: a file cannot be written (no space left, no permission); nothing partial is left.
    """
    from sla.data.module import VideoDataModule

    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be at least 0 and below world_size {world_size}")
    folder = Path(folder)
    # Every sample has its caption; what is dropped is decided when the cache is read.
    module = VideoDataModule(replace(data, caption_dropout=0.0))
    train: TrainStream | ShardStream = module.train_dataloader().dataset  # type: ignore[assignment]
    val_loader = module.val_dataloader()
    val: Any = [] if isinstance(val_loader, list) else val_loader.dataset
    plan = _plan(module, train, len(val), autoencoder, text_encoder, config)
    _agree(folder, plan)

    shards = _shards(plan["train_samples"], plan["val_samples"], config.shard_samples)
    key = _plan_key(plan)
    mine = [shard for shard in shards[rank::world_size] if _finished(folder, shard, key) is None]
    if not mine:
        return _finish(folder, plan, shards, module, notes, 0)
    samples = _Samples(train, val, _stream_indices(train.order, config.passes))
    device = _device(config.device)
    autoencoder.to(device)
    if isinstance(text_encoder, UMT5TextEncoder):
        text_encoder.to(device)
    elif isinstance(text_encoder, FrozenTextEncoder):
        text_encoder.encoder.to(device)

    batches = [batch for shard in mine for batch in shard.batches(config.batch_size)]
    loader = DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=data.num_workers,
        collate_fn=list,
    )
    total = sum(shard.count for shard in shards[rank::world_size])
    left = sum(shard.count for shard in mine)
    stream = iter(loader)
    with tqdm(
        total=total,
        initial=total - left,
        unit="sample",
        desc=f"latents {rank + 1}/{world_size}",
        file=sys.stderr,
        disable=not progress,
    ) as bar:
        for shard in mine:
            encoder = _ShardEncoder(autoencoder, text_encoder, DTYPES[config.dtype], device)
            for batch in islice(stream, len(shard.batches(config.batch_size))):
                encoder.add(batch)
                bar.update(len(batch))
            _write_shard(folder, shard, key, encoder)
    return _finish(folder, plan, shards, module, notes, len(mine))


@dataclass(frozen=True)
class _Shard:
    """Samples `start` to `start + count` of a split."""

    split: str
    number: int
    start: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def batches(self, size: int) -> list[list[tuple[str, int]]]:
        items = [(self.split, self.start + k) for k in range(self.count)]
        return [items[k : k + size] for k in range(0, len(items), size)]


def _shards(train: int, val: int, size: int) -> list[_Shard]:
    return [
        _Shard(split, number, start, min(size, count - start))
        for split, count in (("train", train), ("val", val))
        for number, start in enumerate(range(0, count, size))
    ]


def _stream_indices(order: Order, passes: int) -> np.ndarray:
    """int64 (passes, count): where in the training stream a sample of the set comes in a pass."""
    indices = np.full((passes, order.count), -1, dtype=np.int64)
    left, index = indices.size, 0
    while left:  # a bucket's last samples of a pass may come in a later one
        pass_index, position = order.place(index)
        if pass_index < passes:
            indices[pass_index, position] = index
            left -= 1
        index += 1
    return indices


class _Samples(Dataset[Sample]):
    """Sample by (split, position). Training samples are ordered by clip, then by pass, so that the
    samples of one clip, its text among them, lie in one shard."""

    def __init__(self, train: Any, val: Any, stream_indices: np.ndarray) -> None:
        self.train = train
        self.val = val
        self.stream_indices = stream_indices

    def __getitem__(self, item: tuple[str, int]) -> Sample:
        split, position = item
        sample: Sample
        if split == "val":
            sample = self.val[position]
        else:
            clip, pass_index = divmod(position, len(self.stream_indices))
            sample = self.train[int(self.stream_indices[pass_index, clip])]
        return sample


class _ShardEncoder:
    """Collects the tensors and records of one shard."""

    def __init__(
        self,
        autoencoder: VideoAutoencoder,
        text_encoder: CacheTextEncoder,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.dtype = dtype
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self.samples: list[dict[str, Any]] = []
        self.texts: dict[str, int] = {}  # number of each caption
        self.add_text("")  # for samples whose caption is dropped

    def add(self, samples: Sequence[Sample]) -> None:
        for _, group in groupby(samples, lambda sample: sample["video"].shape):
            same = list(group)
            video = torch.stack([sample["video"] for sample in same]).to(self.device)
            latents = self.autoencoder.encode(video).to("cpu", self.dtype)
            for sample, latent in zip(same, latents, strict=True):
                self._add_one(sample, latent)

    def _add_one(self, sample: Sample, latent: Tensor) -> None:
        if not torch.isfinite(latent).all():
            raise CacheError(
                f"latents of clip {sample['clip_id']!r} are not finite in "
                f"{str(self.dtype).removeprefix('torch.')}: set latents.dtype and "
                "autoencoder.dtype to float32"
            )
        self.tensors[f"video.{len(self.samples)}"] = latent.clone()
        text = self.add_text(sample["caption"])
        self.samples.append(
            {"id": sample["clip_id"], "text": text, "weight": float(sample["weight"])}
        )

    def add_text(self, caption: str) -> int:
        """Number of the caption's text in this shard."""
        if caption not in self.texts:
            if isinstance(self.text_encoder, TrainedTextEncoder):
                ids, mask = self.text_encoder.tokenize([caption])
                text = ids.to(torch.int32)
            else:
                text, mask = self.text_encoder.encode([caption])
                text = text.to(self.dtype)
            length = int(mask.sum())
            if not bool(mask[0, :length].all()):
                raise CacheError(
                    f"{type(self.text_encoder).__name__} puts padding before tokens; only text "
                    "that is padded at its end can be cached"
                )
            number = self.texts[caption] = len(self.texts)
            # Both kinds of encoder pad with a constant, which the reader puts back.
            self.tensors[f"text.{number}"] = text[0, :length].cpu().clone()
        return self.texts[caption]


def _write_shard(folder: Path, shard: _Shard, key: str, encoder: _ShardEncoder) -> None:
    content = {"plan": key, "captions": list(encoder.texts), "samples": encoder.samples}
    data = save(encoder.tensors, metadata={_HEADER_KEY: json.dumps(content)})
    path = folder / f"{shard.name}.safetensors"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a machine that stops must not leave a name without its bytes
    _write_record(path, content, sha256(data), len(data))


def _write_record(
    path: Path, content: Mapping[str, Any], checksum: str, size: int
) -> dict[str, Any]:
    record = {"file": path.name, "sha256": checksum, "bytes": size, **content}
    write_text(path.with_suffix(".json"), json.dumps(record) + "\n")
    return record


def _finished(folder: Path, shard: _Shard, key: str) -> dict[str, Any] | None:
    """The record of a shard that is there as a whole, else None."""
    path = folder / f"{shard.name}.safetensors"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        if record["plan"] == key and record["bytes"] == path.stat().st_size:
            return dict(record)
        return None
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        return None
    # Killed between the shard and its record.
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_HEADER_KEY, "{}"))
    except (SafetensorError, ValueError):
        return None
    if content.get("plan") != key:
        return None
    return _write_record(path, content, file_sha256(path), path.stat().st_size)


def _plan(
    module: VideoDataModule,
    train: TrainStream | ShardStream,
    val_samples: int,
    autoencoder: VideoAutoencoder,
    text_encoder: CacheTextEncoder,
    config: LatentsConfig,
) -> dict[str, Any]:
    cut, order = module.config, train.order
    shapes = {
        f"{height}x{width}": autoencoder.latent_shape(cut.num_frames, height, width)
        for height, width in [(cut.height, cut.width), *bucket_sizes(cut)]
    }
    if isinstance(text_encoder, TrainedTextEncoder):
        # As long as `tokenize` makes all.
        text: dict[str, Any] = {"kind": TOKENS, "length": text_encoder.config.max_tokens + 1}
        text["pad"] = text_encoder.PAD
    else:
        inner = text_encoder
        if isinstance(inner, FrozenTextEncoder):
            inner = inner.encoder
        text = {"kind": EMBEDDINGS, "length": inner.max_tokens, "width": inner.text_dim}
    state = module.state_dict()
    captions = [] if isinstance(train, ShardStream) else [clip.caption for clip in train.clips]
    captions += [f"{clip.id}\n{clip.caption}" for clip in module.val_clips]
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "autoencoder": autoencoder.identity,
        "text_encoder": text_encoder.identity,
        "dtype": config.dtype,
        "latent_shapes": shapes,
        "text": text,
        "cut": {name: getattr(cut, name) for name in CUT},
        "seed": cut.seed,
        "passes": config.passes,
        "shard_samples": config.shard_samples,
        "train_samples": order.count * config.passes,
        "val_samples": val_samples,
        "train_clips_sha256": state["train_clips"],
        "captions_sha256": sha256("\n\n".join(captions).encode("utf-8", "surrogatepass")),
        "order": state.get("order"),
        "buckets": order.buckets.tolist() if isinstance(order, BucketOrder) else None,
    }
    return dict(json.loads(json.dumps(plan)))


def _plan_key(plan: Mapping[str, Any]) -> str:
    return sha256(json.dumps(plan, sort_keys=True).encode())


def _agree(folder: Path, plan: Mapping[str, Any]) -> None:
    """Makes `plan` the folder's, unless it has another."""
    path = folder / PLAN
    if not path.is_file():
        if any(folder.glob("*.safetensors")):
            raise CacheError(f"{folder} holds safetensors files and no {PLAN}: name another folder")
        write_text(path, json.dumps(plan, indent=2) + "\n")
        return
    stored = _read_json(path)
    names = [name for name in {**stored, **plan} if stored.get(name) != plan.get(name)]
    if names:
        listing = "\n".join(f"  {n}: {stored.get(n)!r} -> {plan.get(n)!r}"[:400] for n in names)
        raise CacheError(
            f"{folder} holds another latent cache:\n{listing}\n"
            "name another folder (data.cache=...), or delete this one"
        )


def _finish(
    folder: Path,
    plan: Mapping[str, Any],
    shards: Sequence[_Shard],
    module: VideoDataModule,
    notes: Mapping[str, Any] | None,
    written: int,
) -> CacheSummary:
    """Writes the manifest if all shards are there."""
    key = _plan_key(plan)
    records = {shard: _finished(folder, shard, key) for shard in shards}
    found = {shard: record for shard, record in records.items() if record is not None}
    missing = len(shards) - len(found)
    if not missing:
        lists = module.config.source != "webdataset"
        manifest = {
            **plan,
            "notes": dict(notes or {}),
            "left_out": {**module.clips.faults, **module.clips.short} if lists else {},
            "shards": [{"split": shard.split, **record} for shard, record in found.items()],
        }
        path = folder / MANIFEST
        if written or not path.is_file():
            write_text(path, json.dumps(manifest, indent=1) + "\n")
        for split in ("train", "val"):  # what killed processes left; another may write its manifest
            for stale in folder.glob(f".{split}-*.part.*"):
                stale.unlink(missing_ok=True)
    return CacheSummary(
        folder=folder,
        shards=len(shards),
        written=written,
        missing=missing,
        samples=sum(shard.count for shard in found),
        num_bytes=sum(record["bytes"] for record in found.values()),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


# Reading


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}; run `make latents` again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CacheError(f"{path} is not of a latent cache")
    if values.get("version") != VERSION:
        raise CacheError(
            f"{path} has version {values.get('version')}; this code reads version {VERSION}"
        )
    return values


class LatentCache:
    """Reads a finished cache, sample by sample, in any order.

    A shard is mapped into memory when it is first needed, and its checksum is compared then, once
    among all of the loader's processes that were started from this object.

    Args:
        folder: of the cache.
        verify: compare checksums, which reads each shard once as a whole.

    Attributes:
        manifest: as `manifest.json` has it.
        clips: the clips of the set, in its order; `Clip.video` is the cache's folder.

    Raises:
        CacheError: no cache there, or one that is not finished.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            started = (self.folder / PLAN).is_file()
            what = "a latent cache that is not finished" if started else "no latent cache"
            do = "run the same `make latents` again to go on" if started else "run `make latents`"
            raise CacheError(f"data.cache: {what} in {self.folder}: {do}")
        self.manifest = _read_json(self.folder / MANIFEST)
        try:
            self._read_manifest()
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise CacheError(f"{self.folder / MANIFEST} is damaged: {error!r}") from error
        self._verify = verify
        self._checked = multiprocessing.Array("b", max(1, len(self._shards)), lock=False)
        self._numbers = {shard["file"]: number for number, shard in enumerate(self._shards)}
        self._open: OrderedDict[str, Any] = OrderedDict()

    def _read_manifest(self) -> None:
        manifest = self.manifest
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._size = int(manifest["shard_samples"])
        self._first = {"train": 0}
        self._first["val"] = sum(shard["split"] == "train" for shard in self._shards)
        self._shapes = {name: tuple(shape) for name, shape in manifest["latent_shapes"].items()}
        self._text = manifest["text"]
        self._cut = manifest["cut"]
        self.passes = int(manifest["passes"])
        count = {
            "train": (int(manifest["train_samples"]), self.passes),
            "val": (int(manifest["val_samples"]), int(self._cut["val_windows"])),
        }
        clips = {
            split: [self._clip(split, place, each) for place in range(total // each)]
            for split, (total, each) in count.items()
        }
        self.clips = ClipSet(clips["train"], clips["val"], {}, {})

    def _clip(self, split: str, place: int, each: int) -> Clip:
        shard, number = self._locate(split, place * each)
        sample = shard["samples"][number]
        caption = shard["captions"][sample["text"]]
        return Clip(sample["id"], self.folder, caption, split, {"position": place})

    def _locate(self, split: str, position: int) -> tuple[dict[str, Any], int]:
        number, place = divmod(position, self._size)
        return self._shards[number + self._first[split]], place

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # mapped files cannot be sent

    def check_cut(self, config: DataConfig) -> None:
        """Compares how the cached samples were cut with what a run asks for.

        Raises:
            CacheError: they differ; lists the fields.
        """
        cut = self._cut
        wrong = [name for name in CUT if cut.get(name) != getattr(config, name)]
        if wrong:
            listing = "\n".join(
                f"  data.{n}: {cut.get(n)!r} in the cache, {getattr(config, n)!r} in the run"
                for n in wrong
            )
            raise CacheError(
                f"the samples in {self.folder} were cut otherwise:\n{listing}\n"
                "give the run the cache's values, or make another cache"
            )

    def check_models(
        self, autoencoder: str, text_encoder: str, *, channels: int, text_dim: int
    ) -> None:
        """Compares the models that made the cache with those of a run.

        Args:
            autoencoder, text_encoder: identities of the run's.
            channels: that the run's model reads.
            text_dim: width of the text embeddings that it reads.

        Raises:
            CacheError: others; names both.
        """
        for name, ours in (("autoencoder", autoencoder), ("text_encoder", text_encoder)):
            theirs = self.manifest[name]
            if theirs != ours:
                raise CacheError(
                    f"{self.folder} was made by another {name.replace('_', ' ')}:\n"
                    f"  the cache's: {theirs}\n  the run's:   {ours}\n"
                    "train with the cache's (sections autoencoder, text_encoder and text of the "
                    "config), or make a cache with the run's (`make latents`)"
                )
        found = next(iter(self._shapes.values()))[0]
        if found != channels:
            raise CacheError(
                f"model.in_channels is {channels}; latents in {self.folder} have {found} channels"
            )
        width = self._text.get("width", text_dim)
        if width != text_dim:
            raise CacheError(
                f"model.text_dim is {text_dim}; embeddings in {self.folder} have width {width}"
            )

    def read(self, split: str, position: int, *, drop_caption: bool = False) -> Sample:
        """One sample.

        Args:
            split: `train` or `val`.
            position: in the split: clip * passes + pass for training, clip * windows + window for
                validation.
            drop_caption: give the empty caption and its text.

        Returns:
            `video` float32 (C, T, H, W), `caption`, `clip_id`, `weight`, `text_mask` bool (L,), and
            `token_ids` int64 (L,) or `text` float32 (L, text_dim), as the cache has them.

        Raises:
            CacheError: the shard is missing or damaged; names it and both checksums.
        """
        shard, place = self._locate(split, position)
        sample = shard["samples"][place]
        text = 0 if drop_caption else sample["text"]
        try:
            file = self._open_shard(shard)
            video = file.get_tensor(f"video.{place}").float()
            words = file.get_tensor(f"text.{text}")
        except SafetensorError as error:
            raise CacheError(f"{self.folder / shard['file']} is damaged: {error}{_REDO}") from error
        return {
            "video": video,
            "caption": shard["captions"][text],
            "clip_id": sample["id"],
            "weight": sample["weight"],
            **self._pad(words),
        }

    def filling(self) -> Sample:
        """A sample of weight 0: zeros, and the empty caption."""
        some = self.read("train", 0, drop_caption=True)
        shape = self._shapes[f"{self._cut['height']}x{self._cut['width']}"]
        return {**some, "video": torch.zeros(shape), "clip_id": "", "weight": 0.0}

    def order(self, config: DataConfig) -> Order:
        """The order in which a run reads the training clips."""
        order = PassOrder(config.seed, len(self.clips.train))
        if self.manifest["buckets"] is None:
            return order
        buckets = np.asarray(self.manifest["buckets"], dtype=np.int8)
        return BucketOrder(order, buckets, config.batch_size)

    def train_position(self, clip: int, pass_index: int) -> int:
        """Position of a training clip's sample in a pass; passes beyond the cache's begin anew."""
        return clip * self.passes + pass_index % self.passes

    def _pad(self, words: Tensor) -> Sample:
        length = int(self._text["length"])
        mask = torch.arange(length) < len(words)
        if self._text["kind"] == TOKENS:
            ids = torch.full((length,), int(self._text["pad"]), dtype=torch.int64)
            ids[: len(words)] = words
            return {"token_ids": ids, "text_mask": mask}
        text = torch.zeros(length, words.shape[1])
        text[: len(words)] = words
        return {"text": text, "text_mask": mask}

    def _open_shard(self, shard: Mapping[str, Any]) -> Any:
        name = shard["file"]
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self.folder / name
        if not path.is_file():
            raise CacheError(f"{path} is missing; run the same `make latents` again")
        number = self._numbers[name]
        if self._verify and not self._checked[number]:
            found = file_sha256(path)
            if found != shard["sha256"]:
                raise CacheError(
                    f"{path} is damaged: its SHA-256 is {found}, the manifest says "
                    f"{shard['sha256']}{_REDO}"
                )
            self._checked[number] = 1
        file = self._open[name] = safe_open(path, framework="pt").__enter__()
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].__exit__(None, None, None)
        return file


_REDO = "; delete it and run the same `make latents` again"


class CachedTrainStream(Dataset[Sample]):
    """Training sample by index, any index from 0 on, from a cache.

    Order and dropped captions are those of the run's config; what a sample shows is the cache's.
    """

    def __init__(self, cache: LatentCache, config: DataConfig) -> None:
        self.cache = cache
        self.config = config
        self.order = cache.order(config)

    def __getitem__(self, index: int) -> Sample:
        from sla.data.module import draw_sample

        pass_index, clip = self.order.place(index)
        draw = draw_sample(self.config, self.order.count, index)
        position = self.cache.train_position(clip, pass_index)
        sample = self.cache.read("train", position, drop_caption=draw.drop_caption)
        return {**sample, "sample_index": index}


class CachedWindows(Dataset[Sample]):
    """The validation windows of some of a cache's clips; indices from `len` on are filling."""

    def __init__(self, cache: LatentCache, clips: Sequence[Clip], config: DataConfig) -> None:
        self.cache = cache
        self.clips = clips
        self.windows = config.val_windows

    def __len__(self) -> int:
        return len(self.clips) * self.windows

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            return {**self.cache.filling(), "sample_index": index}
        clip, window = divmod(index, self.windows)
        position = self.clips[clip].info["position"] * self.windows + window
        return {**self.cache.read("val", position), "sample_index": index}
