"""Wan in diffusers: the adapter, and models with random weights.

Shape letters as in `sla.models.injection`; C channels, T x H x W the latents' frames, height and
width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel
from sla_kernels.norm_rotary import norm_rotary
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sla.attention import AttentionConfig, AttentionContext, UnsupportedAttentionError
from sla.attention.token_order import raster_order, tile_order
from sla.models.dit import patchify, unpatchify
from sla.models.injection import (
    CarriedContext,
    MethodProcessor,
    ModelAdapter,
    RotaryHooks,
    per_sample,
    register_adapter,
)
from sla.models.wan_sizes import WAN_CONFIGS

if TYPE_CHECKING:
    from sla.models.sequence_parallel import SequenceShard

Grid = tuple[int, int, int]


def build_wan(
    size: str = "1.3b",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
) -> Any:
    """A `WanTransformer3DModel` with random weights, in evaluation mode.

    Args:
        size: `1.3b` or `14b`, exactly Wan2.1's text-to-video models, or `tiny`.
        dtype: of the weights; as in `from_pretrained`, the time embedding, the modulation tables
            and the norms around attention stay in float32.
        device: where to build it; nothing larger than the model is allocated anywhere.
        seed: of the weights; the global generators are left as they are.

    Raises:
        ValueError: an unknown size.
    """
    if size not in WAN_CONFIGS:
        raise ValueError(f"size is {size!r}; it must be one of {', '.join(WAN_CONFIGS)}")
    device = torch.device(device)
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)
            model: Any = WanTransformer3DModel(**WAN_CONFIGS[size])
        finally:
            torch.set_default_dtype(default)
    return cast_wan(model, dtype).eval()


def cast_wan(model: Any, dtype: torch.dtype) -> Any:
    """Cast the weights as `from_pretrained` does, in place; what Wan wants in float32 stays so.

    Our methods' parameters stay as they are.
    """
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        if "processor" in parts:
            continue
        parameter.data = parameter.data.to(torch.float32 if kept & parts else dtype)
    return model


class WanProcessor(MethodProcessor):
    """diffusers' `WanAttnProcessor` for self-attention, with a method in place of attention."""

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """(B, N, dim) -> (B, N, dim).

        Raises:
            UnsupportedAttentionError: cross-attention, a mask, or what the method refuses.
        """
        if encoder_hidden_states is not None:
            raise UnsupportedAttentionError("only self-attention is replaced")
        self.refuse_mask(attention_mask)
        rotary, context = self.carried(rotary_emb)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key = attn.to_k(hidden_states)
            value = attn.to_v(hidden_states)
        query, key = _normalise_androtate(attn, query, key, *rotary)
        value = value.unflatten(2, (attn.heads, -1))
        output = self.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            hidden_states,
            context,
        )
        output = attn.to_out[0](output)
        output = attn.to_out[1](output)
        return output


def _normalise_androtate(
    attn: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, N, dim) queries and keys to (B, N, H, D); in one kernel where no gradient is asked for.

    `cos` and `sin`: (1, N, 1, D) float32.
    """
    norms = attn.norm_q, attn.norm_k
    eps = norms[0].eps
    plain = all(type(norm) is nn.RMSNorm and norm.weight is not None for norm in norms)
    if plain and query.is_cuda and not torch.is_grad_enabled() and eps == norms[1].eps is not None:
        weights = norms[0].weight, norms[1].weight
        return norm_rotary(query, key, *weights, cos, sin, attn.heads, eps)
    heads = (attn.heads, -1)
    return (
        rotate(attn.norm_q(query).unflatten(2, heads), cos, sin),
        rotate(attn.norm_k(key).unflatten(2, heads), cos, sin),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of (B, N, H, D) by angles given twice, (1, N, 1, D) float32.

    Written with the pairs' partners rather than with their halves stacked: Inductor fuses this with
    the normalisation before it into one kernel that writes the result, and writes stacked halves to
    memory in float32 first.
    """
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    sign = torch.arange(x.shape[-1], device=x.device) % 2 * 2 - 1  # -1 for the first of a pair
    return (x * cos + partner * (sin * sign)).type_as(x)


