"""The kernels as a backend of `sla_kernels.operator`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sla_kernels import eager, feature_maps
from sla_kernels.block_map import CRITICAL, MARGINAL, BlockMap, all_marginal, num_blocks
from sla_kernels.block_map import route as plain_route
from sla_kernels.feature_maps import FeatureMap
from sla_kernels.triton import launch, low_bit, operators

_NAMES = {
    feature_maps.softmax: "softmax",
    feature_maps.elu_plus_one: "elu+1",
    torch.relu: "relu",
}


def unsupported_reason(query: Tensor, block_q: int, block_kv: int) -> str | None:
    """Why the kernels cannot work on such tensors, or None."""
    head_dim = query.shape[3]
    if not query.is_cuda and not launch.interpreted():
        return f"query is on {query.device}; Triton needs a GPU (or TRITON_INTERPRET=1, to test)"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"query is {query.dtype}; Triton's kernels take float16, bfloat16 or float32"
    if query.dtype == torch.bfloat16 and launch.interpreted():
        return "query is torch.bfloat16, which Triton's interpreter multiplies wrongly"
    if head_dim % 8 or head_dim > launch.MAX_HEAD_DIM:
        return f"head_dim is {head_dim}; it must be a multiple of 8, at most {launch.MAX_HEAD_DIM}"
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if block not in launch.BLOCKS:
            return f"{name} is {block}; it must be one of {', '.join(map(str, launch.BLOCKS))}"
        # Triton 3.6 reads past the shared memory in products over 16 rows of such tiles.
        if block < 32 < head_dim and query.dtype == torch.float32 and query.is_cuda:
            return f"{name} is {block}; in float32 with head_dim over 32 it must be 32, 64 or 128"
    return None


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
    key_lengths: Tensor | None = None,
) -> BlockMap:
    """As `block_map.route`, in kernels."""
    if num_blocks(key.shape[2], block_kv) > launch.MAX_ROUTED_BLOCKS:
        return plain_route(
            query,
            key,
            critical=critical,
            negligible=negligible,
            block_q=block_q,
            block_kv=block_kv,
            scale=scale,
            always_critical=always_critical,
            key_lengths=key_lengths,
        )
    labels, rows, counts = operators.route(
        query.detach(),
        key.detach(),
        key_lengths,
        critical,
        negligible,
        block_q,
        block_kv,
        always_critical,
        scale,
    )
    tokens_q, tokens_kv = query.shape[2], key.shape[2]
    return BlockMap(labels, block_q, block_kv, tokens_q, tokens_kv, key_lengths, (rows, counts))


def sparse_branch(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """O^s and, if wanted, its log-sum-exp, as `reference.sparse_branch`."""
    query, scale = _positive(query, scale)
    output, lse = _attend(query, key, value, None, None, block_map, "softmax", scale, True, False)
    if not want_lse:  # a cut to the tokens would make torch.compile look at their number
        return output, None
    return output, lse[..., : query.shape[2]] * math.log(2)  # the kernels' is in units of log2


def low_bit_branch(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
) -> tuple[Tensor, Tensor] | None:
    """O^s computed in FP8, and its log-sum-exp, without gradients; None where it cannot be."""
    if low_bit.unsupported_reason(query, block_map.block_kv) is not None:
        return None
    query, scale = _positive(query, scale)
    rows, counts = block_map.row_table or operators.row_table(block_map.labels)
    output, lse = operators.run_low_bit(
        query.detach(),
        key.detach(),
        value.detach(),
        block_map.key_lengths,
        block_map.block_lengths,
        rows,
        counts,
        block_map.block_q,
        block_map.block_kv,
        scale,
    )
    return output, lse[..., : query.shape[2]] * math.log(2)


def merge_pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    sparse: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """As `sla_kernels.pooled.merge_pooled`."""
    query, scale = _positive(query, scale)
    output, *_ = operators.run(
        operators.merge_pooled,
        query,
        key,
        value,
        sparse,
        lse,
        block_map.key_lengths,
        block_map.labels,
        block_map.block_q,
        block_map.block_kv,
        scale,
    )
    return output


def linear_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None,
    feature_map: FeatureMap,
) -> Tensor:
    """O^l, as `reference.linear_branch`; a feature map of the caller's goes through autograd."""
    name = _NAMES.get(feature_map)
    if name is None:
        return eager.linear_branch(query, key, value, block_map, feature_map)
    if block_map is None:
        block_map = all_marginal(query, key, 128)
    return _attend(query, key, value, None, None, block_map, name, 1.0, False, True)[0]


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    feature_map: FeatureMap,
    scale: float,
    *,
    block_map: BlockMap | None = None,
    routing: dict[str, Any] | None = None,
) -> Tensor | None:
    """The whole operator, with a given block map or with the arguments of `route`.

    None where it is not fused: the caller adds the branches.
    """
    name = _NAMES.get(feature_map)
    # Proj in float32 would not fit the shared memory beside the rest.
    if name is None or scale <= 0 or query.dtype == torch.float32:
        return None
    weight = None if proj_weight is None else proj_weight.to(query.dtype)
    bias = None if proj_bias is None else proj_bias.to(query.dtype)
    if block_map is None:
        assert routing is not None
        block_q, block_kv = routing["block_q"], routing["block_kv"]
        blocks = num_blocks(key.shape[2], block_kv)
        if blocks <= launch.MAX_ROUTED_BLOCKS and not _too_large(query, block_q, block_kv):
            output, *_ = operators.run(
                operators.sparse_linear_attention,
                query,
                key,
                value,
                weight,
                bias,
                routing["key_lengths"],
                routing["critical"],
                routing["negligible"],
                block_q,
                block_kv,
                routing["always_critical"],
                name,
                scale,
            )
            return output
        block_map = route(query, key, scale=scale, **routing)
    return _attend(query, key, value, weight, bias, block_map, name, scale, True, True)[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    block_map: BlockMap,
    feature_map: str,
    scale: float,
    sparse: bool,
    linear: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and the kernels' own log-sum-exp."""
    if _too_large(query, block_map.block_q, block_map.block_kv):
        block_map = _in_half(block_map)
    if block_map.row_table is not None:
        rows, counts = block_map.row_table
    elif sparse:
        rows, counts = operators.row_table(block_map.labels)
    else:  # not looked at
        rows = counts = block_map.labels.new_empty((1, 1, 1, 1), dtype=torch.int32)
    output, lse = operators.run(
        operators.attend,
        query,
        key,
        value,
        weight,
        bias,
        block_map.key_lengths,
        block_map.block_lengths,
        block_map.labels,
        rows,
        counts,
        block_map.block_q,
        block_map.block_kv,
        feature_map,
        scale,
        sparse,
        linear,
    )
    return output, lse


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale: the kernels take the highest scaled score for the
    scaled highest score."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (query * 0.0, 1.0)


def _too_large(query: Tensor, block_q: int, block_kv: int) -> bool:
    """Whether tiles of such blocks do not fit the shared memory of a multiprocessor."""
    return query.dtype != torch.bfloat16 and 128 in (block_q, block_kv) and query.shape[3] > 32


def _in_half(block_map: BlockMap) -> BlockMap:
    """The same classes of the same scores, in blocks of at most 64."""
    labels = block_map.labels
    for dim, block, tokens in (
        (2, block_map.block_q, block_map.tokens_q),
        (3, block_map.block_kv, block_map.tokens_kv),
    ):
        if block > 64:
            labels = labels.repeat_interleave(block // 64, dim=dim)
            labels = labels.narrow(dim, 0, num_blocks(tokens, 64))
    block_lengths = block_map.block_lengths
    if block_lengths is not None and block_map.block_kv > 64:
        parts = torch.arange(0, block_map.block_kv, 64, device=block_lengths.device)
        block_lengths = (block_lengths[:, None] - parts).clamp(0, 64).flatten().to(torch.int32)
    return BlockMap(
        labels.contiguous(),
        min(block_map.block_q, 64),
        min(block_map.block_kv, 64),
        block_map.tokens_q,
        block_map.tokens_kv,
        block_map.key_lengths,
        block_lengths=block_lengths,
    )


assert CRITICAL == 1  # kernels compare labels with numbers
assert MARGINAL == 0
