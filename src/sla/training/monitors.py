"""Callbacks that only look: what TensorBoard shows of a run beside the losses.

Everything is logged every n steps or once a validation, and costs nothing in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from sla_kernels import sparse_attention
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sla.attention import AttentionContext, AttentionMethod
from sla.models.video_model import VideoModel
from sla.training.callbacks import FirstValidationBatch
from sla.training.model_flops import PARTS
from sla.training.module import DiffusionModule

Inputs = tuple[Tensor, Tensor, Tensor, AttentionContext]


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
        self._sums: Tensor | None = None  # (strata, 2): losses and how many, where the losses are

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        u, losses = outputs["u"], outputs["losses"].double()
        stratum = (u * self.strata).long().clamp(max=self.strata - 1)
        inside = (stratum == torch.arange(self.strata, device=u.device)[:, None]).double()
        sums = torch.stack((inside @ losses, inside.sum(1)), dim=1)
        self._sums = sums if self._sums is None else self._sums + sums
        if (batch_idx + 1) % self.every:
            return
        for index, (total, count) in enumerate(self._sums.tolist()):
            if count:
                pl_module.log(f"train/loss_stratum_{index}", total / count, rank_zero_only=True)
        self._sums = None


class RoutingMonitor(FirstValidationBatch):
    """Logs, on the first validation batch, how routing and the branches change.

    `routing/overlap`: critical blocks of this validation that were critical in the last one, as a
    share; a mean over layers. `branches/linear_over_sparse`: norm of what the linear branch adds
    over the norm of the sparse branch's output, for methods with one. One more sparse attention a
    layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._critical: dict[int, Tensor] = {}
        self._overlaps: list[float] = []
        self._ratios: list[float] = []

    @contextmanager
    def observe(self, model: VideoModel) -> Iterator[None]:
        self._overlaps, self._ratios, seen = [], [], set[int]()

        def hook(method: nn.Module, args: Inputs, output: Tensor) -> None:
            assert isinstance(method, AttentionMethod)
            if method.layer_index not in seen:  # of the strata, the first
                seen.add(method.layer_index)
                self._observe(method, args, output)

        handles = [method.register_forward_hook(hook) for method in model.attention_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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

    def values(self) -> dict[str, float]:
        lists = {
            "routing/overlap": self._overlaps,
            "branches/linear_over_sparse": self._ratios,
        }
        return {name: sum(found) / len(found) for name, found in lists.items() if found}


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
    "GradientNorms",
    "LossByTimestep",
    "RoutingMonitor",
    "card",
    "part_of",
    "total_norm",
]
