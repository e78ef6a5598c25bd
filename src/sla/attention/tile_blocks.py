"""Tiles of the latent grid as blocks of the sparse branch: what VSA and VMoBA share.

Shape letters: B batch, H heads, N tokens, D head_dim, C cubes or other tiles of the latent grid,
S slots: the places of all tiles, each filled up to whole blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from sla_kernels.block_map import accumulation_dtype, tokens_in_blocks
from torch import Tensor, nn

from sla.attention.interface import (
    AttentionContext,
    AttentionMethod,
    Grid,
    UnsupportedAttentionError,
    tokens_of,
)
from sla.attention.token_order import raster_order, tile_index, tile_order, tile_shape


@dataclass(frozen=True)
class TileBlocks:
    """The tokens of a grid, tile after tile, each tile filled up to whole blocks of one size.

    All tiles take as many slots, also those at the far ends of the grid that are smaller.

    Attributes:
        index: int64 (S,): the token of each slot; 0 for filling.
        slot: int64 (N,): the slot of each token.
        filling: int64: the slots without a token.
        tile: int64 (N,): the tile of each token.
        lengths: int64 (C,): tokens of each tile.
        block_lengths: int32 (S / block,): tokens of each block, at least 1: an empty block counts
            as one of 1, and whoever makes a block map leaves it out.
        slots: slots of a tile.
        in_place: every token is in its slot and there is no filling: nothing has to move.
    """

    index: Tensor
    slot: Tensor
    filling: Tensor
    tile: Tensor
    lengths: Tensor
    block_lengths: Tensor
    slots: int
    in_place: bool

    def spread(self, tensor: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, S, D), filling zero."""
        if self.in_place:
            return tensor
        result: Tensor = _Move.apply(tensor, self.index, self.slot, self.filling, True)
        return result

    def collect(self, tensor: Tensor) -> Tensor:
        """(B, H, S, D) to (B, H, N, D), the inverse of `spread`."""
        if self.in_place:
            return tensor
        result: Tensor = _Move.apply(tensor, self.slot, self.index, self.filling, False)
        return result

    def means(self, spread: Tensor) -> Tensor:
        """Mean over the tokens of each tile: (B, H, S, D), filling zero, to (B, H, C, D).

        float64 for float64, float32 for everything else.
        """
        sums = spread.unflatten(2, (-1, self.slots)).sum(3, dtype=accumulation_dtype(spread))
        return sums / self.lengths[:, None]


