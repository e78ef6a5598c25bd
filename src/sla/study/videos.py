"""Samples of held-out prompts, scored against the pretrained full-attention model's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sla_eval.metrics import VideoMetric, build_metric, metric_class
from sla_eval.metrics.frechet import frechet_distance
from torch import Tensor

from sla.data.manifest import DataError
from sla.data.module import DataConfig, VideoDataModule
from sla.data.streaming import ShardWindows
from sla.data.video import to_frames
from sla.study.evaluator import Evaluator, find
from sla.study.frames import Strips, frame_indices
from sla.study.labels import Prompt
from sla.study.plan import StudyError
from sla.study.records import ACCURACY, FRECHET, Key, measurement
from sla.training.config import Experiment
from sla.training.generation import StageSeconds
from sla.training.module import DiffusionModule
from sla.training.run import sample_videos

Videos = NDArray[np.uint8]


@dataclass(frozen=True)
class Sampled:
    """Videos of the prompts.

    Attributes:
        videos: uint8 (prompts, T, H, W, 3).
        step_ms: median milliseconds of a denoising step of one video, its share of
            `sampling.batch_size` at a time, guidance in it, not compiled; the first ones warm up.
    """

    videos: Videos
    step_ms: float | None


def sample_prompts(
    experiment: Experiment, module: DiffusionModule, prompts: Sequence[Prompt]
) -> Sampled:
    """One video a prompt: prompt i from the noise of seed `sampling.seed + i`, for every arm."""
    stages: list[StageSeconds] = []
    texts = [prompt.text for prompt in prompts]
    # Blocks that were compiled for training would be compiled anew for these shapes, in every arm.
    with torch.compiler.set_stance("force_eager"):
        videos = sample_videos(experiment, module, texts, timings=stages.append)
    measured = stages[experiment.sampling.batch_size :]
    steps = [seconds for stage in measured for seconds in stage.steps]
    return Sampled(videos, 1e3 * float(np.median(steps)) if steps else None)


def real_clips(data: DataConfig, shards: Sequence[str], prompts: Sequence[Prompt]) -> Videos:
    """The held-out clips whose captions the prompts are, cut as validation clips are.

    Args:
        data: how clips are cut, of shards.
        shards: tar files that hold them.

    Returns:
        uint8 (prompts, T, H, W, 3).

    Raises:
        DataError: a clip is not there or cannot be read.
    """
    shards = list(shards)
    config = replace(data, val_shards=shards, val_clips=0, val_windows=1, num_workers=0)
    loader: Any = VideoDataModule(config).val_dataloader()
    windows: ShardWindows = loader.dataset
    places = {windows.source.name(p): i for i, p in enumerate(windows.chosen)}
    videos: list[Videos] = []
    for prompt in prompts:
        place = places.get(prompt.id)
        sample = None if place is None else windows[place]
        if sample is None or not sample["weight"]:
            raise DataError(
                f"clip {prompt.id} of {shards} cannot be read, and its frames are to be kept "
                "(measures.frames of 0 keeps none)"
            )
        videos.append(to_frames(sample["video"]))
    return np.stack(videos)


def strips_of(
    key: Key,
    videos: Videos,
    prompts: Sequence[Prompt],
    noise_seed: int | None,
    shown: Sequence[int],
) -> Strips:
    """Frames of some of the videos.

    Args:
        key: what names the run.
        videos: uint8 (prompts, T, H, W, 3), of all prompts or of those shown.
        prompts: as many.
        noise_seed: of prompt 0's initial noise; None of real clips.
        shown: numbers of the prompts to keep.
    """
    indices = frame_indices(videos.shape[1])
    return Strips(
        *key,
        prompts=tuple(prompts[i].text for i in shown),
        clips=tuple(prompts[i].id for i in shown),
        noise_seeds=() if noise_seed is None else tuple(noise_seed + i for i in shown),
        indices=indices,
        frames=np.ascontiguousarray(videos[list(shown)][:, list(indices)]),
    )


def check_metrics(names: Sequence[str]) -> None:
    """Refuse metrics that cannot run here.

    Raises:
        StudyError: an unknown one, one of sets, or one whose weights are missing; says which.
    """
    for name in names:
        try:
            cls = metric_class(name)
        except ValueError as error:
            raise StudyError(f"measures.video_metrics: {error}") from error
        if not issubclass(cls, VideoMetric):
            raise StudyError(f"measures.video_metrics: {name} is no score of single videos")
        missing = cls.availability()
        if missing:
            raise StudyError(f"measures.video_metrics: {name} cannot run: {missing}")


def score(
    step: int,
    videos: Videos,
    reference: Videos,
    prompts: Sequence[Prompt],
    metrics: Sequence[str],
    fps: float,
    evaluator: tuple[Evaluator, Tensor] | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Measurements of an arm's videos.

    Args:
        step: that the arm was trained for.
        videos, reference: uint8 (prompts, T, H, W, 3), of the arm and of the reference model.
        metrics: names of `sla_eval` metrics.
        fps: for those that ask for it.
        evaluator: the network and the features of real held-out clips, or None.
        device: where they compute.
    """

    def one(video: Videos, other: Videos, prompt: Prompt, name: str) -> float:
        metric = build_metric(name).to(device)
        assert isinstance(metric, VideoMetric)  # `check_metrics`
        metric.update(_tchw(video, device), _tchw(other, device), prompt=prompt.text, fps=fps)
        return metric.per_video[0]

    rows = []
    # A GPU gets the videos one by one; a CPU's cores one each.
    with ThreadPoolExecutor(8 if device.type == "cpu" else 1) as pool:
        for name in metrics:
            values = list(pool.map(partial(one, name=name), videos, reference, prompts))
            rows.append(measurement(step, name, values))
    if evaluator is not None:
        network, real = evaluator
        found = find(network, videos, [dict(prompt.attributes) for prompt in prompts], device)
        for attribute, correct in found.correct.items():
            rows.append(measurement(step, f"{ACCURACY}/{attribute}", correct))
        together = np.stack(list(found.correct.values()), axis=1)
        rows.append(measurement(step, ACCURACY, together.mean(1)))
        distance = frechet_distance(torch.from_numpy(found.features), real)
        rows.append(measurement(step, FRECHET, float(distance)))
    return rows


def _tchw(video: Videos, device: torch.device) -> Tensor:
    return torch.from_numpy(video).permute(0, 3, 1, 2).to(device)
