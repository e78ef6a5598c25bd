"""Full attention: the exact baseline, and the model before SLA is swapped in."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.attention.config import FullConfig
from sla.attention.interface import AttentionContext, AttentionMethod, Grid, tokens_of
from sla.attention.registry import register_attention


@register_attention("full", FullConfig)
class FullAttention(AttentionMethod):
    """softmax(Q K^T / sqrt(D)) V through PyTorch's fastest exact kernel."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        return scaled_dot_product_attention(query, key, value)

    def density(self, grid: Grid) -> float:
        return 1.0

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """4 N^2 D per head: two products of N x N x D multiply-adds."""
        return 4.0 * self.num_heads * tokens_of(grid) ** 2 * self.head_dim
