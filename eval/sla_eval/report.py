"""Scores of a folder of videos, with intervals and where they come from, as a dict and as files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sla_eval.backbones import weight_checksums
from sla_eval.metrics import available_metrics, metric_class
from sla_eval.prompts import Prompt, assign_prompts
from sla_eval.runner import MetricClass, Progress, Scores, is_set_metric, score_videos
from sla_eval.tables import Table, score_table
from sla_eval.videos import find_videos

FORMAT = 2  # of a report
RESAMPLES = 1000
# What a score can depend on, by the names of the distributions; those not installed are left out.
_PACKAGES = (
    *("sla-reproduction", "torch", "torchmetrics", "numpy", "decord2", "av", "pillow"),
    *("torchvision", "open-clip-torch", "transformers", "timm", "pyiqa", "lpips", "scikit-image"),
    *("opencv-python-headless", "opencv-python", "vbench"),
)


def bootstrap_interval(
    values: Sequence[float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over videos.

    It covers the choice of videos alone, not the randomness of training or sampling. The order
    of `values` does not matter.

    Args:
        values: one a video; infinite values are allowed.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        weights: how much each counts in the mean, positive; None for all alike.

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
    chosen = (random.integers(0, count, count) for _ in range(resamples))
    if weights is None:
        means = np.sort([array[places].mean() for places in chosen])
    else:
        ordered = sorted(zip(values, weights, strict=True))
        counted = np.asarray([weight for _, weight in ordered], dtype=np.float64)
        means = np.sort([np.average(array[p], weights=counted[p]) for p in chosen])
    # The nearest rank, not interpolated: between infinities there is nothing to interpolate.
    low, high = (means[max(0, math.ceil(q * resamples) - 1)] for q in (0.025, 0.975))
    return float(low), float(high)


def choose_metrics(metrics: str | Sequence[str] = "all") -> dict[str, MetricClass]:
    """Metrics by name, in the order asked for.

    Args:
        metrics: "all", a name, or names.

    Raises:
        ValueError: an unknown metric, or none.
    """
    if isinstance(metrics, str):
        metrics = [metrics]
    names = list(dict.fromkeys(metrics))
    if names == ["all"]:
        names = available_metrics()
    if not names:
        raise ValueError(f"metrics must be 'all' or name at least one metric, got {metrics!r}")
    return {name: metric_class(name) for name in names}


def score_folder(
    videos_dir: str | os.PathLike[str],
    reference_dir: str | os.PathLike[str] | None = None,
    metrics: str | Sequence[str] = "all",
    *,
    prompts: Sequence[Prompt] | None = None,
    workers: int | None = 0,
    processes: int = 0,
    device: str | torch.device = "cpu",
    weights_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores the videos of a folder (see `score_files`).

    Args:
        videos_dir: folder of videos (`find_videos`).
        reference_dir: folder of reference videos, each of the same file name as the video it is
            compared with; None if there are none.
        metrics: "all", or names of metrics.
        prompts: the prompts that they were made from (`assign_prompts`); None takes those of the
            JSON files beside the videos.
        workers, processes, device, weights_dir, progress: see `score_videos`.

    Raises:
        ValueError: no such folder, an unknown metric, no metric, or prompts that do not fit.
    """
    classes = choose_metrics(metrics)  # unknown names fail before any work
    files = find_videos(videos_dir)
    references = None if reference_dir is None else find_videos(reference_dir)
    return score_files(
        files,
        references,
        classes,
        prompts=assign_prompts(files, prompts),
        workers=workers,
        processes=processes,
        device=device,
        weights_dir=weights_dir,
        progress=progress,
    )


