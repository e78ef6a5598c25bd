"""Host side of the FP8 forward: what is refused, buffers, order of launches. No autograd here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sla_kernels.block_map import num_blocks
from sla_kernels.eager import FP8
from sla_kernels.triton import forward_low_bit as kernels
from sla_kernels.triton import launch, tiling
from sla_kernels.triton.calls import Calls, padded
from sla_kernels.triton.launch import Problem

_LOG2_E = math.log2(math.e)
_ALIGNMENT = 16  # bytes, so numbers: rows start on such boundaries for the copy engine
# Blocks of V that a program takes the largest magnitudes of, one after the other.
_MAXIMA_BLOCKS = 8


@dataclass(frozen=True)
class Rounded:
    """K and V in e4m3; rows may be longer than what counts of them.

    Attributes:
        key: (B*H, N_kv, D + filling).
        value: (B*H, D, N_kv + filling), zeros past the end.
        key_scales: float32 (B*H, T_n).
        value_scales: float32 (B*H, D).
    """

    key: Tensor
    value: Tensor
    key_scales: Tensor
    value_scales: Tensor


def unsupported_reason(query: Tensor, block_kv: int) -> str | None:
    """Why the FP8 kernel cannot work on what the others can, or None."""
    # An FP8 product sums over at least 32 numbers.
    if block_kv < 32:
        return f"block_kv is {block_kv}; FP8 products take blocks of 32, 64 or 128 keys"
    if query.shape[3] <= 16:
        return f"head_dim is {query.shape[3]}; FP8 products take more than 16"
    if query.is_cuda and not _has_e4m3(query.device):
        return f"{query.device} has no e4m3 products; compute capability 8.9 or newer has"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    rows: Tensor,
    counts: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """O^s of rounded tensors and weights, and log2-sum-exp2 of each row, as `launch.attend`."""
    batch, heads, tokens_q, head_dim = query.shape
    tokens_kv = key.shape[2]
    output = torch.empty_like(query)
    lse = launch.new_row_numbers(query)
    query, key, value = (launch.described(tensor) for tensor in (query, key, value))
    key_lengths, block_lengths = launch.aligned(key_lengths), launch.aligned(block_lengths)
    rows, counts = launch.aligned(rows), launch.aligned(counts)
    written = launch.described(output)
    optional = (key_lengths is None, block_lengths is None)
    layout = launch.layout_of(query, key, value, written)
    calls = Calls(("low_bit", *layout, optional, rows.shape, problem))
    rounded = quantise(calls, key, value, key_lengths, block_lengths, problem.block_kv)
    t_m, t_n = num_blocks(tokens_q, problem.block_q), num_blocks(tokens_kv, problem.block_kv)
    config = tiling.forward_low_bit(problem.block_q, problem.block_kv)
    calls.launch(
        kernels.forward,
        batch * heads * t_m * problem.block_q // config["TILE_M"],
        calls.tiles(query, config["TILE_M"]),
        _key_tiles(calls, rounded.key, head_dim, config["TILE_N"]),
        _value_tiles(calls, rounded.value, config["TILE_N"]),
        calls.tiles(written, config["TILE_M"]),
        rounded.key_scales,
        rounded.value_scales,
        lse,
        rows,
        counts,
        key_lengths,
        block_lengths,
        heads,
        tokens_kv,
        t_m,
        t_n,
        rows.shape[3],
        lse.shape[2],
        problem.scale * _LOG2_E,
        LENGTHS=key_lengths is not None,
        RAGGED=block_lengths is not None,
        D=head_dim,
        P=padded(head_dim),
        BLOCK_Q=problem.block_q,
        BLOCK_KV=problem.block_kv,
        BY_HAND=launch.interpreted(),
        **config,
    )
    calls.done()
    if written is not output:
        output.copy_(written)
    return output, lse


def quantise(
    calls: Calls,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    block_kv: int,
) -> Rounded:
    """Rounded K and V of tensors that the copy engine can address."""
    batch, heads, tokens, head_dim = key.shape
    pairs, t_n = batch * heads, num_blocks(tokens, block_kv)
    width, length = (num_blocks(count, _ALIGNMENT) * _ALIGNMENT for count in (head_dim, tokens))
    rounded = Rounded(
        key.new_empty((pairs, tokens, width), dtype=FP8),
        value.new_empty((pairs, head_dim, length), dtype=FP8),
        key.new_empty((pairs, t_n), dtype=torch.float32),
        value.new_empty((pairs, head_dim), dtype=torch.float32),
    )
    maxima = torch.zeros_like(rounded.value_scales)
    programs = num_blocks(t_n, _MAXIMA_BLOCKS)
    # What both kernels take.
    numbers: dict[str, int] = {
        "LENGTHS": key_lengths is not None,
        "RAGGED": block_lengths is not None,
        "D": head_dim,
        "P": padded(head_dim),
        "BLOCK_KV": block_kv,
    }
    calls.launch(
        kernels.channel_maxima,
        pairs * programs,
        calls.tiles(value, block_kv),
        maxima,
        key_lengths,
        block_lengths,
        heads,
        tokens,
        t_n,
        programs,
        **numbers,
        STAGES=3,
    )
    calls.launch(
        kernels.quantise,
        2 * pairs * t_n,
        calls.tiles(key, block_kv),
        calls.tiles(value, block_kv),
        _key_tiles(calls, rounded.key, head_dim, block_kv),
        _value_tiles(calls, rounded.value, block_kv),
        rounded.key_scales,
        rounded.value_scales,
        maxima,
        key_lengths,
        block_lengths,
        heads,
        tokens,
        t_n,
        pairs * t_n,
        **numbers,
        BY_HAND=launch.interpreted(),
    )
    return rounded


def _key_tiles(calls: Calls, key: Tensor, head_dim: int, tokens: int) -> object:
    return calls.matrices(key, (*key.shape[:2], head_dim), (1, tokens, padded(head_dim)))


def _value_tiles(calls: Calls, value: Tensor, tokens: int) -> object:
    return calls.matrices(value, tuple(value.shape), (1, padded(value.shape[1]), tokens))


@lru_cache
def _has_e4m3(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
