"""Sums of block quantities over the marginal blocks, as a matrix product with the 0/1 mask.

H_i = sum over marginal j of h_j is M h, with M the T_m x T_n mask and h flattened to a row a block:
one product on the tensor cores, whatever the fractions. The backward's dh_j, a sum over the rows
that hold j as marginal, is M^T dH.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def marginal_mask(
    labels,  # int8 (B*H*T_m, T_n)
    mask,  # (B*H*T_m, stride): 1 where the label is 0
    blocks_kv,
    stride,
    COLUMNS: tl.constexpr,
):
    """Grid: B*H*T_m."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, blocks_kv, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        label = tl.load(labels + row * blocks_kv + j, mask=j < blocks_kv, other=1)
        tl.store(
            mask + row * stride + j, (label == 0).to(mask.dtype.element_ty), mask=j < blocks_kv
        )


@triton.jit
def aggregate(
    mask,  # descriptor of (1, M, K) tiles of (B*H, T_m, T_n), or of (1, K, M) if TRANSPOSED
    parts,  # descriptor of (1, BLOCK_K, BLOCK_N) tiles of (heads of the group, K, width)
    sums,  # (heads of the group, M, width)
    first_bh,
    rows,  # M: T_m, or T_n if TRANSPOSED
    inner,  # K
    width,
    factor,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums = factor * M parts.

    Grid: heads of the group * ceil(width / BLOCK_N) * ceil(M / BLOCK_M), the last fastest, so that
    a strip of `parts` is read from memory once.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    tile_m, strip = pid % tiles_m, pid // tiles_m
    tile_n, group_head = strip % tiles_n, strip // tiles_n
    bh = first_bh + group_head
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, inner, BLOCK_K, num_stages=STAGES):
        if TRANSPOSED:
            marginal = mask.load([bh, start, tile_m * BLOCK_M]).reshape([BLOCK_K, BLOCK_M])
            marginal = tl.trans(marginal)
        else:
            marginal = mask.load([bh, tile_m * BLOCK_M, start]).reshape([BLOCK_M, BLOCK_K])
        part = parts.load([group_head, start, tile_n * BLOCK_N]).reshape([BLOCK_K, BLOCK_N])
        total = tl.dot(marginal, part, total, input_precision=PRECISION)
    row = group_head.to(tl.int64) * rows + m[:, None]
    out = sums + row * width + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < width)
    tl.store(out, (total * factor).to(sums.dtype.element_ty), mask=inside)
