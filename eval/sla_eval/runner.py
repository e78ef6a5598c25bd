"""Scores of many videos: each decoded once for all metrics, in this process, in others or on a GPU.

A video's score is computed by itself, on one thread on a CPU, and results are put together in the
order of the file names. So neither the number of processes nor the order of the videos changes a
score. Memory holds the videos being scored and a few numbers of each that is done.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sla_eval.backbones import load_backbone
from sla_eval.metrics.base import (
    EvalMetric,
    MetricUnavailableError,
    VideoMetric,
    VideoSetMetric,
)
from sla_eval.prompts import Prompt
from sla_eval.videos import Video, VideoError, decode_video

MetricClass = type[VideoMetric] | type[VideoSetMetric]
Metrics = Mapping[str, MetricClass]
Progress = Callable[[int, int, str], None]
Load = Callable[[str], nn.Module]
Metric = TypeVar("Metric", bound=EvalMetric)

NOT_A_NUMBER = "its score is not a number"
NO_REFERENCES = "needs reference videos, none were given"


@dataclass(frozen=True)
class Job:
    """A video to score.

    Attributes:
        video: the file; None to put a reference that belongs to no video into the sets.
        reference: the one that it is compared with, if any.
        prompt: what it was made from, if known.
        metrics: names of those to compute; the metrics that a VBench prompt is not for are left
            out.
    """

    video: Path | None
    reference: Path | None
    prompt: Prompt | None
    metrics: tuple[str, ...]

    @property
    def name(self) -> str:
        """File name that its results go by."""
        path = self.video or self.reference
        assert path is not None
        return path.name


@dataclass(frozen=True)
class Decoded:
    """A job's frames.

    Attributes:
        video: None for a reference alone, and where `unreadable` says why.
        reference: None where no metric needs it, and where `why` says why.
    """

    video: Video | None
    reference: Video | None
    unreadable: str | None = None
    why: str = ""


@dataclass
class Scored:
    """What became of a job.

    Attributes:
        job: the job.
        unreadable: why the video could not be decoded, or None.
        values: metric to (value, weight in the mean over videos).
        skipped: metric to the reason why it has no value.
        states: metric of sets to what it keeps of this video, on the CPU.
        not_available: metrics that could not be built where this job ran, with the reason.
    """

    job: Job
    unreadable: str | None = None
    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)


@dataclass
class Scores:
    """What was found out about a list of videos.

    Attributes:
        files: their names, sorted.
        values: metric to {file: value}, for metrics that have a value a video.
        weights: metric to {file: weight in the mean over videos}.
        set_values: metric to the value of all videos together, for metrics of sets.
        set_counts: metric of sets to the number of videos in it.
        skipped: metric to {file: reason}.
        not_available: metric to the reason, which says how to get it.
        unreadable: {file: reason}.
        other_dimension: metric to the number of videos whose VBench prompt is not for it.
    """

    files: list[str] = field(default_factory=list)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    set_values: dict[str, float] = field(default_factory=dict)
    set_counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    other_dimension: dict[str, int] = field(default_factory=dict)


def is_set_metric(cls: MetricClass) -> bool:
    """Whether a metric has one value for all videos together, as Frechet distances do."""
    return issubclass(cls, VideoSetMetric)


def default_workers(videos: int) -> int:
    """Processes that pay: one a core, each with eight videos or more; 0 is this process alone."""
    count = min(os.cpu_count() or 1, videos // 8)
    return count if count > 1 else 0


def score_videos(
    videos: Sequence[Path],
    classes: Metrics,
    *,
    references: Mapping[str, Path] | None = None,
    prompts: Mapping[str, Prompt] | None = None,
    workers: int | None = 0,
    processes: int = 0,
    device: str | torch.device = "cpu",
    weights_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    load: Load | None = None,
) -> Scores:
    """Scores videos by several metrics; what cannot be scored is listed, and the rest goes on.

    Args:
        videos: files of different names.
        classes: metrics by name. For `workers` above 0 on the CPU they must be importable in
            another process.
        references: {file name: reference video}; a video is compared with that of its name, and
            metrics of sets take all of them.
        prompts: {file name: prompt}.
        workers: processes that decode and score, 0 for this one alone; None chooses. On a GPU
            they are threads that decode, and this process scores.
        processes: on a GPU, processes that decode and score in place of this one, each with
            networks of its own on it: many metrics start more small kernels than one Python can.
            0 is this one alone. No score depends on it.
        device: where the metrics compute.
        weights_dir: folder of the networks' weights (`sla_eval.backbones`).
        progress: called after each video with (done, total, file name).
        load: gives a network by its name, on any device, in place of `load_backbone` and
            `weights_dir`; other processes must be able to import it. It raises
            `BackboneUnavailableError` for those that it has not.

    Raises:
        ValueError: workers or processes below 0, processes on a CPU, or two videos of one name.
        RuntimeError: worker processes cannot be started.
    """
    files = {path.name: path for path in sorted(videos, key=lambda path: path.name)}
    if len(files) != len(videos):
        raise ValueError(
            f"videos must have different file names, got {len(files)} names for "
            f"{len(videos)} videos"
        )
    device = torch.device(device)
    if workers is None:
        on_gpu = device.type != "cpu"
        workers = min(8, os.cpu_count() or 1) if on_gpu else default_workers(len(files))
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if processes < 0:
        raise ValueError(f"processes must be 0 or more, got {processes}")
    if processes and device.type == "cpu":
        raise ValueError(f"processes is {processes}, which is for a GPU; on a CPU set workers")
    prompts = prompts or {}
    scores = Scores(files=list(files))
    running: dict[str, MetricClass] = {}
    for name, cls in classes.items():
        reason = why_not(
            cls,
            has_references=references is not None,
            has_prompts=bool(prompts),
            weights_dir=weights_dir,
            load=load,
        )
        if reason is None:
            running[name] = cls
        else:
            scores.not_available[name] = reason
    joined: dict[str, VideoSetMetric] = {}
    for name, set_class in _set_classes(running).items():
        try:
            joined[name] = _build(set_class, weights_dir, load)
        except MetricUnavailableError as error:
            scores.not_available[name] = " ".join(str(error).split())
            del running[name]
    scores.skipped = {m: {} for m in running}
    scores.values = {m: {} for m in running if m not in joined}
    scores.weights = {m: {} for m in scores.values}
    scores.other_dimension = dict.fromkeys(running, 0)

    jobs = _jobs(files, references or {}, prompts, running, scores)
    results: Iterator[Scored]
    if processes:
        results = _in_processes(jobs, (running, device, weights_dir, load), processes)
    elif device.type != "cpu":
        scorer = Scorer(running, device, weights_dir, load, side_by_side=True)
        results = _on_one_thread(_with_decoding_threads(jobs, scorer, max(1, workers)))
    elif workers == 0:
        results = _one_by_one(jobs, Scorer(running, device, weights_dir, load))
    else:
        results = _in_processes(jobs, (running, device, weights_dir, load), workers)
    for done, found in enumerate(results, start=1):
        name = found.job.name
        scores.not_available |= found.not_available
        if found.unreadable is not None and found.job.video is not None:
            scores.unreadable[name] = found.unreadable
        for metric, (value, weight) in found.values.items():
            scores.values[metric][name] = value
            scores.weights[metric][name] = weight
        for metric, reason in found.skipped.items():
            scores.skipped[metric][name] = reason
        for metric, state in found.states.items():
            # At once and in the order of names: a state may be large.
            joined[metric].merge_state(state)
        if progress is not None:
            progress(done, len(jobs), name)
    for metric, total in joined.items():
        scores.set_counts[metric] = int(total.count)
        try:
            with warnings.catch_warnings():
                # `merge_state` does not count as an update.
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                scores.set_values[metric] = float(total.compute())
        except ValueError as error:  # fewer than two videos
            scores.not_available.setdefault(metric, str(error))
    for metric in scores.not_available:
        scores.values.pop(metric, None)
        scores.skipped.pop(metric, None)
    return scores


def _jobs(
    files: Mapping[str, Path],
    references: Mapping[str, Path],
    prompts: Mapping[str, Prompt],
    running: Metrics,
    scores: Scores,
) -> list[Job]:
    """A job a video, and for metrics of sets one for each reference without a video."""
    jobs = []
    for name, path in files.items():
        prompt = prompts.get(name)
        wanted = tuple(m for m in running if prompt is None or prompt.is_for(m))
        for metric in running.keys() - set(wanted):
            scores.other_dimension[metric] += 1
        jobs.append(Job(path, references.get(name), prompt, wanted))
    sets = tuple(_set_classes(running))
    if sets:
        jobs += [
            Job(None, references[name], prompts.get(name), sets)
            for name in sorted(references.keys() - files.keys())
        ]
    return jobs


def _set_classes(running: Metrics) -> dict[str, type[VideoSetMetric]]:
    return {name: cls for name, cls in running.items() if issubclass(cls, VideoSetMetric)}


def why_not(
    cls: MetricClass,
    *,
    has_references: bool,
    has_prompts: bool,
    weights_dir: str | os.PathLike[str] | None = None,
    load: Load | None = None,
) -> str | None:
    """Why a metric cannot run here, and how to get it; None if it can.

    Of a `load` it is not known beforehand what it can give.
    """
    reason = cls.availability(weights_dir) if load is None or not cls.backbones else None
    if reason is not None:
        return " ".join(reason.split())
    if cls.needs_reference and not has_references:
        return NO_REFERENCES
    if cls.needs_prompt and not has_prompts:
        return "needs the videos' prompts, none were given or found beside the videos"
    return None


def _build(
    cls: type[Metric], weights_dir: str | os.PathLike[str] | None, load: Load | None
) -> Metric:
    if load is None or not cls.backbones:  # a metric of no network need not know of `load`
        return cls(weights_dir=weights_dir)
    return cls(weights_dir=weights_dir, load=load)


class Scorer:
    """Metrics that are built once and score one video after another.

    Args:
        classes: by name; those that turn out not to be available are left out and noted.
        device: where they compute.
        weights_dir: folder of the networks' weights.
        load: gives a network by its name; None loads from `weights_dir`. A network is loaded once
            for all metrics.
        side_by_side: whether the metrics of a video run in a thread each: on a GPU one prepares
            frames, or starts many small kernels, while another's network works.
    """

    def __init__(
        self,
        classes: Metrics,
        device: torch.device,
        weights_dir: str | os.PathLike[str] | None = None,
        load: Load | None = None,
        *,
        side_by_side: bool = False,
    ) -> None:
        self.device = device
        once = functools.cache(load or functools.partial(load_backbone, weights_dir=weights_dir))
        self.metrics: dict[str, EvalMetric] = {}
        self.not_available: dict[str, str] = {}
        for name, cls in classes.items():
            try:
                self.metrics[name] = _build(cls, weights_dir, once).to(device)
            except MetricUnavailableError as error:
                self.not_available[name] = " ".join(str(error).split())
        self._threads: ThreadPoolExecutor | None = None
        if side_by_side and len(self.metrics) > 1:
            self._threads = ThreadPoolExecutor(
                len(self.metrics), "metric", torch.set_num_threads, (1,)
            )

    def decode(self, job: Job) -> Decoded:
        """The frames of a job's video and of its reference, if a metric needs that."""
        video, unreadable = _decode(job.video)
        metrics = [self.metrics[name] for name in job.metrics if name in self.metrics]
        if unreadable is not None:  # its reference still belongs to the set of references
            metrics = [metric for metric in metrics if isinstance(metric, VideoSetMetric)]
        if not any(metric.needs_reference for metric in metrics):
            return Decoded(video, None, unreadable)
        if job.reference is None:
            return Decoded(video, None, unreadable, "no reference video of this name")
        reference, why = _decode(job.reference)
        return Decoded(video, reference, unreadable, f"reference unreadable: {why}" if why else "")

    def score(self, job: Job) -> Scored:
        """Decodes and measures a video."""
        return self.measure(job, self.decode(job))

    def measure(self, job: Job, decoded: Decoded) -> Scored:
        """All metrics of a decoded video."""
        found = Scored(job, decoded.unreadable, not_available=dict(self.not_available))
        video, reference = (
            None if clip is None else clip.frames.to(self.device)
            for clip in (decoded.video, decoded.reference)
        )
        fps = getattr(decoded.video or decoded.reference, "fps", None)
        prompt = None if job.prompt is None else job.prompt.text
        frames = _Frames(video, reference, fps, prompt, decoded.why)
        metrics = {name: self.metrics[name] for name in job.metrics if name in self.metrics}
        each = map if self._threads is None else self._threads.map
        outcomes = each(functools.partial(_measure_one, job=job, frames=frames), metrics.values())
        for name, outcome in zip(metrics, outcomes, strict=True):
            if outcome.skipped is not None:
                found.skipped[name] = outcome.skipped
            if outcome.value is not None:
                found.values[name] = outcome.value
            if outcome.state is not None:
                found.states[name] = outcome.state
        return found


