"""The study set on disk: tar shards as the source `webdataset` reads them.

    DIR/plan.json              what decides the content; written first
    DIR/train-00000.tar ...    samples of `000123.mp4` and `000123.json` (caption and attributes)
    DIR/train-00000.json       checksum of the shard; written when it is whole
    DIR/val-..., DIR/test-...
    DIR/real-train-00000.tar   windows of the demo set's real clips, if asked for; real-val-...
    DIR/manifest.json          plan, shards, checksums; written last

Every file is written whole and then renamed, a shard's JSON after the shard: a killed run goes on
with the first shard that is not there. Clips are made by any number of processes and put into
shards by one, in their order, so that their number changes no byte.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sla.data.study.clip import CRF, encode, make_clip
from sla.data.study.physics import FPS, FRAMES, StudyError, load_mujoco
from sla.data.study.render import SIZE
from sla.data.study.scene import ATTRIBUTES, SPLITS
from sla.data.video import VideoError, probe, read_frames, resize_crop
from sla.files import atomic_path, file_sha256, sha256, write_text

FORMAT = "sla-study-set"
VERSION = 1  # of what a seed stands for: scenes, physics, pictures, encoding
MANIFEST, PLAN = "manifest.json", "plan.json"
_CHUNK = 4  # clips that a process makes at a time
_REAL_STEP, _REAL_MOST = 8, 24  # frames between windows of a real scene; windows of a scene

Sample = tuple[bytes, dict[str, Any]]


@dataclass(frozen=True)
class StudyConfig:
    """What the set holds.

    Attributes:
        seed: of every clip.
        train, val, test: clips of each split.
        shard_clips: clips of a shard.

    Raises:
        ValueError: a value that cannot be used; names the field and what would do.
    """

    seed: int = 0
    train: int = 8000
    val: int = 400
    test: int = 400
    shard_clips: int = 200

    def __post_init__(self) -> None:
        for name in ("seed", "train", "val", "test"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.shard_clips < 1:
            raise ValueError(f"shard_clips is {self.shard_clips}; it must be at least 1")
        if self.train + self.val + self.test == 0:
            raise ValueError("train, val and test are all 0; one must be at least 1")


@dataclass(frozen=True)
class StudySummary:
    """What `write_study` did.

    Attributes:
        folder: the set.
        clips: samples by the beginning of their shards' names (`train`, `real-val`, ...).
        written: shards that this call wrote.
        shards, num_bytes: of the whole set.
        checksum: SHA-256 over all shards' checksums: two sets with the same are the same.
    """

    folder: Path
    clips: dict[str, int]
    written: int
    shards: int
    num_bytes: int
    checksum: str

    def __str__(self) -> str:
        clips = ", ".join(f"{count} {name}" for name, count in self.clips.items())
        return (
            f"{self.folder}: {clips} clips in {self.shards} shards "
            f"({self.num_bytes / 2**20:.1f} MiB), {self.written} written now, "
            f"checksum {self.checksum[:16]}"
        )


@dataclass(frozen=True)
class _Shard:
    """Clips `start` to `start + count` of a split; `group` is what its name begins with."""

    group: str
    number: int
    start: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.group}-{self.number:05d}"


def write_study(
    folder: str | os.PathLike[str],
    config: StudyConfig,
    *,
    workers: int | None = None,
    real: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> StudySummary:
    """Makes the study set, or completes an earlier attempt at the same one.

    Args:
        folder: of the set; made.
        config: what it holds.
        workers: processes; None for one a core, 1 for this one alone.
        real: folder of the demo set, whose clips are added in shards of their own.
        progress: show a progress bar on the terminal.

    Raises:
        StudyError: the folder holds another set, a process died, or MuJoCo is missing.
        ValueError: fewer than one worker.
        OSError: a file cannot be written (no space left, no permission); nothing partial is left.
    """
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    load_mujoco()
    folder = Path(folder)
    windows = [] if real is None else _real_windows(Path(real))
    plan = _plan(config, real)
    key = sha256(json.dumps(plan, sort_keys=True).encode())
    _agree(folder, plan)
    shards = _shards({name: getattr(config, name) for name in SPLITS}, config.shard_clips)
    reals = {
        f"real-{split}": [window for window in windows if window.split == split]
        for split in ("train", "val")
    }
    real_shards = _shards({k: len(v) for k, v in reals.items()}, config.shard_clips)
    records = {shard.name: _finished(folder, shard, key) for shard in (*shards, *real_shards)}
    missing = [shard for shard in shards if records[shard.name] is None]
    total = sum(shard.count for shard in shards)
    left = sum(shard.count for shard in missing)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=total,
                initial=total - left,
                unit="clip",
                desc="study set",
                file=sys.stderr,
                disable=not progress,
            )
        )
        if missing:
            clips = _clips(config.seed, missing, min(workers, left), stack)
            for shard in missing:
                samples = []
                for _ in range(shard.count):
                    samples.append(next(clips))
                    bar.update()
                records[shard.name] = _write_shard(folder, shard, key, samples)
    written = len(missing)
    for shard in real_shards:
        if records[shard.name] is None:
            chosen = reals[shard.group][shard.start : shard.start + shard.count]
            records[shard.name] = _write_shard(folder, shard, key, [w.sample() for w in chosen])
            written += 1
    return _finish(folder, plan, [r for r in records.values() if r is not None], written)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan(config: StudyConfig, real: str | os.PathLike[str] | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        **asdict(config),
        "frames": FRAMES,
        "size": SIZE,
        "fps": FPS,
        "crf": CRF,
        "real": "" if real is None else file_sha256(Path(real) / "manifest.jsonl"),
        # Other versions may give other bytes.
        "libraries": {name: metadata.version(name) for name in ("av", "mujoco")},
    }


def _agree(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / PLAN
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_text(path, json.dumps(plan, indent=1) + "\n")
        return
    except ValueError:
        there = {}
    if not isinstance(there, dict):
        there = {}
    if there != plan:
        names = [name for name in plan if there.get(name) != plan[name]]
        differences = "; ".join(f"{n} {there.get(n)!r}, not {plan[n]!r}" for n in names)
        raise StudyError(
            f"{folder} holds another set ({differences or 'of another form'}): name another "
            "folder, or delete it"
        )


def _shards(counts: dict[str, int], size: int) -> list[_Shard]:
    return [
        _Shard(group, number, start, min(size, count - start))
        for group, count in counts.items()
        for number, start in enumerate(range(0, count, size))
    ]


def _finished(folder: Path, shard: _Shard, key: str) -> dict[str, Any] | None:
    """The record of a shard that is there as a whole, else None."""
    path = folder / f"{shard.name}.tar"
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if record["plan"] == key and record["bytes"] == path.stat().st_size:
            return dict(record)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


def _make(seed: int, split: str, start: int, count: int) -> list[Sample]:
    samples = []
    for index in range(start, start + count):
        clip = make_clip(seed, split, index)
        samples.append((encode(clip.frames), clip.record))
    return samples


def _begin_worker() -> None:
    """An interruption is this process's parent's to handle; without the parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _clips(seed: int, shards: Sequence[_Shard], workers: int, stack: ExitStack) -> Iterator[Sample]:
    """The shards' clips in order, made by `workers` processes."""
    tasks = (
        (seed, shard.group, start, min(_CHUNK, shard.start + shard.count - start))
        for shard in shards
        for start in range(shard.start, shard.start + shard.count, _CHUNK)
    )
    if workers == 1:
        for task in tasks:
            yield from _make(*task)
        return
    # Spawned, not forked: this process may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    waiting: deque[Future[list[Sample]]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_make, *task))
            # Enough ahead that none waits for a slow clip of another; not the whole set.
            if len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise StudyError(
            "a process that makes clips died (killed, or out of memory): the same command goes on; "
            "fewer workers need less memory, about 0.3 GiB each"
        ) from None


