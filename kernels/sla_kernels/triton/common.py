"""What the kernels share: feature maps, tiles, the order of programs.

Shape letters: B batch, H heads, N tokens, D head_dim, P = D rounded up to a power of two, T_m query
blocks, T_n key blocks. `bh` is the index of a (sample, head) pair. Tiles are P wide; columns past D
hold zeros. Inside the kernels scores are in units of log2: exp2 replaces exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(descriptor, batch, head, token, ROWS: tl.constexpr, P: tl.constexpr):
    """(ROWS, P) from token on; zeros past the end of the tensor, in both directions."""
    return descriptor.load([batch, head, token, 0]).reshape([ROWS, P])


@triton.jit
def store_tile(descriptor, batch, head, token, tile, ROWS: tl.constexpr, P: tl.constexpr):
    """Write a (ROWS, P) tile; what lies outside the tensor is dropped."""
    descriptor.store([batch, head, token, 0], tile.reshape([1, 1, ROWS, P]))


@triton.jit
def load_square(descriptor, index, P: tl.constexpr):
    """(P, P) matrix number `index` of a (count, D, D) tensor."""
    return descriptor.load([index, 0, 0]).reshape([P, P])


@triton.jit
def store_square(descriptor, index, matrix, P: tl.constexpr):
    """Write a (P, P) matrix; what lies past D is dropped."""
    descriptor.store([index, 0, 0], matrix.reshape([1, P, P]))


@triton.jit
def program_order(pid, heads, blocks, first):
    """(bh, block) of a program: head by head, so that the keys of one head stay in the L2 cache.

    The first `first` blocks of every head, the long ones, come before all others: a long one that
    started last would keep the whole GPU waiting.
    """
    early = pid < first * heads
    late = pid - first * heads
    rest = tl.maximum(blocks - first, 1)
    bh = tl.where(early, pid % heads, late // rest)
    block = tl.where(early, pid // heads, first + late % rest)
    return bh, block


@triton.jit
def filling_penalty(lengths, block, part, TILE: tl.constexpr):
    """What is added to the scores of a tile's keys: 0 for real ones, a weight of 0 for filling.

    Added, not selected: a select on a product's result makes ptxas serialise the loop. Finite, so
    that a tile of nothing but filling gives no NaN; its weights vanish beside any real key's.
    """
    inside = part * TILE + tl.arange(0, TILE) < tl.load(lengths + block)
    return tl.where(inside, 0.0, -1e30)


@triton.jit
def features(x, FEATURE_MAP: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """phi of a float32 (M, P) tile; zero in the columns past D."""
    if FEATURE_MAP == "softmax":
        if D != P:
            x = tl.where(tl.arange(0, P)[None, :] < D, x, float("-inf"))
        # exp2 and one division a row: exp and a division an element cost more than the products.
        x = x * LOG2_E
        e = tl.exp2(x - tl.max(x, 1)[:, None])
        phi = e * (1.0 / tl.sum(e, 1))[:, None]
    elif FEATURE_MAP == "elu+1":
        phi = tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2_E))
    else:
        tl.static_assert(FEATURE_MAP == "relu")
        phi = tl.maximum(x, 0.0)
    if D != P:
        phi = tl.where(tl.arange(0, P)[None, :] < D, phi, 0.0)
    return phi


@triton.jit
def features_backward(x, phi, grad, FEATURE_MAP: tl.constexpr):
    """Gradient of `features`: float32 tiles of its input, output and output's gradient."""
    if FEATURE_MAP == "softmax":
        return phi * (grad - tl.sum(phi * grad, 1)[:, None])
    if FEATURE_MAP == "elu+1":
        return tl.where(x > 0, grad, grad * phi)
    return tl.where(x > 0, grad, 0.0)


@triton.jit
def safe_inverse(x):
    """1 / x, and 0 where x is 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))
