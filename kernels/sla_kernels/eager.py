"""The block-gather backend: plain PyTorch, any device, cost proportional to the critical blocks.

Both branches compute in float32 (float64 for float64 inputs) and keep for the backward only their
inputs, outputs and one number a row. Work is cut into chunks, so that peak memory is bounded
whatever the length. Shape letters as in `block_map`; R rows (query blocks of any head) of a chunk,
C critical blocks of its longest row, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_kernels.block_map import MARGINAL, BlockMap, accumulation_dtype, past_length
from sla_kernels.feature_maps import FeatureMap

# Numbers in the largest temporary of a chunk. On a CPU a chunk should stay near the caches, on a
# GPU it should fill the machine.
_CHUNK_CPU = 2**20
_CHUNK_GPU = 2**26

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest e4m3 number


def sparse_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    scale: float,
    want_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """O^s and its log-sum-exp, as `reference.sparse_branch`.

    Padding keys and values may hold anything, NaN too.
    """
    if block_map.key_lengths is not None:
        padding = _padding(block_map.key_lengths, key)
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    output, lse = _apply(_SparseBranch, query, key, value, block_map, scale)
    return output, lse


def rounded_weights_branch(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
) -> tuple[Tensor, Tensor]:
    """O^s and its log-sum-exp with weights that are rounded to e4m3 before they meet the values.

    A row's weights are exp(score - its highest score) * 448; `low_bit` says what it is for. No
    gradients. Padding keys and values must be finite.
    """
    accurate = accumulation_dtype(query)
    queries = _blocks(query, block_map.block_q, accurate)
    keys = _blocks(key, block_map.block_kv, accurate)
    values = _blocks(value, block_map.block_kv, accurate)
    output = torch.zeros_like(queries)
    log_sum_exp = queries.new_full(queries.shape[:2], -math.inf)
    for chunk in _chunks(block_map, query.shape[-1]):
        scores = _scores(queries, keys, chunk, scale)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(highest.masked_fill(highest == -math.inf, 0.0)).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        rounded = weights.mul_(FP8_MAX).to(FP8).to(accurate)
        output[chunk.rows] = _safe_divide(rounded @ _gather(values, chunk.keys), total * FP8_MAX)
        log_sum_exp[chunk.rows] = (highest + total.log()).squeeze(-1)
    lse = _unblocks(log_sum_exp.unsqueeze(-1), (*query.shape[:3], 1), accurate).squeeze(-1)
    return _unblocks(output, query.shape, query.dtype), lse


def linear_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None,
    feature_map: FeatureMap,
) -> Tensor:
    """O^l, as `reference.linear_branch`, in the accumulation dtype; padding as `sparse_branch`."""
    accurate = accumulation_dtype(query)
    padding = None
    if block_map is not None and block_map.key_lengths is not None:
        padding = _padding(block_map.key_lengths, key)
        # Before phi: the gradient of phi at NaN is NaN, whatever it is multiplied with.
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    phi_query = feature_map(query.to(accurate))
    phi_key = feature_map(key.to(accurate))
    value = value.to(accurate)
    if padding is not None:
        phi_key = phi_key.masked_fill(padding, 0.0)
    if block_map is None:
        sums = phi_key.transpose(-1, -2) @ value
        normaliser = phi_key.sum(dim=2).unsqueeze(-1)
        return _safe_divide(phi_query @ sums, phi_query @ normaliser)
    output: Tensor = _apply(_MarginalBranch, phi_query, phi_key, value, block_map)
    return output


@torch.compiler.disable
def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """function.apply(*inputs), kept from torch.compile: it looks at numbers on the host, where
    Dynamo of PyTorch 2.11 silently makes other gradients of it."""
    return function.apply(*inputs)


@dataclass(frozen=True)
class _Chunk:
    """Rows of the sparse branch that are worked on together.

    Attributes:
        rows: int64 (R,), into the flat list of all query blocks.
        keys: int64 (R, C), into the flat list of all key blocks.
        mask: bool (R, 1, C * block_kv), True for real keys of critical blocks; None if all are.
    """

    rows: Tensor
    keys: Tensor
    mask: Tensor | None


class _SparseBranch(torch.autograd.Function):
    """FlashAttention over gathered blocks (Algorithm 1; backward Algorithm 2)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
    ) -> tuple[Tensor, Tensor]:
        accurate = accumulation_dtype(query)
        queries = _blocks(query, block_map.block_q, accurate)
        keys = _blocks(key, block_map.block_kv, accurate)
        values = _blocks(value, block_map.block_kv, accurate)
        output = torch.zeros_like(queries)
        log_sum_exp = queries.new_full(queries.shape[:2], -math.inf)
        for chunk in _chunks(block_map, query.shape[-1]):
            scores = _scores(queries, keys, chunk, scale)
            lse = torch.logsumexp(scores, dim=-1)
            # A row without critical keys: exp(-inf - 0) = 0, so its output is zero.
            shift = torch.where(lse == -math.inf, 0.0, lse) if chunk.mask is not None else lse
            weights = scores.sub_(shift.unsqueeze(-1)).exp_()
            output[chunk.rows] = weights @ _gather(values, chunk.keys)
            log_sum_exp[chunk.rows] = lse
        result = _unblocks(output, query.shape, query.dtype)
        ctx.save_for_backward(query, key, value, result, log_sum_exp)
        ctx.block_map, ctx.scale = block_map, scale
        lse = _unblocks(log_sum_exp.unsqueeze(-1), (*query.shape[:3], 1), accurate).squeeze(-1)
        return result, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, log_sum_exp = ctx.saved_tensors
        block_map, scale = ctx.block_map, ctx.scale
        accurate = accumulation_dtype(query)
        queries = _blocks(query, block_map.block_q, accurate)
        keys = _blocks(key, block_map.block_kv, accurate)
        values = _blocks(value, block_map.block_kv, accurate)
        grad_out = _blocks(grads[0], block_map.block_q, accurate)
        delta = (grad_out * _blocks(result, block_map.block_q, accurate)).sum(-1, keepdim=True)
        # The log-sum-exp's derivative by a score is its weight, so its gradient joins delta.
        delta = delta - _blocks(grads[1].unsqueeze(-1), block_map.block_q, accurate)
        d_query, d_key, d_value = (torch.zeros_like(t) for t in (queries, keys, values))
        for chunk in _chunks(block_map, query.shape[-1]):
            weights = _scores(queries, keys, chunk, scale)
            lse = log_sum_exp[chunk.rows]
            shift = torch.where(lse == -math.inf, 0.0, lse) if chunk.mask is not None else lse
            weights = weights.sub_(shift.unsqueeze(-1)).exp_()
            d_out = grad_out[chunk.rows]
            _scatter_add(d_value, chunk.keys, weights.transpose(1, 2) @ d_out)
            d_scores = d_out @ _gather(values, chunk.keys).transpose(1, 2)
            d_scores = d_scores.sub_(delta[chunk.rows]).mul_(weights).mul_(scale)
            d_query[chunk.rows] = d_scores @ _gather(keys, chunk.keys)
            _scatter_add(d_key, chunk.keys, d_scores.transpose(1, 2) @ queries[chunk.rows])
        return (
            _unblocks(d_query, query.shape, query.dtype),
            _unblocks(d_key, key.shape, key.dtype),
            _unblocks(d_value, value.shape, value.dtype),
            None,
            None,
        )


