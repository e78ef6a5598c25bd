"""Sparse-Linear Attention operators (arXiv 2509.24006).

    output = sparse_linear_attention(query, key, value, proj_weight, proj_bias, critical=0.05)

routes blocks into critical (exact attention), marginal (linear attention) and negligible (skipped)
and computes O = O^s + Proj(O^l), differentiably. `classify_blocks` gives the routing alone,
`sparse_attention` and `linear_attention` one branch; `sparse_pooled_attention` has the mean of each
marginal block in place of linear attention. Tensors are (batch, heads, tokens, head_dim)
with any strides. Needs nothing but torch, and Triton for the fused kernels.

Backends: `triton` (fused kernels, forward and backward, taken on a GPU), `eager` (block-gather
PyTorch, any device), `reference` (the dense definition, O(N^2)).
"""

from sla_kernels.block_map import BlockMap
from sla_kernels.feature_maps import (
    Hedgehog,
    available_feature_maps,
    get_feature_map,
    register_feature_map,
)
from sla_kernels.operator import (
    Backend,
    Branches,
    attention_branches,
    available_backends,
    classify_blocks,
    linear_attention,
    register_backend,
    sparse_attention,
    sparse_linear_attention,
    sparse_pooled_attention,
)

__all__ = [
    "Backend",
    "BlockMap",
    "Branches",
    "Hedgehog",
    "attention_branches",
    "available_backends",
    "available_feature_maps",
    "classify_blocks",
    "get_feature_map",
    "linear_attention",
    "register_backend",
    "register_feature_map",
    "sparse_attention",
    "sparse_linear_attention",
    "sparse_pooled_attention",
]
