"""The sparse branch's forward in FP8: rounding to e4m3, and attention over the rounded tensors.

The numbers are those of `sla_kernels.low_bit`; constants and letters as in `common`. The tensor
cores take FP8's second operand only with the summed dimension contiguous, so V is written
transposed, tokens last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sla_kernels.triton.common import filling_penalty, load_tile, safe_inverse, store_tile

E4M3_MAX = tl.constexpr(448.0)
LOG2_E4M3_MAX = tl.constexpr(8.807354922057604)
SMALLEST = tl.constexpr(2.0**-100)  # as `low_bit._SMALLEST`


@triton.jit
def to_e4m3(x, BY_HAND: tl.constexpr):
    """float32 in [-448, 448], to the nearest e4m3, ties to even.

    BY_HAND: round to numbers of e4m3 before the conversion. Triton's interpreter needs it: its own
    rounding loses carries (125.3 becomes 64).
    """
    if BY_HAND:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        normal = (bits & -0x100000).to(tl.float32, bitcast=True)
        grid = 24576.0  # 1.5 * 2^14: float32 has steps of 2^-9 there, as e4m3 has below 2^-6
        x = tl.where(tl.abs(x) < 2.0**-6, (x + grid) - grid, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def e4m3_scales(largest):
    """Scales and their inverses of blocks with these largest magnitudes."""
    small = largest < SMALLEST
    largest = tl.where(small, E4M3_MAX, largest)
    return tl.math.div_rn(largest, E4M3_MAX), tl.math.div_rn(E4M3_MAX, largest)


@triton.jit
def valid_keys(
    lengths,
    block_lengths,
    batch,
    block,
    tokens_kv,
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys of a block count."""
    if RAGGED:
        return tl.load(block_lengths + block)
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
    return tl.minimum(tokens_kv - block * BLOCK, BLOCK)


