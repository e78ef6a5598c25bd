"""The backward kernels (Algorithm 2), without atomics: two runs give the same bits.

With G = dO H_i^T, Q^s = phi(Q) / (phi(Q) Z_i) and D^l = rowsum(Q^s * G) = rowsum(dO * O^l), the
linear branch gives dphi(Q) = (G - D^l Z_i^T) / (phi(Q) Z_i), dH_i = Q^s^T dO, dZ_i = -Q^s^T D^l.
The sparse branch's D^s = rowsum(dO * O^s) is what is left of rowsum(dO * (O - bias)), so that O^s
need not be kept. Proj is part of the values V' = V W^T (see prepare.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import (
    LOG2_E,
    features,
    features_backward,
    filling_penalty,
    load_square,
    load_tile,
    program_order,
    safe_inverse,
    store_square,
    store_tile,
)


@triton.jit
def query_tile(
    q,
    grad,
    k,
    v,
    lse,
    delta,
    out,
    scale,
    limit,
    penalty,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ's part from one tile of keys; `limit` and `penalty` as in the forward."""
    if MASKED:
        inside = (tl.arange(0, k.shape[0]) < limit)[:, None]
        k = tl.where(inside, k, 0.0)
        v = tl.where(inside, v, 0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if RAGGED:
        scores += penalty[None, :]
    weights = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        weights = tl.where((tl.arange(0, k.shape[0]) < limit)[None, :], weights, 0.0)
    d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, out, input_precision=PRECISION)


