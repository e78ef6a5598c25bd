"""Callbacks that only look: what TensorBoard shows of a run beside the losses.

Everything is logged every n steps or once a validation, and costs nothing in between.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from sla_kernels import sparse_attention
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sla.attention import AttentionContext, AttentionMethod, FullConfig, build_attention
from sla.models.video_model import Grid, VideoModel
from sla.training.module import DiffusionModule

# Parts of a model by what the names of their parameters hold, first match first.
PARTS = {
    "self_attention": ("self_attention.", "attn1."),
    "cross_attention": ("cross_attention.", "attn2."),
    "mlp": ("mlp.", "ffn."),
    "text_encoder": ("text_encoder.",),
}
Inputs = tuple[Tensor, Tensor, Tensor, AttentionContext]
# A backward takes twice the products of its forward.
FORWARDS_OF_A_STEP = 3


def part_of(name: str, parameter: nn.Parameter, methods: set[int]) -> str:
    """The part of a model that a parameter belongs to.

    Args:
        name: in the module.
        methods: ids of the attention methods' own parameters.
    """
    if id(parameter) in methods:
        return "attention_method"
    for part, marks in PARTS.items():
        if any(mark in name for mark in marks):
            return part
    return "rest"


class GradientNorms(Callback):
    """Logs the norm of the gradient of each part, before clipping.

    Args:
        every: optimiser steps between two rows.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        if (trainer.global_step + 1) % self.every:
            return
        assert isinstance(pl_module, DiffusionModule)
        own = {id(p) for m in pl_module.model.attention_modules() for p in m.parameters()}
        gradients: dict[str, list[Tensor]] = defaultdict(list)
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                gradients[part_of(name, parameter, own)].append(parameter.grad)
        for part, tensors in gradients.items():
            # Lightning would keep what is logged here for the end of an epoch.
            norm = total_norm(tensors)
            pl_module.log(f"gradient_norm/{part}", norm, on_step=True, on_epoch=False)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all numbers of the tensors together, sharded ones whole."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class LossByTimestep(Callback):
    """Logs the training loss by strata of the timestep's distribution: means since the last row.

    Args:
        strata: equally likely ones, as the validation's.
        every: steps between two rows.
    """

    def __init__(self, strata: int, every: int) -> None:
        self.strata = strata
        self.every = every
        self._sums = torch.zeros(strata, 2, dtype=torch.float64)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        u, losses = outputs["u"].double().cpu(), outputs["losses"].double().cpu()
        stratum = (u * self.strata).long().clamp(max=self.strata - 1)
        self._sums[:, 0].index_add_(0, stratum, losses)
        self._sums[:, 1].index_add_(0, stratum, torch.ones_like(losses))
        if (batch_idx + 1) % self.every:
            return
        for index, (total, count) in enumerate(self._sums.tolist()):
            if count:
                pl_module.log(f"train/loss_stratum_{index}", total / count, rank_zero_only=True)
        self._sums.zero_()


def forward_flops(model: VideoModel, grid: Grid, text_tokens: int) -> float:
    """Operations of a forward of one sample, a multiply-add as two.

    Counted are the linear layers of the repeated blocks, cross-attention and the attention methods;
    a method whose work depends on its inputs counts as full attention.
    """
    tokens = math.prod(grid)
    total = sum(_attention_flops(method, grid) for method in model.attention_modules())
    for block in model.repeated_blocks():
        methods = [part for part in block.modules() if isinstance(part, AttentionMethod)]
        own = {part for method in methods for part in method.modules()}
        for name, part in block.named_modules():
            if not isinstance(part, nn.Linear) or part in own:
                continue
            side, layer = _side(name)
            rows = text_tokens if side == "text" else tokens
            total += 2.0 * rows * part.in_features * part.out_features
            if side and layer == "query":
                total += 4.0 * tokens * text_tokens * part.out_features
    return total


def _attention_flops(method: AttentionMethod, grid: Grid) -> float:
    try:
        return method.flops(grid)
    except ValueError:
        sizes = (method.num_heads, method.head_dim, method.dim, method.layer_index)
        return build_attention(FullConfig(), *sizes).flops(grid)


def _side(name: str) -> tuple[str, str]:
    """What a layer of cross-attention works on, `text` or `video`, else nothing; and its role."""
    last = name.rsplit(".", 1)[-1]
    role = {"to_q": "query", "to_k": "key", "to_v": "value"}.get(last, last)
    if not any(mark in f"{name}." for mark in PARTS["cross_attention"]):
        return "", role
    return "text" if role in ("key", "value") else "video", role


