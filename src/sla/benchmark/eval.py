"""Video metrics: videos per second of decoding, of each metric that can run here, and of all.

The videos are made for it, of the size asked for. Each rate counts decoding, as a score does; what
a metric takes by itself is the difference to `decode`. Rates are of the clock, with a process a
core, whose start does not count; "a core" is of processor time on one thread, so that other
programs of the machine do not count; the goal is met if two cores that do nothing else meet it. On
a GPU decoding runs in threads, `decode` too, and there is no rate a core; "GPU at work" is the
share of the time in which one of its kernels ran: where it is low, decoding or Python is waited
for.

Speed does not depend on what the weights are: with --random-weights each network is of the
published architecture with random numbers in it, and rows say `weights: random`. No score is made
or shown. The one metric whose work depends on what a network says, dynamic degree, then does all
of it: the flow is 0, and no video ends early.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sla.benchmark import timing
from sla.benchmark.recording import add_options, results_file

SEED = 0
GOAL = 5.0  # videos a second, metrics without weights, 16 frames of 256x256, two cores
HEAD = (
    f"{'metric':24} {'weights':>9} {'workers':>7} {'videos/s':>9} {'videos/s a core':>16} "
    f"{'goal':>6} {'GPU at work':>11}"
)
LONG = 10.0  # seconds; a run that took longer is not repeated
PROFILED = 8  # videos whose kernels are looked at


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--videos", type=int, default=32, help="how many are scored in a run")
    parser.add_argument("--frames", type=int, default=16, help="of a video")
    parser.add_argument("--size", type=int, default=256, help="its height and width in pixels")
    parser.add_argument("--workers", type=int, help="processes or threads; default: one a core")
    parser.add_argument(
        "--processes", type=int, default=0, help="that score on the GPU in place of this one"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help=f"the quickest counts; one longer than {LONG:g} s is not repeated",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--metrics", default="all", help="'all', or names separated by commas")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", type=Path, help="folder of the networks' weights")
    weights.add_argument(
        "--random-weights",
        action="store_true",
        help="measure networks of the published architectures with random weights",
    )
    parser.add_argument(
        "--max-seconds", type=float, help="begin no row after this time; the most telling are first"
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked; 1 if a row could not be measured."""
    from sla_eval.report import choose_metrics

    if options.videos < 2 or min(options.frames, options.size, options.repeats) < 1:
        print("--videos must be 2 or more, --frames, --size and --repeats 1", file=sys.stderr)
        return 2
    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    able, missing = {}, {}
    for name, cls in choose_metrics(names).items():
        reason = why_not_measured(cls, options)
        if reason is None:
            able[name] = cls
        else:
            missing[name] = reason
    label = "throughput-random-weights" if options.random_weights else "throughput"
    file = results_file(options, "eval", seed=SEED, label=label)
    folder = Path(tempfile.mkdtemp(prefix="sla-benchmark-"))
    if options.random_weights:
        print("weights are RANDOM: rates of the published architectures, no scores")
    print(HEAD)
    left_out, failed = [], False
    try:
        for name, row in measure(options, able, folder):
            if row is None:
                left_out.append(name)
                continue
            print(line(row), flush=True)
            failed |= row["error"] is not None
            if file is not None:
                file.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, reason in missing.items():
        print(f"{name:24} left out: {reason}")
    if left_out:
        print(f"--max-seconds left out: {', '.join(left_out)}", file=sys.stderr)
    if file is not None and file.path.exists():
        print(f"recorded in {file.path}")
    return int(failed)


def why_not_measured(cls: Any, options: argparse.Namespace) -> str | None:
    """Why a metric cannot be measured here, in one line; None if it can."""
    from sla_eval.backbones import missing_random_backbone
    from sla_eval.runner import why_not

    if options.random_weights:
        reasons = [missing_random_backbone(name) for name in cls.backbones]
        return next((reason for reason in reasons if reason is not None), None)
    reason = why_not(cls, has_references=True, has_prompts=True, weights_dir=options.weights)
    return None if reason is None else f"{reason} (python -m sla_eval says how to get it)"


def weights_of(cls: Any, random: bool) -> str:
    """Of a metric's networks: "none" where it has none, else "random" or "published"."""
    from sla_eval.backbones import comes_with_weights

    if not cls.backbones:
        return "none"
    from_files = any(not comes_with_weights(name) for name in cls.backbones)
    return "random" if random and from_files else "published"


