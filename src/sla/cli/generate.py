"""`python -m sla generate`: a video of a prompt, or one of each prompt of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sla_eval.prompts import read_prompts
from tqdm import tqdm

from sla.cli import videos, weights
from sla.cli.quiet import quiet_lightning
from sla.config import ConfigError, load_experiment
from sla.data.video import VIDEO_SUFFIXES
from sla.files import sha256
from sla.models.families import family
from sla.training.build import sampling_device


def generate(
    config: Path,
    overrides: Sequence[str],
    path: Path | None,
    out: Path | None,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
) -> None:
    """Write an mp4, a picture strip and a sidecar JSON of each prompt.

    Of a file of prompts, those whose video is there already, of the same prompt, seed, weights,
    attention and sampling, are left as they are: a call that was interrupted goes on where it was.
    Prompt i has the seed `sampling.seed` + i.

    Args:
        path: weights; None takes those of the config's run, or before it is finished the
            pretrained ones.
        out: for `prompt` the mp4, or an existing folder; for `prompts` the folder. None takes
            names of its own under `runs/<name>/generated`.
        prompt: what the video shows.
        prompts: a file of prompts, as `sla_eval.prompts.read_prompts` takes it.

    Raises:
        ConfigError: not exactly one of `prompt` and `prompts`, or an `out` that does not fit.
        PromptError: a file of prompts that cannot be read or is empty.
        RunError: no weights, or not enough memory on the GPU.
        OSError: a video cannot be written; those before it stay.
    """
    if (prompt is None) == (prompts is None):
        raise ConfigError("give either a prompt (PROMPT=) or a file of prompts (PROMPTS=)")
    texts = [item.text for item in read_prompts(prompts)] if prompts is not None else [prompt or ""]
    _check_out(out, many=prompts is not None)
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    path = path or weights.newest(experiment) or weights.pretrained(experiment)
    loaded = weights.load(experiment, path)
    experiment = loaded.experiment
    device = sampling_device(experiment.trainer)
    print(f"sampling with {loaded.name} attention from {path}")

    own_folder = Path(experiment.run.dir) / experiment.run.name / "generated"
    if prompts is None:
        files = [_file_of_one(out, own_folder, texts[0], loaded.name, experiment.sampling.seed)]
    else:
        folder = out or own_folder / (videos.slug(Path(prompts).stem) or "prompts")
        files = [
            folder / f"{i:04d}-{_short(text)}-{loaded.name}-{experiment.sampling.seed + i}.mp4"
            for i, text in enumerate(texts)
        ]
    digest = family(experiment.model.name).digest(path)
    wanted = [
        videos.describe(
            file,
            experiment,
            text,
            experiment.sampling.seed + i,
            weights_sha256=digest,
            device=device,
        )
        for i, (file, text) in enumerate(zip(files, texts, strict=True))
    ]
    missing = wanted
    if prompts is not None:
        missing = [video for video in wanted if not videos.is_made(video)]
        if len(missing) < len(wanted):
            print(
                f"{len(wanted) - len(missing)} of {len(wanted)} videos are there already in "
                f"{folder}, of the same prompt, seed, weights, attention and sampling",
                flush=True,
            )
    if missing:
        family(experiment.model.name).for_inference(loaded.module.model, device)
        module = loaded.module.to(device)
        total = len(missing) * experiment.sampling.steps
        with tqdm(total=total, unit="step", file=sys.stderr) as bar:
            for number, video in enumerate(missing, start=1):
                bar.set_description(f"video {number} of {len(missing)}")
                videos.make(video, module, path, strip=True, progress=lambda *_: bar.update())
    if prompts is None:
        print(f"{wanted[0].file}\n{wanted[0].strip}")
    else:
        print(f"{len(missing)} videos made; all {len(wanted)} are in {folder}")


def _check_out(out: Path | None, *, many: bool) -> None:
    """Before any work, whether what is asked for can be written there."""
    if out is None:
        return
    if many:
        if (out.exists() and not out.is_dir()) or out.suffix.lower() in VIDEO_SUFFIXES:
            raise ConfigError(f"OUT is {str(out)!r}; for a file of prompts it must be a folder")
    elif not out.is_dir() and out.suffix.lower() != ".mp4":
        raise ConfigError(
            f"OUT is {str(out)!r}; for one prompt it must be an .mp4 file or an existing folder"
        )


def _file_of_one(out: Path | None, folder: Path, text: str, method: str, seed: int) -> Path:
    """Where a single prompt's video goes."""
    if out is not None and not out.is_dir():
        return out
    # The hash tells apart prompts that are alike in the letters that a name keeps.
    name = f"{_short(text)}-{sha256(text.encode())[:8]}-{method}-{seed}.mp4"
    return (out or folder) / name


def _short(text: str) -> str:
    return videos.slug(text)[:48].rstrip("-") or "empty"
