"""Exact attention over some blocks, merged with one pooled key and value for each other block.

Shape letters: B batch, H heads, N tokens, D head_dim, T_m query blocks, T_n key blocks, c queries
of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sla_kernels.block_map import MARGINAL, BlockMap, pool_blocks, tokens_in_blocks

# Scores of a chunk: B H c T_n.
_CHUNK_CPU, _CHUNK_GPU = 2**22, 2**26


def merge_pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    sparse: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """O = (exp(L) O^s + sum_b n_b exp(q k_b) v_b) / (exp(L) + sum_b n_b exp(q k_b)).

    b runs over the marginal blocks of the query's row, n_b is the number of their keys that count,
    and k_b (scaled) and v_b are the means over them.

    Args:
        query, key, value: (B, H, N, D).
        sparse: O^s, exact attention over the critical blocks. lse: L, its log-sum-exp, (B, H, N).

    Returns:
        (B, H, N_q, D), dtype of `query`; zero where a row has neither.
    """
    pooled_key = pool_blocks(key, block_map.block_kv, block_map.key_lengths)
    pooled_value = pool_blocks(value, block_map.block_kv, block_map.key_lengths)
    merged: Tensor = _Merge.apply(
        query,
        pooled_key,
        pooled_value,
        sparse,
        lse,
        _log_counts(block_map, pooled_key),
        block_map.labels == MARGINAL,
        block_map.block_q,
        scale,
    )
    return merged


def _log_counts(block_map: BlockMap, pooled: Tensor) -> Tensor:
    """log n_b, (B or 1, 1, 1, T_n); what a block without keys has does not matter."""
    lengths = block_map.key_lengths
    if lengths is None:
        lengths = torch.full((1,), block_map.tokens_kv, device=pooled.device)
    counts = tokens_in_blocks(lengths, block_map.tokens_kv, block_map.block_kv)
    return counts.to(pooled.dtype).log()[:, None, None, :]


class _Merge(torch.autograd.Function):
    """One softmax over the pooled keys and, as one more with the score L, all critical ones.

    The scores are computed once more in the backward: kept, they would be as large as T_n outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sparse: Tensor,
        lse: Tensor,
        bias: Tensor,
        marginal: Tensor,
        block_q: int,
        scale: float,
    ) -> Tensor:
        output = torch.empty_like(sparse)
        total = torch.empty_like(lse)
        for part in _parts(query, key):
            scores = _scores(query[:, :, part], key, bias, marginal, part, block_q, scale)
            total[:, :, part] = torch.logaddexp(lse[:, :, part], scores.logsumexp(dim=-1))
            weights, exact = _weights(scores, lse[:, :, part], total[:, :, part])
            output[:, :, part] = (exact * sparse[:, :, part] + weights @ value).to(output.dtype)
        ctx.save_for_backward(query, key, value, sparse, lse, bias, marginal, total)
        ctx.block_q, ctx.scale = block_q, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sparse, lse, bias, marginal, total = ctx.saved_tensors
        grad_query, grad_sparse = torch.empty_like(query), torch.empty_like(sparse)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        grad_lse = torch.empty_like(lse)
        for part in _parts(query, key):
            scores = _scores(query[:, :, part], key, bias, marginal, part, ctx.block_q, ctx.scale)
            weights, exact = _weights(scores, lse[:, :, part], total[:, :, part])
            grad = grads[0][:, :, part].to(key.dtype)
            of_weights = grad @ value.transpose(-1, -2)
            of_exact = (grad * sparse[:, :, part]).sum(dim=-1, keepdim=True)
            mean = exact * of_exact + (weights * of_weights).sum(dim=-1, keepdim=True)
            grad_value += weights.transpose(-1, -2) @ grad
            of_scores = weights * (of_weights - mean) * ctx.scale
            grad_query[:, :, part] = (of_scores @ key).to(grad_query.dtype)
            grad_key += of_scores.transpose(-1, -2) @ query[:, :, part].to(key.dtype)
            grad_sparse[:, :, part] = (exact * grad).to(grad_sparse.dtype)
            grad_lse[:, :, part] = (exact * (of_exact - mean)).squeeze(-1)
        return grad_query, grad_key, grad_value, grad_sparse, grad_lse, None, None, None, None


def _parts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Chunks of the queries."""
    limit = _CHUNK_CPU if query.device.type == "cpu" else _CHUNK_GPU
    step = max(1, limit // (query.shape[0] * query.shape[1] * key.shape[2]))
    for first in range(0, query.shape[2], step):
        yield slice(first, min(first + step, query.shape[2]))


def _scores(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    marginal: Tensor,
    part: slice,
    block_q: int,
    scale: float,
) -> Tensor:
    """Scores of the pooled keys, counted as the keys that they stand for: (B, H, c, T_n)."""
    rows = torch.arange(part.start, part.stop, device=query.device) // block_q
    scores = query.to(key.dtype) @ key.transpose(-1, -2) * scale + bias
    return scores.masked_fill(~marginal[:, :, rows], -math.inf)


def _weights(scores: Tensor, lse: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the pooled keys, and that of all critical ones together, (B, H, c, 1)."""
    shift = torch.where(total == -math.inf, 0.0, total)[..., None]
    return (scores - shift).exp(), (lse[..., None] - shift).exp()


__all__ = ["merge_pooled"]