@triton.jit
def backward_queries(
    query,
    key,
    value,
    output,  # pointer: these loads are under way while the copy engine's are waited for
    grad_output,
    grad_query,
    bias,
    lse,
    delta,  # float32 (B*H, N_q + filling), written: D^s
    d_lse,  # likewise: gradient of lse
    rows,
    counts,
    h_sums,  # descriptor of H_i, (D, D) matrices
    z_sums,  # (heads of the group, T_m, D + 1, D): Z_i is the row after H_i
    d_h_sums,  # likewise, written: dH_i
    d_z_sums,  # dZ_i
    d_bias,  # float32 (B*H*T_m, D), written: sum of dO over the block
    lengths,
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
    stride_batch,  # of output
    stride_head,
    stride_token,
    scale_log2,
    scale,
    SPARSE: tl.constexpr,
    LINEAR: tl.constexpr,
    BIAS: tl.constexpr,
    D_LSE: tl.constexpr,
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ, D^s, dH, dZ, and the bias's gradient. Grid: heads of the group * T_m."""
    PARTS_KV: tl.constexpr = BLOCK_KV // TILE_N
    group_bh, block = program_order(tl.program_id(0), group_heads, blocks_q, long_rows)
    bh = first_bh + group_bh
    batch, head = bh // heads, bh % heads
    token = block * BLOCK_Q
    row = bh.to(tl.int64) * blocks_q + block
    tokens = token + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, P)
    output += batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    out = tl.load(
        output + tokens[:, None].to(tl.int64) * stride_token + columns[None, :],
        mask=(tokens[:, None] < tokens_q) & (columns[None, :] < D),
        other=0.0,
    ).to(tl.float32)
    q = load_tile(query, batch, head, token, BLOCK_Q, P)
    grad = load_tile(grad_output, batch, head, token, BLOCK_Q, P)
    if BIAS:
        b = tl.load(bias + columns, mask=columns < D, other=0.0)
        out -= b.to(tl.float32)[None, :]
        total = tl.sum(grad.to(tl.float32), 0)
        tl.store(d_bias + row * D + columns, total, mask=columns < D)
    d_row = tl.sum(grad.to(tl.float32) * out, 1)
    d_query = tl.zeros([BLOCK_Q, P], tl.float32)
    if LINEAR:
        index = group_bh * blocks_q + block
        place = index.to(tl.int64) * (D + 1) * D + D * D + columns
        z = tl.load(z_sums + place, mask=columns < D, other=0.0).to(tl.float32)
        h = load_square(h_sums, index, P)
        x = q.to(tl.float32)
        phi = features(x, FEATURE_MAP, D, P)
        inverse = safe_inverse(tl.sum(phi * z[None, :], 1))[:, None]
        g = tl.dot(grad.to(h.dtype), tl.trans(h), input_precision=PRECISION)
        d_linear = tl.sum(phi * g, 1)[:, None] * inverse
        d_phi = (g - d_linear * z[None, :]) * inverse
        d_query = features_backward(x, phi, d_phi, FEATURE_MAP) * (1.0 / scale)
        phi = phi * inverse
        d_h = tl.dot(tl.trans(phi.to(h.dtype)), grad.to(h.dtype), input_precision=PRECISION)
        dtype = d_z_sums.dtype.element_ty
        store_square(d_h_sums, index, d_h.to(dtype), P)
        d_z = -tl.sum(phi * d_linear, 0)
        tl.store(d_z_sums + place, d_z.to(dtype), mask=columns < D)
        d_row -= tl.sum(d_linear, 1)
    if SPARSE:
        places = bh.to(tl.int64) * lse_stride + tokens
        if D_LSE:
            # A score's share of dlse is its weight: it joins D^s. lse is in units of log2.
            d_sum_exp = tl.load(d_lse + places, mask=tokens < lse_stride, other=0.0)
            d_row -= d_sum_exp * LOG2_E
        tl.store(delta + places, d_row, mask=tokens < lse_stride)
        sum_exp = tl.load(lse + places, mask=tokens < lse_stride, other=0.0)
        if LENGTHS:
            tokens_kv = tl.load(lengths + batch)
        count = tl.load(counts + row)
        rows += row * width
        last = tl.load(rows + tl.maximum(count - 1, 0))
        short = (count > 0) & ((last + 1) * BLOCK_KV > tokens_kv)
        full = count - short.to(tl.int32)
        upcoming = tl.load(rows)
        for step in tl.range(0, full * PARTS_KV, num_stages=STAGES):
            start = upcoming * BLOCK_KV + (step % PARTS_KV) * TILE_N
            penalty = sum_exp
            if RAGGED:
                penalty = filling_penalty(block_lengths, upcoming, step % PARTS_KV, TILE_N)
            upcoming = tl.load(rows + tl.minimum((step + 1) // PARTS_KV, width - 1))
            k = load_tile(key, batch, head, start, TILE_N, P)
            v = load_tile(value, batch, head, start, TILE_N, P)
            d_query = query_tile(
                q,
                grad,
                k,
                v,
                sum_exp,
                d_row,
                d_query,
                scale_log2,
                TILE_N,
                penalty,
                False,
                RAGGED,
                PRECISION,
            )
        if short:
            for part in range(PARTS_KV):
                start = last * BLOCK_KV + part * TILE_N
                if start < tokens_kv:
                    k = load_tile(key, batch, head, start, TILE_N, P)
                    v = load_tile(value, batch, head, start, TILE_N, P)
                    d_query = query_tile(
                        q,
                        grad,
                        k,
                        v,
                        sum_exp,
                        d_row,
                        d_query,
                        scale_log2,
                        tokens_kv - start,
                        sum_exp,
                        True,
                        False,
                        PRECISION,
                    )
    d_query = d_query * scale
    store_tile(grad_query, batch, head, token, d_query.to(q.dtype), BLOCK_Q, P)


@triton.jit
def backward_keys(
    query,
    key,
    value,
    grad_output,
    grad_key,
    grad_value,
    lse,  # descriptors of (1, TILE_M) tiles
    delta,
    columns_table,  # int32 (B*H, T_n, T_m): query blocks that hold a key block as critical
    counts,  # int32 (B*H, T_n)
    order,  # int32 (B*H, T_n): key blocks, the longest columns first
    lengths,
    block_lengths,  # int32 (T_n,)
    first_bh,
    group_heads,
    heads,
    blocks_q,
    blocks_kv,
    long_columns,
    scale_log2,
    scale,
    ADD: tl.constexpr,
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sparse branch's dK and dV, added to what is there if ADD.

    Grid: heads of the group * T_n.
    """
    PARTS_Q: tl.constexpr = BLOCK_Q // TILE_M
    group_bh, rank = program_order(tl.program_id(0), group_heads, blocks_kv, long_columns)
    bh = first_bh + group_bh
    batch, head = bh // heads, bh % heads
    line = bh.to(tl.int64) * blocks_kv
    block = tl.load(order + line + rank)
    line += block
    token = block * BLOCK_KV
    k = load_tile(key, batch, head, token, BLOCK_KV, P)
    v = load_tile(value, batch, head, token, BLOCK_KV, P)
    d_key = tl.zeros([BLOCK_KV, P], tl.float32)
    d_value = tl.zeros([BLOCK_KV, P], tl.float32)
    count = tl.load(counts + line)
    columns_table += line * blocks_q
    if RAGGED:
        penalty = filling_penalty(block_lengths, block, 0, BLOCK_KV)
    upcoming = tl.load(columns_table)
    for step in tl.range(0, count * PARTS_Q, num_stages=STAGES):
        start = upcoming * BLOCK_Q + (step % PARTS_Q) * TILE_M
        upcoming = tl.load(columns_table + tl.minimum((step + 1) // PARTS_Q, blocks_q - 1))
        q = load_tile(query, batch, head, start, TILE_M, P)
        grad = load_tile(grad_output, batch, head, start, TILE_M, P)
        # Past the end all four are zero, and so is what they add.
        sum_exp = lse.load([bh, start]).reshape([TILE_M])
        d_row = delta.load([bh, start]).reshape([TILE_M])
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        if RAGGED:
            scores += penalty[:, None]
        weights = tl.exp2(scores * scale_log2 - sum_exp[None, :])
        d_scores = (weights * (d_weights - d_row[None, :])).to(k.dtype)
        d_value = tl.dot(weights.to(v.dtype), grad, d_value, input_precision=PRECISION)
        d_key = tl.dot(d_scores, q, d_key, input_precision=PRECISION)
    d_key = d_key * scale
    if ADD:
        d_key += load_tile(grad_key, batch, head, token, BLOCK_KV, P).to(tl.float32)
        d_value += load_tile(grad_value, batch, head, token, BLOCK_KV, P).to(tl.float32)
    if LENGTHS:
        # Padding may hold anything, its gradient is zero. (Past the end nothing is written, and a
        # select without need makes ptxas serialise the loop's products.)
        valid = (token + tl.arange(0, BLOCK_KV) < tl.load(lengths + batch))[:, None]
        d_key = tl.where(valid, d_key, 0.0)
        d_value = tl.where(valid, d_value, 0.0)
    store_tile(grad_key, batch, head, token, d_key.to(k.dtype), BLOCK_KV, P)
    store_tile(grad_value, batch, head, token, d_value.to(v.dtype), BLOCK_KV, P)


@triton.jit
def backward_linear(
    key,
    value,
    grad_key,
    grad_value,
    weight,  # descriptor of Proj as one (D, D) matrix
    d_h_sums,  # descriptor of dh_j, (D, D) matrices
    d_z_sums,  # descriptor of rows of the same; dz_j is the one after the matrix
    d_weight,  # float32 (programs, D, D), added to
    lengths,
    first_bh,
    group_heads,
    heads,
    tokens_kv,
    blocks_kv,
    PROJ: tl.constexpr,
    LENGTHS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The linear branch's dK and dV, and dW = sum over key blocks of dV'_j^T V_j, a partial sum a
    program. Grid: any number of programs."""
    PARTS: tl.constexpr = BLOCK_KV // TILE
    pid = tl.program_id(0)
    columns = tl.arange(0, P)
    inside = (columns[:, None] < D) & (columns[None, :] < D)
    places = columns[:, None] * D + columns[None, :]
    if PROJ:
        target = d_weight + pid.to(tl.int64) * D * D + places
        total = tl.load(target, mask=inside, other=0.0)
        w = load_square(weight, 0, P)
    tiles = blocks_kv * PARTS
    for item in tl.range(pid, group_heads * tiles, tl.num_programs(0), num_stages=STAGES):
        group_bh, tile = item // tiles, item % tiles
        bh, block = first_bh + group_bh, tile // PARTS
        batch, head = bh // heads, bh % heads
        token = tile * TILE
        limit = tokens_kv
        if LENGTHS:
            limit = tl.load(lengths + batch)
        valid = (token + tl.arange(0, TILE) < limit)[:, None]
        k = load_tile(key, batch, head, token, TILE, P)
        v = load_tile(value, batch, head, token, TILE, P)
        index = group_bh * blocks_kv + block
        d_h = load_square(d_h_sums, index, P)
        d_z = d_z_sums.load([index, D, 0]).reshape([P])
        if LENGTHS:
            k = tl.where(valid, k, 0.0)
            v = tl.where(valid, v, 0.0)
        # dV'_j W and V'_j dh_j^T share dh_j W.
        g = d_h
        if PROJ:
            g = tl.dot(d_h, w.to(d_h.dtype), input_precision=PRECISION).to(d_h.dtype)
        x = k.to(tl.float32)
        phi = features(x, FEATURE_MAP, D, P)
        d_phi = tl.dot(v.to(g.dtype), tl.trans(g), input_precision=PRECISION)
        d_phi += d_z.to(tl.float32)[None, :]
        d_key = features_backward(x, phi, d_phi, FEATURE_MAP)
        if LENGTHS:
            d_key = tl.where(valid, d_key, 0.0)
        store_tile(grad_key, batch, head, token, d_key.to(k.dtype), TILE, P)
        # Keys that are none add nothing to dW.
        phi = tl.where(valid, phi, 0.0)
        phi = phi.to(d_h.dtype)
        d_value = tl.dot(phi, g, input_precision=PRECISION)
        store_tile(grad_value, batch, head, token, d_value.to(v.dtype), TILE, P)
        if PROJ:
            d_projected = tl.dot(phi, d_h, input_precision=PRECISION).to(v.dtype)
            total = tl.dot(tl.trans(d_projected), v, total, input_precision=PRECISION)
    if PROJ:
        tl.store(target, total, mask=inside)
