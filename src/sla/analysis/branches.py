"""Why an output of two branches misses exact attention: its scale, its linear branch, its Proj.

Each part is replaced by the best that could stand in its place, one at a time, on the same queries,
keys, values and block classes. Nothing is trained: where there is a Proj, it is a least-squares fit
to exact attention, to be measured on clips that it was not fitted to.

Shape letters: R captured query rows, N tokens, D head_dim, Q queries of the whole blocks looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from sla_kernels import classify_blocks, linear_attention, sparse_pooled_attention
from sla_kernels.block_map import CRITICAL, MARGINAL
from torch import Tensor

from sla.analysis.routing import Grid, evenly, ordered_blocks
from sla.analysis.weights import attention_weights

K = TypeVar("K", bound=Hashable)
RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)


class ProjFit:
    """What a least-squares fit of target = scale (branch W^T + b) needs, in float64 on the CPU.

    Args:
        branch, target: (Q, D).
        scale: (Q, 1).
        exact: (Q, D), exact attention: errors are relative to its norm.
    """

    def __init__(self, branch: Tensor, target: Tensor, scale: Tensor, exact: Tensor) -> None:
        self._exact = exact.double().square().sum().item()
        inputs = (scale * torch.cat([branch, torch.ones_like(scale)], dim=1)).double().cpu()
        target = target.double().cpu()
        self.gram = inputs.T @ inputs / self._exact
        self.cross = inputs.T @ target / self._exact
        self._target = target.square().sum().item() / self._exact

    def error(self, solution: Tensor) -> float:
        """||O' - O|| / ||O|| on these queries with a solution of `solve_proj`."""
        explained = (solution * (2 * self.cross - self.gram @ solution)).sum().item()
        return max(self._target - explained, 0.0) ** 0.5


def solve_proj(fits: Sequence[ProjFit], ridge: float = 0.0) -> Tensor:
    """The one Proj that is best for all of these: float64 (D + 1, D), W^T and below it b.

    Each fit counts as much as another, whatever the norm of its output.

    Args:
        ridge: penalty on the squares of its numbers, times the mean diagonal of the Gram matrix.
    """
    gram = torch.stack([fit.gram for fit in fits]).sum(0)
    cross = torch.stack([fit.cross for fit in fits]).sum(0)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    # Where attention is broad, O^l hardly differs from query to query: columns nearly parallel.
    return torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ cross


def held_out_errors(
    fits: Mapping[K, ProjFit], group: Callable[[K], object], part: Callable[[K], object]
) -> dict[K, float]:
    """Error of every call with the Proj that suits the other parts of its group best.

    Fitted to the call itself, Proj looks far better than any that serves other clips too: it learns
    what this clip's output is. So a call is measured with a fit to its group without its own part,
    and the group with the ridge of `RIDGES` that is best for it so.

    Args:
        group: which calls share a Proj.
        part: what is held out together, such as a clip.

    Raises:
        ValueError: a group of one part alone.
    """
    groups: dict[object, list[K]] = defaultdict(list)
    for key in fits:
        groups[group(key)].append(key)
    found: dict[K, float] = {}
    for keys in groups.values():
        parts = dict.fromkeys(part(key) for key in keys)
        if len(parts) < 2:
            raise ValueError(f"held_out_errors needs two parts or more, and got {list(parts)}")
        best: dict[K, float] = {}
        for ridge in RIDGES:
            errors: dict[K, float] = {}
            for held in parts:
                others = [fits[key] for key in keys if part(key) != held]
                solution = solve_proj(others, ridge)
                errors |= {key: fits[key].error(solution) for key in keys if part(key) == held}
            if not best or sum(errors.values()) < sum(best.values()):
                best = errors
        found |= best
    return found


