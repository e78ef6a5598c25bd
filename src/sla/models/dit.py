"""A small video diffusion transformer, to be read at a sitting.

It is Wan2.1's network in miniature: patchified video tokens, adaptive layer norm on the timestep
from one shared projection plus a table per block, rotary 3D positions, RMS-normalised queries and
keys, self-attention over the whole video, cross-attention to text, an MLP. Self-attention goes
through `sla.attention.build_attention`, so that any registered method can take its place.

One thing is not Wan's: fixed absolute positions are added to the tokens. Rotary positions are
relative, and from them alone a small network hardly learns where in the frame something is (on the
clip of the overfitting test, four seeds: samples were 0.24 to 0.33 off per pixel without absolute
positions, 0.03 to 0.05 with them).

Shapes: B batch, C channels, T x H x W frames, height and width of the latents (or pixels),
N video tokens, L text tokens, M = hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sla.attention import AttentionConfig, AttentionContext, AttentionMethod, build_attention
from sla.attention.token_order import raster_order, tile_order
from sla.models.video_model import Grid, ModelConfig, VideoModel, check_grid, check_inputs

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (N, 1, head_dim / 2), float32


@dataclass
class DiTConfig(ModelConfig):
    """Sizes of a `VideoDiT`.

    Attributes:
        name: `dit`.
        in_channels: C, channels of the latents; 3 for pixels.
        patch_size: frames, height and width of the patch that becomes one token.
        hidden_size: M, width of a token.
        num_heads: attention heads; head_dim = hidden_size / num_heads.
        depth: blocks.
        mlp_ratio: hidden width of the MLP over `hidden_size`.
        text_dim: width of the text embeddings that cross-attention reads.
        time_frequencies: sinusoids that embed the timestep.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every normalisation.

    Raises:
        ValueError: a size that no model can have; names the field and what is allowed.
    """

    name: str = "dit"
    in_channels: int = 3
    patch_size: tuple[int, int, int] = (1, 4, 4)
    hidden_size: int = 192
    num_heads: int = 3
    depth: int = 6
    mlp_ratio: float = 3.0
    text_dim: int = 128
    time_frequencies: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = tuple(self.patch_size)  # YAML and JSON give lists
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(
                f"patch_size is {sizes}; it must be three positive numbers: frames, height, width"
            )
        self.patch_size = sizes
        for name in ("in_channels", "hidden_size", "num_heads", "depth", "text_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("mlp_ratio", "rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.time_frequencies < 2 or self.time_frequencies % 2:
            raise ValueError(
                f"time_frequencies is {self.time_frequencies}; it must be even and positive"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of num_heads "
                f"({self.num_heads})"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"hidden_size / num_heads is {self.head_dim}; it must be even and at least 6: "
                "rotary positions need a pair of channels for each of frames, height and width"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    def grid(self, size: Sequence[int]) -> Grid:
        """Token grid (frames, height, width) of latents whose last three dimensions are `size`.

        Raises:
            ValueError: a dimension is not a positive multiple of the patch.
        """
        return check_grid(size, self.patch_size)


def patchify(latents: Tensor, patch_size: Grid) -> Tensor:
    """Cut (B, C, T, H, W) into tokens (B, N, C * patch), raster order: frames, height, width.

    Channels of a token are ordered (C, frames, height, width), so that a linear layer on them is a
    `Conv3d` with kernel and stride `patch_size` whose weight was flattened.
    """
    batch, channels, frames, height, width = latents.shape
    t, h, w = patch_size
    cut = latents.reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: Grid) -> Tensor:
    """Inverse of `patchify`: (B, N, C * patch) back to (B, C, T, H, W)."""
    cut = tokens.unflatten(2, (-1, *patch_size)).unflatten(1, grid)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the timestep at geometric frequencies: (B,) -> (B, width) float32."""
    half = width // 2
    exponent = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def position_embedding(grid: Grid, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Absolute positions of a token grid: a third of the channels for each axis, sines and cosines.

    Returns:
        (N, dim) float32; channels that three axes cannot share evenly are zero.
    """
    width = 2 * (dim // 6)
    axes = []
    for axis in range(3):
        angle = timestep_embedding(torch.arange(grid[axis], device=device), width)
        shape = [1, 1, 1, width]
        shape[axis] = grid[axis]
        axes.append(angle.view(shape).expand(*grid, width))
    return F.pad(torch.cat(axes, dim=-1).flatten(0, 2), (0, dim - 3 * width))


def rotary_embedding(
    grid: Grid,
    head_dim: int,
    theta: float,
    device: torch.device | str = "cpu",
    origin: Grid = (0, 0, 0),
) -> Rotary:
    """Rotary positions of a token grid as Wan has them.

    The channel pairs of a head are shared out: a third each, rounded down to whole pairs, for
    height and width, the rest for frames.

    Args:
        grid: frames, height, width in tokens.
        head_dim: channels of a head, even.
        theta: base of the frequencies.
        device: where the result lives.
        origin: position of the first token; attention scores do not depend on it.

    Returns:
        Cosines and sines, (N, 1, head_dim / 2) float32 each; the 1 broadcasts over heads.
    """
    spatial = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        # float64: the angle of a far position loses its fraction in float32.
        pair = torch.arange(0, width, 2, device=device, dtype=torch.float64)
        position = torch.arange(grid[axis], device=device, dtype=torch.float64) + origin[axis]
        angle = position[:, None] * theta ** (-pair / width)
        shape = [1, 1, 1, width // 2]
        shape[axis] = grid[axis]
        angles.append(angle.view(shape).expand(*grid, width // 2))
    angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn neighbouring channel pairs of (B, N, heads, head_dim) by their positions' angles."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * (1 + scale) + shift, in the precision of the modulation, dtype of `normed`."""
    return (normed * (1 + scale) + shift).type_as(normed)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the weight's precision, dtype of x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return normed.type_as(x)


class SelfAttention(nn.Module):
    """Self-attention over all video tokens, by the method of `attention`.

    Queries and keys are RMS-normalised over all heads at once, as in Wan: the paper's
    observations are about attention maps of that kind, and the norm's weight per channel leaves
    each head a sharpness of its own.
    """

    def __init__(self, config: DiTConfig, attention: AttentionConfig, layer_index: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.norm_query = RMSNorm(dim, config.norm_eps)
        self.norm_key = RMSNorm(dim, config.norm_eps)
        self.output = nn.Linear(dim, dim)
        self.method = build_attention(
            attention, config.num_heads, config.head_dim, dim, layer_index
        )

    def forward(self, hidden: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        heads = (self.num_heads, -1)
        query = rotate(self.norm_query(self.query(hidden)).unflatten(-1, heads), rotary)
        key = rotate(self.norm_key(self.key(hidden)).unflatten(-1, heads), rotary)
        value = self.value(hidden).unflatten(-1, heads)
        # Methods take (B, heads, N, head_dim) with any strides: views, nothing is copied.
        attended = self.method(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), context
        )
        return self.output(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Exact attention from video tokens to text tokens; masked text tokens get no weight."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.norm_query = RMSNorm(dim, config.norm_eps)
        self.norm_key = RMSNorm(dim, config.norm_eps)
        self.output = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        query = self.norm_query(self.query(hidden)).unflatten(-1, heads).transpose(1, 2)
        key = self.norm_key(self.key(text)).unflatten(-1, heads).transpose(1, 2)
        value = self.value(text).unflatten(-1, heads).transpose(1, 2)
        mask = text_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; the first and the last modulated by the timestep."""

    def __init__(self, config: DiTConfig, attention: AttentionConfig, layer_index: int) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        mlp_width = round(config.mlp_ratio * dim)
        # Shift, scale and gate of self-attention, then of the MLP, added to the shared projection
        # of the timestep: 6 M parameters a block where a projection of its own would have 6 M^2.
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.norm_self = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attention = SelfAttention(config, attention, layer_index)
        self.norm_cross = nn.LayerNorm(dim, eps)
        self.cross_attention = CrossAttention(config)
        self.norm_mlp = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, dim)
        )

    def forward(
        self,
        hidden: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor,
        rotary: Rotary,
        context: AttentionContext,
    ) -> Tensor:
        """(B, N, M) -> (B, N, M); `time` (B, 6, M), `text` (B, L, M), `text_mask` (B, L)."""
        modulation = (self.modulation + time).chunk(6, dim=1)
        shift_self, scale_self, gate_self, shift_mlp, scale_mlp, gate_mlp = modulation

        normed = modulate(self.norm_self(hidden), shift_self, scale_self)
        context = context.with_hidden_states(normed)
        attended = self.self_attention(normed, rotary, context)
        hidden = (hidden + gate_self * attended).type_as(hidden)

        crossed = self.cross_attention(self.norm_cross(hidden), text, text_mask)
        hidden = hidden + crossed.type_as(hidden)

        normed = modulate(self.norm_mlp(hidden), shift_mlp, scale_mlp)
        return (hidden + gate_mlp * self.mlp(normed)).type_as(hidden)


class VideoDiT(VideoModel):
    """The small video diffusion transformer.

    With initial weights the output is zero and each block is the identity.

    Args:
        config: sizes.
        attention_config: config of a registered attention method, used in every layer. Its `tile`
            is the order of the tokens inside; inputs and outputs are in raster order always.

    Raises:
        ValueError, TypeError: from `build_attention`, if the attention config cannot be used.
    """

    def __init__(self, config: DiTConfig, attention_config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self._attention_config = attention_config
        self.activation_checkpointing = False
        dim, eps = config.hidden_size, config.norm_eps
        patch_channels = config.in_channels * math.prod(config.patch_size)

        self.patch_embedding = nn.Linear(patch_channels, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.time_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            Block(config, attention_config, index) for index in range(config.depth)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, patch_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        of_methods = {module for method in self.attention_modules() for module in method.modules()}
        for module in self.modules():
            # A method's own parameters start as the method says.
            if isinstance(module, nn.Linear) and module not in of_methods:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (*self.time_embedding, *self.text_embedding):
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        # Every branch starts closed (adaLN-Zero): gates, cross-attention's output, the head.
        closed = [block.cross_attention.output for block in self._blocks()]
        for linear in (self.time_projection, self.head, *closed):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """As `VideoModel`.

        Works in the dtype of the weights, or under autocast; the modulation and the residual sums
        never run in less than the weights' precision.
        """
        config = self.config
        grid = check_inputs(
            self, config.in_channels, config.text_dim, latents, timestep, text, text_mask
        )
        dtype = self.patch_embedding.weight.dtype
        rotary = rotary_embedding(grid, config.head_dim, config.rope_theta, latents.device)

        # The timestep is embedded without autocast, as in Wan: bf16 has 8 bits for 1000 steps.
        with torch.autocast(latents.device.type, enabled=False):
            frequencies = timestep_embedding(timestep, config.time_frequencies)
            time_hidden = self.time_embedding(frequencies.to(dtype))
            time = self.time_projection(F.silu(time_hidden)).unflatten(-1, (6, -1))
        at_least_float32 = torch.promote_types(dtype, torch.float32)
        time, time_hidden = time.to(at_least_float32), time_hidden.to(at_least_float32)

        text = self.text_embedding(text.to(dtype))
        hidden = self.patch_embedding(patchify(latents, config.patch_size).to(dtype))
        positions = position_embedding(grid, config.hidden_size, latents.device)
        hidden = (hidden + positions).to(dtype)
        tile = self.attention_config.tile
        if tile is not None:
            # Tokens and their rotary positions move together; between here and the patches
            # only self-attention mixes tokens, and its method knows the order.
            order = tile_order(grid, tile, latents.device)
            hidden = hidden[:, order]
            rotary = (rotary[0][order], rotary[1][order])
        context = AttentionContext(grid=grid, timestep=timestep, tile=tile)
        for block in self.blocks:
            arguments = (hidden, time, text, text_mask, rotary, context)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden = block(*arguments)

        shift, scale = (self.modulation + time_hidden.unsqueeze(1)).chunk(2, dim=1)
        velocity = self.head(modulate(self.norm(hidden), shift, scale))
        if tile is not None:
            velocity = velocity[:, raster_order(grid, tile, latents.device)]
        return unpatchify(velocity, grid, config.patch_size).to(latents.dtype)

    def grid(self, size: Sequence[int]) -> Grid:
        return self.config.grid(size)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return ("query", "key", "value", "output", "mlp.0", "mlp.2")

    @property
    def attention_config(self) -> AttentionConfig:
        return self._attention_config

    def attention_modules(self) -> Iterator[AttentionMethod]:
        for block in self._blocks():
            yield block.self_attention.method

    def set_attention(self, attention_config: AttentionConfig) -> None:
        """As `VideoModel`; the token order becomes the config's too.

        If a method cannot be built, the model is unchanged.
        """
        config = self.config
        weight = self.patch_embedding.weight
        methods = [
            build_attention(
                attention_config, config.num_heads, config.head_dim, config.hidden_size, index
            )
            for index in range(config.depth)
        ]
        for block, method in zip(self._blocks(), methods, strict=True):
            method.to(device=weight.device, dtype=weight.dtype)
            method.train(block.training)
            block.self_attention.method = method
        self._attention_config = attention_config