@dataclass(frozen=True)
class _Frames:
    """What a metric is given of a video; `why`: what is wrong with the reference."""

    video: Tensor | None
    reference: Tensor | None
    fps: float | None
    prompt: str | None
    why: str


@dataclass
class _Outcome:
    """What a metric says of a video: (value, weight), a state, or why not."""

    value: tuple[float, float] | None = None
    state: Any = None
    skipped: str | None = None


def _measure_one(metric: EvalMetric, *, job: Job, frames: _Frames) -> _Outcome:
    outcome = _Outcome()
    video, reference = frames.video, frames.reference
    if metric.needs_prompt and frames.prompt is None:
        outcome.skipped = "its prompt is not known"
        return outcome
    try:
        if isinstance(metric, VideoSetMetric):
            if reference is None and job.reference is not None and frames.why:
                outcome.skipped = frames.why
            if video is not None or reference is not None:
                metric.update(video, reference, prompt=frames.prompt, fps=frames.fps)
                outcome.state = _to_cpu(metric.metric_state)
        elif isinstance(metric, VideoMetric) and video is not None:
            if metric.needs_reference and reference is None:
                outcome.skipped = frames.why
                return outcome
            metric.update(video, reference, prompt=frames.prompt, fps=frames.fps)
            value, weight = metric.per_video[-1], float(metric.weight(video))
            if math.isnan(value):
                outcome.skipped = NOT_A_NUMBER
            else:
                outcome.value = (value, weight)
    except ValueError as error:  # a video this metric does not take, such as one frame
        outcome.skipped = str(error)
    finally:
        metric.reset()
    return outcome


