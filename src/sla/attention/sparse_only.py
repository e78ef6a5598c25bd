"""Sparse only: SLA's sparse branch alone, the "Sparse only" row of the paper's Table 2."""

from __future__ import annotations

from sla_kernels import BlockMap, classify_blocks, sparse_attention
from sla_kernels.block_map import block_counts, num_blocks
from torch import Tensor

from sla.attention.config import BlockSparseConfig, SparseOnlyConfig
from sla.attention.interface import AttentionContext, AttentionMethod, Grid, tokens_of
from sla.attention.registry import register_attention


class BlockSparseAttention(AttentionMethod):
    """What the methods share that route over blocks of consecutive tokens (Section 4).

    Raises:
        ValueError: a fraction or block size of the config is out of range.
    """

    config: BlockSparseConfig

    def __init__(
        self,
        config: BlockSparseConfig,
        num_heads: int,
        head_dim: int,
        dim: int,
        layer_index: int,
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        if not 0.0 < config.critical <= 1.0:
            raise ValueError(f"attention.critical is {config.critical}; it must be in (0, 1]")
        if not 0.0 <= self.negligible <= 1.0 - config.critical + 1e-9:
            raise ValueError(
                f"attention.negligible is {self.negligible}; it must be in "
                f"[0, 1 - critical] = [0, {1.0 - config.critical:g}]"
            )
        for field in ("block_q", "block_kv"):
            if getattr(config, field) < 1:
                raise ValueError(f"attention.{field} is {getattr(config, field)}; must be >= 1")

    @property
    def negligible(self) -> float:
        """Fraction of the key blocks of a row that are skipped, k_l."""
        return 0.0

    def block_map(self, query: Tensor, key: Tensor, context: AttentionContext) -> BlockMap:
        return classify_blocks(
            query,
            key,
            critical=self.config.critical,
            negligible=self.negligible,
            block_q=self.config.block_q,
            block_kv=self.config.block_kv,
            always_critical=context.always_critical,
        )

    def blocks(self, grid: Grid) -> tuple[int, int, int]:
        """(T_m, T_n, critical blocks of a row) for one sample of this grid."""
        tokens = tokens_of(grid)
        t_m = num_blocks(tokens, self.config.block_q)
        t_n = num_blocks(tokens, self.config.block_kv)
        return t_m, t_n, block_counts(self.config.critical, 0.0, t_n)[0]

    def density(self, grid: Grid) -> float:
        _, t_n, critical = self.blocks(grid)
        return critical / t_n

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Exact attention on the critical blocks, plus the pooled scores of the routing."""
        t_m, t_n, _ = self.blocks(grid)
        exact = 4.0 * tokens_of(grid) ** 2 * self.head_dim * self._density(grid, density)
        routing = 2.0 * t_m * t_n * self.head_dim
        return self.num_heads * (exact + routing)


@register_attention("sparse_only", SparseOnlyConfig)
class SparseOnlyAttention(BlockSparseAttention):
    """Exact softmax over the critical blocks of each row; all other blocks are skipped."""

    config: SparseOnlyConfig

    @property
    def negligible(self) -> float:
        """All that is not critical."""
        return 1.0 - self.config.critical

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        block_map = self.block_map(query, key, context)
        return sparse_attention(query, key, value, block_map, backend=self.config.backend)