@register_adapter("WanTransformer3DModel")
class WanAdapter(ModelAdapter):
    """Wan 2.1 and 2.2: self-attention over the video alone, in `blocks.N.attn1`.

    Tile order: the patches of the latents change places before the transformer and back after it,
    and the rotary embedding with them, so that no layer knows.
    """

    processor = WanProcessor
    can_reorder = True

    def attention_layers(self, transformer: Any) -> list[nn.Module]:
        return [block.attn1 for block in transformer.blocks]

    def context(self, transformer: Any, arguments: Mapping[str, Any]) -> AttentionContext | None:
        latents = arguments.get("hidden_states")
        if latents is None:
            return None
        timestep = per_sample(arguments.get("timestep"), latents.shape[0], latents.device)
        return AttentionContext(grid=_grid(transformer, latents), timestep=timestep)

    def connect(self, transformer: Any, config: AttentionConfig) -> list[RemovableHandle]:
        hooks = (RotaryHooks if config.tile is None else _TileHooks)(self, transformer, config)
        return hooks.connect(transformer, transformer.rope)

    def split_sequence(self, transformer: Any, shard: SequenceShard) -> list[RemovableHandle]:
        return _SplitHooks(transformer, shard).connect(transformer)


def _grid(transformer: Any, latents: Tensor) -> Grid:
    frames, height, width = transformer.config.patch_size
    return (
        latents.shape[2] // frames,
        latents.shape[3] // height,
        latents.shape[4] // width,
    )


class _TileHooks(RotaryHooks):
    """`RotaryHooks` that put the tokens into tile order, and the output back."""

    tile: Grid

    def connect(self, transformer: nn.Module, rotary: nn.Module) -> list[RemovableHandle]:
        handle = transformer.register_forward_hook(self.after)
        return [*super().connect(transformer, rotary), handle]

    def before(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        super().before(transformer, args, kwargs)
        if self.waiting is None or self.waiting.grid is None:
            return None
        arguments = self.arguments(args, kwargs)
        latents, timestep = arguments["hidden_states"], arguments.get("timestep")
        order = tile_order(self.waiting.grid, self.tile, latents.device)
        arguments["hidden_states"] = _reorder(transformer, latents, order)
        if isinstance(timestep, Tensor) and timestep.ndim == 2:  # one a token, Wan2.2 TI2V
            arguments["timestep"] = timestep[:, order]
        return (), arguments

    def after_rotary(self, rotary: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        carried = super().after_rotary(rotary, args, output)
        if not isinstance(carried, CarriedContext) or carried.context.grid is None:
            return carried
        cos, sin = carried.rotary
        order = tile_order(carried.context.grid, self.tile, cos.device)
        return CarriedContext((cos[:, order], sin[:, order]), carried.context)

    def after(self, transformer: Any, args: tuple[Any, ...], output: Any) -> Any:
        sample = output[0]
        grid = _grid(transformer, sample)
        sample = _reorder(transformer, sample, raster_order(grid, self.tile, sample.device))
        return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)


def _reorder(transformer: Any, latents: Tensor, order: Tensor) -> Tensor:
    """(B, C, T, H, W) with its patches, in raster order, at other places."""
    grid, patch = _grid(transformer, latents), transformer.config.patch_size
    return unpatchify(patchify(latents, patch)[:, order], grid, patch)


class _SplitHooks:
    """Hooks that leave this rank its part of the tokens, from the first layer to the output.

    They run after those of `connect`: what is split is in tile order already.
    """

    def __init__(self, transformer: nn.Module, shard: SequenceShard) -> None:
        self.shard = shard
        self.names = tuple(inspect.signature(transformer.forward).parameters)

    def connect(self, transformer: Any) -> list[RemovableHandle]:
        return [
            transformer.register_forward_pre_hook(self.before, with_kwargs=True),
            transformer.rope.register_forward_hook(self.after_rotary),
            transformer.blocks[0].register_forward_pre_hook(self.before_layers),
            transformer.proj_out.register_forward_hook(self.after_layers),
        ]

    def before(
        self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        latents, timestep = arguments.get("hidden_states"), arguments.get("timestep")
        if latents is None:
            return None
        grid = _grid(transformer, latents)
        self.shard.check_tokens(grid)
        if not isinstance(timestep, Tensor) or timestep.ndim != 2 or timestep.shape[1] == 1:
            return None
        arguments["timestep"] = self.shard.split(timestep, 1)  # one a token, Wan2.2 TI2V
        return (), arguments

    def after_rotary(self, rotary: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, CarriedContext):
            return output
        cos, sin = (self.shard.split(angles, 1) for angles in output.rotary)
        return output._replace(rotary=(cos, sin))

    def before_layers(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = args
        return self.shard.split(hidden, 1).contiguous(), *others

    def after_layers(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.shard.gather_output(output, 1)


__all__ = ["WAN_CONFIGS", "WanAdapter", "WanProcessor", "build_wan", "cast_wan", "rotate"]
