"""Which blocks are critical, marginal and negligible: pooling, routing, tables.

Shape letters: B batch, H heads, N_q and N_kv tokens, D head_dim, T_m = ceil(N_q / block_q) query
blocks, T_n = ceil(N_kv / block_kv) key blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1


@dataclass(frozen=True)
class BlockMap:
    """Class of every pair of a query block and a key block (M_c, equation 3).

    Attributes:
        labels: int8 (B, H, T_m, T_n): 1 critical, 0 marginal, -1 negligible.
        block_q, block_kv: tokens in a block; the last one may be shorter.
        tokens_q, tokens_kv: N_q and N_kv.

    Raises:
        ValueError: labels of the wrong shape for these tokens and blocks.
        TypeError: labels that are not int8.
    """

    labels: Tensor
    block_q: int
    block_kv: int
    tokens_q: int
    tokens_kv: int

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int8:
            raise TypeError(f"labels is {self.labels.dtype}; it must be torch.int8")
        wanted = (
            num_blocks(self.tokens_q, self.block_q),
            num_blocks(self.tokens_kv, self.block_kv),
        )
        if self.labels.ndim != 4 or tuple(self.labels.shape[2:]) != wanted:
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)}; it must be (B, H, {wanted[0]}, "
                f"{wanted[1]}) for {self.tokens_q} queries in blocks of {self.block_q} and "
                f"{self.tokens_kv} keys in blocks of {self.block_kv}"
            )

    @cached_property
    def critical_counts(self) -> Tensor:
        """int64 (B, H, T_m): critical blocks of each row."""
        return (self.labels == CRITICAL).sum(-1)

    @cached_property
    def critical_blocks(self) -> Tensor:
        """Row table, int64 (B, H, T_m, T_n): a row's critical key blocks in ascending order come
        first, `critical_counts` of them; the rest of the row is filling."""
        # A stable sort of "is not critical" keeps ascending block order among equals.
        return (self.labels != CRITICAL).to(torch.int8).argsort(dim=-1, stable=True)

    @cached_property
    def column_counts(self) -> Tensor:
        """int64 (B, H, T_n): rows that hold each key block as critical."""
        return (self.labels == CRITICAL).sum(-2)

    @cached_property
    def column_blocks(self) -> Tensor:
        """Column table, int64 (B, H, T_n, T_m): the query blocks that hold a key block as
        critical, as `critical_blocks`."""
        by_column = (self.labels != CRITICAL).to(torch.int8).transpose(-1, -2)
        return by_column.argsort(dim=-1, stable=True)

    def fractions(self) -> dict[str, float]:
        """Share of all pairs of blocks in each class."""
        total = self.labels.numel()
        names = {"critical": CRITICAL, "marginal": MARGINAL, "negligible": NEGLIGIBLE}
        return {name: (self.labels == label).sum().item() / total for name, label in names.items()}

    def token_labels(self) -> Tensor:
        """int8 (B, H, N_q, N_kv): the class of every score. For references and pictures only."""
        rows = self.labels.repeat_interleave(self.block_q, dim=2)[:, :, : self.tokens_q]
        return rows.repeat_interleave(self.block_kv, dim=3)[..., : self.tokens_kv]


def num_blocks(tokens: int, block: int) -> int:
    """ceil(tokens / block)."""
    return -(-tokens // block)


def fraction_of(fraction: float, blocks: int) -> int:
    """floor(fraction * blocks), with 0.29 * 100 = 28.999999999999996 counted as 29."""
    return math.floor(fraction * blocks + 1e-9 * blocks)


def block_counts(
    critical: float, negligible: float, key_blocks: int, forced: int = 0
) -> tuple[int, int]:
    """Critical and negligible blocks of a row.

    Args:
        critical, negligible: fractions k_h and k_l.
        key_blocks: T_n.
        forced: leading key blocks that are critical in any case, in addition.

    Returns:
        min(T_n, forced + max(1, floor(k_h T_n))), and floor(k_l T_n) or what is left.
    """
    chosen = min(key_blocks, forced + max(1, fraction_of(critical, key_blocks)))
    skipped = min(fraction_of(negligible, key_blocks), key_blocks - chosen)
    return chosen, skipped


def pool_blocks(tensor: Tensor, block: int) -> Tensor:
    """Mean over the tokens of each block; a short last block over its real tokens (Section 4.1).

    Args:
        tensor: (B, H, N, D) floating.
        block: tokens in a block.

    Returns:
        (B, H, T, D), float64 for float64 and float32 for everything else.
    """
    accurate = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    tokens = tensor.shape[2]
    whole = tokens // block
    parts = []
    if whole:
        parts.append(accurate[:, :, : whole * block].unflatten(2, (whole, block)).mean(dim=3))
    if tokens % block:
        parts.append(accurate[:, :, whole * block :].mean(dim=2, keepdim=True))
    return torch.cat(parts, dim=2)


@torch.no_grad()
def route(
    query: Tensor,
    key: Tensor,
    *,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    scale: float,
    always_critical: int,
) -> BlockMap:
    """`classify_blocks` after its checks.

    Blocks of a row are ranked by pool(Q) pool(K)^T, highest first, the lower index first among
    equals; softmax, which P_c applies, does not change the order. The first ones are critical, the
    last ones negligible. Routing has no gradient.
    """
    tokens_q, tokens_kv = query.shape[2], key.shape[2]
    scores = pool_blocks(query, block_q) @ pool_blocks(key, block_kv).transpose(-1, -2)
    scores = scores * scale
    key_blocks = scores.shape[-1]
    forced_keys = num_blocks(min(always_critical, tokens_kv), block_kv)
    forced_queries = num_blocks(min(always_critical, tokens_q), block_q)
    scores[..., :forced_keys] = math.inf
    chosen, skipped = block_counts(critical, negligible, key_blocks, forced_keys)

    order = scores.argsort(dim=-1, descending=True, stable=True)
    labels = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    labels.scatter_(-1, order[..., :chosen], CRITICAL)
    labels.scatter_(-1, order[..., key_blocks - skipped :], NEGLIGIBLE)
    labels[..., :forced_queries, :] = CRITICAL
    return BlockMap(labels, block_q, block_kv, tokens_q, tokens_kv)
