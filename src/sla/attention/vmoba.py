"""VMoBA: Video Mixture of Block Attention (arXiv 2506.23858).

Shape letters: B batch, H heads, N tokens, D head_dim, C key blocks (tiles of the latent grid),
S slots of the keys: the tiles one after the other, each filled up to whole kernel blocks;
P chosen pairs of a query and a key block; V virtual queries of a head: its pairs by key block, the
queries of each filled up to whole kernel blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sla_kernels import BlockMap, sparse_attention
from torch import Tensor

from sla.attention.config import VMoBAConfig
from sla.attention.interface import AttentionContext, AttentionMethod, Grid, tokens_of
from sla.attention.registry import register_attention
from sla.attention.tile_blocks import (
    TileBlocks,
    check_grid,
    grid_reason,
    in_autocast_dtype,
    tile_blocks,
)
from sla.attention.token_order import tile_shape

# Numbers in the largest temporary when outputs are merged.
_CHUNK = 2**25
# Queries between two looks at how many pairs a query has.
_STRIDE = 1024


@register_attention("vmoba", VMoBAConfig)
class VMoBAAttention(AttentionMethod):
    """Each query attends exactly to the key blocks that it has picked.

    Partition (equation 1): by layer_index mod 3 blocks of frames (1D), of places in all frames
    (2D), or of both (3D). Selection, per head (equations 3 and 4): similarities of all queries with
    the mean keys of all blocks, from the highest on, until the chosen ones hold the share tau of
    the sum of all. The paper does not say how similarities become non-negative; its code shifts and
    scales a head's to [0, 1] by their least and greatest, and so does this. As in the code, and
    unlike the equations, the block that a query lies in is always chosen, first, and counts: every
    query has a block.

    What the paper does around it is the caller's: full attention in the first 25 % of the sampling
    steps.

    Execution: every pair is a virtual query. They are sorted by key block, so that 64 of them share
    their keys, computed by the block-sparse kernels, and a query's outputs merged by their
    log-sum-exps. To size them, the host waits for the device once. `torch.compile` leaves all of it
    as it is: sizes and loops depend on the choice, and would be compiled anew in every step.

    Raises:
        ValueError: a number of the config is out of range.
    """

    config: VMoBAConfig

    def __init__(
        self, config: VMoBAConfig, num_heads: int, head_dim: int, dim: int, layer_index: int
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        if config.selection not in ("threshold", "density"):
            raise ValueError(
                f"attention.selection is {config.selection!r}; it must be 'threshold' or 'density'"
            )
        if not 0.0 <= config.threshold <= 1.0:
            raise ValueError(f"attention.threshold is {config.threshold}; it must be in [0, 1]")
        if not 0.0 < config.critical <= 1.0:
            raise ValueError(f"attention.critical is {config.critical}; it must be in (0, 1]")

    def unsupported_reason(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> str | None:
        reason = super().unsupported_reason(query, key, value, context)
        return reason or grid_reason(query, context)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        query, key, value = in_autocast_dtype(query, key, value)
        with torch.autocast(query.device.type, enabled=False):
            blocks = self._blocks(query, context)
            keys = blocks.spread(key)
            pairs = _pairs(self._select(query, keys, blocks), self.config.block_q)
            block_map = self._map(pairs, blocks)
            queries: Tensor = _Repeat.apply(query, pairs)
            outputs, lse = sparse_attention(
                queries,
                keys,
                blocks.spread(value),
                block_map,
                backend=self.config.backend,
                return_lse=True,
            )
            merged: Tensor = _Merge.apply(outputs, lse, pairs)
            return merged

    def tile(self, grid: Grid) -> Grid:
        """Size of this layer's key blocks, in frames, rows and columns."""
        frames, height, width = grid
        partition = self.layer_index % 3
        if partition == 0:
            return self.config.temporal, height, width
        if partition == 1:
            return frames, *self.config.spatial
        return self.config.spatio_temporal

    def _blocks(self, query: Tensor, context: AttentionContext) -> TileBlocks:
        grid = context.grid
        assert grid is not None
        return tile_blocks(grid, self.tile(grid), context.tile, self.config.block_kv, query)

    @torch.no_grad()
    def _select(self, query: Tensor, keys: Tensor, blocks: TileBlocks) -> Tensor:
        """The chosen pairs, bool (B, H, C, N), from the keys in their slots."""
        tiles, tokens = len(blocks.lengths), query.shape[2]
        threshold = self.config.selection == "threshold"
        if (self.config.threshold if threshold else self.config.critical) == 1.0:
            return query.new_ones((*query.shape[:2], tiles, tokens), dtype=torch.bool)
        means = blocks.means(keys)
        # In float32 also for float64: `_take` compares the bits.
        similarity = (means @ query.to(means.dtype).transpose(-1, -2)).float()
        lowest, highest = similarity.flatten(2).aminmax(dim=-1)
        spread = (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)[..., None, None]
        similarity = (similarity - lowest[..., None, None]) / spread
        own = torch.arange(tiles, device=query.device)[:, None] == blocks.tile
        if threshold:
            total = similarity.sum((-2, -1), dtype=torch.float64)
            held = (similarity * own).sum((-2, -1), dtype=torch.float64)
            amounts = similarity
            budget = self.config.threshold * total - held
        else:
            # Queries of a tile hold all its keys.
            held = blocks.lengths.double().square().sum()
            amounts = blocks.lengths.float()[:, None]
            budget = (self.config.critical * tokens**2 - held).expand(similarity.shape[:2])
        # -1 comes after every similarity; nothing is held by what is chosen already.
        ranked = similarity.masked_fill(own, -1.0)
        return own | _take(ranked, amounts, budget, reach=threshold)

    @torch.no_grad()
    def _map(self, pairs: _Pairs, blocks: TileBlocks) -> BlockMap:
        """Row of virtual queries by row, the kernel blocks of its one key block."""
        batch, heads, tiles = pairs.counts.shape
        block_q, block_kv = self.config.block_q, self.config.block_kv
        rows, per_tile = pairs.virtual // block_q, blocks.slots // block_kv
        device = pairs.counts.device
        ends = ((pairs.counts + block_q - 1) // block_q).cumsum(-1)
        row = torch.arange(rows, device=device).expand(batch, heads, rows).contiguous()
        # Rows that the head has no pairs for are past its last tile.
        tile = torch.searchsorted(ends, row, right=True)
        used, tile = tile < tiles, tile.clamp(max=tiles - 1)
        in_tile = torch.where(used, (blocks.lengths[tile] + block_kv - 1) // block_kv, 0)
        block = torch.arange(tiles * per_tile, device=device)
        critical = (block // per_tile == tile[..., None]) & (block % per_tile < in_tile[..., None])
        table = tile[..., None] * per_tile + torch.arange(per_tile, device=device)
        return BlockMap(
            critical.to(torch.int8) * 2 - 1,
            block_q,
            block_kv,
            pairs.virtual,
            tiles * blocks.slots,
            row_table=(table.to(torch.int32), in_tile.to(torch.int32)),
            block_lengths=blocks.block_lengths if len(blocks.filling) else None,
        )

    @torch.no_grad()
    def selected(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        """The chosen pairs, bool (B, H, C, N): whether the query attends to the key block.

        Key blocks are the tiles of the grid of size `tile(grid)`, in raster order of the tiles.

        Raises:
            UnsupportedAttentionError: the grid does not fit the tokens.
        """
        check_grid(self, query, context)
        with torch.autocast(query.device.type, enabled=False):
            blocks = self._blocks(query, context)
            return self._select(query, blocks.spread(key), blocks)

    def exact_fraction(self, query: Tensor, key: Tensor, context: AttentionContext) -> float:
        """There is no map of blocks by blocks: queries pick one by one (`selected`)."""
        chosen = self.selected(query, key, context).sum((0, 1, 3))
        lengths = self._blocks(query, context).lengths
        batch, heads, tokens, _ = query.shape
        return (chosen * lengths).sum().item() / (batch * heads * tokens**2)

    def density(self, grid: Grid) -> float | None:
        """None for `threshold`; for `density` what is asked for, to within one pair, or what the
        queries' own blocks hold where that is more."""
        if self.config.selection == "threshold":
            return 1.0 if self.config.threshold == 1.0 else None
        own = 1.0
        for size, step in zip(grid, self.tile(grid), strict=True):
            lengths = [min(step, size - start) for start in range(0, size, step)]
            own *= sum(length**2 for length in lengths) / size**2
        return max(own, self.config.critical)

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Exact attention on the chosen pairs, 2 N C D per head for the similarities, and 2 D for
        each pair to merge: density N C of them, if blocks are of one size."""
        tokens = tokens_of(grid)
        frames, rows, columns = tile_shape(grid, self.tile(grid))
        found = self._density(grid, density)
        exact = 4.0 * tokens**2 * self.head_dim * found
        each = 2.0 * tokens * (frames * rows * columns) * self.head_dim
        return self.num_heads * (exact + each * (1.0 + found))


def _take(ranked: Tensor, amounts: Tensor, budget: Tensor, *, reach: bool) -> Tensor:
    """The first of the ranking, up to a budget of their amounts.

    The cut is found by bisection on the bits of the ranked numbers, which are ordered as the
    numbers are: a sort of all pairs would take longer than the attention.

    Args:
        ranked: float32 (B, H, C, N): highest first, of equals the lower index (of C, then of N)
            first; each in [0, 1], or negative: never taken.
        amounts: float32, not negative: as `ranked`, or (..., C, 1) where a key block's are alike;
            these take a third of the memory traffic.
        budget: float64 (B, H).
        reach: take until the sum reaches the budget; else until it would pass it.

    Returns:
        bool (B, H, C, N).
    """
    bits = ranked.contiguous().view(torch.int32)
    budget = budget[..., None, None]
    counted = amounts.shape[-1] == 1

    def enough(amount: Tensor) -> Tensor:
        return amount >= budget if reach else amount > budget

    def by_block(these: Tensor) -> Tensor:
        """The amounts of these, summed over the queries: float64 (B, H, C, 1)."""
        if counted:
            return these.sum(-1, keepdim=True) * amounts.double()
        return torch.where(these, amounts, 0.0).sum(-1, keepdim=True, dtype=torch.float64)

    def held(cut: Tensor) -> Tensor:
        """The amount of all at or above the cut."""
        return by_block(bits >= cut).sum(-2, keepdim=True)

    # The highest cut that holds enough; if not even all do, all are taken.
    low = torch.zeros(budget.shape, dtype=torch.int32, device=bits.device)
    high = torch.full_like(low, _ONE + 1)
    everything = ~enough(held(low))
    for _ in range(_ONE.bit_length()):
        middle = (low + high) // 2
        found = enough(held(middle))
        low, high = torch.where(found, middle, low), torch.where(found, high, middle)
    # What ranks at the cut itself is taken in order of its index.
    equal = bits == low
    blocks = by_block(equal)
    before = held(low + 1) + blocks.cumsum(-2) - blocks
    here = torch.where(equal, amounts, 0.0)
    running = before + here.cumsum(-1, dtype=torch.float64)
    fits = running - here < budget if reach else running <= budget
    chosen = (bits > low) | (equal & fits)
    chosen = torch.where(everything, bits >= 0, chosen)
    # With nothing left to spend the cut is above all.
    return chosen & ((budget > 0) if reach else (budget >= 0))


_ONE = 0x3F800000  # the bits of 1.0


@dataclass(frozen=True)
class _Pairs:
    """The chosen pairs as virtual queries. Flat indices run over all samples and heads.

    Attributes:
        shape: (B, H, N).
        virtual: V.
        counts: int64 (B, H, C): pairs of each key block.
        query_of: int64 (B H V,): flat query of each virtual query; its head's first for filling.
        real: bool (B H V,): no filling.
        slots: int64 (P,): flat virtual queries of the pairs by query, those of query q in
            slots[first[q] : first[q] + number[q]].
        first, number: int64 (B H N,).
        order: int64 (B H N,): queries from the most pairs to the fewest.
        longest: pairs of every `_STRIDE`-th query of `order`.
    """

    shape: tuple[int, int, int]
    virtual: int
    counts: Tensor
    query_of: Tensor
    real: Tensor
    slots: Tensor
    first: Tensor
    number: Tensor
    order: Tensor
    longest: list[int]

    def chunks(self, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries in groups of bounded size, like numbers of pairs together.

        Yields:
            flat queries (n,), their virtual queries (n, w), and which of these are real.
        """
        last = self.slots.shape[0] - 1
        start = 0
        while start < len(self.longest):
            most = self.longest[start]
            stop = start + max(1, _CHUNK // (most * width * _STRIDE))
            queries = self.order[start * _STRIDE : stop * _STRIDE]
            column = torch.arange(most, device=queries.device)
            real = column < self.number[queries, None]
            place = (self.first[queries, None] + column).clamp(max=last)
            yield queries, self.slots[place], real
            start = stop


@torch.no_grad()
def _pairs(chosen: Tensor, block_q: int) -> _Pairs:
    """Lay out the chosen pairs, bool (B, H, C, N); at least one of every query."""
    batch, heads, tiles, tokens = chosen.shape
    device = chosen.device
    counts = chosen.sum(-1)
    padded = (counts + block_q - 1) // block_q * block_q
    number = chosen.sum(2).flatten()
    order = number.argsort(descending=True, stable=True)
    # The one wait for the device.
    sizes = torch.cat(
        [padded.sum(-1).max().view(1), number.sum().view(1), number[order[::_STRIDE]]]
    )
    virtual, total, *longest = sizes.tolist()

    head = torch.arange(batch * heads, device=device)
    start = head.view(batch, heads, 1) * virtual + padded.cumsum(-1) - padded
    pair = torch.nonzero_static(chosen.flatten(), size=total).flatten()  # by head and key block
    group = pair // tokens
    query = group // tiles * tokens + pair % tokens
    flat_counts = counts.flatten()
    rank = torch.arange(total, device=device) - (flat_counts.cumsum(0) - flat_counts)[group]
    slot = start.flatten()[group] + rank

    query_of = (head * tokens).repeat_interleave(virtual)
    query_of[slot] = query
    real = torch.zeros(batch * heads * virtual, dtype=torch.bool, device=device)
    real[slot] = True
    # Of a query's pairs, this one is number `turn`.
    turn = chosen.cumsum(2, dtype=torch.int32).flatten()[pair] - 1
    first = number.cumsum(0) - number
    slots = torch.empty_like(slot)
    slots[first[query] + turn] = slot
    return _Pairs(
        (batch, heads, tokens),
        virtual,
        counts,
        query_of,
        real,
        slots,
        first,
        number,
        order,
        longest,
    )


class _Repeat(torch.autograd.Function):
    """(B, H, N, D) to the virtual queries (B, H, V, D).

    The backward sums a query's gradients one group of queries after the other, in float32 and in
    one order: no atomic additions, the same bits every time.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, pairs: _Pairs) -> Tensor:
        ctx.pairs = pairs
        batch, heads, _ = pairs.shape
        rows = query.reshape(-1, query.shape[-1])
        return rows.index_select(0, pairs.query_of).view(batch, heads, pairs.virtual, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pairs, grad = ctx.pairs, grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        result = rows.new_empty((pairs.number.shape[0], grad.shape[-1]))
        for queries, slots, real in pairs.chunks(grad.shape[-1]):
            accurate = torch.promote_types(rows.dtype, torch.float32)
            weights = real.to(accurate)[:, None]
            result[queries] = (weights @ rows[slots].to(accurate)).squeeze(1).to(rows.dtype)
        return result.view(*pairs.shape, -1), None


class _Merge(torch.autograd.Function):
    """O = sum_i exp(L_i - L) O_i over a query's virtual queries i, L = logsumexp_i(L_i).

    (B, H, V, D) and (B, H, V) to (B, H, N, D). Sums as in the backward of `_Repeat`.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, lse: Tensor, pairs: _Pairs) -> Tensor:
        width = outputs.shape[-1]
        rows, row_lse = outputs.reshape(-1, width), lse.flatten()
        result = rows.new_empty((pairs.number.shape[0], width))
        total = row_lse.new_empty(pairs.number.shape[0])
        for queries, slots, real in pairs.chunks(width):
            parts = row_lse[slots].masked_fill(~real, -torch.inf)
            total[queries] = parts.logsumexp(-1)
            weights = parts.softmax(-1)[:, None]
            result[queries] = (weights @ rows[slots].to(weights.dtype)).squeeze(1).to(rows.dtype)
        ctx.save_for_backward(outputs, lse, result, total)
        ctx.pairs = pairs
        return result.view(*pairs.shape, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outputs, lse, result, total = ctx.saved_tensors
        width, virtual = outputs.shape[-1], ctx.pairs.virtual
        rows, row_lse = outputs.reshape(-1, width), lse.flatten()
        grad = grads[0].reshape(-1, width)
        d_rows, d_lse = torch.empty_like(rows), torch.empty_like(row_lse)
        shared = (grad.to(total.dtype) * result).sum(-1)  # dO . O
        # dO_i = w_i dO and dL_i = w_i dO (O_i - O), w_i = exp(L_i - L), zero for filling. A few
        # heads at a time: these are large, and twice as large in float32.
        step = virtual * max(1, _CHUNK // (virtual * width))
        for start in range(0, len(rows), step):
            heads = slice(start, start + step)
            query = ctx.pairs.query_of[heads]
            weights = (row_lse[heads] - total[query]).exp()
            weights = weights.masked_fill(~ctx.pairs.real[heads], 0.0)
            parts = grad[query].to(weights.dtype)
            d_lse[heads] = weights * ((parts * rows[heads]).sum(-1) - shared[query])
            torch.mul(parts, weights[:, None], out=d_rows[heads])
        return d_rows.view_as(outputs), d_lse.view_as(lse), None
