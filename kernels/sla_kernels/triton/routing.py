"""Routing: classes and row tables from pooled queries and keys; column tables from classes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _threshold(bits, wanted):
    """Largest t with at least `wanted` values >= t in each row of unsigned `bits`, bit by bit."""
    t = tl.zeros_like(wanted).to(tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = t | bit
        bit = bit >> 1
        enough = tl.sum((bits >= candidate[:, None]).to(tl.int32), 1) >= wanted
        t = tl.where(enough, candidate, t)
    return t


@triton.jit
def _first(bits, t, wanted):
    """The `wanted` highest values of each row, the lower index first among equals."""
    above = bits > t[:, None]
    equal = bits == t[:, None]
    left = wanted - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))


@triton.jit
def pooled_scores(
    pooled_query,  # float32 (B*H, T_m, D)
    pooled_key,  # float32 (B*H, T_n, D)
    scores,  # float32 (B*H, T_m, T_n)
    blocks_q,
    blocks_kv,
    scale,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Scaled scores in true float32, whatever the user allows products to be rounded to: a rounded
    score would choose other blocks. Grid: B*H*ceil(T_m / TILE)*ceil(T_n / TILE)."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(blocks_kv, TILE)
    tiles_m = tl.cdiv(blocks_q, TILE)
    bh = (pid // (tiles_n * tiles_m)).to(tl.int64)
    i = (pid // tiles_n % tiles_m) * TILE + tl.arange(0, TILE)
    j = (pid % tiles_n) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, CHUNK)
    query = pooled_query + (bh * blocks_q + i[:, None]) * D + d[None, :]
    key = pooled_key + (bh * blocks_kv + j[None, :]) * D + d[:, None]
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, CHUNK):
        known = start + d < D
        q = tl.load(query + start, mask=(i[:, None] < blocks_q) & known[None, :], other=0.0)
        k = tl.load(key + start, mask=(j[None, :] < blocks_kv) & known[:, None], other=0.0)
        total = tl.dot(q, k, total, input_precision="ieee")
    out = scores + (bh * blocks_q + i[:, None]) * blocks_kv + j[None, :]
    inside = (i[:, None] < blocks_q) & (j[None, :] < blocks_kv)
    tl.store(out, total * scale, mask=inside)


@triton.jit
def route(
    scores,  # float32 (B*H, T_m, T_n)
    labels,  # int8 (B*H, T_m, T_n)
    rows,  # int32 (B*H, T_m, width)
    counts,  # int32 (B*H, T_m)
    mask,  # (B*H, T_m, mask_stride): 1 where marginal, else 0, if MASK
    sample_counts,  # int32 (B, 3): T_n, critical and negligible blocks of a row of each sample
    heads,
    blocks_q,
    blocks_kv,
    mask_stride,
    width,
    chosen,
    skipped,
    forced_q,
    forced_kv,
    LENGTHS: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # T_n rounded up to a power of two
):
    """As `block_map.route`, ties included. Grid: B*H*ceil(T_m / ROWS)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(blocks_q, ROWS)
    bh = (pid // tiles).to(tl.int64)
    i = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    known = blocks_kv
    if LENGTHS:
        sample = sample_counts + (bh // heads) * 3
        known = tl.load(sample)
        chosen = tl.load(sample + 1)
        skipped = tl.load(sample + 2)
    row = bh * blocks_q + i
    here = i < blocks_q
    inside = here[:, None] & (j[None, :] < blocks_kv)
    score = tl.load(scores + row[:, None] * blocks_kv + j[None, :], mask=inside, other=0.0)
    score += 0.0  # makes -0.0 and 0.0 equal in their bits too
    score = tl.where(j[None, :] < forced_kv, float("inf"), score)
    # Unsigned integers in the order of the floats; zero for what is no block.
    bits = score.to(tl.uint32, bitcast=True)
    sign: tl.constexpr = 0x80000000
    bits = tl.where(bits >= sign, ~bits, bits | sign)
    valid = j[None, :] < known
    bits = tl.where(valid, bits, 0)

    wanted = tl.zeros([ROWS], tl.int32) + chosen
    critical = valid & _first(bits, _threshold(bits, wanted), wanted)
    critical = valid & (critical | (i[:, None] < forced_q))
    kept = tl.zeros([ROWS], tl.int32) + known - skipped
    negligible = (valid & _first(bits, _threshold(bits, kept), kept)) == 0
    label = tl.where(critical, 1, tl.where(negligible, -1, 0))

    tl.store(labels + row[:, None] * blocks_kv + j[None, :], label.to(tl.int8), mask=inside)
    if MASK:
        marginal = (label == 0).to(mask.dtype.element_ty)
        tl.store(mask + row[:, None] * mask_stride + j[None, :], marginal, mask=inside)
    found = critical.to(tl.int32)
    place = tl.cumsum(found, 1) - 1
    target = rows + row[:, None] * width + place
    tl.store(target, j[None, :] + tl.zeros_like(found), mask=inside & critical)
    tl.store(counts + row, tl.sum(found, 1), mask=here)


@triton.jit
def row_table(
    labels,  # int8 (B*H, T_m, T_n), any strides
    table,  # int32 (B*H, lines, entries): positions of the critical labels of each line, ascending
    counts,  # int32 (B*H, lines)
    lines,
    entries,
    stride_head,
    stride_line,
    stride_entry,
    LINES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Table of the critical blocks of each row, or (strides exchanged) of each column.

    Grid: B*H*ceil(lines / LINES).
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(lines, LINES)
    bh = (pid // tiles).to(tl.int64)
    line = (pid % tiles) * LINES + tl.arange(0, LINES)
    chunk = tl.arange(0, CHUNK)
    source = labels + bh * stride_head + line[:, None].to(tl.int64) * stride_line
    target = table + (bh * lines + line[:, None]) * entries
    count = tl.zeros([LINES], tl.int32)
    for start in range(0, entries, CHUNK):
        entry = start + chunk
        inside = (line[:, None] < lines) & (entry[None, :] < entries)
        label = tl.load(source + entry[None, :].to(tl.int64) * stride_entry, mask=inside, other=0)
        found = (label == 1).to(tl.int32)
        place = count[:, None] + tl.cumsum(found, 1) - 1
        tl.store(target + place, entry[None, :] + tl.zeros_like(found), mask=inside & (found > 0))
        count += tl.sum(found, 1)
    tl.store(counts + bh * lines + line, count, mask=line < lines)


@triton.jit
def longest_first(
    counts,  # int32 (B*H, T)
    order,  # int32 (B*H, T): the lines of each head by falling count
    lines,
    LINES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sort by counting: a line's rank is the number of lines before it. Grid: B*H*ceil(T/LINES)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(lines, LINES)
    bh = (pid // tiles).to(tl.int64)
    line = (pid % tiles) * LINES + tl.arange(0, LINES)
    mine = tl.load(counts + bh * lines + line, mask=line < lines, other=0)
    rank = tl.zeros([LINES], tl.int32)
    for start in range(0, lines, CHUNK):
        other = start + tl.arange(0, CHUNK)
        count = tl.load(counts + bh * lines + other, mask=other < lines, other=-1)
        before = count[None, :] > mine[:, None]
        before |= (count[None, :] == mine[:, None]) & (other[None, :] < line[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(order + bh * lines + rank, line, mask=line < lines)
