"""Time reading video: decoders alone, the pipeline by workers, its memory over many samples.

Rates are of the clock; "a core" and "of raw" are of processor time, that of all processes together,
so that other programs of the machine do not count.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from sla.benchmark.recording import add_options, results_file

if TYPE_CHECKING:
    from sla.data.module import DataConfig

# `sla.data` and what it needs (PyAV, decord, lightning) are imported where they are used: machines
# that measure kernels alone have none of it.

SEED = 0
DEMO_CLIPS = Path("data/demo/clips")
PER_SHARD = 10
BATCH = 4
RESUMED = 1000  # sample at which resuming is timed
SIZE = 64  # pixels of a sample, as in the demo
HEAD = (
    f"{'what':9} {'reader':20} {'workers':>7} {'decoded/s':>10} {'a core':>10} {'of raw':>7} "
    f"{'samples/s':>10} {'a core':>10} {'first, s':>8} {'resume,s':>8} a worker's MiB after samples"
)
FIELDS = (
    *("decoded_per_s", "decoded_per_s_core", "of_raw_pyav", "of_raw_decord", "samples_per_s"),
    *("samples_per_s_core", "first_batch_s", "resume_s", "memory_mib", "samples", "size", "videos"),
)
# The raw decoders that the pipeline is measured by: each in the plainest loop a person would write.
RAW = ("pyav", "decord")


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument(
        "--videos", type=Path, nargs="+", help="files; default: the demo set's clips"
    )
    parser.add_argument("--samples", type=int, default=300, help="of each timed run")
    parser.add_argument("--repeats", type=int, default=3, help="the quickest counts")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-frames", type=int, default=16, help="of a sample")
    parser.add_argument(
        "--memory-samples",
        type=int,
        nargs="*",
        default=[100, 1_000, 10_000],
        help="how many samples of small clips a worker has read when its memory is taken",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked."""
    clips = options.videos or sorted(DEMO_CLIPS.glob("*.mp4"))
    if not clips:
        print(f"no clips in {DEMO_CLIPS}: run `make data`", file=sys.stderr)
        return 1
    file = results_file(options, "data", seed=SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # everything here is counted by the core
    folder = Path(tempfile.mkdtemp(prefix="sla-benchmark-"))
    print(HEAD)
    try:
        for row in measure(options, clips, folder):
            print(line(row), flush=True)
            if file is not None:
                file.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(threads)
    if file is not None:
        print(f"recorded in {file.path}")
    return 0


def measure(
    options: argparse.Namespace, clips: list[Path], folder: Path
) -> Iterator[dict[str, Any]]:
    """The rows, one after the other."""
    for name in RAW:
        raw = [decode(name, clips) for _ in range(options.repeats + 1)][1:]  # the first warms up
        yield row(
            "raw",
            name,
            decoded_per_s=max(found.frames / found.seconds for found in raw),
            decoded_per_s_core=max(found.per_core for found in raw),
            videos=len(clips),
        )
    write_set(clips, folder)
    for reader in (*READERS, *LIBRARIES):
        for workers in options.workers:
            cache = folder / f"cache-{reader}-{workers}"
            yield Pipeline(reader, options, clips, folder, cache).measure(workers)
    if options.memory_samples:
        yield row("memory", "shards", workers=1, memory_mib=worker_memory(options, folder))


def row(what: str, reader: str, workers: int = 0, **found: Any) -> dict[str, Any]:
    """A measurement with all its fields; None for what it does not say."""
    blank = dict.fromkeys(FIELDS)
    return {"what": what, "reader": reader, "workers": workers, **blank, **found}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def number(name: str, form: str, width: int) -> str:
        value = row[name]
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    shares = [row[f"of_raw_{name}"] for name in RAW if row[f"of_raw_{name}"] is not None]
    memory = row["memory_mib"]
    cells = (
        f"{row['what']:9} {row['reader']:20} {row['workers']:7d}",
        number("decoded_per_s", ".0f", 10),
        number("decoded_per_s_core", ".0f", 10),
        f"{min(shares):7.0%}" if shares else f"{'-':>7}",
        number("samples_per_s", ".1f", 10),
        number("samples_per_s_core", ".1f", 10),
        number("first_batch_s", ".2f", 8),
        number("resume_s", ".2f", 8),
        ", ".join(f"{n}: {mib:.1f}" for n, mib in memory.items()) if memory else "",
    )
    return " ".join(cells).rstrip()


@dataclass(frozen=True)
class Decoded:
    """Frames, and the seconds that they took by the clock and by the processor."""

    frames: float
    seconds: float
    cpu_seconds: float

    @property
    def per_core(self) -> float:
        """Frames of a processor second."""
        return self.frames / self.cpu_seconds


def decode(name: str, clips: Sequence[Path]) -> Decoded:
    """Times a raw decoder."""
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    frames = DECODERS[name](clips)
    return Decoded(frames, time.perf_counter() - start, time.process_time() - cpu_start)


def decode_with_pyav(clips: Sequence[Path]) -> int:
    """All frames of all clips as RGB arrays, one after the other; how many they were."""
    import av

    frames = 0
    for clip in clips:
        with av.open(str(clip)) as container:
            container.streams.video[0].thread_type = "NONE"
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
                frames += 1
    return frames


def decode_with_decord(clips: Sequence[Path]) -> int:
    """The same with decord, a clip at a time."""
    import decord

    frames = 0
    for clip in clips:
        reader = decord.VideoReader(str(clip), ctx=decord.cpu(0), num_threads=1)
        frames += len(reader.get_batch(range(len(reader))).asnumpy())
    return frames


DECODERS: dict[str, Callable[[Sequence[Path]], int]] = {
    "pyav": decode_with_pyav,
    "decord": decode_with_decord,
}


def write_set(clips: Sequence[Path], folder: Path) -> None:
    """The clips as a manifest and as tar files of `PER_SHARD` samples."""
    import webdataset

    entries = [
        {"id": f"{n:09d}", "video": str(clip.resolve()), "caption": clip.stem, "split": "train"}
        for n, clip in enumerate(clips)
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "manifest.jsonl").write_text(text, encoding="utf-8")
    for first in range(0, len(entries), PER_SHARD):
        path = folder / f"{first // PER_SHARD:05d}.tar"
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for entry in entries[first : first + PER_SHARD]:
                video = Path(entry["video"]).read_bytes()
                text = entry["caption"]
                writer.write({"__key__": entry["id"], "mp4": video, "txt": text.encode()})


READERS = ("manifest", "shards", "shards, full frames")
# What reads the same shards with webdataset's own pipeline, and our decoding.
LIBRARIES = ("webdataset",)


@dataclass
class Pipeline:
    """Reads samples as training does.

    Attributes:
        reader: one of `READERS` or `LIBRARIES`.
        options: the command line's.
        clips: the videos.
        folder: where `write_set` put them.
        cache: folder for indices of shards.
    """

    reader: str
    options: argparse.Namespace
    clips: Sequence[Path]
    folder: Path
    cache: Path

    def config(self, workers: int, decode_to_size: bool = True) -> DataConfig:
        """Batches of four without caching."""
        from sla.data.module import DataConfig

        common: dict[str, Any] = {
            "num_frames": self.options.num_frames,
            "height": SIZE,
            "width": SIZE,
            "batch_size": BATCH,
            "num_workers": workers,
            "seed": SEED,
            "cache_mib": 0,
            "decode_to_size": decode_to_size,
            "val_fraction": 0.0,
        }
        if self.reader == "manifest":
            return DataConfig(root=str(self.folder), probe_videos=False, **common)
        return DataConfig(
            source="webdataset",
            shards=[str(path) for path in sorted(self.folder.glob("*.tar"))],
            shard_cache=str(self.cache),
            **common,
        )

    def batches(self, workers: int, start: int = 0) -> Iterator[Any]:
        """Endless batches from a sample on, as a run that starts or resumes there gets them."""
        if self.reader in LIBRARIES:
            return webdataset_batches(self.config(workers), start)
        from sla.data.module import VideoDataModule

        data = VideoDataModule(self.config(workers, self.reader != "shards, full frames"))
        data.start_sample = start
        return iter(data.train_dataloader())

    def measure(self, workers: int) -> dict[str, Any]:
        """Throughput once it runs, and the times to a first batch, at the start and in a resume."""
        count = -(-self.options.samples // BATCH)
        decoded = self._decoded(count)
        found: list[Decoded] = []
        first: list[float] = []
        shares: dict[str, list[float]] = {name: [] for name in RAW}
        for _ in range(self.options.repeats):
            raw = {name: decode(name, self.clips) for name in RAW}  # side by side: clocks change
            start = time.perf_counter()
            batches = self.batches(workers)
            next(batches)
            first.append(time.perf_counter() - start)
            for _ in range(4 * workers):  # more than what workers have fetched meanwhile
                next(batches)
            start, cpu_start = time.perf_counter(), cpu_time(batches)
            for _ in range(count):
                next(batches)
            seconds, cpu_seconds = time.perf_counter() - start, cpu_time(batches) - cpu_start
            found.append(Decoded(decoded, seconds, cpu_seconds))
            for name in RAW:
                shares[name].append(found[-1].per_core / raw[name].per_core)
            del batches
        start = time.perf_counter()
        batches = self.batches(workers, start=RESUMED)
        next(batches)
        resume = time.perf_counter() - start
        del batches
        samples = BATCH * count
        return row(
            "pipeline",
            self.reader,
            workers,
            decoded_per_s=max(one.frames / one.seconds for one in found),
            decoded_per_s_core=max(one.per_core for one in found),
            samples_per_s=samples / min(one.seconds for one in found),
            samples_per_s_core=samples / min(one.cpu_seconds for one in found),
            first_batch_s=first[0],  # with an empty cache of indices
            resume_s=resume,
            samples=samples,
            size=SIZE,
            videos=len(self.clips),
            **{f"of_raw_{name}": statistics.median(shares[name]) for name in RAW},
        )

    def _decoded(self, count: int) -> float:
        """Frames that the decoder puts out for so many batches, a mean over twice as many.

        Each window's way from its key frame counts: a decoder has to go it.
        """
        with counted() as total:
            for _ in itertools.islice(self.batches(0), 2 * count):
                pass
        return total[0] / 2


@contextmanager
def counted() -> Iterator[list[int]]:
    """Sums up the frames that are decoded in this process."""
    from sla.data import decode

    total = [0]
    plain = decode.VideoFile

    class Counted(plain):  # type: ignore[misc,valid-type]
        def __exit__(self, *error: Any) -> None:
            total[0] += self.decoded
            super().__exit__(*error)

    decode.VideoFile = Counted  # type: ignore[misc]
    try:
        yield total
    finally:
        decode.VideoFile = plain  # type: ignore[misc]


def cpu_time(batches: Any) -> float:
    """Processor seconds so far of this process and the loader's workers."""
    total = time.process_time()
    for worker in getattr(batches, "_workers", ()):
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def webdataset_batches(config: DataConfig, start: int = 0) -> Iterator[Any]:
    """Like samples through webdataset: its shuffle, its split by worker, and our decoding."""
    from torch.utils.data import DataLoader

    from sla.data.module import collate

    stream = WebDatasetStream(config, start // max(1, config.num_workers))
    return iter(
        DataLoader(
            stream,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            collate_fn=collate,
        )
    )


class WebDatasetStream(IterableDataset[Any]):
    """Endless passes of a webdataset pipeline.

    Args:
        config: shards, shuffling and how samples are cut.
        skip: samples that a run which resumes has seen. The pipeline knows no position: they are
            read, and dropped before they are decoded.
    """

    def __init__(self, config: DataConfig, skip: int) -> None:
        self.config = config
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        import numpy as np
        import webdataset

        from sla.data.decode import Cut
        from sla.data.streaming import choose, make_sample, read_cut

        config = self.config
        random = np.random.default_rng(config.seed)
        stages: Any = webdataset.WebDataset(
            config.shards,
            shardshuffle=len(config.shards),
            seed=config.seed,
            empty_check=False,
        ).shuffle(config.shuffle_window, initial=20)
        passes = itertools.chain.from_iterable(iter(stages) for _ in itertools.count())
        for number, raw in enumerate(itertools.islice(passes, self.skip, None)):
            draw = choose(config, 0, random.random(7))
            cut = Cut(config.height, config.width, draw.scale, draw.center)
            video = io.BytesIO(raw["mp4"])
            frames = read_cut(video, config, draw.stride, draw.start, cut, raw["__key__"])
            yield make_sample(frames, raw["txt"].decode(), number, raw["__key__"], 1.0)


def worker_memory(options: argparse.Namespace, folder: Path) -> dict[str, float] | None:
    """MiB of a loader worker's memory after so many samples of small clips; None without /proc."""
    from sla.data.module import DataConfig, VideoDataModule
    from sla.data.testing import write_shards

    if not Path("/proc/self/statm").exists():
        return None
    shards = write_shards(folder / "small", [100] * 16, frames=8, height=16, width=24)
    config = DataConfig(
        source="webdataset",
        shards=[str(path) for path in shards],
        shard_cache=str(folder / "cache-small"),
        num_frames=4,
        height=16,
        width=16,
        batch_size=10,
        num_workers=1,
        val_fraction=0.0,
        decode_to_size=True,
    )
    batches: Any = iter(VideoDataModule(config).train_dataloader())
    found = {}
    read = 0
    for wanted in sorted(options.memory_samples):
        while read < wanted:
            next(batches)
            read += config.batch_size
        found[str(wanted)] = round(resident_mib(batches._workers[0].pid), 1)
    return found


def resident_mib(process: int) -> float:
    """MiB of a process's memory that are its own or touched by it."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
