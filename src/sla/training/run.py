"""What `make pretrain` and `make finetune` do, step by step."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sla.attention import FullConfig
from sla.data.module import VideoDataModule
from sla.data.video import grid, picture_strip, write_picture, write_video
from sla.models.families import RANDOM, family
from sla.models.text import TextEncoder
from sla.models.video_model import VideoModel
from sla.seeds import drawing
from sla.training.build import (
    build_data,
    build_evaluator,
    build_module,
    build_networks,
    build_trainer,
    load_autoencoder,
    trained_part,
)
from sla.training.callbacks import SampleVideos, log_videos
from sla.training.config import Experiment
from sla.training.generation import StageSeconds, generate_videos
from sla.training.memory import check_run
from sla.training.module import DiffusionModule
from sla.training.ranks import end_with_launcher
from sla.training.router import load_router
from sla.training.run_folder import RunError, RunFolder, is_rank_zero, open_run
from sla.training.strategy import (
    FSDP2,
    ShardedDiffusionModule,
    is_sharded,
    is_sharded_checkpoint,
    load_weights,
    stored_shapes,
    stored_step,
    whole_state,
)
from sla.training.trainable import choose_trainable, merge_lora

log = logging.getLogger(__name__)

_FINISHED = "finished already; run.name=... or run.resume=never starts another"


def pretrain(experiment: Experiment, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Train from scratch (or from `run.init_weights`) and export the weights.

    Args:
        experiment: what to run.
        resolved: the same as plain values, kept with the run.

    Returns:
        The run's summary, as in its `summary.json`.

    Raises:
        RunError: the run cannot start or go on.
    """
    start = time.perf_counter()
    end_with_launcher()
    folder = open_run(experiment.run, resolved)
    finished = _finished(folder, experiment)
    if finished is not None:
        return finished
    data = build_data(experiment)
    model, text_encoder = build_networks(experiment, weights=experiment.run.init_weights or RANDOM)
    _choose_trainable(experiment, model, text_encoder)
    module = build_module(experiment, model, text_encoder)
    trainer = _fit(experiment, folder, module, data)
    after = evaluate(experiment, module, data)
    # bf16: the weights are shipped with the repository.
    _export(experiment, folder, module, resolved, torch.bfloat16)
    summary = {
        "name": experiment.run.name,
        "attention": experiment.attention.name,
        "steps": experiment.trainer.max_steps,
        "val_loss": after.loss,
        "val_loss_strata": after.strata,
        **_resources(start),
    }
    _write_samples(experiment, folder, {experiment.attention.name: module}, data, trainer)
    _write_summary(folder, summary)
    return summary


