"""Video metrics: videos per second of decoding, of each metric that can run here, and of all.

The videos are made for it, of the size asked for. Each rate counts decoding, as a score does; what
a metric takes by itself is the difference to `decode`. Rates are of the clock, with a process a
core, whose start does not count; "a core" is of processor time on one thread, so that other
programs of the machine do not count; the goal is met if two cores that do nothing else meet it. On
a GPU decoding runs in threads, and there is no rate a core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sla.results import RESULTS, ResultsFile

SEED = 0
GOAL = 5.0  # videos a second, metrics without weights, 16 frames of 256x256, two cores
HEAD = (
    f"{'metric':24} {'weights':>8} {'workers':>7} {'videos/s':>9} {'videos/s a core':>16} "
    f"{'goal':>6}"
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--videos", type=int, default=32, help="how many are scored in a run")
    parser.add_argument("--frames", type=int, default=16, help="of a video")
    parser.add_argument("--size", type=int, default=256, help="its height and width in pixels")
    parser.add_argument("--workers", type=int, help="processes or threads; default: one a core")
    parser.add_argument("--repeats", type=int, default=3, help="the quickest counts")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--metrics", default="all", help="'all', or names separated by commas")
    parser.add_argument("--weights", type=Path, help="folder of the networks' weights")
    parser.add_argument("--record", action="store_true", help="keep the rows under results/")
    parser.add_argument("--out", type=Path, help="keep the rows under this folder instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked."""
    from sla_eval.report import choose_metrics
    from sla_eval.runner import why_not

    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    classes = choose_metrics(names)
    able, missing = {}, {}
    for name, cls in classes.items():
        reason = why_not(cls, has_references=True, has_prompts=True, weights_dir=options.weights)
        if reason is None:
            able[name] = cls
        else:
            missing[name] = reason
    if options.videos < 2 or min(options.frames, options.size, options.repeats) < 1:
        print("--videos must be 2 or more, --frames, --size and --repeats 1", file=sys.stderr)
        return 2
    file = None
    if options.record or options.out:
        root = options.out or RESULTS
        file = ResultsFile("eval", root=root, seed=SEED, label="throughput")
    folder = Path(tempfile.mkdtemp(prefix="sla-benchmark-"))
    print(HEAD)
    try:
        for row in measure(options, able, folder):
            print(line(row), flush=True)
            if file is not None:
                file.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name in missing:
        print(f"{name:24} not available here (python -m sla_eval says how to get it)")
    if file is not None:
        print(f"recorded in {file.path}")
    return 0


def measure(
    options: argparse.Namespace, classes: Mapping[str, Any], folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for decoding alone, for each metric, for those without weights, and for all."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    write_videos(folder, options.videos, options.frames, options.size)
    without = {name: cls for name, cls in classes.items() if not cls.backbones}
    groups: dict[str, Mapping[str, Any]] = {"decode": {}}
    groups |= {name: {name: cls} for name, cls in classes.items()}
    groups |= {"all without weights": without, "all": classes}
    for name, group in groups.items():
        if name != "decode" and (not group or (name == "all" and len(group) == len(without))):
            continue
        arguments = (group, folder, device)
        rates = [
            videos_per_second(*arguments, workers, options.weights) for _ in range(options.repeats)
        ]
        per_core = None
        if device == "cpu":
            found = [
                videos_per_second(*arguments, 0, options.weights, time.process_time)
                for _ in range(options.repeats)
            ]
            per_core = max(found)
        yield {
            "what": "throughput",
            "metric": name,
            "metrics": len(group),
            "needs_weights": any(cls.backbones for cls in group.values()),
            "needs_reference": any(cls.needs_reference for cls in group.values()),
            "device": device,
            "workers": 0 if name == "decode" else workers,
            "videos": options.videos,
            "frames": options.frames,
            "height": options.size,
            "width": options.size,
            "videos_per_s": max(rates),
            "videos_per_s_core": per_core,
        }


def videos_per_second(
    classes: Mapping[str, Any],
    folder: Path,
    device: str,
    workers: int,
    weights_dir: Path | None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Rate once every process runs: from the first results to the last."""
    from sla_eval.prompts import Prompt
    from sla_eval.report import find_videos
    from sla_eval.runner import score_videos
    from sla_eval.videos import decode_video

    videos = find_videos(folder / "videos")
    references = {path.name: path for path in find_videos(folder / "references")}
    times: list[float] = []
    if not classes:  # in one process: others add up where each has a core
        for path in videos:
            decode_video(path)
            times.append(clock())
        return (len(times) - 1) / (times[-1] - times[0])
    score_videos(
        videos,
        classes,
        references=references,
        prompts={path.name: Prompt("a grey pattern that moves") for path in videos},
        workers=workers,
        device=device,
        weights_dir=weights_dir,
        progress=lambda *_: times.append(clock()),
    )
    # Results come in order, those of other processes at once: the first `workers` are a warm-up.
    first = min(max(1, workers), len(times) - 2)
    return (len(times) - 1 - first) / (times[-1] - times[first])


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
    weights = "needed" if row["needs_weights"] else "none"
    core = row["videos_per_s_core"]
    goal = ""
    standard = (row["frames"], row["height"], row["device"]) == (16, 256, "cpu")
    if standard and row["metric"] != "decode" and not row["needs_weights"]:
        goal = "met" if 2 * core >= GOAL else "missed"
    return (
        f"{row['metric']:24} {weights:>8} {row['workers']:7d} {row['videos_per_s']:9.2f} "
        f"{'-' if core is None else f'{core:.2f}':>16} {goal:>6}"
    ).rstrip()
