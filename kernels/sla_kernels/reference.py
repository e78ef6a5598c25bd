"""The definition of SLA, dense and plain, to be read beside the paper (arXiv 2509.24006).

Everything here costs O(N^2) time and memory and runs in the dtype it is given, with PyTorch's
own differentiation: it is the oracle that every backend is tested against, in float64 for exact
values and in low precision to learn what error that precision costs.

Shape letters: B batch, H heads, N query tokens, M key tokens, D head_dim, F features.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sla_kernels.block_map import CRITICAL, MARGINAL, BlockMap, classify_blocks
from sla_kernels.feature_maps import FeatureMap, get_feature_map


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
) -> Tensor:
    """O^s: exact softmax attention over the critical keys of each row.

    A row without critical blocks gives 0.

    Args:
        query: (B, H, N, D).
        key, value: (B, H, M, D).
        scale: factor of the scores, the paper's 1 / sqrt(D).
    """
    critical = block_map.token_mask(CRITICAL)
    scores = (query @ key.mT) * scale
    weights = scores.masked_fill(~critical, float("-inf")).softmax(dim=-1)
    # All scores of a row masked: softmax gives NaN where the sum over no keys is meant.
    weights = weights.masked_fill(~critical.any(dim=-1, keepdim=True), 0.0)
    return weights @ value


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None,
    feature_map: str | FeatureMap,
) -> Tensor:
    """O^l: linear attention over the marginal keys of each row, or over all keys without a map.

    The paper sums h_j = phi(K_j)^T V_j and z_j over the marginal blocks j of a row (equation 5).
    Written out by keys that is the weight phi(q) . phi(k) for each marginal key, divided by the
    row's sum of weights, phi(q) . Z_i. A row whose sum is 0 (no marginal block, or no feature in
    common) gives 0.
    """
    phi = get_feature_map(feature_map)
    weights = phi(query).to(value.dtype) @ phi(key).to(value.dtype).mT
    if block_map is not None:
        weights = weights * block_map.token_mask(MARGINAL)
    sums = weights.sum(dim=-1, keepdim=True)
    empty = sums == 0
    output = (weights @ value) / sums.masked_fill(empty, 1.0)
    return output.masked_fill(empty, 0.0)


def project(output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Proj(O^l) = O^l W^T + b, shared by the heads; no weight is the identity."""
    if weight is not None:
        output = F.linear(output, weight.to(output.dtype))
    return output if bias is None else output + bias.to(output.dtype)


def sparse_linear_attention_with_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    *,
    feature_map: str | FeatureMap = "softmax",
    scale: float | None = None,
) -> Tensor:
    """O = O^s + Proj(O^l), equation 6, for a given block map."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    output_sparse = sparse_attention(query, key, value, block_map, scale)
    output_linear = linear_attention(query, key, value, block_map, feature_map)
    return output_sparse + project(output_linear, proj_weight, proj_bias)


def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_q: int = 64,
    block_kv: int = 64,
    feature_map: str | FeatureMap = "softmax",
    scale: float | None = None,
    always_critical: int = 0,
) -> Tensor:
    """The whole of Algorithm 1: routing (equations 2 and 3), both branches, Proj and the sum.

    No gradient passes through the routing: the classes are constants of the backward.
    """
    block_map = classify_blocks(
        query,
        key,
        critical=critical,
        negligible=negligible,
        block_q=block_q,
        block_kv=block_kv,
        scale=scale,
        always_critical=always_critical,
    )
    return sparse_linear_attention_with_map(
        query, key, value, block_map, proj_weight, proj_bias, feature_map=feature_map, scale=scale
    )


__all__ = [
    "linear_attention",
    "project",
    "sparse_attention",
    "sparse_linear_attention",
    "sparse_linear_attention_with_map",
]