def score_files(
    videos: Sequence[Path],
    references: Sequence[Path] | None = None,
    classes: Mapping[str, MetricClass] | None = None,
    *,
    prompts: Mapping[str, Prompt] | None = None,
    workers: int | None = 0,
    processes: int = 0,
    device: str | torch.device = "cpu",
    weights_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores videos; each is decoded once, for all metrics.

    What cannot be scored is listed with its reason and does not stop the rest.

    Args:
        videos: files, of different names.
        references: videos to compare with, each of the name, frames and size of its video.
        classes: metrics by name (`choose_metrics`); None takes all.
        prompts: {file name: prompt}.
        workers, processes, device, weights_dir, progress: see `score_videos`.

    Returns:
        A report: {"format", "provenance", "bootstrap", "videos", "metrics", "unreadable"}.
        "videos": {file: {"prompt", "seed"}}, as far as they are known. "metrics": {name: entry}.
        An entry is {"title", "source", "higher_is_better", "value_range", "needs_reference",
        "set_level", "mean", "low", "high", "count", "per_video": {file: value}, "weights":
        {file: weight in the mean} or None for all alike, "skipped": {file: reason},
        "other_dimension": count}, where a metric of sets has its one value as
        "mean", no interval and no values per video; or, if there is no score, {"not_available":
        reason} with what the metric says of itself. "unreadable": {file: reason}.
    """
    classes = choose_metrics() if classes is None else classes
    prompts = prompts or {}
    scores = score_videos(
        videos,
        classes,
        references=None if references is None else {path.name: path for path in references},
        prompts=prompts,
        workers=workers,
        processes=processes,
        device=device,
        weights_dir=weights_dir,
        progress=progress,
    )
    return {
        "format": FORMAT,
        "provenance": {**provenance(device), "weights": checksums(classes, weights_dir)},
        "bootstrap": {"level": 0.95, "resamples": RESAMPLES, "seed": 0, "over": "videos"},
        "videos": {
            name: {"prompt": prompts[name].text, "seed": prompts[name].seed}
            if name in prompts
            else {}
            for name in scores.files
        },
        "metrics": {name: _entry(name, cls, scores) for name, cls in classes.items()},
        "unreadable": scores.unreadable,
    }


def _entry(name: str, cls: MetricClass, scores: Scores) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "title": cls.title or name,
        "source": cls.source,
        "higher_is_better": cls.higher_is_better,
        "value_range": list(cls.value_range),
        "needs_reference": cls.needs_reference,
        "set_level": is_set_metric(cls),
    }
    if name in scores.not_available:
        return entry | {"not_available": scores.not_available[name]}
    common = {
        "skipped": scores.skipped[name],
        "other_dimension": scores.other_dimension.get(name, 0),
    }
    if name in scores.set_values:
        entry |= {"mean": scores.set_values[name], "low": math.nan, "high": math.nan}
        return entry | {"count": scores.set_counts[name], "per_video": {}} | common
    values = scores.values.get(name)
    if not values:
        return entry | {"not_available": _why_none(scores, scores.skipped[name])}
    given = scores.weights[name]
    weights = None if len(set(given.values())) == 1 else given
    numbers = list(values.values())  # in the order of the names, whatever that of the work
    counted = None if weights is None else [weights[file] for file in values]
    low, high = bootstrap_interval(numbers, weights=counted)
    entry |= {"mean": float(np.average(numbers, weights=counted)), "low": low, "high": high}
    return entry | {"count": len(values), "per_video": values, "weights": weights} | common


def _why_none(scores: Scores, skipped: Mapping[str, str]) -> str:
    if not scores.files:
        return "the folder has no videos"
    if len(scores.unreadable) == len(scores.files):
        return f"none of {len(scores.files)} videos is readable"
    if not skipped:
        return "no video is of a prompt that VBench measures it on"
    file, reason = next(iter(skipped.items()))
    return f"no video could be scored ({file}: {reason})"


def paired_differences(
    report: Mapping[str, Any], baseline: Mapping[str, Any], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """How much higher each metric is than in another report, video by video of the same name.

    The interval is a bootstrap over pairs: what prompt and seed do to both alike cancels. Metrics
    that compare with a reference, and metrics of sets, have no pairs and are left out; so are pairs
    with an infinite value, which are counted. Where videos count unlike in a metric's mean, so do
    their differences, by the weights in `report`.

    Args:
        report, baseline: of `score_files`, or read from a file by `read_report`.
        seed: of the resampling.

    Returns:
        {metric: {"mean", "low", "high", "count", "left_out", "title", "higher_is_better",
        "per_video": {file: difference}}}, with report minus baseline.

    Raises:
        ValueError: a file that both reports have was made from other prompts or seeds.
    """
    for name, video in report["videos"].items():
        other = baseline["videos"].get(name, {})
        for key in ("prompt", "seed"):
            ours, theirs = video.get(key), other.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"baseline must be of the same prompts and seeds; {name} has {key} {ours!r} "
                    f"here and {theirs!r} there"
                )
    found = {}
    for name, entry in report["metrics"].items():
        other = baseline["metrics"].get(name, {})
        if entry["needs_reference"] or not entry.get("per_video") or not other.get("per_video"):
            continue
        pairs = {
            file: (value, other["per_video"][file])
            for file, value in entry["per_video"].items()
            if file in other["per_video"]
        }
        differences = {
            file: ours - theirs
            for file, (ours, theirs) in pairs.items()
            if math.isfinite(ours) and math.isfinite(theirs)
        }
        if not differences:
            continue
        weights = entry.get("weights")
        counted = None if weights is None else [weights[file] for file in differences]
        values = list(differences.values())
        low, high = bootstrap_interval(values, seed, weights=counted)
        found[name] = {
            "mean": float(np.average(values, weights=counted)),
            "low": low,
            "high": high,
            "count": len(differences),
            "left_out": len(pairs) - len(differences),
            "title": entry["title"],
            "higher_is_better": entry["higher_is_better"],
            "per_video": differences,
        }
    return found


def checksums(
    classes: Mapping[str, MetricClass], weights_dir: str | os.PathLike[str] | None = None
) -> dict[str, dict[str, str]]:
    """SHA-256 of the weights of the metrics that can run here, {backbone: {file: sum}}."""
    backbones = {
        backbone
        for cls in classes.values()
        if cls.availability(weights_dir) is None
        for backbone in cls.backbones
    }
    return {name: weight_checksums(name, weights_dir) for name in sorted(backbones)}


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What scores made by this process must be kept with."""
    device = torch.device(device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "command": shlex.join(_command()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "python": platform.python_version(),
        "versions": {p: v for p in _PACKAGES if (v := _version(p)) is not None},
    }


def _command() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = getattr(spec, "name", None)
    if name is None:
        return ["python", *sys.argv]
    return ["python", "-m", name.removesuffix(".__main__"), *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown_table(report: Mapping[str, Any]) -> str:
    """A report as a Markdown table, with what was left out listed below it."""
    return score_table(report).markdown()


def write_json(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, atomically; parent folders are made.

    JSON has no infinity and no nan: they become the text "inf" or "-inf", and null.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    text = json.dumps(_jsonable(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    _write(Path(path), text)


def write_table(stem: str | os.PathLike[str], table: Table) -> list[Path]:
    """Writes a table as `<stem>.md`, `<stem>.csv` and `<stem>.tex`; returns the files.

    Raises:
        OSError: one cannot be written.
    """
    stem = Path(stem)
    found = []
    for suffix, text in ((".md", table.markdown()), (".csv", table.csv()), (".tex", table.latex())):
        found.append(stem.with_name(stem.name + suffix))
        _write(found[-1], text)
    return found


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `write_json` has written of a report.

    Raises:
        ValueError: it cannot be read, or is no report of this format.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"report must be a readable JSON file, got {str(path)!r}: {error}"
        ) from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"report must be of format {FORMAT}, got {str(path)!r}")
    for entry in report["metrics"].values():
        for key in ("mean", "low", "high"):
            if key in entry:
                entry[key] = _number(entry[key])
        if "per_video" in entry:
            entry["per_video"] = {f: _number(value) for f, value in entry["per_video"].items()}
    return report


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _write(target: Path, text: str) -> None:
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
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