@triton.jit
def channel_maxima(
    value,
    maxima,  # float32 (B*H, D), zeros: becomes the largest magnitude of each channel
    lengths,  # int32 (B,)
    block_lengths,  # int32 (T_n,)
    heads,
    tokens_kv,
    blocks_kv,
    programs,  # of a head
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Largest magnitudes of V over the keys that count. Grid: B*H * programs."""
    pid = tl.program_id(0)
    bh = pid // programs
    batch, head = bh // heads, bh % heads
    highest = tl.zeros([P], tl.float32)
    for block in tl.range(pid % programs, blocks_kv, programs, num_stages=STAGES):
        valid = valid_keys(
            lengths, block_lengths, batch, block, tokens_kv, LENGTHS, RAGGED, BLOCK_KV
        )
        v = load_tile(value, batch, head, block * BLOCK_KV, BLOCK_KV, P).to(tl.float32)
        v = tl.where(tl.arange(0, BLOCK_KV)[:, None] < valid, tl.abs(v), 0.0)
        highest = tl.maximum(highest, tl.max(v, 0))
    columns = tl.arange(0, P)
    tl.atomic_max(maxima + bh * D + columns, highest, mask=columns < D, sem="relaxed")


# With one token, or one block, as a constant Triton 3.6 writes garbage for the tile's zeros.
@triton.jit(do_not_specialize=["tokens_kv", "blocks_kv"])
def quantise(
    key,
    value,
    k_rounded,  # descriptor of (B*H, N_kv, D), (BLOCK_KV, P) tiles
    v_rounded,  # descriptor of (B*H, D, N_kv + filling), (P, BLOCK_KV) tiles
    k_scales,  # float32 (B*H, T_n)
    v_scales,  # float32 (B*H, D)
    maxima,  # of `channel_maxima`
    lengths,
    block_lengths,
    heads,
    tokens_kv,
    blocks_kv,
    all_blocks,  # B*H * T_n
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """Rounded K and V^T with their scales. Grid: B*H * T_n for K, as many more for V.

    Keys that do not count become zeros, and so do all places past the end.
    """
    pid = tl.program_id(0)
    index = pid % all_blocks
    bh, block = index // blocks_kv, index % blocks_kv
    batch, head = bh // heads, bh % heads
    start = block * BLOCK_KV
    valid = valid_keys(lengths, block_lengths, batch, block, tokens_kv, LENGTHS, RAGGED, BLOCK_KV)
    inside = tl.arange(0, BLOCK_KV)[:, None] < valid
    if pid < all_blocks:
        k = load_tile(key, batch, head, start, BLOCK_KV, P).to(tl.float32)
        k = tl.where(inside, k, 0.0)
        k_scale, k_inverse = e4m3_scales(tl.max(tl.abs(k)))
        tl.store(k_scales + index, k_scale)
        k = to_e4m3(k * k_inverse, BY_HAND)
        k_rounded.store([bh, start, 0], k.reshape([1, BLOCK_KV, P]))
    else:
        columns = tl.arange(0, P)
        largest = tl.load(maxima + bh * D + columns, mask=columns < D, other=0.0)
        scales, inverses = e4m3_scales(largest)
        if block == 0:
            tl.store(v_scales + bh * D + columns, scales, mask=columns < D)
        v = load_tile(value, batch, head, start, BLOCK_KV, P).to(tl.float32)
        v = tl.where(inside, v, 0.0)
        v = tl.trans(to_e4m3(v * inverses[None, :], BY_HAND))
        v_rounded.store([bh, 0, start], v.reshape([1, P, BLOCK_KV]))


@triton.jit
def attend_tile(
    q, k, v, highest, total, out, factor, penalty, RAGGED: tl.constexpr, BY_HAND: tl.constexpr
):
    """One step of online softmax over a tile of keys; v is (P, keys).

    Weights are 448 times what they are relative to the highest score, and so are `total` and `out`.
    If RAGGED, `penalty` is added to the keys' scores.
    """
    scores = tl.dot(q, tl.trans(k))
    if RAGGED:
        scores = scores * factor + penalty[None, :]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - (new_highest - LOG2_E4M3_MAX)[:, None])
    else:
        new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - (new_highest - LOG2_E4M3_MAX)[:, None])
    rescale = tl.exp2(highest - new_highest)
    total = total * rescale + tl.sum(weights, 1)
    if BY_HAND:  # the conversion of the GPU saturates
        weights = tl.minimum(weights, E4M3_MAX)
    # A sum of its own for each tile, added in float32: the tensor cores add FP8's products with
    # fewer bits, and over many tiles what they cut off would add up.
    part = tl.dot(to_e4m3(weights, BY_HAND), tl.trans(v))
    return new_highest, total, out * rescale[:, None] + part


@triton.jit
def forward(
    query,
    key,  # descriptors of what `quantise` wrote
    value,
    output,
    k_scales,
    v_scales,
    lse,  # float32 (B*H, N_q + filling): log2-sum-exp2 of the scaled critical scores
    rows,  # int32 (B*H, T_m, width): critical key blocks of each row, ascending
    counts,  # int32 (B*H, T_m)
    lengths,  # int32 (B,)
    block_lengths,  # int32 (T_n,)
    heads,
    tokens_kv,
    blocks_q,
    blocks_kv,
    width,
    lse_stride,
    scale,  # factor on the scores times log2(e)
    LENGTHS: tl.constexpr,
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """O^s and its log-sum-exp. Grid: B*H * T_m * BLOCK_Q / TILE_M. As `forward.forward`."""
    PARTS_Q: tl.constexpr = BLOCK_Q // TILE_M
    PARTS_KV: tl.constexpr = BLOCK_KV // TILE_N
    pid = tl.program_id(0)
    row = pid // PARTS_Q
    bh, block = row // blocks_q, row % blocks_q
    batch, head = bh // heads, bh % heads
    token = block * BLOCK_Q + (pid % PARTS_Q) * TILE_M
    # Q is rounded here, with the scale of its whole block. Past its end the tile holds zeros.
    q = load_tile(query, batch, head, token, TILE_M, P).to(tl.float32)
    largest = tl.max(tl.abs(q))
    for other in tl.static_range(1, PARTS_Q):
        other_token = block * BLOCK_Q + ((pid + other) % PARTS_Q) * TILE_M
        rest = load_tile(query, batch, head, other_token, TILE_M, P).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(rest)))
    q_scale, q_inverse = e4m3_scales(largest)
    q = to_e4m3(q * q_inverse, BY_HAND)
    scale *= q_scale
    if LENGTHS:
        tokens_kv = tl.load(lengths + batch)
    count = tl.load(counts + row)
    rows += row.to(tl.int64) * width
    k_scales += bh * blocks_kv
    last = tl.load(rows + tl.maximum(count - 1, 0))
    # The table ascends, so only its last block can reach past the end of the keys.
    short = (count > 0) & ((last + 1) * BLOCK_KV > tokens_kv)
    full = count - short.to(tl.int32)
    highest = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    out = tl.zeros([TILE_M, P], tl.float32)
    upcoming = tl.load(rows)
    for step in tl.range(0, full * PARTS_KV, num_stages=STAGES):
        start = upcoming * BLOCK_KV + (step % PARTS_KV) * TILE_N
        factor = scale * tl.load(k_scales + upcoming)
        penalty = highest
        if RAGGED:
            penalty = filling_penalty(block_lengths, upcoming, step % PARTS_KV, TILE_N)
        upcoming = tl.load(rows + tl.minimum((step + 1) // PARTS_KV, width - 1))
        k = key.load([bh, start, 0]).reshape([TILE_N, P])
        v = value.load([bh, 0, start]).reshape([P, TILE_N])
        highest, total, out = attend_tile(
            q, k, v, highest, total, out, factor, penalty, RAGGED, BY_HAND
        )
    if short:
        factor = scale * tl.load(k_scales + last)
        for part in range(PARTS_KV):
            start = last * BLOCK_KV + part * TILE_N
            if start < tokens_kv:
                # Values past the end are zeros, so that the weights alone must be kept out of sums.
                penalty = tl.where(start + tl.arange(0, TILE_N) < tokens_kv, 0.0, -1e30)
                k = key.load([bh, start, 0]).reshape([TILE_N, P])
                v = value.load([bh, 0, start]).reshape([P, TILE_N])
                highest, total, out = attend_tile(
                    q, k, v, highest, total, out, factor, penalty, True, BY_HAND
                )
    columns = tl.arange(0, P)
    scales = tl.load(v_scales + bh * D + columns, mask=columns < D, other=0.0)
    out = out * safe_inverse(total)[:, None] * scales[None, :]
    sum_exp = highest + tl.log2(tl.where(count > 0, total, 1.0)) - LOG2_E4M3_MAX
    sum_exp = tl.where(count > 0, sum_exp, float("-inf"))
    tokens = token + tl.arange(0, TILE_M)
    tl.store(lse + bh.to(tl.int64) * lse_stride + tokens, sum_exp, mask=tokens < lse_stride)
    store_tile(output, batch, head, token, out.to(output.dtype), TILE_M, P)