class FlopsUtilisation(Callback):
    """Logs model FLOP/s, and their share of the GPU's peak (MFU) where Lightning knows that.

    Counted are the products of the model, once: neither recomputed blocks nor a teacher.

    Args:
        every: steps between two rows.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._flops = 0.0
        self._since = 0.0
        self._of_sample: dict[tuple[Grid, int], float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flops, self._since = 0.0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        video = batch["video"]
        grid = pl_module.model.grid(video.shape)
        sample = (grid, self._text_tokens(batch))
        if sample not in self._of_sample:
            self._of_sample[sample] = FORWARDS_OF_A_STEP * forward_flops(pl_module.model, *sample)
        self._flops += len(video) * self._of_sample[sample]
        if (batch_idx + 1) % self.every:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rate = self._flops / (time.perf_counter() - self._since)
        pl_module.log("throughput/model_tflops_per_s", rate / 1e12, rank_zero_only=True)
        peak = None
        if pl_module.device.type == "cuda":
            dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
            peak = get_available_flops(pl_module.device, dtype)
        if peak:
            pl_module.log("throughput/model_flops_utilisation", rate / peak, rank_zero_only=True)
        self.on_train_start(trainer, pl_module)

    @staticmethod
    def _text_tokens(batch: Any) -> int:
        """Of a batch whose text is encoded, or tokenised; of one with captions alone the bytes."""
        if "text_mask" in batch:
            return int(batch["text_mask"].shape[1])
        return max(len(caption.encode()) for caption in batch["caption"])


class RoutingMonitor(Callback):
    """Logs, on the first validation batch, how routing and the branches change.

    `routing/overlap`: critical blocks of this validation that were critical in the last one, as a
    share; a mean over layers. `branches/linear_over_sparse`: norm of what the linear branch adds
    over the norm of the sparse branch's output, for methods with one. One more sparse attention a
    layer.
    """

    def __init__(self) -> None:
        self._critical: dict[int, Tensor] = {}
        self._overlaps: list[float] = []
        self._ratios: list[float] = []
        self._handles: list[Any] = []

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        if batch_idx or trainer.sanity_checking:
            return
        self._overlaps, self._ratios, seen = [], [], set[int]()

        def hook(method: nn.Module, args: Inputs, output: Tensor) -> None:
            assert isinstance(method, AttentionMethod)
            if method.layer_index not in seen:  # of the strata, the first
                seen.add(method.layer_index)
                self._observe(method, args, output)

        self._handles = [m.register_forward_hook(hook) for m in pl_module.model.attention_modules()]

    @torch.no_grad()
    def _observe(
        self,
        method: AttentionMethod,
        inputs: Inputs,
        output: Tensor,
    ) -> None:
        query, key, value, context = inputs
        block_map = method.block_map(query, key, context)
        if block_map is None:
            return
        critical = (block_map.labels == 1).cpu()
        before = self._critical.get(method.layer_index)
        if before is not None and before.shape == critical.shape:
            kept = (before & critical).sum().item()
            self._overlaps.append(kept / max(1, int(critical.sum().item())))
        self._critical[method.layer_index] = critical
        sparse = sparse_attention(query, key, value, block_map).float()
        added = (output.float() - sparse).norm() / sparse.norm()
        self._ratios.append(added.item())

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._remove()
        if batch_idx:
            return
        for name, values in (
            ("routing/overlap", self._overlaps),
            ("branches/linear_over_sparse", self._ratios),
        ):
            if values:
                pl_module.log(
                    name,
                    sum(values) / len(values),
                    on_step=False,
                    on_epoch=True,
                    batch_size=1,
                    rank_zero_only=True,
                )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class ConfigCard(Callback):
    """Writes the run's config to TensorBoard as text.

    Args:
        config: the resolved experiment as plain values.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("config", card(self.config))


def card(config: Mapping[str, Any]) -> str:
    """A config as a Markdown table."""
    lines = ["| section | key | value |", "| --- | --- | --- |"]
    for section, values in config.items():
        lines += [f"| {section} | {key} | `{value}` |" for key, value in values.items()]
    return "\n".join(lines)


__all__ = [
    "ConfigCard",
    "FlopsUtilisation",
    "GradientNorms",
    "LossByTimestep",
    "RoutingMonitor",
    "card",
    "forward_flops",
    "part_of",
    "total_norm",
]
