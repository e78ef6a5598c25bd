"""`python -m sla capture`: what a model's attention is given and does, as files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sla_eval.prompts import read_prompts
from tqdm import tqdm

from sla.analysis.capture import check_choice, record
from sla.analysis.capture_files import CapturePlan
from sla.attention import AttentionConfig
from sla.cli import weights
from sla.cli.data import ensure
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment, to_dict
from sla.data.module import VideoBatch
from sla.diffusion.flow_matching import TIMESTEPS, per_sample_noise
from sla.diffusion.sampling import sample
from sla.models.families import family
from sla.models.schedulers import build_scheduler
from sla.models.video_model import VideoModel
from sla.results import provenance
from sla.training.build import build_data, load_autoencoder, sampling_device
from sla.training.config import Experiment
from sla.training.module import DiffusionModule
from sla.training.run_folder import RunError

# Query blocks of this order are kept whole beside raster order's: the cubes of VSA.
TILE = (4, 4, 4)


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture.

    Attributes:
        clips: validation clips, noised to the timesteps; not used with prompts.
        prompts: captions of videos that are sampled, captured at the sampler's steps nearest to the
            timesteps; video i starts from the noise of `sampling.seed` + i.
        timesteps: in [0, 1000].
        layers, heads: indices; None for all.
        query_blocks: query blocks of each order; None for all queries.
        dtype: of the files.
        values: keep values too.
        max_gib: the most that the files may take.
    """

    clips: int = 1
    prompts: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = (950.0, 700.0, 400.0, 100.0)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    query_blocks: int | None = None
    dtype: str = "float32"
    values: bool = True
    max_gib: float = 4.0

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise CaptureOptionError(f"--clips is {self.clips}; it must be at least 1")
        wrong = [t for t in self.timesteps if not 0.0 <= t <= TIMESTEPS]
        if wrong or not self.timesteps:
            raise CaptureOptionError(
                f"--timesteps holds {wrong or 'nothing'}; each must be in [0, {TIMESTEPS:g}]"
            )
        if not self.max_gib > 0:
            raise CaptureOptionError(f"--max-gib is {self.max_gib}; it must be positive")


class CaptureOptionError(ValueError):
    """An option of the command that cannot be used."""


def read_options(
    *, prompt: str | None = None, prompts: str | None = None, **numbers: Any
) -> CaptureOptions:
    """Options with a file of prompts read, as `sla_eval.prompts.read_prompts` takes it."""
    texts = [item.text for item in read_prompts(prompts)] if prompts is not None else []
    return CaptureOptions(prompts=(*([prompt] if prompt else []), *texts), **numbers)


