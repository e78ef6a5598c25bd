"""One pass over the keys and values, one over the queries: what routing and the linear branch need.

Proj is linear, so Proj(O^l) is linear attention over V' = V W^T (plus the bias). It is applied to
the block sums, h'_j = h_j W^T: a small product a key block, and none in the attention kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import features, load_square, load_tile, store_square


@triton.jit
def mean_rows(tile, count, pooled, place, D: tl.constexpr, P: tl.constexpr):
    """Store the sum of a tile's rows over count."""
    mean = tl.sum(tile.to(tl.float32), 0) / count
    columns = tl.arange(0, P)
    tl.store(pooled + place.to(tl.int64) * D + columns, mean, mask=columns < D)


@triton.jit
def pool(
    query,
    key,
    lengths,  # int32 (B,)
    pooled_query,  # float32 (B*H, T_m, D)
    pooled_key,  # float32 (B*H, T_n, D)
    query_programs,
    heads,
    tokens_q,
    tokens_kv,
    blocks_q,
    blocks_kv,
    LENGTHS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Mean query and mean key of each block. Grid: B*H*(T_m + T_n)."""
    pid = tl.program_id(0)
    if pid < query_programs:
        bh, block = pid // blocks_q, pid % blocks_q
        q = load_tile(query, bh // heads, bh % heads, block * BLOCK_Q, BLOCK_Q, P)
        count = tl.minimum(tokens_q - block * BLOCK_Q, BLOCK_Q)
        mean_rows(q, count, pooled_query, pid, D, P)
    else:
        place = pid - query_programs
        bh, block = place // blocks_kv, place % blocks_kv
        k = load_tile(key, bh // heads, bh % heads, block * BLOCK_KV, BLOCK_KV, P)
        if LENGTHS:
            tokens_kv = tl.load(lengths + bh // heads)
            valid = block * BLOCK_KV + tl.arange(0, BLOCK_KV) < tokens_kv
            k = tl.where(valid[:, None], k, 0.0)
        count = tl.maximum(tl.minimum(tokens_kv - block * BLOCK_KV, BLOCK_KV), 1)
        mean_rows(k, count, pooled_key, place, D, P)


@triton.jit
def prepare(
    key,
    value,
    weight,  # descriptor of Proj as one (D, D) matrix
    lengths,  # int32 (B,)
    h_sums,  # descriptor of h'_j, (D, D) matrices, divided by the block size
    z_sums,  # (heads of the group, T_n, D + 1, D): z_j, likewise, is the row after h'_j
    first_bh,
    group_heads,
    heads,
    tokens,
    blocks,
    PROJ: tl.constexpr,
    LENGTHS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h'_j = phi(K_j)^T V_j W^T and z_j of each block. Grid: any number of programs, which share
    the blocks, so that Proj is read once."""
    columns = tl.arange(0, P)
    if PROJ:
        w = load_square(weight, 0, P)
    items = group_heads * blocks
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=STAGES):
        bh, block = first_bh + item // blocks, item % blocks
        batch, head = bh // heads, bh % heads
        limit = tokens
        if LENGTHS:
            limit = tl.load(lengths + batch)
        h = tl.zeros([P, P], tl.float32)
        z = tl.zeros([P], tl.float32)
        for part in tl.static_range(BLOCK // TILE):
            start = block * BLOCK + part * TILE
            valid = start + tl.arange(0, TILE) < limit
            k = load_tile(key, batch, head, start, TILE, P)
            v = load_tile(value, batch, head, start, TILE, P)
            if LENGTHS:
                k = tl.where(valid[:, None], k, 0.0)
                v = tl.where(valid[:, None], v, 0.0)
            phi = features(k.to(tl.float32), FEATURE_MAP, D, P)
            phi = tl.where(valid[:, None], phi, 0.0).to(k.dtype)
            h = tl.dot(tl.trans(phi), v, h, input_precision=PRECISION)
            z += tl.sum(phi.to(tl.float32), 0)
        dtype = z_sums.dtype.element_ty
        h *= 1.0 / BLOCK
        if PROJ:
            h = tl.dot(h.to(w.dtype), tl.trans(w), input_precision=PRECISION)
        store_square(h_sums, item, h.to(dtype), P)
        place = (tl.zeros([], tl.int64) + item) * (D + 1) * D + D * D + columns
        tl.store(z_sums + place, (z * (1.0 / BLOCK)).to(dtype), mask=columns < D)