def _decode(path: Path | None) -> tuple[Video | None, str | None]:
    """A video, or why it cannot be read; neither for None."""
    if path is None:
        return None, None
    try:
        return decode_video(path), None
    except VideoError as error:
        return None, error.reason


def _to_cpu(state: Any) -> Any:
    """A state's tensors, detached from the metric and from the device."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_to_cpu(value) for value in state]
    return state


def _one_by_one(jobs: Sequence[Job], scorer: Scorer) -> Iterator[Scored]:
    yield from _on_one_thread(map(scorer.score, jobs))


def _on_one_thread(results: Iterator[Scored]) -> Iterator[Scored]:
    # Also where threads decode: each would split its copies over all cores.
    with one_thread():
        yield from results


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: sums are split by threads, and the last digits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_decoding_threads(jobs: Sequence[Job], scorer: Scorer, threads: int) -> Iterator[Scored]:
    """Decoding runs ahead by as many videos as there are threads; the device never waits for it."""
    with ThreadPoolExecutor(threads, "decode") as pool:
        ahead: deque[tuple[Job, Future[Decoded]]] = deque()
        waiting = iter(jobs)
        try:
            while True:
                while len(ahead) <= threads and (job := next(waiting, None)) is not None:
                    ahead.append((job, pool.submit(scorer.decode, job)))
                if not ahead:
                    return
                job, decoding = ahead.popleft()
                yield scorer.measure(job, decoding.result())
        finally:
            pool.shutdown(cancel_futures=True)


_scorer: Scorer | Exception | None = None  # of a worker process


def _start_worker(*setup: Any) -> None:
    global _scorer
    torch.set_num_threads(1)
    try:
        classes, device, weights_dir, load = setup
        _scorer = Scorer(classes, device, weights_dir, load)
    except Exception as error:  # an initialiser that fails breaks the pool and hides the reason
        _scorer = error


def _own_scorer() -> Scorer:
    if isinstance(_scorer, Exception):
        raise _scorer
    assert _scorer is not None
    return _scorer


def _score_in_worker(job: Job) -> Scored:
    return _own_scorer().score(job)


def _is_ready() -> bool:
    return _own_scorer() is not None


# What each worker is started with: metrics by name, device, the folder of weights, and `load`.
Setup = tuple[Metrics, torch.device, "str | os.PathLike[str] | None", "Load | None"]


def _pool(setup: Setup, workers: int) -> ProcessPoolExecutor:
    methods = multiprocessing.get_all_start_methods()
    # Never a plain fork: this process has threads. The server imports torch once for all workers.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _start_worker, setup)


def _in_processes(jobs: Sequence[Job], setup: Setup, workers: int) -> Iterator[Scored]:
    """Results in the order of the jobs; a job that kills its process is listed as unreadable."""
    workers = min(workers, len(jobs)) or 1
    pool = _pool(setup, workers)
    ahead: deque[tuple[Job, Future[Scored]]] = deque()
    waiting = iter(jobs)
    try:
        try:
            pool.submit(_is_ready).result()  # else every video would be blamed
        except BrokenProcessPool as error:
            raise RuntimeError(
                "worker processes cannot be started: metrics must be importable by name in another "
                "process, and there must be memory for each; workers=0 scores in this process"
            ) from error
        while True:
            while len(ahead) < 2 * workers and (job := next(waiting, None)) is not None:
                ahead.append((job, _submitted(pool, job)))
            if not ahead:
                return
            try:
                found = ahead[0][1].result()
            except BrokenProcessPool:
                # Which of them it was is not said: each once more, alone.
                suspects = [job for job, _ in ahead]
                ahead.clear()
                pool.shutdown()
                yield from _alone(suspects, setup)
                pool = _pool(setup, workers)
            else:
                ahead.popleft()
                yield found
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, job: Job) -> Future[Scored]:
    """A job's future, which also says that an earlier job has broken the pool."""
    try:
        return pool.submit(_score_in_worker, job)
    except BrokenProcessPool as error:
        refused: Future[Scored] = Future()
        refused.set_exception(error)
        return refused


def _alone(jobs: Sequence[Job], setup: Setup) -> Iterator[Scored]:
    pool = _pool(setup, 1)
    try:
        for job in jobs:
            try:
                yield pool.submit(_score_in_worker, job).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = _pool(setup, 1)
                yield Scored(job, "the process that decoded and scored it died")
    finally:
        pool.shutdown(cancel_futures=True)
