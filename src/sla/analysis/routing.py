"""How good is P_c? The mass of attention on the blocks that pooled scores choose.

Shape letters: R captured query rows, N tokens, D head_dim, M whole query blocks among the rows, T_n
key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sla_kernels import classify_blocks
from sla_kernels.block_map import CRITICAL, block_counts, num_blocks
from torch import Tensor

from sla.analysis.weights import attention_weights
from sla.attention.token_order import tile_order

Grid = tuple[int, int, int]


def whole_blocks(rows: Tensor, tokens: int, block: int, order: Tensor) -> Tensor:
    """int64 (M, block): places in `rows` of the tokens of each query block that is there as a
    whole; a short last block of the order is left out.

    Args:
        rows: int64 (R,): raster indices of the tokens that there are.
        tokens: N.
        order: int64 (N,): the raster index at each place of a token order.
    """
    place = torch.full((tokens,), -1, dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    count = tokens // block
    blocks = place[order.to(rows.device)[: count * block]].unflatten(0, (count, block))
    return blocks[(blocks >= 0).all(dim=1)]


def evenly(rows: Tensor, count: int) -> Tensor:
    """Indices of at most `count` of the rows, evenly spaced, each in the middle of its part."""
    count = min(count, len(rows))
    return ((2 * torch.arange(count) + 1) * len(rows)) // (2 * count)


def ordered_blocks(
    rows: Tensor, tokens: int, block: int, grid: Grid, tile: Grid | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A token order, int64 (N,), and `whole_blocks` of it; None is raster order.

    Raises:
        ValueError: no query block of this order is among the rows as a whole.
    """
    if tile is None:
        order = torch.arange(tokens, device=device)
    else:
        order = tile_order(grid, tile, device)
    blocks = whole_blocks(rows.to(device), tokens, block, order)
    if not len(blocks):
        raise ValueError(
            f"no block of {block} queries in {_name(tile)} is whole among the {len(rows)} "
            f"captured rows of {tokens} tokens; capture with --query-blocks all, or analyse with "
            "a smaller --block"
        )
    return order, blocks


def block_mass(query: Tensor, key: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Attention of each query block on each key block, mean over its queries; rows sum to one.

    Args:
        query: (M block_q, D), whole blocks. key: (N, D).

    Returns:
        (M, T_n) float32.
    """
    tokens = key.shape[0]
    short = -tokens % block_kv
    rows = []
    for part in query.unflatten(0, (-1, block_q)):  # a block at a time: N weights a query
        mean = attention_weights(part, key).mean(dim=0)
        rows.append(torch.nn.functional.pad(mean, (0, short)).unflatten(0, (-1, block_kv)).sum(-1))
    return torch.stack(rows)


@dataclass(frozen=True)
class Recall:
    """Mass on the critical blocks of one head, mean over query blocks.

    Attributes:
        critical: the fraction k_h that was asked for.
        blocks: critical blocks of a row, of `key_blocks`.
        pooled: mass on the blocks that the pooled scores choose.
        oracle: mass on as many blocks of the largest true mass, the best that a choice of whole
            blocks can do.
        agreement: share of the oracle's blocks among the chosen ones.
    """

    critical: float
    blocks: int
    key_blocks: int
    pooled: float
    oracle: float
    agreement: float


def routing_recall(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    grid: Grid,
    *,
    tile: Grid | None,
    critical: Sequence[float],
    block_q: int = 64,
    block_kv: int = 64,
) -> list[Recall]:
    """Recall of the routing that SLA runs, at several critical fractions.

    Args:
        query: (R, D) of one head, in raster order. key: (N, D).
        rows: int64 (R,): which tokens the queries are, ascending.
        grid: token grid.
        tile: token order whose consecutive tokens make blocks; None for raster order.

    Raises:
        ValueError: no query block of this order is among the rows as a whole.
    """
    tokens = key.shape[0]
    order, blocks = ordered_blocks(rows, tokens, block_q, grid, tile, key.device)
    query, key = query[blocks.flatten()].float(), key[order].float()
    mass = block_mass(query, key, block_q, block_kv)
    best = mass.sort(dim=-1, descending=True).values
    oracle_order = mass.argsort(dim=-1, descending=True, stable=True)
    key_blocks = num_blocks(tokens, block_kv)
    found = []
    for fraction in critical:
        labels = classify_blocks(
            query[None, None],
            key[None, None],
            critical=fraction,
            negligible=0.0,
            block_q=block_q,
            block_kv=block_kv,
        ).labels[0, 0]
        chosen = labels == CRITICAL
        count, _ = block_counts(fraction, 0.0, key_blocks)
        agreed = chosen.gather(-1, oracle_order[:, :count])
        found.append(
            Recall(
                critical=fraction,
                blocks=count,
                key_blocks=key_blocks,
                pooled=(mass * chosen).sum(-1).mean().item(),
                oracle=best[:, :count].sum(-1).mean().item(),
                agreement=agreed.double().mean().item(),
            )
        )
    return found


def _name(tile: Grid | None) -> str:
    return "raster order" if tile is None else f"tiles of {'x'.join(map(str, tile))}"


__all__ = [
    "Recall",
    "block_mass",
    "evenly",
    "ordered_blocks",
    "routing_recall",
    "whole_blocks",
]