def finetune(
    experiment: Experiment, resolved: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """The paper's experiment: measure full attention, swap the method in, fine-tune, measure.

    Args, returns and raises as `pretrain`; the summary's fields are those of
    `results/finetune/`. `callbacks` watch the training beside the run's own.
    """
    start = time.perf_counter()
    end_with_launcher()
    if not experiment.run.init_weights:
        raise RunError("run.init_weights is empty; fine-tuning starts from pretrained weights")
    folder = open_run(experiment.run, resolved)
    finished = _finished(folder, experiment)
    if finished is not None:
        return finished
    data = build_data(experiment)

    full = FullConfig(tile=experiment.attention.tile)

    def build() -> DiffusionModule:
        model, text_encoder = build_networks(experiment, full, experiment.run.init_weights)
        teacher = None
        if experiment.flow.target == "teacher":
            teacher, _ = build_networks(experiment, full, experiment.run.init_weights)
        return build_module(experiment, model, text_encoder, teacher)

    module, baseline = _baseline(experiment, folder, build, data)
    _swap_in(experiment, module.model)
    _choose_trainable(experiment, module.model, module.text_encoder)

    first = {
        "val/loss": baseline["sla_val_loss_before"],
        "val/loss_full_attention": baseline["full_val_loss"],
        "attention/error": baseline["attention_error_before"],
    }
    trainer = _fit(experiment, folder, module, data, first, callbacks)
    after = evaluate(experiment, module, data)
    _export(experiment, folder, module, resolved)

    text_encoder = module.text_encoder
    if module.teachers:
        teacher = module.teachers[0]
    else:
        teacher, text_encoder = build_networks(experiment, full, experiment.run.init_weights)
    pretrained = build_module(experiment, teacher, text_encoder)
    tokens = teacher.grid(_video_shape(experiment))
    models = (module.model, teacher)
    flops = [sum(m.flops(tokens) for m in model.attention_modules()) for model in models]
    summary = {
        "name": experiment.run.name,
        "attention": experiment.attention.name,
        "steps": experiment.trainer.max_steps,
        "full_val_loss": baseline["full_val_loss"],
        "sla_val_loss_before": baseline["sla_val_loss_before"],
        "sla_val_loss_after": after.loss,
        "attention_error_before": baseline["attention_error_before"],
        "attention_error_after": after.error,
        "attention_flops_ratio": flops[0] / flops[1],
        "critical_fraction": after.critical,
        "marginal_fraction": after.marginal,
        "negligible_fraction": after.negligible,
        "tokens": math.prod(tokens),
    }
    modules = {"pretrained": pretrained, experiment.attention.name: module}
    _write_samples(experiment, folder, modules, data, trainer)
    summary |= _resources(start)
    _write_summary(folder, summary)
    return summary


@dataclass(frozen=True)
class Measured:
    """A validation pass: mean loss, loss by stratum, and attention against exact attention."""

    loss: float
    strata: list[float]
    error: float
    critical: float
    marginal: float
    negligible: float


def _baseline(
    experiment: Experiment,
    folder: RunFolder,
    build: Callable[[], DiffusionModule],
    data: VideoDataModule,
) -> tuple[DiffusionModule, dict[str, float]]:
    """Measures before any fine-tuning; kept, so that a resumed run has them.

    Also returns a pretrained module that attention may be swapped into: measuring shards it with
    `fsdp2`, and then another one is built.
    """
    module = build()
    path = folder.path / "baseline.json"
    if path.is_file():
        stored = json.loads(path.read_text())
        assert isinstance(stored, dict)
        return module, stored
    full = evaluate(experiment, module, data)
    log.info(f"full attention: validation loss {full.loss:.5f}")
    module = build() if is_sharded(module) else module
    _swap_in(experiment, module.model)
    swapped = evaluate(experiment, module, data)
    log.info(
        f"{experiment.attention.name} swapped in, not fine-tuned: validation loss "
        f"{swapped.loss:.5f}, attention error {swapped.error:.3f}"
    )
    baseline = {
        "full_val_loss": full.loss,
        "sla_val_loss_before": swapped.loss,
        "attention_error_before": swapped.error,
    }
    if is_rank_zero():
        folder.write_json("baseline.json", baseline)
    return build() if is_sharded(module) else module, baseline


def _swap_in(experiment: Experiment, model: VideoModel) -> None:
    """Give the model the experiment's attention, with its routers of stage 1 if there are any."""
    with drawing(experiment.run.seed):
        model.set_attention(experiment.attention)
    if experiment.run.router_weights is not None:
        load_router(experiment.run.router_weights, model)


def _choose_trainable(experiment: Experiment, model: VideoModel, text_encoder: TextEncoder) -> None:
    with drawing(experiment.run.seed):
        choose_trainable(model, text_encoder, experiment.optim)


def evaluate(experiment: Experiment, module: DiffusionModule, data: VideoDataModule) -> Measured:
    metrics = build_evaluator(experiment).validate(module, datamodule=data, verbose=False)[0]
    return Measured(
        loss=metrics["val/loss"],
        strata=[metrics[f"val/loss_stratum_{i}"] for i in range(module.val_strata)],
        error=metrics["attention/error"],
        critical=metrics["attention/critical"],
        marginal=metrics["attention/marginal"],
        negligible=metrics["attention/negligible"],
    )


def _fit(
    experiment: Experiment,
    folder: RunFolder,
    module: DiffusionModule,
    data: VideoDataModule,
    first_metrics: Mapping[str, float] | None = None,
    callbacks: Sequence[Callback] = (),
) -> pl.Trainer:
    """Train to `max_steps`, from the folder's checkpoint if it has one."""
    prompts = default_prompts(experiment, data)

    def samples(module: DiffusionModule) -> np.ndarray:
        return sample_videos(experiment, module, prompts)

    sampling = experiment.sampling
    own = SampleVideos(samples, sampling.every, sampling.fps)
    trainer = build_trainer(experiment, folder.path, [own, *callbacks])
    grid_of_tokens = module.model.grid(_video_shape(experiment))
    check_run(experiment, module.model, grid_of_tokens, trainer.num_devices * trainer.num_nodes)
    if folder.checkpoint is not None:
        sharded = is_sharded_checkpoint(folder.checkpoint)
        if sharded and experiment.trainer.strategy != FSDP2:
            raise RunError(
                f"{folder.checkpoint} is sharded, and trainer.strategy is "
                f"{experiment.trainer.strategy!r}: set trainer.strategy=fsdp2 (any number of "
                f"devices will do), or make one file of it with `python -m sla consolidate "
                f"{folder.checkpoint} FILE.ckpt` and set run.resume=FILE.ckpt"
            )
        stored = check_checkpoint(folder.checkpoint, module)
        if stored["global_step"] >= experiment.trainer.max_steps:
            # Trained already, interrupted later: `fit` would leave out its end, where the averaged
            # weights (which `state_dict` holds) take their place.
            if sharded:
                load_weights(folder.checkpoint, module)
            else:
                module.load_state_dict(stored["state_dict"])
            return trainer
        log.info(f"going on from {folder.checkpoint}")
    elif first_metrics and trainer.logger is not None:
        trainer.logger.log_metrics(dict(first_metrics), step=0)
    checkpoint = None if folder.checkpoint is None else str(folder.checkpoint)
    # Our own checkpoints hold optimiser and random states, which weights_only refuses.
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    if trainer.interrupted or trainer.global_step < experiment.trainer.max_steps:
        raise RunError(
            f"training stopped at step {trainer.global_step} of {experiment.trainer.max_steps}; "
            f"run the same command again to go on from {folder.checkpoints / 'last.ckpt'}"
        )
    return trainer


def check_checkpoint(path: Path, module: DiffusionModule) -> dict[str, Any]:
    """Read a checkpoint, which must be of this network.

    Returns:
        What it holds; of a folder of shards `global_step` alone.

    Raises:
        RunError: unreadable, or its parameters differ in name or shape; lists them.
    """
    checkpoint: dict[str, Any]
    try:
        if path.is_dir():
            stored = stored_shapes(path)
            checkpoint = {"global_step": stored_step(path)}
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            stored = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items()}
    except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        raise RunError(f"{path} is not a readable checkpoint: {error}") from error
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    wrong = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
    if wrong:
        listing = "\n".join(
            f"  {name}: checkpoint {stored.get(name, 'absent')}, model {wanted.get(name, 'absent')}"
            for name in wrong[:12]
        )
        more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise RunError(f"{path} is of another architecture:\n{listing}{more}")
    return checkpoint