def capture(
    config: Path,
    overrides: Sequence[str],
    path: Path | None,
    out: Path | None,
    options: CaptureOptions,
) -> Path:
    """Capture attention of a model; goes on where an interrupted call of the same options was.

    Labels and errors are those of the model's own method. For a model with full attention they are
    the config's method's, fresh and not fine-tuned, given the model's queries, keys and values.

    Args:
        path: weights; None takes the pretrained ones of the config.
        out: folder; None takes `runs/<name>/capture`.

    Returns:
        The folder.

    Raises:
        RunError: no weights, or no validation clip.
        CaptureError: too large, or a folder of another capture.
        ValueError: a layer or head that the model does not have.
    """
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    # Hooks are not called by compiled blocks.
    experiment = replace(experiment, trainer=replace(experiment.trainer, compile=False))
    path = path or weights.pretrained(experiment)
    wanted = experiment.attention
    loaded = weights.load(experiment, path)
    model = loaded.module.model
    full = model.attention_config.name == "full"
    probe = wanted if full and wanted.name != "full" else None
    device = sampling_device(experiment.trainer)
    module = loaded.module.to(device)
    runs = (
        _Prompts(loaded.experiment, module, options)
        if options.prompts
        else _Clips(loaded.experiment, module, options)
    )
    plan = _plan(loaded, runs, options, probe)
    out = out or Path(experiment.run.dir) / experiment.run.name / "capture"
    with (
        record(
            model,
            out,
            plan,
            provenance=provenance(plan.seed),
            probe=probe,
            max_gib=options.max_gib,
        ) as recorder,
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        bar = tqdm(runs.descriptions, "capture", unit="sample", file=sys.stderr)
        for index, _ in enumerate(bar):
            recorder.sample = index
            if missing := recorder.wants(index):
                runs.run(index, missing)
            left = recorder.wants(index)
            if left:
                raise RunError(f"the model was not called at timesteps {left} of sample {index}")
    of = "the model's own" if probe is None else f"a fresh {probe.name}'s"
    print(
        f"{recorder.written} files written, {len(plan.moments)} in {out}: layers "
        f"{list(plan.layers)}, heads {list(plan.heads)}, timesteps "
        f"{[round(t, 1) for t in plan.timesteps]}; labels and errors are {of}\n"
        f"measure it: python -m sla analyse --capture {out} --record"
    )
    return out


class _Clips:
    """Validation clips at chosen noise levels."""

    def __init__(
        self, experiment: Experiment, module: DiffusionModule, options: CaptureOptions
    ) -> None:
        ensure(experiment.data)
        single = replace(experiment.data, batch_size=1, num_workers=0)
        data = build_data(replace(experiment, data=single))
        loaders = data.val_dataloader()
        self._module = module
        self._batches: list[VideoBatch] = []
        for batch in loaders if not isinstance(loaders, list) else [b for x in loaders for b in x]:
            if batch["weight"].item() > 0:
                self._batches.append(batch)
            if len(self._batches) == options.clips:
                break
        if len(self._batches) < options.clips:
            raise RunError(
                f"--clips is {options.clips}; there are {len(self._batches)} validation clips"
            )
        self.seed = experiment.run.seed
        self.size: Sequence[int] = self._batches[0]["video"].shape[1:]
        self.timesteps = tuple(sorted({float(t) for t in options.timesteps}, reverse=True))
        self.descriptions: tuple[dict[str, Any], ...] = tuple(
            {
                "kind": "clip",
                "clip": batch["clip_id"][0],
                "caption": batch["caption"][0],
                "index": int(batch["sample_index"].item()),
                "seed": self.seed,
            }
            for batch in self._batches
        )

    def run(self, index: int, timesteps: Sequence[float]) -> None:
        """One forward a timestep; noise is that of the clip, the same at all of them."""
        batch, device = self._batches[index], self._module.device
        batch["video"] = batch["video"].to(device)
        shape = batch["video"].shape[1:]
        noise, _ = per_sample_noise(batch["sample_index"], self.seed, shape, device)
        for timestep in timesteps:
            sigma = torch.tensor([timestep / TIMESTEPS], device=device)
            self._module.losses(batch, sigma, noise)


class _Stop(Exception):
    """Nothing more of this video is wanted."""


class _Prompts:
    """Videos being sampled."""

    def __init__(
        self, experiment: Experiment, module: DiffusionModule, options: CaptureOptions
    ) -> None:
        data, self._sampling = experiment.data, experiment.sampling
        autoencoder = load_autoencoder(experiment.autoencoder)
        latents = autoencoder.latent_shape(data.num_frames, data.height, data.width)
        self._module = module
        self.seed = self._sampling.seed
        self.size: Sequence[int] = (experiment.model.in_channels, *latents[1:])
        steps = [float(t) for t in self._scheduler().timesteps]
        nearest = {min(steps, key=lambda s: abs(s - t)) for t in options.timesteps}
        self.timesteps = tuple(sorted(nearest, reverse=True))
        self.descriptions: tuple[dict[str, Any], ...] = tuple(
            {"kind": "prompt", "caption": text, "index": i, "seed": self.seed + i}
            for i, text in enumerate(options.prompts)
        )

    def _scheduler(self) -> Any:
        sampling, device = self._sampling, self._module.device
        return build_scheduler(sampling.scheduler, self._module.flow.shift, sampling.steps, device)

    def run(self, index: int, timesteps: Sequence[float]) -> None:
        """Sampling up to the last timestep that is wanted."""
        device, sampling = self._module.device, self._sampling
        encode = self._module.text_encoder.encode
        text, mask = (t.to(device) for t in encode([self.descriptions[index]["caption"]]))
        null = [t.to(device) for t in encode([""])] if sampling.guidance != 1.0 else [None, None]
        generator = torch.Generator().manual_seed(self.descriptions[index]["seed"])
        scheduler = self._scheduler()
        last = [float(t) for t in scheduler.timesteps].index(min(timesteps)) + 1

        def step_done(done: int, _: int) -> None:
            if done >= last:
                raise _Stop

        with contextlib.suppress(_Stop):
            sample(
                self._module.model,
                torch.randn(1, *self.size, generator=generator).to(device),
                text,
                mask,
                *null,
                scheduler=scheduler,
                guidance=sampling.guidance,
                batched_guidance=sampling.batched_guidance,
                progress=step_done,
            )


def _plan(
    loaded: weights.Loaded,
    runs: _Clips | _Prompts,
    options: CaptureOptions,
    probe: AttentionConfig | None,
) -> CapturePlan:
    model: VideoModel = loaded.module.model
    method = next(iter(model.attention_modules()))
    own = model.attention_config
    tiles = [tile for tile in (TILE, own.tile, getattr(probe, "tile", None)) if tile is not None]
    return CapturePlan(
        samples=runs.descriptions,
        timesteps=runs.timesteps,
        layers=check_choice(model, "layers", options.layers),
        heads=check_choice(model, "heads", options.heads),
        grid=model.grid(runs.size),
        num_heads=method.num_heads,
        head_dim=method.head_dim,
        query_blocks=options.query_blocks,
        block=int(getattr(probe or own, "block_q", 64)),
        orders=(None, *dict.fromkeys(tiles)),
        dtype=options.dtype,
        values=options.values,
        attention=asdict(own),
        probe=asdict(probe or own),
        probe_is_model=probe is None,
        weights=str(loaded.path),
        weights_sha256=family(loaded.experiment.model.name).digest(loaded.path),
        seed=runs.seed,
        config=to_dict(loaded.experiment),
    )


__all__ = ["CaptureOptionError", "CaptureOptions", "capture", "read_options"]
