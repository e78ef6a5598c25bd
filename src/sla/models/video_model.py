"""What training, sampling and measuring ask of a video diffusion transformer, whatever its family.

`VideoDiT` is one, `DiffusersVideoModel` makes one of a transformer of diffusers. How a family is
configured, built, stored and found again is in `sla.models.families`.

Shapes: B batch, C channels, T x H x W the latents' frames, height and width, L text tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sla.attention import AttentionConfig, AttentionMethod

Grid = tuple[int, int, int]


@dataclass
class ModelConfig:
    """What every family's config has.

    A family's config has C and the width of its text embeddings too, as fields or properties
    `in_channels` and `text_dim`.

    Attributes:
        name: the family's registered name (`sla.models.families`).
    """

    name: str = "dit"

    if TYPE_CHECKING:

        @property
        def in_channels(self) -> int: ...

        @property
        def text_dim(self) -> int: ...


class VideoModel(nn.Module, abc.ABC):
    """Predicts the velocity of noisy video latents from the timestep and the text.

    Attributes:
        activation_checkpointing: recompute each block in the backward pass to save memory; changes
            nothing else. May be switched at any time.
    """

    activation_checkpointing: bool

    @abc.abstractmethod
    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            latents: (B, C, T, H, W), floating; T, H and W multiples of the patch.
            timestep: (B,) in [0, 1000], floating or integer.
            text: text embeddings, (B, L, width).
            text_mask: (B, L) bool, True for real tokens; at least one in every sample.

        Returns:
            (B, C, T, H, W), dtype of `latents`.

        Raises:
            ValueError: a shape that does not fit; names it and what is allowed.
            TypeError: `text_mask` is not bool.
        """

    @abc.abstractmethod
    def grid(self, size: Sequence[int]) -> Grid:
        """Token grid (frames, height, width) of latents whose last three dimensions are `size`.

        Raises:
            ValueError: a dimension is not a positive multiple of the patch.
        """

    @property
    @abc.abstractmethod
    def attention_config(self) -> AttentionConfig:
        """The config of the method in its self-attention."""

    @abc.abstractmethod
    def attention_modules(self) -> Iterator[AttentionMethod]:
        """The self-attention method of every layer, first layer first."""

    @abc.abstractmethod
    def set_attention(self, attention_config: AttentionConfig) -> None:
        """Replace the self-attention method of every layer; all other weights stay as they are.

        The new methods' own parameters are freshly initialised, on the model's device and in its
        dtype (a method may keep some in float32). Build optimisers after this, not before.

        Raises:
            ValueError, TypeError: from `build_attention`.
        """

    @abc.abstractmethod
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The layers, first one first: what is compiled, checkpointed and sharded one by one."""

    @property
    @abc.abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """Ends of the names of the linear layers that LoRA adapts by default."""


def check_inputs(
    model: VideoModel,
    in_channels: int,
    text_dim: int,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    text_mask: Tensor,
) -> Grid:
    """Refuse inputs of `VideoModel.forward` that do not fit; returns the grid of the latents.

    Raises:
        ValueError, TypeError: as `VideoModel.forward`.
    """
    if latents.ndim != 5 or latents.shape[1] != in_channels:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; they must be (B, {in_channels}, T, H, W)"
        )
    batch = latents.shape[0]
    if timestep.shape != (batch,):
        raise ValueError(
            f"timestep has shape {tuple(timestep.shape)}; it must be ({batch},), one a sample"
        )
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != text_dim:
        raise ValueError(f"text has shape {tuple(text.shape)}; it must be ({batch}, L, {text_dim})")
    if text_mask.shape != text.shape[:2]:
        raise ValueError(
            f"text_mask has shape {tuple(text_mask.shape)}; "
            f"it must be {tuple(text.shape[:2])}, as text"
        )
    if text_mask.dtype != torch.bool:
        raise TypeError(f"text_mask is {text_mask.dtype}; it must be torch.bool")
    return model.grid(latents.shape)


def check_grid(size: Sequence[int], patch_size: Grid) -> Grid:
    """`VideoModel.grid` for patches of that many frames, rows and columns."""
    for name, length, patch in zip(
        ("frames", "height", "width"), size[-3:], patch_size, strict=True
    ):
        if length < 1 or length % patch:
            raise ValueError(
                f"{name} of the latents is {length}; it must be a positive multiple of "
                f"{patch}, as patch_size is {tuple(patch_size)}"
            )
    frames, height, width = (n // p for n, p in zip(size[-3:], patch_size, strict=True))
    return frames, height, width


__all__ = ["Grid", "ModelConfig", "VideoModel", "check_grid", "check_inputs"]
