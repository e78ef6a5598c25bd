"""Kernels of sparse pooled attention: the pooled keys join a softmax over the critical ones.

The sparse branch's output and log-sum-exp are where online softmax over the pooled keys starts.
Every query meets every pooled key; those of blocks that are not marginal get no weight. Two passes
in the backward, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import LOG2_E, load_tile, safe_inverse, store_tile
from sla_kernels.triton.prepare import mean_rows

# Finite, so that no difference is NaN; what has a score of _NOTHING has no weight beside _LEAST.
_NOTHING = tl.constexpr(-1e30)
_LEAST = tl.constexpr(-1e20)


@triton.jit
def pool_keys(
    key,
    value,
    lengths,  # int32 (B,)
    pooled_key,  # (B*H, T_n, D)
    pooled_value,
    heads,
    tokens_kv,
    blocks_kv,
    LENGTHS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Mean key and value of each block. Grid: B*H*T_n."""
    place = tl.program_id(0)
    bh, block = place // blocks_kv, place % blocks_kv
    batch, head, token = bh // heads, bh % heads, block * BLOCK_KV
    k = load_tile(key, batch, head, token, BLOCK_KV, P)
    v = load_tile(value, batch, head, token, BLOCK_KV, P)
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
        valid = (token + tl.arange(0, BLOCK_KV) < tokens_kv)[:, None]
        k = tl.where(valid, k, 0.0)
        v = tl.where(valid, v, 0.0)
    count = tl.maximum(tl.minimum(tokens_kv - token, BLOCK_KV), 1)
    mean_rows(k, count, pooled_key, place, D, P)
    mean_rows(v, count, pooled_value, place, D, P)


@triton.jit
def log_counts(labels, first, blocks_kv, tokens_kv, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr):
    """What is added to the scores of a tile of pooled keys: log2 of how many keys each is for."""
    blocks = first + tl.arange(0, TILE_N)
    label = tl.load(labels + blocks, mask=blocks < blocks_kv, other=1)
    count = tl.minimum(tokens_kv - blocks * BLOCK_KV, BLOCK_KV)
    logarithm = tl.log2(tl.maximum(count, 1).to(tl.float32))
    return tl.where((label == 0) & (count > 0), logarithm, _NOTHING)


@triton.jit
def merge(
    query,
    pooled_key,
    pooled_value,
    sparse,  # O^s
    output,
    lse,  # float32 (B*H, N_q): log-sum-exp of the scaled critical scores
    total_lse,  # float32 (B*H, N_q + filling), written: log2-sum-exp2 with the pooled ones
    labels,  # int8 (B*H, T_m, T_n)
    lengths,
    heads,
    tokens_q,
    tokens_kv,
    blocks_q,
    blocks_kv,
    lse_stride,  # of total_lse
    scale,  # factor on the scores times log2(e)
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output, and the log-sum-exp of all scores (0 for a row of none). Grid: B*H*T_m*parts."""
    PARTS_Q: tl.constexpr = BLOCK_Q // TILE_M
    pid = tl.program_id(0)
    row = pid // PARTS_Q
    bh, block = row // blocks_q, row % blocks_q
    batch, head = bh // heads, bh % heads
    token = block * BLOCK_Q + (pid % PARTS_Q) * TILE_M
    tokens = token + tl.arange(0, TILE_M)
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
    labels += row.to(tl.int64) * blocks_kv
    q = load_tile(query, batch, head, token, TILE_M, P)
    exact = load_tile(sparse, batch, head, token, TILE_M, P).to(tl.float32)
    places = lse + bh.to(tl.int64) * tokens_q + tokens
    sum_exp = tl.load(places, mask=tokens < tokens_q, other=0.0) * LOG2_E
    highest = tl.maximum(sum_exp, _LEAST)
    total = tl.exp2(sum_exp - highest)
    out = exact * total[:, None]
    for first in tl.range(0, blocks_kv, TILE_N, num_stages=STAGES):
        bias = log_counts(labels, first, blocks_kv, tokens_kv, BLOCK_KV, TILE_N)
        k = load_tile(pooled_key, batch, head, first, TILE_N, P)
        v = load_tile(pooled_value, batch, head, first, TILE_N, P)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
        highest = new_highest
    out = out * safe_inverse(total)[:, None]
    store_tile(output, batch, head, token, out.to(q.dtype), TILE_M, P)
    total = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(total_lse + bh.to(tl.int64) * lse_stride + tokens, total, mask=tokens < lse_stride)


@triton.jit
def merge_backward_queries(
    query,
    pooled_key,
    pooled_value,
    sparse,
    output,
    grad_output,
    grad_query,  # written, as the next two
    grad_sparse,
    grad_lse,  # float32 (B*H, N_q)
    delta,  # float32 (B*H, N_q + filling), written: rowsum(dO * O)
    lse,
    total_lse,
    labels,
    lengths,
    heads,
    tokens_q,
    tokens_kv,
    blocks_q,
    blocks_kv,
    lse_stride,
    scale_log2,
    scale,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of query, O^s and its log-sum-exp. Grid: B*H*T_m*parts."""
    PARTS_Q: tl.constexpr = BLOCK_Q // TILE_M
    pid = tl.program_id(0)
    row = pid // PARTS_Q
    bh, block = row // blocks_q, row % blocks_q
    batch, head = bh // heads, bh % heads
    token = block * BLOCK_Q + (pid % PARTS_Q) * TILE_M
    tokens = token + tl.arange(0, TILE_M)
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
    labels += row.to(tl.int64) * blocks_kv
    q = load_tile(query, batch, head, token, TILE_M, P)
    grad = load_tile(grad_output, batch, head, token, TILE_M, P)
    wide = grad.to(tl.float32)
    d_row = tl.sum(wide * load_tile(output, batch, head, token, TILE_M, P).to(tl.float32), 1)
    of_exact = tl.sum(wide * load_tile(sparse, batch, head, token, TILE_M, P).to(tl.float32), 1)
    real = tokens < tokens_q
    places = bh.to(tl.int64) * tokens_q + tokens
    filled = bh.to(tl.int64) * lse_stride + tokens
    total = tl.load(total_lse + filled, mask=tokens < lse_stride, other=0.0)
    exact = tl.exp2(tl.load(lse + places, mask=real, other=0.0) * LOG2_E - total)
    tl.store(delta + filled, d_row, mask=tokens < lse_stride)
    tl.store(grad_lse + places, exact * (of_exact - d_row), mask=real)
    store_tile(grad_sparse, batch, head, token, (wide * exact[:, None]).to(q.dtype), TILE_M, P)
    d_query = tl.zeros([TILE_M, P], tl.float32)
    for first in tl.range(0, blocks_kv, TILE_N, num_stages=STAGES):
        bias = log_counts(labels, first, blocks_kv, tokens_kv, BLOCK_KV, TILE_N)
        k = load_tile(pooled_key, batch, head, first, TILE_N, P)
        v = load_tile(pooled_value, batch, head, first, TILE_N, P)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + bias[None, :]
        weights = tl.exp2(scores - total[:, None])
        d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - d_row[:, None])
        d_query = tl.dot(d_scores.to(k.dtype), k, d_query, input_precision=PRECISION)
    store_tile(grad_query, batch, head, token, (d_query * scale).to(q.dtype), TILE_M, P)


