"""What the weights of attention are like: shares, stable rank, error against sparsity.

Each measure takes dense rows P = softmax(q k^T / sqrt(D)) of one head and is a plain definition, in
float32 or better. Figures 1 and 3 of arXiv 2509.24006 show them.

Shape letters: R query rows (all of a head, or some), N keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond this many rows or columns the largest eigenvalue is found iteratively.
_DIRECT = 256


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """P of some queries of a head.

    Args:
        query: (R, D), floating.
        key: (N, D): all keys.

    Returns:
        (R, N), float32, or float64 for float64; rows sum to one.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).T
    return torch.softmax(scores / math.sqrt(query.shape[1]), dim=-1)


@dataclass(frozen=True)
class WeightShares:
    """How weights lie around the row average 1 / N.

    Attributes:
        above: share of the weights that exceed 1 / N.
        below: share of the weights below 1 / (100 N).
        sum_above, sum_below: share of all attention that these weights carry; a row's is one.
    """

    above: float
    below: float
    sum_above: float
    sum_below: float


def weight_shares(weights: Tensor) -> WeightShares:
    """Shares of (R, N) weights, mean over rows."""
    average = 1.0 / weights.shape[1]
    above, below = weights > average, weights < average / 100
    rows = weights.shape[0]
    return WeightShares(
        above=above.double().mean().item(),
        below=below.double().mean().item(),
        sum_above=(weights * above).double().sum().item() / rows,
        sum_below=(weights * below).double().sum().item() / rows,
    )


def weight_histogram(weights: Tensor, edges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Distribution of log10(N x weight).

    Args:
        weights: (R, N).
        edges: ascending; what lies outside counts in the first or the last bin.

    Returns:
        Share of the weights in each bin, and share of all attention that they carry; float64
        (len(edges) - 1,), sums one.
    """
    bins = len(edges) - 1
    inner = torch.tensor(edges[1:-1], device=weights.device)
    logs = (weights * weights.shape[1]).clamp(min=1e-38).log10().flatten()
    index = torch.bucketize(logs.float(), inner, right=True)
    share = torch.bincount(index, minlength=bins).double() / index.numel()
    carried = torch.zeros(bins, dtype=torch.float64, device=weights.device)
    carried.index_add_(0, index, weights.double().flatten())
    return share.cpu(), (carried / carried.sum()).cpu()


def stable_rank(matrix: Tensor) -> float:
    """||A||_F^2 / ||A||_2^2 of (R, N): one for a matrix of rank one, at most min(R, N).

    Of some rows of a larger matrix it is that of these rows, which is at most R.

    Raises:
        ValueError: a matrix of zeros has none.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = (wide @ wide.T).double()
    frobenius = gram.diagonal().sum().item()
    if frobenius == 0.0:
        raise ValueError("matrix is all zeros, which has no stable rank")
    gram = gram / frobenius
    size = gram.shape[0]
    if size <= _DIRECT:
        largest = torch.linalg.eigvalsh(gram)[-1].item()
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.rand(size, 1, generator=generator, dtype=torch.float64).to(gram)
        largest = torch.lobpcg(gram, k=1, X=start, niter=500, largest=True)[0].item()
    return 1.0 / largest


def weight_ranks(weights: Tensor) -> Tensor:
    """int64 (R, N): the place of each weight in its row, 0 for the largest; of equal ones the lower
    index comes first."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(weights.shape[1], device=weights.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def kept_count(kept: float, tokens: int) -> int:
    """Weights of a row that are kept: round(kept N), at least one.

    Raises:
        ValueError: `kept` is not in (0, 1].
    """
    if not 0.0 < kept <= 1.0:
        raise ValueError(f"kept is {kept}; it must be in (0, 1]")
    return max(1, round(kept * tokens))


def split_top(weights: Tensor, kept: float, ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """P * M and P * (1 - M): the largest `kept` of the weights of each row, and the others.

    Args:
        ranks: `weight_ranks(weights)`, if it is at hand.
    """
    ranks = weight_ranks(weights) if ranks is None else ranks
    chosen = ranks < kept_count(kept, weights.shape[1])
    return weights * chosen, weights * ~chosen


@dataclass(frozen=True)
class DropError:
    """Output error when all but the largest weights of each row are dropped.

    Attributes:
        kept: share of the weights that stay.
        carried: share of the attention that they carry, mean over rows.
        dropped: ||O_kept - O||_1 / ||O||_1, the others set to zero.
        renormalised: the same after each row is divided by what it has left, which is softmax over
            the kept keys alone, as sparse attention computes.
    """

    kept: float
    carried: float
    dropped: float
    renormalised: float


def drop_errors(
    weights: Tensor, value: Tensor, kept: Sequence[float], ranks: Tensor | None = None
) -> list[DropError]:
    """Error against sparsity (Figure 1, right), one for each share of `kept`.

    Args:
        weights: (R, N).
        value: (N, D).
        ranks: `weight_ranks(weights)`, if it is at hand.

    Raises:
        ValueError: a share that is not in (0, 1].
    """
    ranks = weight_ranks(weights) if ranks is None else ranks
    value = value.to(weights.dtype)
    exact = weights @ value
    size = exact.abs().sum().double()
    found = []
    for share in kept:
        top, _ = split_top(weights, share, ranks)
        output, carried = top @ value, top.sum(-1, keepdim=True)
        errors = [(o - exact).abs().sum().double() / size for o in (output, output / carried)]
        found.append(
            DropError(share, carried.double().mean().item(), errors[0].item(), errors[1].item())
        )
    return found


__all__ = [
    "DropError",
    "WeightShares",
    "attention_weights",
    "drop_errors",
    "kept_count",
    "split_top",
    "stable_rank",
    "weight_histogram",
    "weight_ranks",
    "weight_shares",
]
