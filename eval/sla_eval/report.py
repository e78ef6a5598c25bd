"""Scores of a folder of videos, with intervals, as a dict, a Markdown table or a JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sla_eval.metrics import (
    MetricUnavailableError,
    VideoMetric,
    available_metrics,
    build_metric,
    metric_class,
)
from sla_eval.videos import VideoError, find_videos, read_video


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over videos.

    It covers the choice of videos alone, not the randomness of training or sampling. The order
    of `values` does not matter.

    Args:
        values: one a video; infinite values are allowed.
        seed: of the resampling.
        resamples: number of bootstrap samples.

    Returns:
        (low, high); (nan, nan) for a single value, whose spread is unknown.

    Raises:
        ValueError: no values, a nan among them, or resamples below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    array = np.sort(np.asarray(values, dtype=np.float64))
    if array.ndim != 1 or len(array) == 0 or np.isnan(array).any():
        raise ValueError(f"values must be one or more numbers, none of them nan, got {values!r}")
    if len(array) == 1:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    count = len(array)
    means = np.sort([array[random.integers(0, count, count)].mean() for _ in range(resamples)])
    # The nearest rank, not interpolated: between infinities there is nothing to interpolate.
    low, high = (means[max(0, math.ceil(q * resamples) - 1)] for q in (0.025, 0.975))
    return float(low), float(high)


def score_folder(
    videos_dir: str | os.PathLike[str],
    reference_dir: str | os.PathLike[str] | None = None,
    metrics: str | Sequence[str] = "all",
) -> dict[str, Any]:
    """Scores the videos of a folder; each is decoded once, for all metrics.

    What cannot be scored is listed with its reason and does not stop the rest.

    Args:
        videos_dir: folder of videos (`find_videos`).
        reference_dir: folder of reference videos, each of the same file name, frames and size as
            the video it is compared with; None if there are none.
        metrics: "all", or names of metrics.

    Returns:
        {"metrics": {name: entry}, "unreadable": {file: reason}}, files by name. An entry is
        {"mean", "low", "high", "higher_is_better", "per_video": {file: value},
        "skipped": {file: reason}}, or {"not_available": reason} if no video could be scored.

    Raises:
        ValueError: no such folder, an unknown metric, or no metric.
    """
    if isinstance(metrics, str):
        names = available_metrics() if metrics == "all" else [metrics]
    else:
        names = list(dict.fromkeys(metrics))
    if not names:
        raise ValueError(f"metrics must be 'all' or name at least one metric, got {metrics!r}")
    classes = {name: metric_class(name) for name in names}  # unknown names fail before any work
    files = find_videos(videos_dir)
    references = None
    if reference_dir is not None:
        references = {path.name: path for path in find_videos(reference_dir)}

    running: dict[str, VideoMetric] = {}
    not_available: dict[str, str] = {}
    for name in names:
        if classes[name].needs_reference and references is None:
            not_available[name] = "needs reference videos, none were given"
            continue
        try:
            running[name] = build_metric(name)
        except MetricUnavailableError as error:
            not_available[name] = str(error)

    per_video: dict[str, dict[str, float]] = {name: {} for name in running}
    skipped: dict[str, dict[str, str]] = {name: {} for name in running}
    unreadable: dict[str, str] = {}
    for path in files:
        try:
            video = read_video(path)
        except VideoError as error:
            unreadable[path.name] = error.reason
            continue
        reference: Tensor | None = None
        no_reference = ""
        if references is not None and any(m.needs_reference for m in running.values()):
            try:
                reference = read_video(references[path.name])
            except KeyError:
                no_reference = "no reference video of this name"
            except VideoError as error:
                no_reference = f"reference unreadable: {error.reason}"
        for name, metric in running.items():
            if metric.needs_reference and reference is None:
                skipped[name][path.name] = no_reference
                continue
            try:
                metric.update(video, reference)
            except ValueError as error:  # a video this metric does not take, such as one frame
                skipped[name][path.name] = str(error)
            else:
                per_video[name][path.name] = metric.per_video[-1]

    entries: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in not_available:
            entries[name] = {"not_available": not_available[name]}
        elif not per_video[name]:
            entries[name] = {"not_available": _why_none(files, unreadable, skipped[name])}
        else:
            low, high = bootstrap_interval(list(per_video[name].values()))
            entries[name] = {
                "mean": float(running[name].compute()),
                "low": low,
                "high": high,
                "higher_is_better": running[name].higher_is_better,
                "per_video": per_video[name],
                "skipped": skipped[name],
            }
    return {"metrics": entries, "unreadable": unreadable}


def _why_none(
    files: Sequence[Path], unreadable: Mapping[str, str], skipped: Mapping[str, str]
) -> str:
    if not files:
        return "the folder has no videos"
    if len(unreadable) == len(files):
        return f"none of {len(files)} videos is readable"
    file, reason = next(iter(skipped.items()))
    return f"no video could be scored ({file}: {reason})"


def markdown_table(report: Mapping[str, Any]) -> str:
    """A report of `score_folder` as a Markdown table, with what was left out listed below it."""
    lines = [
        "| metric | mean | 95 % interval | videos |",
        "|---|---|---|---|",
    ]
    notes = []
    for name, entry in report["metrics"].items():
        if "not_available" in entry:
            lines.append(f"| {name} | not available | {_cell(entry['not_available'])} | 0 |")
            continue
        arrow = " ↑" if entry["higher_is_better"] else " ↓"
        low, high = entry["low"], entry["high"]
        interval = "–" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
        count = len(entry["per_video"])
        lines.append(f"| {name}{arrow} | {entry['mean']:.4f} | {interval} | {count} |")
        notes += [f"- {name} skipped {file}: {why}" for file, why in entry["skipped"].items()]
    notes += [f"- unreadable {file}: {why}" for file, why in report["unreadable"].items()]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write_json(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, atomically; parent folders are made.

    JSON has no infinity and no nan: they become the text "inf" or "-inf", and null.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    text = json.dumps(_jsonable(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, as os.replace is atomic within a file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
