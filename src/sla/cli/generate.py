"""`python -m sla generate`: one prompt, one video."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sla.cli import weights
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment
from sla.data.video import picture_strip, write_picture, write_video
from sla.files import write_text
from sla.results import provenance
from sla.training.build import sampling_device
from sla.training.run import sample_videos


def generate(
    config: Path, overrides: Sequence[str], prompt: str, path: Path | None, out: Path | None
) -> None:
    """Write an mp4 of the prompt, a picture strip and a sidecar JSON beside it.

    Args:
        path: weights; None takes those of the config's run, or before it is finished the
            pretrained ones.
        out: the mp4; None makes a name from the prompt under `runs/<name>/generated`.
    """
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    path = path or weights.newest(experiment) or weights.pretrained(experiment)
    loaded = weights.load(experiment, path)
    experiment = loaded.experiment
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "empty"
        folder = Path(experiment.run.dir) / experiment.run.name / "generated"
        out = folder / f"{slug}-{loaded.name}-{experiment.sampling.seed}.mp4"
    print(f"sampling with {loaded.name} attention from {path}")
    module = loaded.module.to(sampling_device(experiment.trainer))
    start = time.perf_counter()
    with tqdm(total=experiment.sampling.steps, unit="step", file=sys.stderr) as bar:
        video = sample_videos(experiment, module, [prompt], lambda *_: bar.update())[0]
    seconds = time.perf_counter() - start
    write_video(out, video, experiment.sampling.fps)
    strip = out.with_suffix(".png")
    write_picture(strip, picture_strip(video))
    sidecar = {
        "prompt": prompt,
        "weights": str(path),
        "attention": dataclasses.asdict(experiment.attention),
        "sampling": dataclasses.asdict(experiment.sampling),
        "sampling_seconds": round(seconds, 2),
        "provenance": provenance(experiment.sampling.seed),
    }
    write_text(out.with_suffix(".json"), json.dumps(sidecar, indent=2) + "\n")
    print(f"{out}\n{strip}")