class _Move(torch.autograd.Function):
    """tensor[:, :, source] with zeros in the slots `filling`, which are on one of the two sides.

    Its backward is a gather too: nothing is added up, in any order.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, source: Tensor, back: Tensor, filling: Tensor, fill: bool
    ) -> Tensor:
        ctx.save_for_backward(back, filling)
        ctx.fill = fill
        result = tensor.index_select(2, source)
        if not fill or not filling.shape[0]:
            return result
        # In place, the compiler of PyTorch 2.11 would give the input a gradient of zero.
        if torch.compiler.is_compiling():
            return result.index_fill(2, filling, 0.0)
        return result.index_fill_(2, filling, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back, filling = ctx.saved_tensors
        grad = grads[0].index_select(2, back)
        if not ctx.fill:
            grad = grad.index_fill(2, filling, 0.0)
        return grad, None, None, None, None


def tile_blocks(grid: Grid, tile: Grid, order: Grid | None, block: int, like: Tensor) -> TileBlocks:
    """The tiles of a grid as blocks. Tensors are kept for the next call; not to be written to.

    Args:
        grid: (frames, height, width).
        tile: size of a tile; cut to the grid where it is larger.
        order: `AttentionContext.tile`, the order in which the tokens come.
        block: slots in a block.
        like: a tensor of the device on which to work.
    """
    tile = (min(tile[0], grid[0]), min(tile[1], grid[1]), min(tile[2], grid[2]))
    # Tensors made for a compiler, or while a CUDA graph is recorded, hold no numbers to keep.
    if (
        torch.compiler.is_compiling()
        or type(like) not in (Tensor, nn.Parameter)
        or (like.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return _tile_blocks(grid, tile, order, block, like.device)
    return _kept_tile_blocks(grid, tile, order, block, like.device)


@lru_cache(maxsize=64)
def _kept_tile_blocks(
    grid: Grid, tile: Grid, order: Grid | None, block: int, device: torch.device
) -> TileBlocks:
    # An inference tensor could never be an index of a pass with gradients.
    with torch.inference_mode(False):
        return _tile_blocks(grid, tile, order, block, device)


def _tile_blocks(
    grid: Grid, tile: Grid, order: Grid | None, block: int, device: torch.device
) -> TileBlocks:
    tokens, tiles = tokens_of(grid), math.prod(tile_shape(grid, tile))
    slots = math.ceil(tokens_of(tile) / block) * block
    frames, rows, columns = (
        (size - torch.arange(0, size, step, device=device)).clamp(max=step)
        for size, step in zip(grid, tile, strict=True)
    )
    lengths = (frames[:, None, None] * rows[:, None] * columns).flatten()
    # Tokens by tiles: which they are in raster order, of which tile, and in which slot.
    raster = tile_order(grid, tile, device)
    of_token = tile_index(grid, tile, device)[raster]
    first = lengths.cumsum(0) - lengths
    places = of_token * slots + torch.arange(tokens, device=device) - first[of_token]
    come = raster if order is None else raster_order(grid, order, device)[raster]

    slot, tile_of_token = torch.empty_like(come), torch.empty_like(come)
    slot[come] = places
    tile_of_token[come] = of_token
    index = torch.zeros(tiles * slots, dtype=torch.int64, device=device)
    index[places] = come
    real = torch.zeros(tiles * slots, dtype=torch.int8, device=device)
    real[places] = 1
    empty = tiles * slots - tokens
    in_blocks = tokens_in_blocks(lengths, slots, block)
    return TileBlocks(
        index=index,
        slot=slot,
        # Not nonzero(), which would wait for the device: how many there are is known.
        filling=real.argsort(stable=True)[:empty],
        tile=tile_of_token,
        lengths=lengths,
        block_lengths=in_blocks.flatten().to(torch.int32),
        slots=slots,
        in_place=empty == 0 and _same_order(grid, tile, order),
    )


def _same_order(grid: Grid, tile: Grid, order: Grid | None) -> bool:
    """Whether tokens that come in `order` are already tile after tile."""

    def is_raster(size: Grid) -> bool:
        whole_rows = size[2] >= grid[2]
        whole_frames = whole_rows and size[1] >= grid[1]
        return whole_frames or (size[0] == 1 and (whole_rows or size[1] == 1))

    if order is None or is_raster(order):
        return is_raster(tile)
    return tuple(min(size, most) for size, most in zip(order, grid, strict=True)) == tile


def grid_reason(query: Tensor, context: AttentionContext) -> str | None:
    """Why tiles of the latent grid cannot be made of the query's tokens, or None."""
    if context.grid is None:
        return "the context has no grid, whose tiles it works on"
    if context.always_critical:
        return (
            f"{context.always_critical} leading tokens must always be attended to, "
            "but they are not in the grid, whose tiles it works on"
        )
    if tokens_of(context.grid) != query.shape[2]:
        return (
            f"{query.shape[2]} tokens, but a grid of {' x '.join(map(str, context.grid))} = "
            f"{tokens_of(context.grid)}"
        )
    return None


def check_grid(method: AttentionMethod, query: Tensor, context: AttentionContext) -> None:
    """Refuse what has a `grid_reason`.

    Raises:
        UnsupportedAttentionError: there is one.
    """
    reason = grid_reason(query, context)
    if reason is not None:
        raise UnsupportedAttentionError(f"attention {method.config.name!r}: {reason}")


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """In the dtype that the kernels take under autocast, for who copies them before."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
