"""RMS norm over all heads and rotary embedding of queries and keys, in one pass over both.

A program takes one token: its query and its key, all heads, stay in registers between the sum of
squares and the turned pairs, and the angles are read once for both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla_kernels.triton.calls import next_power_of_two


@triton.jit
def normed_and_turned(
    x, weight, output, row, stride, cos, sin, eps, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr
):
    """One token of one tensor: rows of `x` lie `stride` apart, rows of the output H * D."""
    heads = tl.arange(0, P[0])[:, None]
    columns = tl.arange(0, P[1])[None, :]
    places, mask = heads * D + columns, (heads < H) & (columns < D)
    values = tl.load(x + row * stride + places, mask=mask, other=0.0).to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(values * values) / (H * D) + eps)
    values = values * scale * tl.load(weight + places, mask=mask, other=0.0).to(tl.float32)
    first, second = tl.split(values.reshape([P[0], P[1] // 2, 2]))
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    turned = turned.reshape([P[0], P[1]]).to(output.dtype.element_ty)
    tl.store(output + row * (H * D) + places, turned, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def norm_rotary_kernel(
    query,  # (B, N, H * D), rows query_stride apart
    key,
    query_weight,  # (H * D,)
    key_weight,
    cos,  # float32 (N, D), an angle for both members of a pair
    sin,
    query_output,  # (B, N, H, D), contiguous
    key_output,
    tokens,
    query_stride,
    key_stride,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,  # H and D, rounded up to powers of two
):
    """Grid: B * N."""
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, P[1] // 2)[None, :]
    angle = row % tokens * D + 2 * pairs
    c = tl.load(cos + angle, mask=2 * pairs < D, other=0.0)
    s = tl.load(sin + angle, mask=2 * pairs < D, other=0.0)
    normed_and_turned(query, query_weight, query_output, row, query_stride, c, s, eps, H, D, P)
    normed_and_turned(key, key_weight, key_output, row, key_stride, c, s, eps, H, D, P)


def norm_rotary(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `sla_kernels.norm_rotary.norm_rotary`, of checked arguments."""
    batch, tokens, width = query.shape
    head_dim = width // heads
    query, key = _even_rows(query), _even_rows(key)
    outputs = [x.new_empty(batch, tokens, heads, head_dim) for x in (query, key)]
    sizes = next_power_of_two(heads), next_power_of_two(head_dim)
    with torch.cuda.device_of(query):
        norm_rotary_kernel[(batch * tokens,)](
            *(query, key, query_weight.contiguous(), key_weight.contiguous()),
            *(cos.contiguous(), sin.contiguous(), *outputs),
            *(tokens, query.stride(1), key.stride(1), eps),
            H=heads,
            D=head_dim,
            P=sizes,
        )
    return outputs[0], outputs[1]


def _even_rows(x: Tensor) -> Tensor:
    """(B, N, C) whose B * N rows lie equally far apart, as the parts of a fused product do."""
    batch, tokens, _ = x.shape
    even = x.stride(2) == 1 and (batch == 1 or x.stride(0) == tokens * x.stride(1))
    return x if even else x.contiguous()
