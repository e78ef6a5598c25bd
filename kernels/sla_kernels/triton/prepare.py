"""One pass over the keys and values, one over the queries: what routing and the linear branch need.

The linear branch works on projected values: Proj is linear, so Proj(O^l) is linear attention over
V' = V W^T (plus the bias), and the projection costs one small product a key block instead of one a
query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import features, load_tile


@triton.jit
def pool_queries(
    query,
    pooled,  # float32 (B*H, T_m, D)
    heads,
    tokens,
    blocks,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean query of each block. Grid: B*H*T_m."""
    pid = tl.program_id(0)
    bh, block = pid // blocks, pid % blocks
    tile = load_tile(query, bh // heads, bh % heads, block * BLOCK, BLOCK, P)
    count = tl.minimum(tokens - block * BLOCK, BLOCK)
    mean = tl.sum(tile.to(tl.float32), 0) / count
    columns = tl.arange(0, P)
    tl.store(pooled + pid.to(tl.int64) * D + columns, mean, mask=columns < D)


@triton.jit
def prepare_keys(
    key,
    value,
    weight,  # (D, D) of Proj
    lengths,  # int32 (B,)
    pooled,  # float32 (B*H, T_n, D)
    sums,  # (heads of the group, T_n, D + 1, D): h_j and, as the last row, z_j; over the block size
    first_bh,
    group_heads,
    heads,
    tokens,
    blocks,
    POOL: tl.constexpr,
    LINEAR: tl.constexpr,
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
    """Mean key, h_j = phi(K_j)^T V'_j and z_j of each block. Grid: any number of programs, which
    share the blocks, so that Proj is read once and loads run ahead of products."""
    columns = tl.arange(0, P)
    inside = (columns[:, None] < D) & (columns[None, :] < D)
    places = columns[:, None] * D + columns[None, :]
    if PROJ:
        w = tl.load(weight + places, mask=inside, other=0.0)
    for item in tl.range(
        tl.program_id(0), group_heads * blocks, tl.num_programs(0), num_stages=STAGES
    ):
        bh, block = first_bh + item // blocks, item % blocks
        batch, head = bh // heads, bh % heads
        limit = tokens
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
                if PROJ:
                    v = tl.dot(v, tl.trans(w), input_precision=PRECISION).to(v.dtype)
                h = tl.dot(tl.trans(phi), v, h, input_precision=PRECISION)
                z += tl.sum(phi.to(tl.float32), 0)
        if POOL:
            count = tl.maximum(tl.minimum(limit - block * BLOCK, BLOCK), 1)
            place = (tl.zeros([], tl.int64) + bh * blocks + block) * D + columns
            tl.store(pooled + place, total / count, mask=columns < D)
        if LINEAR:
            base = sums + (tl.zeros([], tl.int64) + item) * (D + 1) * D
            dtype = sums.dtype.element_ty
            tl.store(base + places, (h * (1.0 / BLOCK)).to(dtype), mask=inside)
            tl.store(base + D * D + columns, (z * (1.0 / BLOCK)).to(dtype), mask=columns < D)