class _MarginalBranch(torch.autograd.Function):
    """Linear attention over the marginal blocks.

    The value gets a column of ones, [V, 1], so that one product gives numerator and denominator:
    h_j = phi(K_j)^T [V_j, 1], and H_i, the sum over marginal j, is the matrix product M h of the
    0/1 marginal mask with all block sums. h and H are recomputed in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, phi_query: Tensor, phi_key: Tensor, value: Tensor, block_map: BlockMap
    ) -> Tensor:
        queries, keys, values, mask = _marginal_inputs(phi_query, phi_key, value, block_map)
        output = queries.new_empty(*queries.shape[:3], value.shape[-1])
        denominator = queries.new_empty(*queries.shape[:3], 1)
        for heads in _head_groups(keys, values):
            aggregated = _aggregate(keys[heads], values[heads], mask[heads])
            both = queries[heads] @ aggregated
            output[heads] = _safe_divide(both[..., :-1], both[..., -1:])
            denominator[heads] = both[..., -1:]
        shape = (*phi_query.shape[:3], value.shape[-1])
        result = _unblocks(output.flatten(0, 1), shape, value.dtype)
        ctx.save_for_backward(phi_query, phi_key, value, result, denominator)
        ctx.block_map = block_map
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        phi_query, phi_key, value, result, denominator = ctx.saved_tensors
        block_map = ctx.block_map
        queries, keys, values, mask = _marginal_inputs(phi_query, phi_key, value, block_map)
        grad = _blocks(grads[0], block_map.block_q, value.dtype)
        delta = (grad * _blocks(result, block_map.block_q, value.dtype)).sum(-1, keepdim=True)
        # d[numerator, denominator] = [dO, -rowsum(dO O)] / denominator
        d_both = torch.cat([grad, -delta], dim=-1).view(*queries.shape[:3], -1)
        d_both = _safe_divide(d_both, denominator)
        d_queries, d_keys = torch.empty_like(queries), torch.empty_like(keys)
        d_values = torch.empty_like(values)
        for heads in _head_groups(keys, values):
            aggregated = _aggregate(keys[heads], values[heads], mask[heads])
            d_queries[heads] = d_both[heads] @ aggregated.transpose(-1, -2)
            d_aggregated = queries[heads].transpose(-1, -2) @ d_both[heads]
            d_sums = (mask[heads].transpose(-1, -2) @ d_aggregated.flatten(2)).view(
                *keys[heads].shape[:2], *d_aggregated.shape[2:]
            )
            d_keys[heads] = values[heads] @ d_sums.transpose(-1, -2)
            d_values[heads] = keys[heads] @ d_sums
        return (
            _unblocks(d_queries.flatten(0, 1), phi_query.shape, phi_query.dtype),
            _unblocks(d_keys.flatten(0, 1), phi_key.shape, phi_key.dtype),
            _unblocks(d_values[..., :-1].flatten(0, 1), value.shape, value.dtype),
            None,
        )


def _marginal_inputs(
    phi_query: Tensor, phi_key: Tensor, value: Tensor, block_map: BlockMap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks (B H, T, block, ...) of phi(Q), phi(K) and [V, 1], and the marginal mask M."""
    dtype = value.dtype
    heads = phi_query.shape[0] * phi_query.shape[1]
    queries = _blocks(phi_query, block_map.block_q, dtype).unflatten(0, (heads, -1))
    # Filling tokens of a short last block have phi(K) = 0 and so add nothing to any sum.
    keys = _blocks(phi_key, block_map.block_kv, dtype).unflatten(0, (heads, -1))
    with_ones = F.pad(value, (0, 1), value=1.0)
    values = _blocks(with_ones, block_map.block_kv, dtype).unflatten(0, (heads, -1))
    mask = (block_map.labels == MARGINAL).to(dtype).flatten(0, 1)
    return queries, keys, values, mask


