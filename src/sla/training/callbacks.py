"""Lightning callbacks: what is logged, kept and restored beside the loss."""

from __future__ import annotations

import abc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from sla.analysis import LayerStatistics, mean_statistics, observe_attention
from sla.data.module import VideoDataModule
from sla.data.video import gif_bytes, grid
from sla.models.video_model import Grid, VideoModel
from sla.training.model_flops import FORWARDS_OF_A_STEP, forward_flops
from sla.training.module import DiffusionModule
from sla.training.sharing import mean_over_group
from sla.training.strategy import whole_methods


class DataPosition(Callback):
    """Tells the data module how many samples the optimiser has consumed.

    What loader workers have prefetched is not consumed: a resumed run reads it again. A run that
    goes on from another's checkpoint, on another number of GPUs, may take other batches a step.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning steps and validates by the number of the batch, and the stored one counts
        # batches of the earlier run: its first step would take too few of ours.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        batches = trainer.global_step * trainer.accumulate_grad_batches
        shift = batches - progress.current.ready
        for count in (progress.total, progress.current):
            for name in ("ready", "started", "processed", "completed"):
                setattr(count, name, getattr(count, name) + shift)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, VideoDataModule)
        per_batch = len(batch["sample_index"]) * trainer.world_size // data.ranks_per_sample
        data.set_consumed(data.consumed + per_batch)


class RandomState(Callback):
    """Keeps the random state of every library in the checkpoint.

    Data, noise and timesteps are functions of (seed, sample index) and need no state; this is for
    whatever else draws (a method's own sampling, dropout of a model added later). Only rank 0's
    state is kept: with several processes nothing of ours may draw from it.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["random_state"] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),  # noqa: NPY002
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get("random_state")
        if state is None:
            return
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class Throughput(Callback):
    """Logs samples, video tokens and model FLOP per second of all ranks, and the GPU's peak memory.

    FLOP are the products of the model, once: neither recomputed blocks nor a teacher. Their share
    of the GPUs' peak (MFU) is logged where Lightning knows that.

    Args:
        every: batches between two rows.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._samples = 0
        self._tokens = 0
        self._flops = 0.0
        self._since = 0.0
        self._step_flops: dict[tuple[Grid, int], float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples = self._tokens = 0
        self._flops = 0.0
        self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        samples = len(batch["sample_index"]) * trainer.world_size // pl_module.sequence_parallel
        self._samples += samples
        self._tokens += samples * pl_module.tokens(batch["video"])
        self._flops += samples * self._flops_of_sample(pl_module.model, batch)
        if (batch_idx + 1) % self.every:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            pl_module.log("system/gpu_peak_gib", torch.cuda.max_memory_allocated() / 2**30)
        seconds = time.perf_counter() - self._since
        pl_module.log("throughput/samples_per_s", self._samples / seconds)
        pl_module.log("throughput/tokens_per_s", self._tokens / seconds)
        rate = self._flops / seconds
        pl_module.log("throughput/model_tflops_per_s", rate / 1e12)
        peak = _peak_flops(trainer, pl_module.device)
        if peak:
            used = rate / (peak * trainer.world_size)
            pl_module.log("throughput/model_flops_utilisation", used)
        self.on_train_start(trainer, pl_module)

    def _flops_of_sample(self, model: VideoModel, batch: Any) -> float:
        """Of a training step on one sample of the batch."""
        sizes = model.grid(batch["video"].shape), _text_tokens(batch)
        if sizes not in self._step_flops:
            self._step_flops[sizes] = FORWARDS_OF_A_STEP * forward_flops(model, *sizes)
        return self._step_flops[sizes]


def _text_tokens(batch: Any) -> int:
    """Of a batch whose text is encoded, or tokenised; of one with captions alone the bytes."""
    if "text_mask" in batch:
        return int(batch["text_mask"].shape[1])
    return max(len(caption.encode()) for caption in batch["caption"])


# Lightning's table ends with the H100; by NVIDIA's datasheet an H200 has an H100 SXM's arithmetic.
_H200_FLOPS = {torch.bfloat16: 989.4e12, torch.float32: 66.9e12}


def _peak_flops(trainer: pl.Trainer, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
    if "H200" in torch.cuda.get_device_name(device):
        return _H200_FLOPS[dtype]
    return get_available_flops(device, dtype)


class FirstValidationBatch(Callback, abc.ABC):
    """Observes attention on the first batch of each validation and logs what was seen.

    Ranks that share a sample see their heads; what is logged is the mean over them.
    """

    def __init__(self) -> None:
        self._observing = ExitStack()

    @abc.abstractmethod
    def observe(self, model: VideoModel) -> AbstractContextManager[Any]:
        """Watches the model's forwards inside the block."""

    @abc.abstractmethod
    def values(self) -> dict[str, float]:
        """What was seen, by the names to log it under; the same names on all ranks."""

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            assert isinstance(pl_module, DiffusionModule)
            self._observing.enter_context(whole_methods(pl_module))
            self._observing.enter_context(self.observe(pl_module.model))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx != 0:
            return
        self._observing.close()
        assert isinstance(pl_module, DiffusionModule)
        seen = self.values()
        means = mean_over_group(list(seen.values()), pl_module.sequence_parallel, pl_module.device)
        for name, value in zip(seen, means, strict=True):
            pl_module.log(
                name,
                value,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                rank_zero_only=True,
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._observing.close()


class AttentionStatistics(FirstValidationBatch):
    """Logs block classes and the error against exact attention on the first validation batch."""

    def __init__(self) -> None:
        super().__init__()
        self._observed: list[LayerStatistics] = []

    @contextmanager
    def observe(self, model: VideoModel) -> Iterator[None]:
        with observe_attention(model) as self._observed:
            yield

    def values(self) -> dict[str, float]:
        mean = mean_statistics(self._observed)
        names = ("error", "error_l1", "critical", "marginal", "negligible")
        return {f"attention/{name}": getattr(mean, name) for name in names}


class SampleVideos(Callback):
    """Writes sample videos to TensorBoard as an animated grid, every n steps.

    Args:
        sample: makes the samples of a module: uint8 (prompts, T, H, W, 3). Called on rank 0, or on
            all ranks if the module needs them.
        every: training steps between two samples; 0 for none.
        fps: frames per second of the animation.
    """

    def __init__(
        self, sample: Callable[[DiffusionModule], np.ndarray], every: int, fps: float
    ) -> None:
        self.sample = sample
        self.every = every
        self.fps = fps

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        if not (trainer.is_global_zero or pl_module.collective):
            return
        step = trainer.global_step
        due = self.every and step % self.every == 0 and step < trainer.max_steps
        if due and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            videos = self.sample(pl_module)
            if trainer.is_global_zero:
                log_videos(trainer.logger, videos, step, self.fps)


def log_videos(logger: Any, videos: np.ndarray, step: int, fps: float) -> None:
    """Write videos, uint8 (videos, T, H, W, 3), as one animated picture.

    Does nothing without videos or with a logger that is not TensorBoard's.
    """
    if not len(videos) or not isinstance(logger, TensorBoardLogger):
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    together = grid(list(videos))
    image = Summary.Image(
        height=together.shape[1],
        width=together.shape[2],
        colorspace=3,
        encoded_image_string=gif_bytes(together, fps),
    )
    # SummaryWriter.add_video needs moviepy and temporary files to make the same bytes.
    summary = Summary(value=[Summary.Value(tag="samples", image=image)])
    logger.experiment._get_file_writer().add_summary(summary, step)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`: replaced, whole or not at all, every n steps and after the last one.

    Lightning writes a step's point of the training curves after the step's checkpoint. The
    checkpoint holds the point too, so that a run killed between the two does not lose it.

    Args:
        folder: where it is kept.
        every: optimiser steps between two checkpoints.
        log_every: optimiser steps between two points of the curves.
    """

    def __init__(self, folder: Path, every: int, log_every: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            every_n_train_steps=every,
            save_top_k=1,
            enable_version_counter=False,
        )
        self.log_every = log_every
        self._point: dict[str, Any] | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        finished = trainer.global_step >= trainer.max_steps
        if finished and self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.global_step % self.log_every:
            return  # this step has no point
        metrics = trainer.logged_metrics.items()
        point = {name: float(value) for name, value in metrics if name.startswith("train/")}
        checkpoint["curve_point"] = {"step": trainer.global_step - 1, "metrics": point}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._point = checkpoint.get("curve_point")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Another run's checkpoint is where this run starts, not a part of its curves.
        own = Path(str(trainer.ckpt_path)).resolve().parent == Path(str(self.dirpath)).resolve()
        if own and self._point and trainer.logger is not None:
            trainer.logger.log_metrics(self._point["metrics"], self._point["step"])


def best_checkpoint(folder: Path) -> ModelCheckpoint:
    """`best.ckpt`: the weights of the lowest validation loss so far."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="val/loss",
        mode="min",
        save_top_k=1,
        enable_version_counter=False,
    )
