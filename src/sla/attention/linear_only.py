"""Linear only: linear attention over all keys, the "Linear only" row of the paper's Table 2."""

from __future__ import annotations

from sla_kernels import linear_attention
from torch import Tensor

from sla.attention.config import LinearOnlyConfig
from sla.attention.feature_maps import FeatureMap
from sla.attention.interface import AttentionContext, AttentionMethod, Grid, tokens_of
from sla.attention.registry import register_attention


@register_attention("linear_only", LinearOnlyConfig)
class LinearOnlyAttention(AttentionMethod):
    """phi(Q) (phi(K)^T V) / (phi(Q) sum_j phi(K_j))."""

    config: LinearOnlyConfig

    def __init__(
        self,
        config: LinearOnlyConfig,
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
        return linear_attention(query, key, value, feature_map=self.feature_map.argument)

    def density(self, grid: Grid) -> float:
        return 0.0

    def exact_fraction(self, query: Tensor, key: Tensor, context: AttentionContext) -> float:
        return 0.0

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """2 N F D for phi(K)^T V and as much for phi(Q) H, F the width of the feature map."""
        width = self.feature_map.width
        return 4.0 * self.num_heads * tokens_of(grid) * width * self.head_dim
