"""The definition of SLA, dense and plain: the oracle of every backend.

O(N^2) memory and time, any floating dtype, differentiable by autograd. To be read beside Section 4
of arXiv 2509.24006. Shape letters as in `block_map`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla_kernels.block_map import CRITICAL, MARGINAL, BlockMap
from sla_kernels.feature_maps import FeatureMap


def sparse_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    scale: float,
    want_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """O^s: softmax attention over the critical scores of each row (equation 4).

    A row without critical blocks gives zero. Beside it the log-sum-exp of the critical scores,
    (B, H, N_q), -inf where there is none.
    """
    critical = block_map.token_labels() == CRITICAL
    scores = (query @ key.transpose(-1, -2)) * scale
    # Not -inf before the log: its gradient would be NaN where a row is empty.
    scores = torch.where(critical, scores, torch.finfo(scores.dtype).min)
    empty = ~critical.any(dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill(~critical, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty, -math.inf)
    return weights @ value, lse


def linear_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None,
    feature_map: FeatureMap,
) -> Tensor:
    """O^l: linear attention over the marginal scores (equation 5), over all if `block_map` is None.

    phi(Q_i) H_i / (phi(Q_i) Z_i) with H_i, Z_i the sums of phi(K_j)^T V_j and of phi(K_j) over the
    marginal blocks j of row i, written here as attention with weights phi(Q) phi(K)^T. Where the
    denominator is zero (no marginal block, or no positive feature), the result is zero.
    """
    weights = feature_map(query) @ feature_map(key).transpose(-1, -2)
    if block_map is not None:
        weights = weights * (block_map.token_labels() == MARGINAL)
    denominator = weights.sum(dim=-1, keepdim=True)
    empty = denominator == 0
    output = (weights @ value) / denominator.masked_fill(empty, 1.0)
    return output.masked_fill(empty, 0.0)