def _finished(folder: RunFolder, experiment: Experiment) -> dict[str, Any] | None:
    summary = folder.finished_summary()
    if summary is None or summary.get("steps", 0) < experiment.trainer.max_steps:
        return None
    log.info(f"{folder.path}: {_FINISHED}")
    return summary


def _video_shape(experiment: Experiment) -> tuple[int, int, int, int, int]:
    """Of what the model makes: latents, or pixels."""
    data = experiment.data
    autoencoder = load_autoencoder(experiment.autoencoder)
    latents = autoencoder.latent_shape(data.num_frames, data.height, data.width)
    return (1, experiment.model.in_channels, *latents[1:])


def default_prompts(experiment: Experiment, data: VideoDataModule) -> list[str]:
    config = experiment.sampling
    if config.prompts or not config.num_prompts:
        return list(config.prompts)
    # From a cache, clips that could not be read come without a caption.
    captions = list(dict.fromkeys(clip.caption for clip in data.val_clips if clip.caption))
    step = max(1, len(captions) // config.num_prompts)
    return captions[::step][: config.num_prompts]


def sample_videos(
    experiment: Experiment,
    module: DiffusionModule,
    prompts: list[str],
    progress: Callable[[int, int], None] | None = None,
    timings: Callable[[StageSeconds], None] | None = None,
) -> np.ndarray:
    """Videos of the prompts, uint8 (prompts, T, H, W, C), on the module's device.

    In bf16 autocast on a GPU, and where sharded weights are gathered in bf16. `progress` is called
    with (steps done, steps in all), `timings` after each video.
    """
    training = module.training
    module.eval()
    try:
        in_bf16 = module.device.type == "cuda" or module.gathered_in == torch.bfloat16
        with torch.autocast(module.device.type, torch.bfloat16, enabled=in_bf16):
            return generate_videos(
                module.model,
                module.text_encoder,
                module.flow,
                experiment.sampling,
                prompts,
                _video_shape(experiment)[1:],
                progress,
                load_autoencoder(experiment.autoencoder).to(module.device).decode,
                timings,
            )
    finally:
        module.train(training)


def _write_samples(
    experiment: Experiment,
    folder: RunFolder,
    modules: Mapping[str, DiffusionModule],
    data: VideoDataModule,
    trainer: pl.Trainer,
) -> None:
    """Videos of every model at the same prompts and seeds, and all of them side by side.

    Rank 0 writes them; where a model's forward needs all ranks, these sample along.
    """
    prompts = default_prompts(experiment, data)
    together_only = any(module.collective for module in modules.values())
    if not prompts or not (is_rank_zero() or together_only):
        return
    device = trainer.strategy.root_device  # `fit` leaves the module on the CPU
    rows = {}
    for name, module in modules.items():
        if is_rank_zero():
            log.info(f"sampling {len(prompts)} videos with {name}")
        if isinstance(module, ShardedDiffusionModule):
            module.shard(trainer)
        rows[name] = sample_videos(experiment, module.to(device), prompts)
    if not is_rank_zero():
        return
    folder.samples.mkdir(exist_ok=True)
    for name in rows:
        for i, video in enumerate(rows[name]):
            write_video(folder.samples / f"{name}-{i}.mp4", video, experiment.sampling.fps)
    folder.write_json(
        "samples/prompts.json",
        {"prompts": prompts, "seeds": [experiment.sampling.seed + i for i in range(len(prompts))]},
    )
    log_videos(
        trainer.logger,
        rows[experiment.attention.name],
        experiment.trainer.max_steps,
        experiment.sampling.fps,
    )
    if trainer.logger is not None:
        trainer.logger.finalize("success")
    # One column a model, one row a prompt.
    videos = [rows[name][i] for i in range(len(prompts)) for name in rows]
    together = grid(videos, list(rows) * len(prompts), columns=len(rows))
    write_video(folder.samples / "side_by_side.mp4", together, experiment.sampling.fps)
    write_picture(folder.samples / "side_by_side.png", picture_strip(together))


def _export(
    experiment: Experiment,
    folder: RunFolder,
    module: DiffusionModule,
    resolved: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    if is_sharded(module):
        state = whole_state(module)
        if not is_rank_zero():
            return
        module = _whole_module(experiment)
        module.load_state_dict(state)
    merge_lora(module.model)
    if is_rank_zero():
        _write_model(experiment, folder.path, module, resolved, module.max_steps, dtype)


def export_checkpoint(
    experiment: Experiment, resolved: Mapping[str, Any], checkpoint: Path, folder: Path
) -> Path:
    """Write the model of a checkpoint, sharded or not, as the end of its run would.

    Args:
        experiment, resolved: of the run.
        checkpoint: `last.ckpt` or `best.ckpt`.
        folder: where to write; other files in it stay.

    Returns:
        What was written: a file or a folder, by the model's family.

    Raises:
        RunError: the checkpoint is unreadable or of another network.
    """
    module = _whole_module(experiment)
    stored = check_checkpoint(checkpoint, module)
    if checkpoint.is_dir():
        load_weights(checkpoint, module)
    else:
        module.load_state_dict(stored["state_dict"])
    merge_lora(module.model)
    folder.mkdir(parents=True, exist_ok=True)
    return _write_model(experiment, folder, module, resolved, stored["global_step"])


def _whole_module(experiment: Experiment) -> DiffusionModule:
    """A module to be filled, of the experiment's attention and LoRA and not sharded."""
    model, text_encoder = build_networks(experiment)
    _choose_trainable(experiment, model, text_encoder)
    return build_module(experiment, model, text_encoder)


def _write_model(
    experiment: Experiment,
    folder: Path,
    module: DiffusionModule,
    resolved: Mapping[str, Any],
    steps: int,
    dtype: torch.dtype | None = None,
) -> Path:
    return family(experiment.model.name).export(
        folder,
        module.model,
        trained_part(module.text_encoder),
        metadata={"experiment": dict(resolved), "steps": steps},
        dtype=dtype,
    )


@rank_zero_only
def _write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    folder.write_json("summary.json", summary)


def _resources(start: float) -> dict[str, float]:
    """Wall time, and the peak memory of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"wall_seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak}
