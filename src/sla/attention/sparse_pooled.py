"""Sparse pooled: SLA's routing, and one pooled key and value for each block that is not critical.

Not of the SLA papers. O^s + Proj(O^l) leaves O^s normalised over the critical blocks alone, however
little of the attention they hold; here all blocks are in one softmax, and what is left out is only
how the keys of a block differ. The same idea without fine-tuning: Multipole Attention (arXiv
2506.13059), PISA (arXiv 2602.01077).
"""

from __future__ import annotations

from sla_kernels import sparse_pooled_attention
from torch import Tensor

from sla.attention.config import SparsePooledConfig
from sla.attention.interface import AttentionContext, Grid, tokens_of
from sla.attention.registry import register_attention
from sla.attention.sparse_only import BlockSparseAttention


@register_attention("sparse_pooled", SparsePooledConfig)
class SparsePooledAttention(BlockSparseAttention):
    """Exact attention over the critical blocks; every other one is its mean, in the same softmax.

    With n_b keys in block b, and k_b and v_b the means of its keys and values,

        O = (sum_j exp(q k_j) v_j + sum_b n_b exp(q k_b) v_b) / (the same with ones for the values)

    over the critical keys j and the other blocks b. Nothing is learned and no block is skipped;
    with every block critical it is exact attention.
    """

    config: SparsePooledConfig

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        block_map = self.block_map(query, key, context)
        return sparse_pooled_attention(query, key, value, block_map, backend=self.config.backend)

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Sparse branch and routing, plus 4 N T_n D for the pooled keys and values, which every
        query meets whether they count for it or not."""
        _, t_n, _ = self.blocks(grid)
        pooled = 4.0 * tokens_of(grid) * t_n * self.head_dim
        return super().flops(grid, density) + self.num_heads * pooled
