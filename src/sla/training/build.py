"""Config to objects: the one place where an experiment's parts are put together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger

from sla.attention import AttentionConfig
from sla.diffusion.flow_matching import FlowMatching
from sla.models.dit import VideoDiT
from sla.models.text import ByteTextEncoder
from sla.training.callbacks import (
    AttentionStatistics,
    DataPosition,
    LastCheckpoint,
    RandomState,
    Throughput,
    best_checkpoint,
)
from sla.training.config import Experiment, TrainerConfig
from sla.training.module import DiffusionModule


def build_networks(
    experiment: Experiment, attention: AttentionConfig | None = None
) -> tuple[VideoDiT, ByteTextEncoder]:
    """Freshly initialised network and text encoder; the same for the same `run.seed`.

    Args:
        attention: method to build with, the experiment's own if None.
    """
    with torch.random.fork_rng():
        torch.manual_seed(experiment.run.seed)
        text_encoder = ByteTextEncoder(experiment.text)
        model = VideoDiT(experiment.model, attention or experiment.attention)
    model.activation_checkpointing = experiment.trainer.activation_checkpointing
    return model, text_encoder


def build_flow(experiment: Experiment) -> FlowMatching:
    """The diffusion process."""
    return FlowMatching(shift=experiment.flow.shift, timesteps=experiment.flow.timesteps)


def build_module(
    experiment: Experiment, model: VideoDiT, text_encoder: ByteTextEncoder
) -> DiffusionModule:
    """The LightningModule around given networks."""
    return DiffusionModule(
        model,
        text_encoder,
        build_flow(experiment),
        experiment.optim,
        seed=experiment.run.seed,
        max_steps=experiment.trainer.max_steps,
        val_strata=experiment.trainer.val_strata,
        compile=experiment.trainer.compile,
    )


def resolve_precision(config: TrainerConfig) -> Any:
    """`auto`: bf16-mixed where the accelerator is a GPU that has bf16, else 32-true."""
    if config.precision != "auto":
        return config.precision
    on_gpu = sampling_device(config).type == "cuda"
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def sampling_device(config: TrainerConfig) -> torch.device:
    """Where to sample outside of a Trainer."""
    on_gpu = config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _hardware(config: TrainerConfig) -> dict[str, Any]:
    devices: Any = config.devices
    if devices != "auto" and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices == "auto" and not torch.cuda.is_available():
        devices = 1
    return {
        "accelerator": config.accelerator,
        "devices": devices,
        "strategy": config.strategy,
        "num_nodes": config.num_nodes,
        "precision": resolve_precision(config),
        # The data module splits samples over ranks itself, resumably.
        "use_distributed_sampler": False,
        # Metric states made in inference mode cannot be updated outside of it, and one module is
        # validated by several Trainers.
        "inference_mode": False,
    }


def build_evaluator(experiment: Experiment) -> pl.Trainer:
    """A Trainer for `validate` alone: no files, no averaging."""
    return pl.Trainer(
        **_hardware(experiment.trainer),
        logger=False,
        callbacks=[AttentionStatistics()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def build_trainer(
    experiment: Experiment, folder: Path, callbacks: Sequence[Callback] = ()
) -> pl.Trainer:
    """The Trainer of a run.

    Args:
        folder: the run's folder; gets `checkpoints/` and `tensorboard/`.
        callbacks: added to the run's own.
    """
    config, optim = experiment.trainer, experiment.optim
    own: list[Callback] = [
        DataPosition(),
        RandomState(),
        Throughput(config.log_every),
        LearningRateMonitor("step"),
        AttentionStatistics(),
        LastCheckpoint(folder / "checkpoints", config.checkpoint_every, config.log_every),
        best_checkpoint(folder / "checkpoints"),
    ]
    if optim.ema_decay:
        own.insert(0, EMAWeightAveraging(decay=optim.ema_decay, use_buffers=False))
    if config.progress_bar:
        # Into a file the bar writes a line each time: fewer of them.
        own.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 20))
    return pl.Trainer(
        **_hardware(config),
        max_steps=config.max_steps,
        max_epochs=-1,
        val_check_interval=config.val_every * optim.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accumulate_grad_batches=optim.accumulate,
        gradient_clip_val=optim.grad_clip or None,
        log_every_n_steps=config.log_every,
        logger=TensorBoardLogger(folder, name="", version="tensorboard"),
        callbacks=[*own, *callbacks],
        enable_progress_bar=config.progress_bar,
        enable_model_summary=False,
    )
