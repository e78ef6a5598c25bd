"""VSA: Video Sparse Attention over 3D cubes (arXiv 2505.13389).

Shape letters as in `tile_blocks`.
"""

from __future__ import annotations

import math

import torch
from sla_kernels import BlockMap, sparse_attention
from sla_kernels.block_map import block_counts
from torch import Tensor, nn

from sla.attention.config import VSAConfig
from sla.attention.interface import (
    AttentionContext,
    AttentionMethod,
    Float32Parameters,
    Grid,
    tokens_of,
)
from sla.attention.registry import register_attention
from sla.attention.tile_blocks import (
    TileBlocks,
    check_grid,
    grid_reason,
    in_autocast_dtype,
    tile_blocks,
)
from sla.attention.token_order import tile_shape


class Gate(Float32Parameters):
    """A gate from the hidden states: x W^T + b, zero at the start; no activation.

    Unlike other learned parts, it has a head axis, as in the paper: rows are (heads, head_dim).

    Args:
        dim: width of the hidden states.
        num_heads, head_dim: H, D.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.zeros(num_heads * head_dim, dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))

    def forward(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N, dim) to (B, H, N, D), both the product and the result in `dtype`."""
        gate = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return gate.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@register_attention("vsa", VSAConfig)
class VSAAttention(AttentionMethod):
    """O = G_c * O_c + G_f * O_f: a coarse branch over cubes and a fine one over chosen tokens.

    Coarse: dense softmax attention over cubes, each the mean of its tokens' queries, keys and
    values; every token of a cube gets the cube's output. Fine: exact attention of a cube's queries
    to the keys of the cubes with its highest coarse scores. The gates are linear in the layer's
    hidden states. As where the paper turns a pretrained model sparse (Section 2.3), and always in
    its released code (FastVideo), G_f is one; G_c starts at zero, so the start is the fine branch
    alone. `fine_gate: learned` is the paper's general form with both gates, here
    G_f = 1 + x W^T + b, still one at the start.

    `to_gate_compress` keeps the name that FastVideo's checkpoints give the coarse gate.

    Raises:
        ValueError: a number of the config is out of range.
    """

    config: VSAConfig

    def __init__(
        self, config: VSAConfig, num_heads: int, head_dim: int, dim: int, layer_index: int
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        if not 0.0 < config.critical <= 1.0:
            raise ValueError(f"attention.critical is {config.critical}; it must be in (0, 1]")
        if config.fine_gate not in ("fixed", "learned"):
            raise ValueError(
                f"attention.fine_gate is {config.fine_gate!r}; it must be 'fixed' or 'learned'"
            )
        self.to_gate_compress = Gate(dim, num_heads, head_dim)
        self.to_gate_fine = (
            Gate(dim, num_heads, head_dim) if config.fine_gate == "learned" else None
        )

    def unsupported_reason(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> str | None:
        reason = super().unsupported_reason(query, key, value, context)
        reason = reason or grid_reason(query, context)
        if reason is not None:
            return reason
        wanted = (query.shape[0], query.shape[2], self.dim)
        if context.hidden_states is None:
            return "the context has no hidden_states, which its gates are made of"
        if tuple(context.hidden_states.shape) != wanted:
            return (
                f"hidden_states has shape {tuple(context.hidden_states.shape)}, "
                f"its gates need {wanted}"
            )
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        blocks = self._blocks(query, context)
        query, key, value = (blocks.spread(t) for t in in_autocast_dtype(query, key, value))
        scores = self._scores(blocks, query, key)
        block_map = self._map(blocks, scores)
        fine = sparse_attention(query, key, value, block_map, backend=self.config.backend)
        with torch.autocast(query.device.type, enabled=False):
            pooled = scores.softmax(-1) @ blocks.means(value)
        pooled = pooled.to(fine.dtype).unsqueeze(3)
        coarse = pooled.expand(-1, -1, -1, blocks.slots, -1).flatten(2, 3)
        fine, coarse = blocks.collect(fine), blocks.collect(coarse)
        hidden = context.hidden_states
        assert hidden is not None
        if self.to_gate_fine is not None:
            fine = fine + self.to_gate_fine(hidden, fine.dtype) * fine
        return fine + self.to_gate_compress(hidden, fine.dtype) * coarse

    def _blocks(self, query: Tensor, context: AttentionContext) -> TileBlocks:
        assert context.grid is not None
        cube = self.config.cube
        return tile_blocks(context.grid, cube, context.tile, self.config.block, query)

    def _scores(self, blocks: TileBlocks, query: Tensor, key: Tensor) -> Tensor:
        """Scaled scores of the cubes, (B, H, C, C), from the tokens in their slots."""
        with torch.autocast(query.device.type, enabled=False):
            means = blocks.means(query) / math.sqrt(self.head_dim), blocks.means(key)
            return means[0] @ means[1].transpose(-1, -2)

    @torch.no_grad()
    def _map(self, blocks: TileBlocks, scores: Tensor) -> BlockMap:
        """Each row's cubes of the highest scores; the lower index first among equals."""
        cubes = scores.shape[-1]
        chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., : self._chosen(cubes)]
        labels = torch.full(scores.shape, -1, dtype=torch.int8, device=scores.device)
        labels.scatter_(-1, chosen, 1)
        slots, lengths = blocks.slots, blocks.block_lengths
        filled = len(blocks.filling) > 0
        tokens = cubes * slots
        return BlockMap(
            labels, slots, slots, tokens, tokens, block_lengths=lengths if filled else None
        )

    @torch.no_grad()
    def block_map(self, query: Tensor, key: Tensor, context: AttentionContext) -> BlockMap:
        """The fine branch's map: block i is cube i of the grid, in raster order of the cubes.

        Cubes at the far ends count as blocks of full size, with their keys in `block_lengths`.

        Raises:
            UnsupportedAttentionError: the grid does not fit the tokens.
        """
        check_grid(self, query, context)
        blocks = self._blocks(query, context)
        return self._map(blocks, self._scores(blocks, blocks.spread(query), blocks.spread(key)))

    def exact_fraction(self, query: Tensor, key: Tensor, context: AttentionContext) -> float:
        critical = self.block_map(query, key, context).labels == 1
        lengths = self._blocks(query, context).lengths.double()
        scores = torch.einsum("bhmn,m,n->", critical.double(), lengths, lengths)
        return scores.item() / (critical.shape[0] * critical.shape[1] * query.shape[2] ** 2)

    def _chosen(self, cubes: int) -> int:
        return block_counts(self.config.critical, 0.0, cubes)[0]

    def density(self, grid: Grid) -> float:
        """Of the cubes. By tokens, where cubes at the far ends are smaller, it depends on which
        are chosen: `exact_fraction`."""
        cubes = math.prod(tile_shape(grid, self.config.cube))
        return self._chosen(cubes) / cubes

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Exact attention on the chosen cubes, 4 C^2 D per head for the coarse branch, whose scores
        are the routing too, and 2 N dim H D for each gate."""
        tokens, cubes = tokens_of(grid), math.prod(tile_shape(grid, self.config.cube))
        exact = 4.0 * tokens**2 * self.head_dim * self._density(grid, density)
        coarse = 4.0 * cubes**2 * self.head_dim
        gates = 1 if self.to_gate_fine is None else 2
        gate = 2.0 * tokens * self.dim * self.head_dim
        return self.num_heads * (exact + coarse + gates * gate)
