"""SLA: Sparse-Linear Attention, the paper's method (arXiv 2509.24006, Section 4)."""

from __future__ import annotations

from sla_kernels import linear_attention, sparse_attention, sparse_linear_attention
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

    With `linear_scope: all`, as in the authors' later public code (thu-ml/SLA, TurboDiffusion), the
    linear branch is one sum over all keys for all rows, critical blocks included, and no block is
    skipped. `block_map` then labels all that is not critical marginal.

    Raises:
        ValueError: a number or a name of the config is out of range.
    """

    config: SLAConfig

    def __init__(
        self, config: SLAConfig, num_heads: int, head_dim: int, dim: int, layer_index: int
    ) -> None:
        if config.linear_scope not in ("marginal", "all"):
            raise ValueError(
                f"attention.linear_scope is {config.linear_scope!r}; it must be 'marginal' or 'all'"
            )
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        self.feature_map = FeatureMap(config.feature_map, head_dim)
        self.proj_l = Projection(head_dim, config.proj_init)

    @property
    def negligible(self) -> float:
        """Fraction of the key blocks of a row that are skipped: none if all keys are in scope."""
        return self.config.negligible if self.config.linear_scope == "marginal" else 0.0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        if self.config.linear_scope == "all":
            return self._attend_to_all(query, key, value, context)
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

    def _attend_to_all(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        # Not the fused operator: its linear branch is masked by the block map.
        block_map = self.block_map(query, key, context)
        backend = self.config.backend
        sparse = sparse_attention(query, key, value, block_map, backend=backend)
        feature_map = self.feature_map.argument
        linear = linear_attention(query, key, value, feature_map=feature_map, backend=backend)
        return sparse + self.proj_l(linear)

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Sparse branch and routing, plus the linear branch: 2 N F D each for phi(K)^T V and for
        phi(Q) H, 2 T_m T_n F D for H = M h as a matrix product (only if the scope is `marginal`:
        otherwise all rows share one H), and 2 N D^2 for Proj; F is the width of the feature map."""
        t_m, t_n, _ = self.blocks(grid)
        tokens, width = tokens_of(grid), self.feature_map.width
        masked = 2.0 * t_m * t_n if self.config.linear_scope == "marginal" else 0.0
        linear = (4.0 * tokens + masked) * width * self.head_dim
        proj = 2.0 * tokens * self.head_dim**2
        return super().flops(grid, density) + self.num_heads * (linear + proj)