def measure(
    options: argparse.Namespace, classes: Mapping[str, Any], folder: Path
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Rows by name: of decoding alone, of all metrics, of those without weights, and of each.

    None in place of a row that --max-seconds leaves out.
    """
    from sla_eval.backbones import random_backbone

    begin = time.perf_counter()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    on_cpu = torch.device(device).type == "cpu"
    write_videos(folder, options.videos, options.frames, options.size)
    load: Callable[[str], torch.nn.Module] | None = None
    if options.random_weights:
        load = random_backbone
        if not on_cpu:  # all rows share the networks: those of one process
            load = functools.partial(random_backbone, device=device)
            if not options.processes:
                load = functools.cache(load)
    without = {name: cls for name, cls in classes.items() if not cls.backbones}
    groups: dict[str, Mapping[str, Any]] = {"decode": {}, "all": classes}
    groups |= {"all without weights": without}
    groups |= {name: {name: cls} for name, cls in classes.items()}
    for name, group in groups.items():
        if name != "decode" and (not group or (name == "all" and len(group) == len(without))):
            continue
        if options.max_seconds is not None and time.perf_counter() - begin > options.max_seconds:
            yield name, None
            continue
        arguments = (group, folder, device)
        common: dict[str, Any] = {"weights_dir": options.weights, "load": load}
        processes = 0 if name == "decode" else options.processes
        if processes:
            common["processes"] = processes
        rates: list[float] = []
        per_core = busy = error = None
        try:
            rates = best_of(
                options.repeats, *arguments, workers=workers, in_threads=not on_cpu, **common
            )
            if on_cpu:
                found = best_of(
                    options.repeats, *arguments, workers=0, clock=time.process_time, **common
                )
                per_core = max(found)
            elif group and not processes:  # other processes' kernels are not seen
                busy = gpu_busy(*arguments, workers=workers, **common)
        except Exception as caught:  # whatever a network raises; the other rows go on
            error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
        weights = {weights_of(cls, options.random_weights) for cls in group.values()} - {"none"}
        yield (
            name,
            {
                "what": "throughput",
                "metric": name,
                "metrics": len(group),
                "names": list(group),
                "weights": "random" if "random" in weights else "published" if weights else "none",
                "needs_weights": any(cls.backbones for cls in group.values()),
                "needs_reference": any(cls.needs_reference for cls in group.values()),
                "device": device,
                "workers": processes or (0 if name == "decode" and on_cpu else workers),
                "processes": processes,
                "videos": options.videos,
                "frames": options.frames,
                "height": options.size,
                "width": options.size,
                "repeats": len(rates),
                "videos_per_s": max(rates, default=None),
                "videos_per_s_core": per_core,
                "gpu_busy": busy,
                "error": error,
            },
        )


def best_of(repeats: int, *arguments: Any, **options: Any) -> list[float]:
    """`videos_per_second` of a few runs; of one if it takes long."""
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < repeats and (not rates or time.perf_counter() - begin < LONG):
        rates.append(videos_per_second(*arguments, **options))
    return rates


def gpu_busy(
    classes: Mapping[str, Any],
    folder: Path,
    device: str,
    workers: int,
    weights_dir: Path | None,
    *,
    load: Callable[[str], torch.nn.Module] | None = None,
) -> float | None:
    """Share of the time from the first kernel of a few videos to the last in which one ran.

    Arguments as of `videos_per_second`, which has warmed up. None where no kernel was seen.
    """
    kernels = timing.gpu_kernels(
        lambda: _score(classes, folder, device, workers, weights_dir, load, lambda: None, PROFILED)
    )
    return covered((start, end) for _, start, end in kernels)


def covered(spans: Iterable[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end that lies in a span; None for none."""
    ordered = sorted(spans)
    if not ordered:
        return None
    total, begin, reached = 0.0, ordered[0][0], ordered[0][0]
    for start, end in ordered:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / (reached - begin) if reached > begin else None


def videos_per_second(
    classes: Mapping[str, Any],
    folder: Path,
    device: str,
    workers: int,
    weights_dir: Path | None,
    clock: Callable[[], float] = time.perf_counter,
    *,
    load: Callable[[str], torch.nn.Module] | None = None,
    processes: int = 0,
    in_threads: bool = False,
) -> float:
    """Rate once every process runs: from the first results to the last.

    Args:
        classes: metrics by name; none is decoding alone, in this thread unless `in_threads`.
        folder: with the videos and references of `write_videos`.
        device, workers, weights_dir, load, processes: see `sla_eval.runner.score_videos`.
        clock: in seconds.
        in_threads: whether the runner's threads decode.

    Raises:
        RuntimeError: a metric turned out not to be available, or does not take the videos.
    """
    from sla_eval.report import find_videos
    from sla_eval.videos import decode_video

    times: list[float] = []
    if not classes and not in_threads:  # in one process: others add up where each has a core
        for path in find_videos(folder / "videos"):
            decode_video(path)
            times.append(clock())
        return (len(times) - 1) / (times[-1] - times[0])
    _score(
        classes,
        folder,
        device,
        workers,
        weights_dir,
        load,
        lambda: times.append(clock()),
        processes=processes,
    )
    # Results come in order, those of other processes at once: the first of each are a warm-up.
    first = min(max(1, processes or workers), len(times) - 2)
    return (len(times) - 1 - first) / (times[-1] - times[first])


def _score(
    classes: Mapping[str, Any],
    folder: Path,
    device: str,
    workers: int,
    weights_dir: Path | None,
    load: Callable[[str], torch.nn.Module] | None,
    after_each: Callable[[], None],
    most: int | None = None,
    processes: int = 0,
) -> None:
    """Score the videos, the first `most` of them; arguments and errors as of
    `videos_per_second`."""
    from sla_eval.prompts import Prompt
    from sla_eval.report import find_videos
    from sla_eval.runner import NOT_A_NUMBER, score_videos

    videos = find_videos(folder / "videos")[:most]
    names = {path.name for path in videos}
    references = {
        path.name: path for path in find_videos(folder / "references") if path.name in names
    }
    scores = score_videos(
        videos,
        classes,
        references=references,
        prompts={path.name: Prompt("a grey pattern that moves") for path in videos},
        workers=workers,
        processes=processes,
        device=device,
        weights_dir=weights_dir,
        progress=lambda *_: after_each(),
        load=load,
    )
    for name, reason in scores.not_available.items():
        raise RuntimeError(f"{name} cannot be measured: {reason}")
    for name, skipped in scores.skipped.items():
        for reason in set(skipped.values()) - {NOT_A_NUMBER}:  # no number takes as long
            raise RuntimeError(f"{name} does not score these videos: {reason}")


def write_videos(folder: Path, count: int, frames: int, size: int) -> None:
    """Videos and references of smooth moving patterns, with some noise, as models make them."""
    from sla.data.video import write_video

    random = np.random.default_rng(SEED)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    for i in range(count):
        waves = random.uniform(2, 12, (3, 2)).astype(np.float32)
        speed = random.uniform(0.1, 0.5)
        video = np.empty((frames, size, size, 3), dtype=np.float32)
        for t in range(frames):
            for channel, (a, b) in enumerate(waves):
                video[t, :, :, channel] = 128 + 90 * np.sin(a * rows + b * columns + speed * t)
        for name, noise in (("videos", 6.0), ("references", 3.0)):
            noisy = video + random.normal(0, noise, video.shape).astype(np.float32)
            frames_of = noisy.round().clip(0, 255).astype(np.uint8)
            write_video(folder / name / f"{i:04d}.mp4", frames_of, fps=8)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if row["error"] is not None:
        return f"{row['metric']:24} {row['weights']:>9} {row['workers']:7d} {row['error']}"
    core, busy = row["videos_per_s_core"], row["gpu_busy"]
    goal = ""
    standard = (row["frames"], row["height"], row["device"]) == (16, 256, "cpu")
    if standard and row["metric"] != "decode" and not row["needs_weights"]:
        goal = "met" if 2 * core >= GOAL else "missed"
    return (
        f"{row['metric']:24} {row['weights']:>9} {row['workers']:7d} {row['videos_per_s']:9.2f} "
        f"{'-' if core is None else f'{core:.2f}':>16} {goal:>6} "
        f"{'' if busy is None else f'{busy:.0%}':>11}"
    ).rstrip()
