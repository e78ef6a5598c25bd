"""Videos that `generate` and `eval` keep: one mp4 each, beside it a JSON file of what made it.

The JSON file (the sidecar) is written last and holds the mp4's SHA-256: where it is and agrees, the
video is whole. So a call that was cut off goes on where it was, and makes no video twice.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sla.data.video import picture_strip, write_picture, write_video
from sla.files import file_sha256, write_text
from sla.results import provenance
from sla.training.config import Experiment
from sla.training.generation import StageSeconds
from sla.training.module import DiffusionModule
from sla.training.run import sample_videos
from sla.training.run_folder import RunError


@dataclass(frozen=True)
class Video:
    """A video to make or to find.

    Attributes:
        file: the mp4.
        experiment: its config; `sampling.seed` is the video's own.
        prompt: what it shows.
        made_of: what the video follows from, apart from the code: two that agree in this are the
            same.
    """

    file: Path
    experiment: Experiment
    prompt: str
    made_of: dict[str, Any]

    @property
    def sidecar(self) -> Path:
        """The JSON file."""
        return self.file.with_suffix(".json")

    @property
    def strip(self) -> Path:
        """The picture strip."""
        return self.file.with_suffix(".png")


def describe(
    file: Path,
    experiment: Experiment,
    prompt: str,
    seed: int,
    *,
    weights_sha256: str,
    device: torch.device,
    swapped: bool = False,
) -> Video:
    """The video of a prompt and seed.

    Args:
        experiment: with the sizes and the attention of the model.
        weights_sha256: of the model's file.
        device: where it is sampled.
        swapped: the attention is another than the file's, its parameters drawn from `run.seed`.
    """
    experiment = dataclasses.replace(
        experiment, sampling=dataclasses.replace(experiment.sampling, seed=seed)
    )
    sampling, data = experiment.sampling, experiment.data
    made_of = {
        "prompt": prompt,
        "seed": seed,
        "weights_sha256": weights_sha256,
        "swapped_with_seed": experiment.run.seed if swapped else None,
        "attention": dataclasses.asdict(experiment.attention),
        "autoencoder": dataclasses.asdict(experiment.autoencoder),
        "text_encoder": dataclasses.asdict(experiment.text_encoder),
        "scheduler": sampling.scheduler,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "batched_guidance": sampling.batched_guidance,
        "shift": experiment.flow.shift,
        "fps": sampling.fps,
        "size": [data.num_frames, data.height, data.width],
        "device": device.type,
    }
    # As a file gives it back.
    return Video(file, experiment, prompt, json.loads(json.dumps(made_of)))


def is_made(video: Video) -> bool:
    """Whether a video is there, whole, and made of the same, by the JSON file beside it."""
    try:
        sidecar = json.loads(video.sidecar.read_text(encoding="utf-8"))
        return (
            isinstance(sidecar, dict)
            and sidecar.get("made_of") == video.made_of
            and sidecar.get("video_sha256") == file_sha256(video.file)
        )
    except (OSError, ValueError):
        return False


def make(
    video: Video,
    module: DiffusionModule,
    weights: Path,
    *,
    strip: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sample a video and write it, and last its JSON file.

    Args:
        module: on the device to sample on.
        weights: where the model is from.
        strip: write a PNG with some of its frames too.
        progress: called with (steps done, steps in all).

    Raises:
        RunError: not enough memory on the GPU.
        OSError: a file cannot be written; the video does not count as made.
    """
    experiment = video.experiment
    sampling = experiment.sampling
    stages: list[StageSeconds] = []
    try:
        frames = sample_videos(experiment, module, [video.prompt], progress, stages.append)[0]
    except torch.OutOfMemoryError as error:
        hint = ""
        if sampling.batched_guidance and sampling.guidance != 1.0:
            hint = "; sampling.batched_guidance=false takes half the memory for activations"
        raise RunError(f"{module.device} has too little memory: {error}{hint}") from error
    start = time.perf_counter()
    # While the video is replaced, no sidecar may speak for it.
    video.sidecar.unlink(missing_ok=True)
    write_video(video.file, frames, sampling.fps)
    if strip:
        write_picture(video.strip, picture_strip(frames))
    (stage,) = stages
    seconds = {
        "text_encoding": round(stage.text_encoding, 4),
        "denoising": round(stage.denoising, 4),
        "denoising_steps": [round(step, 4) for step in stage.steps],
        "decoding": round(stage.decoding, 4),
        "writing": round(time.perf_counter() - start, 4),
    }
    sidecar = {
        "prompt": video.prompt,
        "seed": sampling.seed,
        "weights": str(weights),
        "attention": dataclasses.asdict(experiment.attention),
        "sampling": dataclasses.asdict(sampling),
        "device": str(module.device),
        "seconds": seconds,
        "made_of": video.made_of,
        "video_sha256": file_sha256(video.file),
        "provenance": provenance(sampling.seed),
    }
    write_text(video.sidecar, json.dumps(sidecar, indent=2) + "\n")


def slug(text: str) -> str:
    """The text's letters and digits of ASCII, small, with `-` between; possibly empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
