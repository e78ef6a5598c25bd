"""Config to objects: the one place where an experiment's parts are put together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger

from sla.attention import AttentionConfig
from sla.data.module import VideoDataModule
from sla.diffusion.flow_matching import FlowMatching
from sla.models.autoencoders import AutoencoderConfig, VideoAutoencoder, build_autoencoder
from sla.models.families import RANDOM, family
from sla.models.text import (
    FrozenTextEncoder,
    TextEncoder,
    TextEncoderConfig,
    TrainedTextEncoder,
    TrainedTextEncoderConfig,
    build_text_encoder,
)
from sla.models.video_model import VideoModel
from sla.seeds import drawing
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
from sla.training.monitors import (
    ConfigCard,
    GradientNorms,
    LossByTimestep,
    RoutingMonitor,
)
from sla.training.ranks import EndOnFailure
from sla.training.run_folder import RunError
from sla.training.sharing import check_can_share
from sla.training.strategy import (
    FSDP2,
    MovingAverage,
    ShardedAverage,
    ShardedDiffusionModule,
    build_strategy,
    check_ranks,
)

# Frozen networks by their configs: a run needs each in several places, and never changes it.
_autoencoders: dict[tuple[Any, ...], VideoAutoencoder] = {}
_text_encoders: dict[tuple[Any, ...], FrozenTextEncoder] = {}


def load_autoencoder(config: AutoencoderConfig) -> VideoAutoencoder:
    """The autoencoder of a config, loaded once a process.

    Raises:
        FileNotFoundError, ValueError: from `build_autoencoder`.
    """
    key = astuple(config)
    if key not in _autoencoders:
        _autoencoders[key] = build_autoencoder(config)
    return _autoencoders[key]


def load_text_encoder(
    config: TextEncoderConfig, sizes: TrainedTextEncoderConfig
) -> TrainedTextEncoder | FrozenTextEncoder:
    """A freshly initialised text encoder, or the frozen one of the config, loaded once a process.

    Raises:
        FileNotFoundError, ValueError: from `build_text_encoder`.
    """
    key = astuple(config)
    if key in _text_encoders:
        return _text_encoders[key]
    encoder = build_text_encoder(config, sizes)
    if isinstance(encoder, FrozenTextEncoder):
        _text_encoders[key] = encoder
    return encoder


def trained_part(text_encoder: TextEncoder) -> TrainedTextEncoder | None:
    """The text encoder if model files hold it, None if it is a frozen one from elsewhere."""
    return text_encoder if isinstance(text_encoder, TrainedTextEncoder) else None


def build_data(experiment: Experiment) -> VideoDataModule:
    """The data module, after its cache, if it reads one, was compared with the run's models.

    Raises:
        CacheError: no cache, or one made by another autoencoder or text encoder, or of other sizes
            or crops than the run asks for.
        RunError: an autoencoder or a frozen text encoder without a cache.
        FileNotFoundError, ValueError: the run's own models cannot be loaded.
    """
    data = VideoDataModule(experiment.data)
    data.ranks_per_sample = experiment.trainer.sequence_parallel
    frozen_text = experiment.text_encoder.name != "trained"
    if experiment.data.source != "latents":
        if experiment.autoencoder.name != "pixel" or frozen_text:
            raise RunError(
                f"autoencoder.name={experiment.autoencoder.name} with text_encoder.name="
                f"{experiment.text_encoder.name} is trained from a latent cache: write one with "
                "`make latents`, then set data.source=latents and data.cache"
            )
        return data
    most = getattr(experiment.model, "text_tokens", None)
    if frozen_text and most is not None and experiment.text_encoder.max_tokens > most:
        raise RunError(
            f"text_encoder.max_tokens is {experiment.text_encoder.max_tokens}; it may be at most "
            f"model.text_tokens, which is {most}"
        )
    text = load_text_encoder(experiment.text_encoder, experiment.text) if frozen_text else None
    data.cache.check_models(
        load_autoencoder(experiment.autoencoder).identity,
        experiment.text.identity if text is None else text.identity,
        channels=experiment.model.in_channels,
        text_dim=experiment.model.text_dim,
    )
    data.cache.check_cut(experiment.data)
    return data


def build_networks(
    experiment: Experiment, attention: AttentionConfig | None = None, weights: str = RANDOM
) -> tuple[VideoModel, TrainedTextEncoder | FrozenTextEncoder]:
    """Network and text encoder; what is drawn is the same for the same `run.seed`.

    Args:
        attention: method to build with, the experiment's own if None.
        weights: where their pretrained weights are; `random` for fresh ones.

    Raises:
        FileNotFoundError, CheckpointError: from the model family's `create`.
    """
    with drawing(experiment.run.seed):
        text_encoder = load_text_encoder(experiment.text_encoder, experiment.text)
        if isinstance(text_encoder, FrozenTextEncoder):
            torch.default_generator.manual_seed(experiment.run.seed)  # whatever loading has drawn
        model = family(experiment.model.name).create(
            experiment.model,
            attention or experiment.attention,
            weights,
            trained_part(text_encoder),
        )
    model.activation_checkpointing = experiment.trainer.activation_checkpointing
    return model, text_encoder


def build_flow(experiment: Experiment) -> FlowMatching:
    """The diffusion process."""
    return FlowMatching(shift=experiment.flow.shift, timesteps=experiment.flow.timesteps)


def build_module(
    experiment: Experiment,
    model: VideoModel,
    text_encoder: TextEncoder,
    teacher: VideoModel | None = None,
) -> DiffusionModule:
    """The LightningModule around given networks.

    Raises:
        RunError: `trainer.sequence_parallel` is not for this model.
    """
    config = experiment.trainer
    check_can_share(model, experiment.model.name, config.sequence_parallel)
    module_class = ShardedDiffusionModule if config.strategy == FSDP2 else DiffusionModule
    return module_class(
        model,
        text_encoder,
        build_flow(experiment),
        experiment.optim,
        seed=experiment.run.seed,
        max_steps=experiment.trainer.max_steps,
        val_strata=experiment.trainer.val_strata,
        compile=experiment.trainer.compile,
        cuda_graphs=experiment.trainer.cuda_graphs,
        teacher=teacher,
        sequence_parallel=config.sequence_parallel,
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
        "strategy": build_strategy(config),
        "num_nodes": config.num_nodes,
        "precision": resolve_precision(config),
        # The data module splits samples over ranks itself, resumably.
        "use_distributed_sampler": False,
        # Metric states made in inference mode cannot be updated outside of it, and one module is
        # validated by several Trainers.
        "inference_mode": False,
    }


def build_evaluator(experiment: Experiment) -> pl.Trainer:
    """A Trainer for `validate` alone: no files, no averaging.

    Raises:
        RunError: `trainer.sequence_parallel` does not divide the ranks.
    """
    trainer = pl.Trainer(
        **_hardware(experiment.trainer),
        logger=False,
        callbacks=[AttentionStatistics()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    check_ranks(experiment.trainer, trainer.num_devices * trainer.num_nodes)
    return trainer


def build_trainer(
    experiment: Experiment, folder: Path, callbacks: Sequence[Callback] = ()
) -> pl.Trainer:
    """The Trainer of a run.

    Args:
        folder: the run's folder; gets `checkpoints/` and `tensorboard/`.
        callbacks: added to the run's own.

    Raises:
        RunError: as `build_evaluator`.
    """
    config, optim = experiment.trainer, experiment.optim
    own: list[Callback] = [
        EndOnFailure(),
        DataPosition(),
        RandomState(),
        Throughput(config.log_every),
        LearningRateMonitor("step"),
        AttentionStatistics(),
        RoutingMonitor(),
        GradientNorms(config.log_every),
        LossByTimestep(config.val_strata, config.log_every * optim.accumulate),
        ConfigCard(asdict(experiment)),
        LastCheckpoint(folder / "checkpoints", config.checkpoint_every, config.log_every),
        best_checkpoint(folder / "checkpoints"),
    ]
    if optim.ema_decay:
        averaging = ShardedAverage if config.strategy == FSDP2 else MovingAverage
        own.insert(0, averaging(optim.ema_decay))
    if config.progress_bar:
        # Into a file the bar writes a line each time: fewer of them.
        own.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 20))
    trainer = pl.Trainer(
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
    check_ranks(config, trainer.num_devices * trainer.num_nodes)
    return trainer
