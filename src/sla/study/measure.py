"""What is measured of a model on the fixed validation clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sla.analysis import observe_attention
from sla.attention import AttentionContext, AttentionMethod, FullConfig
from sla.data.manifest import DataError
from sla.data.module import VideoBatch, VideoDataModule
from sla.diffusion.flow_matching import SampleNoise
from sla.flops import Shape, model_flops
from sla.models.video_model import VideoModel
from sla.training.module import DiffusionModule

Values = NDArray[np.float32]


def validation_batches(data: VideoDataModule) -> list[VideoBatch]:
    """The fixed validation clips, decoded once and kept: on the CPU, without filling.

    Raises:
        DataError: there are none, or one cannot be read (all arms must see the same).
    """
    loader: Any = data.val_dataloader()
    batches: list[VideoBatch] = list(loader)
    broken = [
        clip
        for batch in batches
        for clip, weight in zip(batch["clip_id"], batch["weight"].tolist(), strict=True)
        if weight == 0
    ]
    if broken or not batches:
        what = f"clips {broken[:5]} cannot be read" if broken else "there are no validation clips"
        raise DataError(f"{what}; arms of a study are compared on the same ones")
    return batches


def on_device(batch: VideoBatch, device: torch.device) -> VideoBatch:
    """A batch with its pictures on a device."""
    moved = batch.copy()
    moved["video"] = batch["video"].to(device, non_blocking=True)
    return moved


class Draws:
    """Noise of the triples of some batches, drawn once and kept on the device: it is drawn on the
    CPU, which takes longer than a forward."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int], SampleNoise] = {}

    def of(
        self, module: DiffusionModule, number: int, batch: VideoBatch, stratum: int
    ) -> SampleNoise:
        """Of the batch with this number, always the same one."""
        key = number, stratum, module.val_strata
        if key not in self._kept:
            self._kept[key] = module.validation_draws(batch, stratum)
        return self._kept[key]


@torch.no_grad()
def triple_losses(
    module: DiffusionModule,
    batches: Sequence[VideoBatch],
    *,
    in_bf16: bool,
    draws: Draws | None = None,
) -> Values:
    """Flow-matching loss of every (clip, timestep, noise) triple: the same ones for every model.

    Args:
        module: on the device to measure on; its mode is left as it was.
        batches: from `validation_batches`.
        in_bf16: compute under bf16 autocast, as the run trains.
        draws: those of these batches, on this device, from earlier calls.

    Returns:
        float32 (clips, strata).
    """
    draws = draws or Draws()
    rows: list[Tensor] = []
    training = module.training
    module.eval()
    try:
        with torch.autocast(module.device.type, torch.bfloat16, enabled=in_bf16):
            for number, batch in enumerate(batches):
                moved = on_device(batch, module.device)
                strata = [
                    module.validation_losses(
                        moved, stratum, draws.of(module, number, batch, stratum)
                    ).float()
                    for stratum in range(module.val_strata)
                ]
                rows.append(torch.stack(strata, dim=1).cpu())
    finally:
        module.train(training)
    return torch.cat(rows).numpy()


@dataclass(frozen=True)
class AttentionMeasures:
    """Attention of a model on its own queries, keys and values; means over clips and strata.

    Attributes:
        error_l1, error_l2: float32 (layers,): distance of the output to exact attention's on the
            same inputs, over the norm of that.
        exact: float32 (layers,): share of the N^2 scores that are computed exactly.
        marginal, negligible: float32 (layers,): shares of the blocks in these classes of the
            method's map: of SLA those of the linear branch and those that are skipped.
        flops: of all layers, one sample, one forward.
        full_flops: of exact attention.
    """

    error_l1: Values
    error_l2: Values
    exact: Values
    marginal: Values
    negligible: Values
    flops: float
    full_flops: float


@torch.no_grad()
def measure_attention(
    module: DiffusionModule, batch: VideoBatch, *, in_bf16: bool
) -> AttentionMeasures:
    """Errors, densities and FLOPs of a model's attention, over all timestep strata.

    Args:
        module, in_bf16: as `triple_losses`.
        batch: some validation clips.
    """
    model, training = module.model, module.training
    methods = list(model.attention_modules())
    grid = model.grid(batch["video"].shape)
    known = [method.density(grid) for method in methods]
    fractions: list[list[float]] = [[] for _ in methods]
    module.eval()
    with ExitStack() as stack:
        stack.callback(module.train, training)
        for index, method in enumerate(methods):
            if known[index] is None:
                hook = method.register_forward_hook(_count_into(fractions[index]))
                stack.callback(hook.remove)
        observed = stack.enter_context(observe_attention(model))
        stack.enter_context(torch.autocast(module.device.type, torch.bfloat16, enabled=in_bf16))
        moved = on_device(batch, module.device)
        for stratum in range(module.val_strata):
            module.validation_losses(moved, stratum)
    exact = [
        float(np.mean(fractions[i])) if density is None else density
        for i, density in enumerate(known)
    ]
    layers = sorted({statistics.layer for statistics in observed})

    def by_layer(name: str) -> Values:
        means = [
            np.mean([getattr(s, name) for s in observed if s.layer == layer]) for layer in layers
        ]
        return np.asarray(means, dtype=np.float32)

    return AttentionMeasures(
        error_l1=by_layer("error_l1"),
        error_l2=by_layer("error"),
        exact=np.asarray(exact, dtype=np.float32),
        marginal=by_layer("marginal"),
        negligible=by_layer("negligible"),
        flops=sum(m.flops(grid, density) for m, density in zip(methods, exact, strict=True)),
        full_flops=full_attention_flops(model, grid),
    )


def full_attention_flops(model: VideoModel, grid: tuple[int, int, int]) -> float:
    """Of all layers with exact attention, one sample, one forward."""
    methods = list(model.attention_modules())
    shape = Shape(grid, methods[0].num_heads, methods[0].head_dim, len(methods))
    return model_flops(FullConfig(), shape)


def proj_norm(module: DiffusionModule) -> float | None:
    """Norm of all weights that the methods own, or None: whether the linear branch has begun."""
    own = [p for method in module.model.attention_modules() for p in method.parameters()]
    if not own:
        return None
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in own))


def _count_into(found: list[float]) -> Callable[..., None]:
    def hook(
        method: AttentionMethod,
        args: tuple[Tensor, Tensor, Tensor, AttentionContext],
        output: Tensor,
    ) -> None:
        query, key, _, context = args
        found.append(method.exact_fraction(query, key, context))

    return hook
