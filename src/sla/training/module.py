"""The LightningModule: a video diffusion model trained by flow matching.

It knows the loss of a batch and the optimiser, nothing of data, files, sampling or logging of
pictures: those are the data module's, the callbacks' and the run's.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from sla.attention import AttentionMethod
from sla.data.module import VideoBatch
from sla.diffusion.flow_matching import FlowMatching, SampleNoise, per_sample_noise
from sla.models.fusion import compile_blocks
from sla.models.text import TextEncoder
from sla.models.video_model import VideoModel
from sla.training.config import OptimConfig
from sla.training.sharing import share_tokens

# Validation noise is drawn from a stream of its own, the same for every run and arm, so that
# validation losses can be compared pair by pair.
VALIDATION_SEED = 20_250_924


class DiffusionModule(pl.LightningModule):
    """Flow matching of a text-conditioned video model.

    Noise and timestep of a sample are a function of (seed, sample index): the loss curve does not
    depend on how samples are spread over processes, nor on interruptions, and two arms of a study
    with one seed see the same draws. (Training noise is drawn on the GPU where there is one, so a
    CPU run sees other noise than a GPU run; validation noise is the same everywhere.)

    Args:
        model: the network; predicts the velocity.
        text_encoder: captions to embeddings; trained along if it has trainable parameters.
        flow: the diffusion process.
        optim: optimiser settings.
        seed: seed of training noise and timesteps.
        max_steps: optimiser steps of the run, for the schedule.
        val_strata: timestep strata at which each validation sample is measured.
        compile: run the blocks of training steps and samples through torch.compile.
        cuda_graphs: with `compile`, replay them as CUDA graphs.
        teacher: the frozen model whose velocity is learned in place of the data's; not a part of
            this module: it is neither stored nor averaged.
        sequence_parallel: ranks that share the tokens of a sample, P: in a Trainer, ranks k P to
            k P + P - 1 do, and are given the same batches. Above 1 for Wan's models alone.
    """

    def __init__(
        self,
        model: VideoModel,
        text_encoder: TextEncoder,
        flow: FlowMatching,
        optim: OptimConfig,
        *,
        seed: int,
        max_steps: int,
        val_strata: int,
        compile: bool = False,
        cuda_graphs: bool = False,
        teacher: VideoModel | None = None,
        sequence_parallel: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.text_encoder = text_encoder
        self.flow = flow
        self.optim = optim
        self.seed = seed
        self.max_steps = max_steps
        self.val_strata = val_strata
        self.sequence_parallel = sequence_parallel
        self.compiled = compile
        self.cuda_graphs = cuda_graphs
        if compile:
            compile_blocks(model.repeated_blocks(), cuda_graphs=cuda_graphs)
        # In a tuple: a module in there is no part of this one.
        self._teacher = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        self.validation_loss = MeanMetric()
        self.bucket_losses = nn.ModuleList(MeanMetric() for _ in range(val_strata))

    @property
    def teachers(self) -> tuple[VideoModel, ...]:
        """The teacher, or none."""
        return self._teacher

    @property
    def collective(self) -> bool:
        """Whether the model's forward needs all ranks, in validation and sampling too."""
        return self.sequence_parallel > 1

    @property
    def gathered_in(self) -> torch.dtype | None:
        """Dtype in which linear layers are found in a forward; None for that of their weights."""
        return None

    def setup(self, stage: str) -> None:
        """Called by each Trainer, with processes there; attention may have been swapped since."""
        if self.sequence_parallel > 1:
            for model in (self.model, *self._teacher):
                share_tokens(model, self.sequence_parallel)

    def tokens(self, video: Tensor) -> int:
        """Video tokens of one sample of a (B, C, T, H, W) batch."""
        return math.prod(self.model.grid(video.shape))

    def losses(
        self, batch: VideoBatch, sigma: Tensor, noise: Tensor, *, training: bool = False
    ) -> Tensor:
        """Flow-matching loss of each sample; in training with a teacher, distance to its velocity.

        Args:
            batch: B samples.
            sigma: (B,) noise level in [0, 1].
            noise: as `batch["video"]`.

        Returns:
            (B,) float32: mean squared error of the velocity.
        """
        video = batch["video"]
        text, text_mask = self.encode_text(batch)
        noisy = self.flow.interpolate(video, noise, sigma)
        inputs = (noisy, self.flow.timestep(sigma), text, text_mask)
        if training:
            # Blocks are compiled one by one, and DDP's exchange follows their backwards by itself:
            # Dynamo need not cut them where a bucket ends. (With recomputed blocks DDP failed on
            # two GPUs in torch 2.11 while it did.)
            with torch._dynamo.config.patch(optimize_ddp=False) if self.compiled else nullcontext():
                velocity = self.model(*inputs)
        else:  # validation is observed through hooks, which compiled blocks do not call
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                velocity = self.model(*inputs)
        target = self.flow.target(video, noise)
        if training and self._teacher:
            with torch.no_grad():
                target = self._teacher[0](*inputs)
        return self.flow.loss(velocity, target)

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)

    def on_fit_end(self) -> None:
        for teacher in self._teacher:
            teacher.to("cpu")

    def encode_text(self, batch: VideoBatch) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, text_dim) of the captions, and their mask (B, L).

        A latent cache gives them, or the token ids of an encoder that is trained with the model.
        """
        if "text" in batch:
            return batch["text"].to(self.device), batch["text_mask"].to(self.device)
        if "token_ids" in batch:
            assert isinstance(self.text_encoder, nn.Module)  # `build_data` has compared the two
            mask = batch["text_mask"].to(self.device)
            return self.text_encoder(batch["token_ids"].to(self.device), mask), mask
        return self.text_encoder.encode(batch["caption"])

    def training_step(self, batch: VideoBatch, batch_idx: int) -> dict[str, Any]:
        """The loss, and what callbacks watch: each sample's loss and uniform draw."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        noise, u = per_sample_noise(
            batch["sample_index"],
            self.seed,
            batch["video"].shape[1:],
            self.device,
            draw_on=self.device,
        )
        losses = self.losses(batch, self.flow.sample_sigma(u), noise, training=True)
        loss = losses.mean()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every == 0:
            # Not by `sync_dist`, which makes the ranks wait for each other in every step.
            mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
            self.log("train/loss", mean, prog_bar=True, batch_size=len(u))
        elif self.trainer.progress_bar_callback is not None:
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(u))
        return {"loss": loss, "losses": losses.detach(), "u": u}

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        for stratum in range(self.val_strata):
            losses = self.validation_losses(batch, stratum)
            # Weight 0 marks what fills up the last batches when ranks share the windows unevenly.
            for metric in (self.validation_loss, self.bucket_losses[stratum]):
                metric.update(losses, batch["weight"])  # type: ignore[operator]

    def validation_draws(self, batch: VideoBatch, stratum: int) -> SampleNoise:
        """The fixed noise and timestep draws of validation samples, the same for every model."""
        index = batch["sample_index"] * self.val_strata + stratum
        shape = batch["video"].shape[1:]
        return per_sample_noise(index, VALIDATION_SEED, shape, self.device)

    def validation_losses(
        self, batch: VideoBatch, stratum: int, draws: SampleNoise | None = None
    ) -> Tensor:
        """(B,) losses at fixed noise, sigma inside the given one of `val_strata` equally likely
        strata of the training density.

        Args:
            draws: of `validation_draws`, where they were kept.
        """
        noise, u = draws or self.validation_draws(batch, stratum)
        sigma = self.flow.sample_sigma((stratum + u) / self.val_strata)
        return self.losses(batch, sigma, noise)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.validation_loss, prog_bar=True)
        for stratum, metric in enumerate(self.bucket_losses):
            self.log(f"val/loss_stratum_{stratum}", metric)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optim = self.optim
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
        )
        schedule = LambdaLR(optimizer, self.learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Decayed matrices, undecayed rest, and the attention methods' own parameters."""
        own = {
            id(parameter)
            for module in self.model.modules()
            if isinstance(module, AttentionMethod)
            for parameter in module.parameters()
        }
        trained = [p for p in self.parameters() if p.requires_grad]
        rest = [p for p in trained if id(p) not in own]
        method_rate = self.optim.learning_rate * self.optim.method_lr_scale
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in rest if p.ndim >= 2],
                "weight_decay": self.optim.weight_decay,
            },
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {
                "params": [p for p in trained if id(p) in own],
                "weight_decay": 0.0,
                "lr": method_rate,
            },
        ]
        return [group for group in groups if group["params"]]

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate at a step over the peak one: linear warm-up, then the schedule."""
        optim = self.optim
        if step < optim.warmup_steps:
            return (step + 1) / (optim.warmup_steps + 1)
        if optim.schedule == "constant":
            return 1.0
        span = max(1, self.max_steps - optim.warmup_steps)
        progress = min(1.0, (step - optim.warmup_steps) / span)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * cosine
