"""What video transformers do to queries and keys before attention: RMS norm, rotary positions.

No part of the paper's method; with attention at 5 % of its work, what stands beside it counts.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("sla_kernels::norm_rotary", mutates_args=())
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
    """RMS norm over all heads, and rotary embedding of neighbouring pairs of channels. No gradient.

    One kernel on a GPU, plain PyTorch elsewhere; computed in float32 and rounded once.

    Args:
        query, key: (B, N, heads * D), float16, bfloat16 or float32, of any strides.
        query_weight, key_weight: (heads * D,) of the norms, of any floating dtype.
        cos, sin: float32, N * D elements: of every token's angles, each twice.
        heads: heads.
        eps: of the norms.

    Returns:
        Query and key, (B, N, heads, D), contiguous, in their dtypes.

    Raises:
        ValueError: sizes that do not fit together, or an odd D.
    """
    _check(query, key, query_weight, key_weight, cos, sin, heads)
    on_gpu = query.is_cuda and _HAS_TRITON
    if on_gpu and query.dtype in _DTYPES and cos.dtype == sin.dtype == torch.float32:
        from sla_kernels.triton.norm_rotary import norm_rotary as fused

        return fused(query, key, query_weight, key_weight, cos, sin, heads, eps)
    return (
        _plain(query, query_weight, cos, sin, heads, eps),
        _plain(key, key_weight, cos, sin, heads, eps),
    )


@norm_rotary.register_fake
def _(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = query.shape
    shape = (batch, tokens, heads, width // heads)
    return query.new_empty(shape), key.new_empty(shape)


def _check(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> None:
    if query.dim() != 3 or query.shape != key.shape:
        raise ValueError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}; both must be (B, N, C)"
        )
    _, tokens, width = query.shape
    if heads < 1 or width % (2 * heads):
        raise ValueError(f"heads is {heads}; it must divide {width} channels into even head_dims")
    for name, tensor, wanted in (
        ("query_weight", query_weight, width),
        ("key_weight", key_weight, width),
        ("cos", cos, tokens * (width // heads)),
        ("sin", sin, tokens * (width // heads)),
    ):
        if tensor.numel() != wanted:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must have {wanted} elements")


def _plain(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    batch, tokens, width = x.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(exact), (width,), weight.to(exact), eps)
    angles = (1, tokens, 1, width // heads // 2)
    c, s = (t.reshape(1, tokens, 1, -1)[..., ::2].reshape(angles).to(exact) for t in (cos, sin))
    first, second = normed.view(batch, tokens, heads, -1, 2).unbind(-1)
    turned = torch.stack((first * c - second * s, first * s + second * c), dim=-1)
    return turned.flatten(-2).to(x.dtype)


__all__ = ["norm_rotary"]
