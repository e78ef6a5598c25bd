"""Linear plus sparse: two outputs added, the "L+S" row of the paper's Table 2."""

from __future__ import annotations

from sla_kernels import linear_attention, sparse_attention
from torch import Tensor

from sla.attention.config import LinearPlusSparseConfig
from sla.attention.feature_maps import FeatureMap
from sla.attention.interface import AttentionContext, Grid, tokens_of
from sla.attention.registry import register_attention
from sla.attention.sparse_only import BlockSparseAttention


@register_attention("linear_plus_sparse", LinearPlusSparseConfig)
class LinearPlusSparseAttention(BlockSparseAttention):
    """The outputs of `linear_only` and `sparse_only` added (arXiv 2509.24006, Table 2).

    The linear part has no Proj and no mask: it runs over all keys, those of critical blocks too.
    So the method is not exact attention at any density. `block_map` labels a block marginal where
    the linear part alone attends it; none is negligible.
    """

    config: LinearPlusSparseConfig

    def __init__(
        self,
        config: LinearPlusSparseConfig,
        num_heads: int,
        head_dim: int,
        dim: int,
        layer_index: int,
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        self.feature_map = FeatureMap(config.feature_map, head_dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        block_map = self.block_map(query, key, context)
        backend = self.config.backend
        sparse = sparse_attention(query, key, value, block_map, backend=backend)
        feature_map = self.feature_map.argument
        linear = linear_attention(query, key, value, feature_map=feature_map, backend=backend)
        return sparse + linear

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Sparse branch and routing, plus 4 N F D for the linear part, F the width of the feature
        map."""
        linear = 4.0 * tokens_of(grid) * self.feature_map.width * self.head_dim
        return super().flops(grid, density) + self.num_heads * linear
