"""The one interface of attention methods.

Shape letters: B batch, H heads, N tokens, D head_dim, T_m query blocks, T_n key blocks.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sla_kernels import BlockMap
from torch import Tensor, nn

from sla.attention.config import AttentionConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class AttentionContext:
    """What changes from step to step and is not a query, key or value.

    Attributes:
        grid: latent grid `(frames, height, width)` in tokens, or None where there is none.
        timestep: diffusion timestep of each sample, (B,), in [0, 1000].
        hidden_states: input of the attention layer, (B, N, dim), for input-dependent gates.
        always_critical: leading tokens that are attended exactly by all and attend exactly to
            all (the text tokens of joint text-video models). They are not part of `grid`.
        tile: the order of the grid's tokens: None for raster order, `(frames, height, width)` for
            tiles of that size (`token_order`).
    """

    grid: Grid | None = None
    timestep: Tensor | None = None
    hidden_states: Tensor | None = None
    always_critical: int = 0
    tile: Grid | None = None

    def with_hidden_states(self, hidden_states: Tensor | None) -> AttentionContext:
        """The same with other hidden states, (B, N, dim) or None."""
        # Not `dataclasses.replace`: torch 2.11 cannot trace it inside activation checkpointing.
        return AttentionContext(
            grid=self.grid,
            timestep=self.timestep,
            hidden_states=hidden_states,
            always_critical=self.always_critical,
            tile=self.tile,
        )


class UnsupportedAttentionError(ValueError):
    """An attention method was called on inputs it does not support."""


class AttentionMethod(nn.Module, abc.ABC):
    """An attention method as a module that owns its learnable parts.

    What is fixed per layer goes to the constructor, the method's numbers live in its config, and
    what changes per step comes with the context.

    Args:
        config: the method's config.
        num_heads: H.
        head_dim: D.
        dim: width of the layer's hidden states.
        layer_index: index of the layer, from 0.
    """

    def __init__(
        self,
        config: AttentionConfig,
        num_heads: int,
        head_dim: int,
        dim: int,
        layer_index: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dim = dim
        self.layer_index = layer_index

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: (B, H, N, D), any strides and floating dtype, after normalisation
                and rotary embedding.
            context: see `AttentionContext`.

        Returns:
            (B, H, N, D), dtype of `query`.

        Raises:
            UnsupportedAttentionError: the method cannot work on these inputs; says why.
        """
        reason = self.unsupported_reason(query, key, value, context)
        if reason is not None:
            raise UnsupportedAttentionError(
                f"attention {self.config.name!r} of layer {self.layer_index} "
                f"does not support these inputs: {reason}"
            )
        return self.attend(query, key, value, context)

    @abc.abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        """`forward` after its checks; what a method implements."""

    def unsupported_reason(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> str | None:
        """Why the method cannot work on these inputs, or None when it can."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.ndim != 4:
                return f"{name} has shape {tuple(tensor.shape)}, expected (B, H, N, D)"
        if query.shape[1] != self.num_heads or query.shape[3] != self.head_dim:
            return (
                f"query has {query.shape[1]} heads of {query.shape[3]}, "
                f"the layer was built for {self.num_heads} of {self.head_dim}"
            )
        if key.shape != value.shape:
            return f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in shape"
        if query.shape[2] != key.shape[2]:
            return (
                f"{query.shape[2]} queries but {key.shape[2]} keys: "
                "only self-attention is replaced, leave cross-attention to the model"
            )
        return None

    def block_map(self, query: Tensor, key: Tensor, context: AttentionContext) -> BlockMap | None:
        """The blocks the method would choose, or None for a method that does not route."""
        return None

    @abc.abstractmethod
    def density(self, grid: Grid) -> float | None:
        """Fraction of the N x N scores that the method computes exactly, in [0, 1].

        None where it depends on the inputs: `exact_fraction` measures it.
        """

    def exact_fraction(self, query: Tensor, key: Tensor, context: AttentionContext) -> float:
        """Fraction of the N x N scores that the method computes exactly for these inputs.

        By default that of the critical tokens of `block_map`, or all without one.
        """
        block_map = self.block_map(query, key, context)
        return 1.0 if block_map is None else block_map.exact_fraction()

    @abc.abstractmethod
    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Forward floating-point operations of the layer for one sample of this grid.

        A multiply-add counts as two; softmax, feature maps and divisions are not counted.

        Args:
            grid: latent grid in tokens.
            density: fraction of exact scores, where `density(grid)` is None or another is wanted.

        Raises:
            ValueError: the density depends on the inputs and none was given.
        """

    def _density(self, grid: Grid, density: float | None) -> float:
        """The density that `flops` counts with."""
        found = self.density(grid) if density is None else density
        if found is None:
            raise ValueError(
                f"the density of attention {self.config.name!r} depends on its inputs; give "
                "density=, from exact_fraction(query, key, context)"
            )
        return found

    def extra_repr(self) -> str:
        return f"{self.config}, layer_index={self.layer_index}"


class Float32Parameters(nn.Module):
    """Parameters that stay in float32 when the model around them is cast.

    Proj starts at zero and moves in small steps: in bf16 those steps would be rounded away. So
    its master copy is float32 whatever `.to(torch.bfloat16)` says, and it is cast where used.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)


class Projection(Float32Parameters):
    """Proj: the learnable linear map of R^D shared by a layer's heads (Section 4).

    Args:
        head_dim: D.
        init: `zero` (weight and bias zero, as the authors' module) or `identity`.
    """

    def __init__(self, head_dim: int, init: str = "zero") -> None:
        super().__init__()
        if init not in ("zero", "identity"):
            raise ValueError(f"proj_init is {init!r}; it must be 'zero' or 'identity'")
        weight = torch.eye(head_dim) if init == "identity" else torch.zeros(head_dim, head_dim)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(head_dim))

    def forward(self, value: Tensor) -> Tensor:
        """Apply to (..., D) in the dtype of `value`."""
        return nn.functional.linear(value, self.weight.to(value.dtype), self.bias.to(value.dtype))


def tokens_of(grid: Grid) -> int:
    """Number of tokens N of a latent grid."""
    frames, height, width = grid
    return frames * height * width
