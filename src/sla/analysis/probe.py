"""Watches the attention methods of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sla.attention import AttentionContext, AttentionMethod


@dataclass(frozen=True)
class LayerStatistics:
    """One call of one layer's attention, over all samples and heads of the batch.

    Attributes:
        layer: index of the layer.
        error: ||O - O_full||_2 / ||O_full||_2, O_full exact attention on the layer's own query,
            key and value.
        error_l1: the same in the L1 norm, the measure of the paper's Figure 1.
        critical, marginal, negligible: fractions of the blocks in each class; 1, 0, 0 for a
            method that does not route.
    """

    layer: int
    error: float
    error_l1: float
    critical: float
    marginal: float
    negligible: float


@contextmanager
def observe_attention(model: nn.Module) -> Iterator[list[LayerStatistics]]:
    """Collect statistics of every attention call inside the block.

    Costs one exact attention and one routing per call; nothing else changes.

    Args:
        model: a model whose self-attention layers are `AttentionMethod`s.

    Yields:
        A list that grows by one entry per call.

    Raises:
        ValueError: the model holds no attention method.
    """
    observed: list[LayerStatistics] = []

    def hook(
        module: nn.Module,
        args: tuple[Tensor, Tensor, Tensor, AttentionContext],
        output: Tensor,
    ) -> None:
        assert isinstance(module, AttentionMethod)
        query, key, value, context = args
        with torch.no_grad():
            observed.append(_statistics(module, query, key, value, context, output))

    methods = [module for module in model.modules() if isinstance(module, AttentionMethod)]
    if not methods:
        raise ValueError(f"{type(model).__name__} holds no attention method to observe")
    handles = [method.register_forward_hook(hook) for method in methods]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()


def mean_statistics(observed: Sequence[LayerStatistics]) -> LayerStatistics:
    """Mean over calls and layers; `layer` is -1.

    Raises:
        ValueError: nothing was observed.
    """
    if not observed:
        raise ValueError("no attention call was observed")
    names = [field.name for field in fields(LayerStatistics) if field.name != "layer"]
    means = {name: sum(getattr(o, name) for o in observed) / len(observed) for name in names}
    return LayerStatistics(layer=-1, **means)


def _statistics(
    method: AttentionMethod,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: AttentionContext,
    output: Tensor,
) -> LayerStatistics:
    exact = scaled_dot_product_attention(query, key, value).float()
    difference = output.float() - exact
    block_map = method.block_map(query, key, context)
    if block_map is None:
        critical, marginal, negligible = 1.0, 0.0, 0.0
    else:
        labels = block_map.labels
        critical = (labels == 1).float().mean().item()
        marginal = (labels == 0).float().mean().item()
        negligible = (labels == -1).float().mean().item()
    return LayerStatistics(
        layer=method.layer_index,
        error=(difference.norm() / exact.norm()).item(),
        error_l1=(difference.abs().sum() / exact.abs().sum()).item(),
        critical=critical,
        marginal=marginal,
        negligible=negligible,
    )
