"""The forward kernel: both branches and their sum, a program a block of queries (Algorithm 1)."""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import (
    features,
    filling_penalty,
    load_square,
    load_tile,
    program_order,
    safe_inverse,
    store_tile,
)


@triton.jit
def attend_tile(
    q,
    k,
    v,
    highest,
    total,
    out,
    scale,
    limit,
    penalty,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of online softmax over a tile of keys.

    `limit` valid keys in it if MASKED; if RAGGED, `penalty` is added to the keys' scores.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if RAGGED:
        scores += penalty[None, :]
    if MASKED:
        inside = tl.arange(0, k.shape[0]) < limit
        scores = tl.where(inside[None, :], scores, float("-inf"))
        v = tl.where(inside[:, None], v, 0.0)
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    total = total * rescale + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
    return new_highest, total, out


@triton.jit
def forward(
    query,
    key,
    value,
    output,
    bias,  # (D,) of Proj
    lse,  # float32 (B*H, N_q + filling): log2-sum-exp2 of the scaled critical scores
    rows,  # int32 (B*H, T_m, width): critical key blocks of each row, ascending
    counts,  # int32 (B*H, T_m)
    h_sums,  # descriptor of H_i, (D, D) matrices
    z_sums,  # (heads of the group, T_m, D + 1, D): Z_i is the row after H_i
    lengths,  # int32 (B,)
    block_lengths,  # int32 (T_n,)
    first_bh,
    group_heads,
    heads,
    tokens_q,
    tokens_kv,
    blocks_q,
    width,
    long_rows,
    lse_stride,
    scale,  # factor on the scores times log2(e)
    SPARSE: tl.constexpr,
    LINEAR: tl.constexpr,
    BIAS: tl.constexpr,
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """O = O^s + phi(Q) H / (phi(Q) Z) + bias. Grid: heads of the group * T_m * BLOCK_Q / TILE_M."""
    PARTS_Q: tl.constexpr = BLOCK_Q // TILE_M
    PARTS_KV: tl.constexpr = BLOCK_KV // TILE_N
    pid = tl.program_id(0)
    group_bh, block = program_order(pid // PARTS_Q, group_heads, blocks_q, long_rows)
    bh = first_bh + group_bh
    batch, head = bh // heads, bh % heads
    token = block * BLOCK_Q + (pid % PARTS_Q) * TILE_M
    row = bh.to(tl.int64) * blocks_q + block
    q = load_tile(query, batch, head, token, TILE_M, P)
    out = tl.zeros([TILE_M, P], tl.float32)
    tokens = token + tl.arange(0, TILE_M)
    if SPARSE:
        if LENGTHS:
            tokens_kv = tl.load(lengths + batch)
        count = tl.load(counts + row)
        rows += row * width
        last = tl.load(rows + tl.maximum(count - 1, 0))
        # The table ascends, so only its last block can reach past the end of the keys.
        short = (count > 0) & ((last + 1) * BLOCK_KV > tokens_kv)
        full = count - short.to(tl.int32)
        highest = tl.full([TILE_M], float("-inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        upcoming = tl.load(rows)
        for step in tl.range(0, full * PARTS_KV, num_stages=STAGES):
            start = upcoming * BLOCK_KV + (step % PARTS_KV) * TILE_N
            penalty = highest
            if RAGGED:
                penalty = filling_penalty(block_lengths, upcoming, step % PARTS_KV, TILE_N)
            upcoming = tl.load(rows + tl.minimum((step + 1) // PARTS_KV, width - 1))
            k = load_tile(key, batch, head, start, TILE_N, P)
            v = load_tile(value, batch, head, start, TILE_N, P)
            highest, total, out = attend_tile(
                q, k, v, highest, total, out, scale, TILE_N, penalty, False, RAGGED, PRECISION
            )
        if short:
            for part in range(PARTS_KV):
                start = last * BLOCK_KV + part * TILE_N
                if start < tokens_kv:
                    limit = tokens_kv - start
                    k = load_tile(key, batch, head, start, TILE_N, P)
                    v = load_tile(value, batch, head, start, TILE_N, P)
                    highest, total, out = attend_tile(
                        q, k, v, highest, total, out, scale, limit, highest, True, False, PRECISION
                    )
        out = out * safe_inverse(total)[:, None]
        sum_exp = highest + tl.log2(tl.where(count > 0, total, 1.0))
        sum_exp = tl.where(count > 0, sum_exp, float("-inf"))
        tl.store(lse + bh.to(tl.int64) * lse_stride + tokens, sum_exp, mask=tokens < lse_stride)
    if LINEAR:
        columns = tl.arange(0, P)
        index = group_bh * blocks_q + block
        z_sums += index.to(tl.int64) * (D + 1) * D + D * D
        z = tl.load(z_sums + columns, mask=columns < D, other=0.0)
        h = load_square(h_sums, index, P)
        phi = features(q.to(tl.float32), FEATURE_MAP, D, P)
        phi *= safe_inverse(tl.sum(phi * z.to(tl.float32)[None, :], 1))[:, None]
        out = tl.dot(phi.to(h.dtype), h, out, input_precision=PRECISION)
        if BIAS:
            b = tl.load(bias + columns, mask=columns < D, other=0.0)
            out += b.to(tl.float32)[None, :]
    store_tile(output, batch, head, token, out.to(q.dtype), TILE_M, P)