@dataclass(frozen=True)
class BranchErrors:
    """Relative errors ||O' - O|| / ||O|| (Frobenius) of one head, O exact attention.

    O^s is exact attention over the critical blocks, normalised over them; O^l the linear branch
    with the softmax feature map; m, a number a query, the attention that the critical blocks have
    of all.

    Attributes:
        critical: the fraction k_h that was asked for.
        mass: mean of m.
        sparse: of O^s alone.
        scaled: of m O^s.
        mixed: of m O^s + (1 - m) O^l, SLA2's form (arXiv 2602.12675) with each query's true m.
        mixed_exact: of m O^s + (1 - m) times exact attention over the marginal blocks: what
            skipping the negligible ones costs.
        pooled: of `sparse_pooled`: the mean of every block that is not critical, in one softmax.
        proj: fit of O^s + Proj(O^l), SLA's form (arXiv 2509.24006, equation 6).
        proj_exact: the same with exact attention over the marginal blocks in place of O^l.
        mixed_proj: fit of m O^s + (1 - m) Proj(O^l).
    """

    critical: float
    mass: float
    sparse: float
    scaled: float
    mixed: float
    mixed_exact: float
    pooled: float
    proj: ProjFit
    proj_exact: ProjFit
    mixed_proj: ProjFit


@torch.no_grad()
def branch_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    grid: Grid,
    *,
    tile: Grid | None,
    critical: Sequence[float],
    negligible: float = 0.1,
    block: int = 64,
    query_blocks: int = 16,
) -> list[BranchErrors]:
    """Errors of one head at several critical fractions, with the routing that SLA runs.

    Args:
        query: (R, D), in raster order. key, value: (N, D).
        rows: int64 (R,): which tokens the queries are, ascending.
        grid: token grid.
        tile: token order whose consecutive tokens make blocks; None for raster order.
        negligible: the fraction k_l, or what the critical ones leave of it.
        block: tokens of a block, queries and keys.
        query_blocks: whole query blocks that are looked at, evenly spaced. A fit of Proj has D + 1
            numbers an output, which many queries must outweigh.

    Raises:
        ValueError: no query block of this order is among the rows as a whole.
    """
    tokens = key.shape[0]
    order, blocks = ordered_blocks(rows, tokens, block, grid, tile, key.device)
    places = blocks[evenly(blocks, query_blocks)].flatten()
    query, key, value = query[places].float(), key[order].float(), value[order].float()
    weights = attention_weights(query, key)
    exact = weights @ value

    def error(output: Tensor) -> float:
        return ((output - exact).norm() / exact.norm()).item()

    found = []
    for fraction in critical:
        block_map = classify_blocks(
            query[None, None],
            key[None, None],
            critical=fraction,
            negligible=min(negligible, 1.0 - fraction),
            block_q=block,
            block_kv=block,
        )
        labels = block_map.labels[0, 0].repeat_interleave(block, 0)
        labels = labels.repeat_interleave(block, 1)[:, :tokens]
        kept, left = weights * (labels == CRITICAL), weights * (labels == MARGINAL)
        mass = kept.sum(-1, keepdim=True)
        sparse = kept @ value / mass
        marginal = left @ value / left.sum(-1, keepdim=True).clamp_min(1e-30)
        linear = linear_attention(query[None, None], key[None, None], value[None, None], block_map)[
            0, 0
        ]
        everything = replace(block_map, labels=block_map.labels.clamp_min(MARGINAL))
        pooled = sparse_pooled_attention(
            query[None, None], key[None, None], value[None, None], everything
        )[0, 0]
        scaled, rest, one = mass * sparse, 1.0 - mass, torch.ones_like(mass)
        found.append(
            BranchErrors(
                critical=fraction,
                mass=mass.mean().item(),
                sparse=error(sparse),
                scaled=error(scaled),
                mixed=error(scaled + rest * linear),
                mixed_exact=error(scaled + rest * marginal),
                pooled=error(pooled),
                proj=ProjFit(linear, exact - sparse, one, exact),
                proj_exact=ProjFit(marginal, exact - sparse, one, exact),
                mixed_proj=ProjFit(linear, exact - scaled, rest, exact),
            )
        )
    return found


__all__ = ["BranchErrors", "ProjFit", "branch_errors", "held_out_errors", "solve_proj"]