def _write_shard(
    folder: Path, shard: _Shard, key: str, samples: Sequence[Sample]
) -> dict[str, Any]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (video, record) in enumerate(samples, start=shard.start):
            text = json.dumps(record, separators=(",", ":")).encode()
            for suffix, data in (("mp4", video), ("json", text)):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")  # no time, no owner
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = buffer.getvalue()
    path = folder / f"{shard.name}.tar"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a machine that stops must not leave a name without its bytes
    record = {
        "file": path.name,
        "group": shard.group,
        "samples": shard.count,
        "bytes": len(data),
        "sha256": sha256(data),
        "plan": key,
    }
    write_text(path.with_suffix(".json"), json.dumps(record) + "\n")
    return record


def _finish(
    folder: Path, plan: dict[str, Any], records: list[dict[str, Any]], written: int
) -> StudySummary:
    listed = [{k: v for k, v in record.items() if k != "plan"} for record in records]
    checksum = sha256("".join(record["sha256"] for record in listed).encode())
    manifest = {
        **plan,
        "attributes": {name: list(values) for name, values in ATTRIBUTES.items()},
        "checksum": checksum,
        "shards": listed,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return _summary(folder, listed, checksum, written)


def _summary(
    folder: Path, listed: Sequence[dict[str, Any]], checksum: str, written: int
) -> StudySummary:
    clips: dict[str, int] = {}
    for record in listed:
        clips[record["group"]] = clips.get(record["group"], 0) + record["samples"]
    total = sum(record["bytes"] for record in listed)
    return StudySummary(folder, clips, written, len(listed), total, checksum)


# Reading


def verify_study(folder: str | os.PathLike[str]) -> StudySummary:
    """Compares every shard of a finished set with its checksum.

    Raises:
        StudyError: it is not finished, or a shard is missing or damaged.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    for record in manifest["shards"]:
        path = folder / record["file"]
        if not path.is_file():
            raise StudyError(f"{path} is missing: run the command that made the set again")
        if file_sha256(path) != record["sha256"]:
            raise StudyError(f"{path} is damaged: delete it and run the command that made it again")
    return _summary(folder, manifest["shards"], manifest["checksum"], 0)


def study_records(folder: str | os.PathLike[str], group: str) -> Iterator[dict[str, Any]]:
    """What is known of each clip of a finished set, in order, without decoding it.

    Args:
        folder: of the set.
        group: `train`, `val`, `test`, `real-train` or `real-val`.

    Yields:
        Caption, attributes (`ATTRIBUTES`, `other_object`, `other_colour`; none of real clips),
        `split`, `seed`, `index`, and `id`: the `clip_id` that the loaders give it.

    Raises:
        StudyError: the set is not finished, or has no such group.
    """
    folder = Path(folder)
    found = [shard for shard in _manifest(folder)["shards"] if shard["group"] == group]
    if not found:
        raise StudyError(f"{folder} has no clips {group!r}")
    for shard in found:
        path = folder / shard["file"]
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, suffix = os.path.splitext(member.name)
                if suffix == ".json":
                    content = tar.extractfile(member)
                    assert content is not None
                    yield {**json.load(content), "id": f"{path.stem}/{name}"}


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise StudyError(f"no finished study set in {folder}: run `make study-data`") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StudyError(f"{folder / MANIFEST} is not of a study set")
    if manifest.get("version") != VERSION:
        raise StudyError(
            f"{folder} is of version {manifest.get('version')}, this code makes {VERSION}: delete "
            "it and run `make study-data`"
        )
    return manifest


# Real clips


@dataclass(frozen=True)
class _Window:
    """`FRAMES` frames of a stretch of a real scene, from `start` on."""

    files: tuple[Path, ...]
    start: int
    fps: float
    caption: str
    split: str
    scene: str

    def sample(self) -> Sample:
        frames = self._frames()
        record = {
            "caption": self.caption,
            "split": self.split,
            "scene": self.scene,
            "start": self.start,
            "real": True,
        }
        return encode(resize_crop(frames, SIZE, SIZE), self.fps), record

    def _frames(self) -> NDArray[np.uint8]:
        try:
            parts, left = [], self.start
            needed = self.start + FRAMES
            for file in self.files:
                frames = read_frames(file)
                parts.append(frames[max(0, left) : needed])
                left, needed = left - len(frames), needed - len(frames)
                if needed <= 0:
                    break
        except VideoError as error:
            raise StudyError(f"{error}; run `make data`") from None
        return np.concatenate(parts)


def _real_windows(root: Path) -> list[_Window]:
    """Windows of the demo set: of clips that follow each other in one scene and split.

    Of a window that spans two clips, the caption is that of the one with more frames in it.
    """
    try:
        text = (root / "manifest.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"no demo set in {root}: run `make data`") from None
    entries = [json.loads(line) for line in text.splitlines()]
    stretches: list[list[dict[str, Any]]] = []
    for _, group in groupby(entries, lambda entry: (entry["scene"], entry["split"])):
        for entry in group:
            last = stretches[-1][-1] if stretches else None
            same = last is not None and (last["scene"], last["split"], last["source_stop"]) == (
                *(entry["scene"], entry["split"]),
                entry["source_start"],
            )
            if same:
                stretches[-1].append(entry)
            else:
                stretches.append([entry])
    found: dict[tuple[str, str], list[_Window]] = {}
    for stretch in stretches:
        files = tuple(root / entry["video"] for entry in stretch)
        try:
            fps = probe(files[0]).fps
        except VideoError as error:
            raise StudyError(f"{error}; run `make data`") from None
        whose = np.repeat(np.arange(len(stretch)), [entry["frames"] for entry in stretch])
        for start in range(0, len(whose) - FRAMES + 1, _REAL_STEP):
            most = int(np.bincount(whose[start : start + FRAMES]).argmax())
            entry = stretch[most]
            window = _Window(files, start, fps, entry["caption"], entry["split"], entry["scene"])
            found.setdefault((window.scene, window.split), []).append(window)
    # Evenly, so that one long scene is not most of them.
    return [
        windows[k * len(windows) // min(len(windows), _REAL_MOST)]
        for windows in found.values()
        for k in range(min(len(windows), _REAL_MOST))
    ]
