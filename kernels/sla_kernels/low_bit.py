"""The sparse branch with a low-bit forward and a 16-bit backward (SLA2, arXiv 2602.12675).

SLA2 rounds Q and K to INT8, P and V to FP8 in the forward, with SageAttention2++'s scales. Here all
are FP8 (e4m3): Hopper's tensor cores take it for both products. The backward knows nothing of the
rounding: it is that of the sparse branch at the unrounded tensors (straight-through).

The numbers, on every device:

- Keys and values that do not count (past `key_lengths`, filling of `block_lengths`) are zeros.
- Q and K have one scale for each block of tokens and head: its largest magnitude over 448.
- V has one scale for each sample, head and channel, its largest magnitude over all keys that count,
  over 448. Such a scale leaves the sum over the keys, one product a number of the output, whatever
  the blocks; one a block would cost one in every step. Of scales that leave the sum, those of
  channels are the finest: a channel of large values coarsens no other (SageAttention2++'s choice).
- A magnitude below 2^-100 counts as zero and its scale is 1, so that no quotient overflows. All
  numbers are rounded to the nearest, ties to even, after a product with 448 over the magnitude.
- Scores are exact sums of rounded products (in float32; a tensor core keeps fewer bits of the
  sums, still far more than e4m3 has). P = 448 exp(score - highest score of the row) is rounded to
  e4m3 before its product with V, which is summed in float32.
- The row sum and the log-sum-exp are of P before rounding. Rounding is to the nearest, so a row's
  errors largely cancel; summing rounded numbers would cost the kernel a conversion a score, more
  than it spends on its exponentials, and the log-sum-exp would need the other sum all the same.

One thing differs: a kernel rounds P relative to the highest score that it has met so far, in the
order of its tiles, and the simulation relative to the highest of all. Either weight is off the
exact one by at most 2^-4 of itself (or, below 2^-6 / 448, by 2^-10 / 448), so two outputs differ
by at most twice that, times the weighted mean of |V|.

`Backend.low_bit_branch` computes this where there is a kernel (Triton's, on a GPU with e4m3
products); elsewhere it is simulated on dequantised tensors, in chunks as the eager backend.

Shape letters as in `block_map`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sla_kernels import eager, operator
from sla_kernels.block_map import BlockMap, past_length

FP8 = eager.FP8
FP8_MAX = eager.FP8_MAX
_SMALLEST = 2.0**-100  # the kernels' too: triton/forward_low_bit.py


def quantise_blocks(tensor: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round to FP8 with one scale for each block of tokens and head.

    Args:
        tensor: (B, H, N, D) floating, finite.
        block: tokens in a block; a short last one has a scale of its own.

    Returns:
        Values, float8_e4m3fn (B, H, N, D), and scales, float32 (B, H, T), the largest magnitude of
        the block over 448, and 1 where that magnitude is below 2^-100: tensor is about
        values * scale, off by at most 2^-4 of itself, or 2^-10 scale where that is more.

    Raises:
        ValueError: another number of dimensions, or a block below 1.
    """
    if tensor.ndim != 4:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; it must be (B, H, N, D)")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    accurate = tensor.to(torch.float32)
    padded = F.pad(accurate.abs().amax(dim=-1), (0, -tensor.shape[2] % block))
    scales, inverses = _scales(padded.unflatten(2, (-1, block)).amax(dim=-1))
    # At most 448 and a rounding error, which e4m3 rounds to 448: nothing to clamp.
    return (accurate * _of_tokens(inverses, block, tensor.shape[2])).to(FP8), scales