@triton.jit
def merge_backward_keys(
    query,
    pooled_key,
    pooled_value,
    grad_output,
    total_lse,  # descriptors of (1, TILE_M) tiles
    delta,
    grad_keys,  # (splits, B*H, T_n, D), written. In bfloat16: see kernels/NOTES.md
    grad_values,
    labels,
    lengths,
    heads,
    tokens_kv,
    blocks_q,
    blocks_kv,
    all_heads,  # B*H
    steps,  # query tiles of a split
    scale_log2,
    scale,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of pooled keys and values from a part of the queries.

    Grid: splits * B*H * ceil(T_n / TILE_N).
    """
    PARTS_Q: tl.constexpr = BLOCK_Q // TILE_M
    pid = tl.program_id(0)
    tiles = tl.cdiv(blocks_kv, TILE_N)
    first = (pid % tiles) * TILE_N
    bh, split = pid // tiles % all_heads, pid // tiles // all_heads
    batch, head = bh // heads, bh % heads
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
    labels += bh.to(tl.int64) * blocks_q * blocks_kv
    k = load_tile(pooled_key, batch, head, first, TILE_N, P)
    v = load_tile(pooled_value, batch, head, first, TILE_N, P)
    d_key = tl.zeros([TILE_N, P], tl.float32)
    d_value = tl.zeros([TILE_N, P], tl.float32)
    end = tl.minimum((split + 1) * steps, blocks_q * PARTS_Q)
    for step in tl.range(split * steps, end, num_stages=STAGES):
        line = labels + (step // PARTS_Q) * blocks_kv
        bias = log_counts(line, first, blocks_kv, tokens_kv, BLOCK_KV, TILE_N)
        start = step * TILE_M
        q = load_tile(query, batch, head, start, TILE_M, P)
        grad = load_tile(grad_output, batch, head, start, TILE_M, P)
        # Past the end q, grad and delta are zero, and so is what they add.
        sum_exp = total_lse.load([bh, start]).reshape([TILE_M])
        d_row = delta.load([bh, start]).reshape([TILE_M])
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 + bias[:, None]
        d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        weights = tl.exp2(scores - sum_exp[None, :])
        d_scores = (weights * (d_weights - d_row[None, :])).to(k.dtype)
        d_value = tl.dot(weights.to(v.dtype), grad, d_value, input_precision=PRECISION)
        d_key = tl.dot(d_scores, q, d_key, input_precision=PRECISION)
    dtype = grad_keys.dtype
    store_tile(grad_keys, split, bh, first, (d_key * scale).to(dtype), TILE_N, P)
    store_tile(grad_values, split, bh, first, d_value.to(dtype), TILE_N, P)


@triton.jit
def spread(
    grad_keys,  # (splits, B*H, T_n, D)
    grad_values,
    grad_key,
    grad_value,
    lengths,
    heads,
    tokens_kv,
    blocks_kv,
    all_heads,
    SPLITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Each key of a block has the same share of its mean's gradient. Grid: B*H*T_n."""
    place = tl.program_id(0)
    bh, block = place // blocks_kv, place % blocks_kv
    batch, head, token = bh // heads, bh % heads, block * BLOCK_KV
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
    columns = tl.arange(0, P)
    d_key = tl.zeros([P], tl.float32)
    d_value = tl.zeros([P], tl.float32)
    for split in tl.static_range(SPLITS):
        places = (place + split * all_heads * blocks_kv).to(tl.int64) * D + columns
        d_key += tl.load(grad_keys + places, mask=columns < D, other=0.0).to(tl.float32)
        d_value += tl.load(grad_values + places, mask=columns < D, other=0.0).to(tl.float32)
    count = tl.maximum(tl.minimum(tokens_kv - token, BLOCK_KV), 1)
    share = tl.where(token + tl.arange(0, BLOCK_KV) < tokens_kv, 1.0 / count, 0.0)[:, None]
    dtype = grad_key.dtype
    store_tile(grad_key, batch, head, token, (share * d_key[None, :]).to(dtype), BLOCK_KV, P)
    store_tile(grad_value, batch, head, token, (share * d_value[None, :]).to(dtype), BLOCK_KV, P)
