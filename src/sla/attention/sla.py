"""SLA: Sparse-Linear Attention, the paper's method (arXiv 2509.24006, Section 4)."""

from __future__ import annotations

from sla_kernels import sparse_linear_attention
from torch import Tensor

from sla.attention.config import SLAConfig
from sla.attention.feature_maps import FeatureMap
from sla.attention.interface import AttentionContext, Grid, Projection, tokens_of
from sla.attention.registry import register_attention
from sla.attention.sparse_only import BlockSparseAttention


@register_attention("sla", SLAConfig)
class SLAAttention(BlockSparseAttention):
    """O = O^s + Proj(O^l) (equation 6): three classes of blocks, two branches.

    Critical blocks get exact attention, marginal ones linear attention, negligible ones nothing.
    `proj_l` keeps the name that every public checkpoint gives the projection.
    """

    config: SLAConfig

    def __init__(
        self, config: SLAConfig, num_heads: int, head_dim: int, dim: int, layer_index: int
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        self.feature_map = FeatureMap(config.feature_map, head_dim)
        self.proj_l = Projection(head_dim, config.proj_init)

    @property
    def negligible(self) -> float:
        return self.config.negligible

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        return sparse_linear_attention(
            query,
            key,
            value,
            self.proj_l.weight.to(query.dtype),
            self.proj_l.bias.to(query.dtype),
            critical=self.config.critical,
            negligible=self.config.negligible,
            block_q=self.config.block_q,
            block_kv=self.config.block_kv,
            feature_map=self.feature_map.argument,
            always_critical=context.always_critical,
            backend=self.config.backend,
        )

    def flops(self, grid: Grid) -> float:
        """Sparse branch and routing, plus the linear branch: 2 N F D each for the block sums
        phi(K_j)^T V_j and for phi(Q_i) H_i, 2 T_m T_n F D for H = M h as a matrix product, and
        2 N D^2 for Proj; F is the width of the feature map."""
        t_m, t_n, _ = self.blocks(grid)
        tokens, width = tokens_of(grid), self.feature_map.width
        linear = (4.0 * tokens + 2.0 * t_m * t_n) * width * self.head_dim
        proj = 2.0 * tokens * self.head_dim**2
        return super().flops(grid) + self.num_heads * (linear + proj)