def _aggregate(keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """H of every query block: (G, T_n, block, F) and (G, T_n, block, D) to (G, T_m, F, D)."""
    sums = keys.transpose(-1, -2) @ values
    return (mask @ sums.flatten(2)).view(*mask.shape[:2], *sums.shape[2:])


def _head_groups(keys: Tensor, values: Tensor) -> Iterator[slice]:
    """Heads whose block sums fit a chunk together."""
    per_head = keys.shape[1] * keys.shape[-1] * values.shape[-1]
    group = max(1, _chunk_size(keys) // per_head)
    for first in range(0, keys.shape[0], group):
        yield slice(first, first + group)


def _chunks(block_map: BlockMap, head_dim: int) -> Iterator[_Chunk]:
    """Rows in groups of bounded size; rows of like length together if lengths differ.

    (A few rows of joint text-video attention hold every block: they must not lengthen the rest.)
    """
    counts = block_map.critical_counts.flatten()
    lengths = block_map.key_lengths
    table = block_map.critical_blocks.flatten(0, 2)
    heads, t_m, t_n = block_map.labels.shape[1:]
    rows = torch.arange(len(counts), device=counts.device)
    first_key_block = torch.div(rows, t_m, rounding_mode="floor") * t_n
    shortest, longest = (int(n) for n in torch.aminmax(counts)) if len(counts) else (0, 0)
    if shortest != longest:
        rows = counts.argsort(descending=True)
    ragged = block_map.tokens_kv % block_map.block_kv
    block_kv = block_map.block_kv
    start = 0
    while start < len(rows):
        length = int(counts[rows[start]]) if shortest != longest else longest
        if length == 0:
            return
        largest = length * block_kv * max(head_dim, block_map.block_q)
        stop = min(len(rows), start + max(1, _chunk_size(counts) // largest))
        chunk_rows = rows[start:stop]
        blocks = table[chunk_rows, :length]
        mask = None
        if shortest != longest:
            used = torch.arange(length, device=counts.device) < counts[chunk_rows, None]
            mask = used[..., None].expand(-1, -1, block_kv)
        if ragged or lengths is not None or block_map.block_lengths is not None:
            tokens = torch.arange(block_kv, device=counts.device)
            if block_map.block_lengths is not None:
                real = tokens < block_map.block_lengths[blocks][..., None]
            elif lengths is None:
                real = (blocks[..., None] < t_n - 1) | (tokens < ragged)
            else:
                sample = torch.div(chunk_rows, heads * t_m, rounding_mode="floor")
                real = blocks[..., None] * block_kv + tokens < lengths[sample][:, None, None]
            mask = real if mask is None else mask & real
        if mask is not None:
            mask = mask.reshape(len(chunk_rows), 1, length * block_kv)
        yield _Chunk(chunk_rows, blocks + first_key_block[chunk_rows, None], mask)
        start = stop


def _scores(queries: Tensor, keys: Tensor, chunk: _Chunk, scale: float) -> Tensor:
    """(R, block_q, C * block_kv) scores, -inf where the mask is False."""
    scores = torch.bmm(queries[chunk.rows] * scale, _gather(keys, chunk.keys).transpose(1, 2))
    if chunk.mask is not None:
        scores.masked_fill_(~chunk.mask, -math.inf)
    return scores


def _gather(blocks: Tensor, index: Tensor) -> Tensor:
    """(all blocks, block, D) and (R, C) to (R, C * block, D)."""
    return blocks.index_select(0, index.flatten()).view(len(index), -1, blocks.shape[-1])


def _scatter_add(blocks: Tensor, index: Tensor, update: Tensor) -> None:
    """The transpose of `_gather`."""
    blocks.index_add_(0, index.flatten(), update.reshape(-1, *blocks.shape[1:]))


def _blocks(tensor: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) to contiguous (B * H * T, block, D) of `dtype`, filled up with zeros."""
    short = -tensor.shape[2] % block
    filled = F.pad(tensor.to(dtype), (0, 0, 0, short))
    return filled.reshape(-1, block, tensor.shape[3])


def _unblocks(blocks: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Inverse of `_blocks` for the (B, H, N, D) `shape`."""
    batch, heads, tokens, width = shape
    whole = blocks.reshape(batch, heads, -1, width)
    return whole[:, :, :tokens].to(dtype)


def _padding(key_lengths: Tensor, key: Tensor) -> Tensor:
    """bool (B, 1, N_kv, 1): True for keys past the length of their sample."""
    return past_length(key_lengths, key.shape[2])[:, None, :, None]


def _safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, zero where the denominator is zero."""
    empty = denominator == 0
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _chunk_size(tensor: Tensor) -> int:
    return _CHUNK_CPU if tensor.device.type == "cpu" else _CHUNK_GPU
