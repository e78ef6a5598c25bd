"""One pass over the keys and values, one over the queries: what routing and the linear branch need.

Proj is linear, so Proj(O^l) is linear attention over V' = V W^T (plus the bias). It is applied to
the block sums, h'_j = h_j W^T: a small product a key block, and none in the attention kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import features, load_square, load_tile, store_square


@triton.jit
def pool_query_block(
    query,
    pooled,
    bh,
    block,
    heads,
    tokens,
    blocks,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean query of a block."""
    tile = load_tile(query, bh // heads, bh % heads, block * BLOCK, BLOCK, P)
    count = tl.minimum(tokens - block * BLOCK, BLOCK)
    mean = tl.sum(tile.to(tl.float32), 0) / count
    columns = tl.arange(0, P)
    place = (tl.zeros([], tl.int64) + bh * blocks + block) * D + columns
    tl.store(pooled + place, mean, mask=columns < D)


@triton.jit
def prepare(
    query,
    key,
    value,
    weight,  # descriptor of Proj as one (D, D) matrix
    lengths,  # int32 (B,)
    pooled_query,  # float32 (B*H, T_m, D)
    pooled_key,  # float32 (B*H, T_n, D)
    h_sums,  # descriptor of h'_j, (D, D) matrices, divided by the block size
    z_sums,  # their z_j: the row after each matrix
    first_bh,
    group_heads,
    heads,
    tokens_q,
    tokens_kv,
    blocks_q,
    blocks,
    POOL: tl.constexpr,
    LINEAR: tl.constexpr,
    PROJ: tl.constexpr,
    LENGTHS: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mean query and key (POOL), h'_j = phi(K_j)^T V_j W^T and z_j (LINEAR) of each block.

    Grid: any number of programs, which share the blocks, so that Proj is read once. The mean
    queries, which only wait for memory, are taken between the keys' products.
    """
    columns = tl.arange(0, P)
    if PROJ:
        w = load_square(weight, 0, P)
    items = group_heads * blocks
    if POOL:
        query_items = group_heads * blocks_q
        items = tl.maximum(items, query_items)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=STAGES):
        if POOL:
            if item < query_items:
                pool_query_block(
                    query,
                    pooled_query,
                    first_bh + item // blocks_q,
                    item % blocks_q,
                    heads,
                    tokens_q,
                    blocks_q,
                    D,
                    P,
                    BLOCK_Q,
                )
        # Rounds without a key block of their own do the last one again: a branch around the
        # products would cost more.
        item = tl.minimum(item, group_heads * blocks - 1)
        bh, block = first_bh + item // blocks, item % blocks
        batch, head = bh // heads, bh % heads
        limit = tokens_kv
        if LENGTHS:
            limit = tl.load(lengths + batch)
        total = tl.zeros([P], tl.float32)
        if LINEAR:
            h = tl.zeros([P, P], tl.float32)
            z = tl.zeros([P], tl.float32)
        for part in tl.static_range(BLOCK // TILE):
            start = block * BLOCK + part * TILE
            valid = start + tl.arange(0, TILE) < limit
            k = load_tile(key, batch, head, start, TILE, P)
            if LENGTHS:
                k = tl.where(valid[:, None], k, 0.0)
            if POOL:
                total += tl.sum(k.to(tl.float32), 0)
            if LINEAR:
                v = load_tile(value, batch, head, start, TILE, P)
                if LENGTHS:
                    v = tl.where(valid[:, None], v, 0.0)
                phi = features(k.to(tl.float32), FEATURE_MAP, D, P)
                phi = tl.where(valid[:, None], phi, 0.0).to(k.dtype)
                h = tl.dot(tl.trans(phi), v, h, input_precision=PRECISION)
                z += tl.sum(phi.to(tl.float32), 0)
        if POOL:
            count = tl.maximum(tl.minimum(limit - block * BLOCK, BLOCK), 1)
            place = (tl.zeros([], tl.int64) + bh * blocks + block) * D + columns
            tl.store(pooled_key + place, total / count, mask=columns < D)
        if LINEAR:
            dtype = z_sums.dtype.element_ty
            h *= 1.0 / BLOCK
            if PROJ:
                h = tl.dot(h.to(w.dtype), tl.trans(w), input_precision=PRECISION)
            store_square(h_sums, item, h.to(dtype), P)
            place = (tl.zeros([], tl.int64) + item) * (D + 1) * D + D * D + columns
            tl.store(z_sums + place, (z * (1.0 / BLOCK)).to(dtype), mask=columns < D)