def quantise_channels(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round to FP8 with one scale for each sample, head and channel.

    Args:
        tensor: (B, H, N, D) floating, finite.

    Returns:
        Values, float8_e4m3fn (B, H, N, D), and scales, float32 (B, H, 1, D), otherwise as
        `quantise_blocks`.
    """
    accurate = tensor.to(torch.float32)
    scales, inverses = _scales(accurate.abs().amax(dim=2, keepdim=True))
    return (accurate * inverses).to(FP8), scales


def dequantise_blocks(values: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """values * scale in `dtype`, (B, H, N, D); arguments as `quantise_blocks` returns them."""
    return (values.to(torch.float32) * _of_tokens(scales, block, values.shape[2])).to(dtype)


def low_bit_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`sparse_attention` with an FP8 forward.

    The output is that of rounded query, key, value and weights. The gradients are those of
    `sparse_attention` at the tensors as they came: the backward runs it once more, so that the
    output and the row sums that it needs belong to the same unrounded scores. (Those of the
    low-bit forward would save that run, but weights recomputed from unrounded scores would not sum
    to one with them.)

    Args:
        query, key, value, block_map, scale, backend: as `sparse_attention`. A key that should be
            rounded well has had its mean over tokens subtracted (SageAttention's smoothing).

    Returns:
        (B, H, N_q, D), dtype of `query`.

    Raises:
        ValueError, TypeError: as `sparse_attention`.
    """
    query, key, value = operator._inputs(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = _LowBitForward.apply(query, key, value, block_map, scale, backend)
        return output


class _LowBitForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_map: BlockMap,
        scale: float | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.block_map, ctx.scale, ctx.backend = block_map, scale, backend
        return _forward(query, key, value, block_map, scale, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            output = operator.sparse_attention(
                inputs[0],
                inputs[1],
                inputs[2],
                ctx.block_map,
                scale=ctx.scale,
                backend=ctx.backend,
            )
            found = iter(torch.autograd.grad(output, wanted, grads[0]))
        gradients = [next(found) if tensor.requires_grad else None for tensor in inputs]
        return (*gradients, None, None, None)


def simulated_branch(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
) -> tuple[Tensor, Tensor]:
    """The low-bit forward on any device: rounded tensors, in float32.

    Args:
        query, key, value, block_map: as `low_bit_sparse_attention`, checked.
        scale: factor on the scores.

    Returns:
        O^s, (B, H, N_q, D) in the dtype of `query`, and the natural log-sum-exp of each row's
        scaled critical scores, float32 (B, H, N_q), -inf for a row without. No gradients.
    """
    ignored = _ignored_keys(block_map)
    if ignored is not None:
        key, value = key.masked_fill(ignored, 0.0), value.masked_fill(ignored, 0.0)
    rounded_query, rounded_key = (
        dequantise_blocks(*quantise_blocks(tensor, block), block, torch.float32)
        for tensor, block in ((query, block_map.block_q), (key, block_map.block_kv))
    )
    values, scales = quantise_channels(value)
    output, lse = eager.rounded_weights_branch(
        rounded_query, rounded_key, values.to(torch.float32), block_map, scale
    )
    return (output * scales).to(query.dtype), lse


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    scale: float | None,
    backend: str,
) -> Tensor:
    operator._check_block_map(query, key, block_map, linear=False)
    chosen = operator._backend(backend, query, block_map.block_q, block_map.block_kv)
    factor = operator._scale(query, scale)
    if chosen.low_bit_branch is not None:
        found = chosen.low_bit_branch(query, key, value, block_map, factor)
        if found is not None:
            return found[0]
    return simulated_branch(query, key, value, block_map, factor)[0]


def _ignored_keys(block_map: BlockMap) -> Tensor | None:
    """bool, broadcastable to (B, H, N_kv, D): True for keys that do not count; None: all count."""
    if block_map.key_lengths is not None:
        return past_length(block_map.key_lengths, block_map.tokens_kv)[:, None, :, None]
    if block_map.block_lengths is not None:
        tokens = torch.arange(block_map.block_kv, device=block_map.labels.device)
        return (tokens >= block_map.block_lengths[:, None]).view(1, 1, -1, 1)
    return None


def _scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and their inverses of blocks with these largest magnitudes."""
    largest = largest.masked_fill(largest < _SMALLEST, FP8_MAX)
    # With a number on either side PyTorch multiplies by a reciprocal, one rounding more (on a GPU).
    highest = torch.full_like(largest, FP8_MAX)
    return largest / highest, highest / largest


def _of_tokens(scales: Tensor, block: int, tokens: int) -> Tensor:
    """(B, H, T) to (B, H, N, 1)."""
    return scales.repeat_interleave(block, dim=2)[:, :, :tokens, None]
