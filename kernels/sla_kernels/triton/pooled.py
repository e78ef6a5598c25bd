"""Host side of sparse pooled attention: buffers, order of launches. No autograd here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sla_kernels.block_map import num_blocks
from sla_kernels.triton import launch, tiling
from sla_kernels.triton import merge_pooled as kernels
from sla_kernels.triton.calls import Calls, next_power_of_two, padded

_LOG2_E = math.log2(math.e)
# Programs that sum over queries for the pooled keys' gradients: so many a multiprocessor.
_PROGRAMS = 4
_MOST_SPLITS = 16


@dataclass(frozen=True)
class Merged:
    """What the forward makes.

    Attributes:
        output: as the query.
        lse: float32 (B, H, N_q + filling): log2-sum-exp2 of all scores, 0 for a row of none.
        pooled_key, pooled_value: (B, H, T_n, D).
    """

    output: Tensor
    lse: Tensor
    pooled_key: Tensor
    pooled_value: Tensor


def new_results(query: Tensor, labels: Tensor) -> Merged:
    """Buffers of the results."""
    batch, heads, _, head_dim = query.shape
    shape = (batch, heads, labels.shape[3], head_dim)
    return Merged(
        torch.empty_like(query),
        launch.new_row_numbers(query),
        query.new_empty(shape),
        query.new_empty(shape),
    )


def merge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    labels: Tensor,
    block_q: int,
    block_kv: int,
    scale: float,
) -> Merged:
    """`sla_kernels.pooled.merge_pooled`; scale is positive."""
    batch, heads, tokens_q, head_dim = query.shape
    tokens_kv, (t_m, t_n) = key.shape[2], labels.shape[2:]
    results = new_results(query, labels)
    written = launch.described(results.output)
    query, key, value, sparse = (launch.described(t) for t in (query, key, value, sparse))
    lse, labels, key_lengths = (
        launch.aligned(lse),
        launch.aligned(labels),
        launch.aligned(key_lengths),
    )
    layout = launch.layout_of(query, key, value, sparse, written)
    calls = Calls(("merge", *layout, key_lengths is None, block_q, block_kv, scale))
    numbers: dict[str, int | str] = {
        "LENGTHS": key_lengths is not None,
        "P": padded(head_dim),
        "BLOCK_KV": block_kv,
    }
    calls.launch(
        kernels.pool_keys,
        batch * heads * t_n,
        calls.tiles(key, block_kv),
        calls.tiles(value, block_kv),
        key_lengths,
        results.pooled_key,
        results.pooled_value,
        heads,
        tokens_kv,
        t_n,
        D=head_dim,
        **numbers,
    )
    config = tiling.merge_pooled(query.dtype, block_q, _columns(t_n))
    calls.launch(
        kernels.merge,
        batch * heads * t_m * block_q // config["TILE_M"],
        calls.tiles(query, config["TILE_M"]),
        calls.tiles(results.pooled_key, config["TILE_N"]),
        calls.tiles(results.pooled_value, config["TILE_N"]),
        calls.tiles(sparse, config["TILE_M"]),
        calls.tiles(written, config["TILE_M"]),
        lse,
        results.lse,
        labels,
        key_lengths,
        heads,
        tokens_q,
        tokens_kv,
        t_m,
        t_n,
        results.lse.shape[2],
        scale * _LOG2_E,
        PRECISION=launch.precision(query.dtype),
        BLOCK_Q=block_q,
        **numbers,
        **config,
    )
    calls.done()
    if written is not results.output:
        results.output.copy_(written)
    return results


def merge_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    labels: Tensor,
    merged: Merged,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, O^s and its log-sum-exp."""
    batch, heads, tokens_q, head_dim = query.shape
    tokens_kv, (t_m, t_n) = key.shape[2], labels.shape[2:]
    results = [torch.empty_like(tensor) for tensor in (query, key, value, sparse)]
    d_query, d_key, d_value, d_sparse = (launch.described(tensor) for tensor in results)
    d_lse = torch.empty_like(lse, memory_format=torch.contiguous_format)
    query, sparse, output, grad = (
        launch.described(tensor) for tensor in (query, sparse, merged.output, grad)
    )
    lse, labels, key_lengths = (
        launch.aligned(lse),
        launch.aligned(labels),
        launch.aligned(key_lengths),
    )
    pooled_key, pooled_value = (
        launch.aligned(merged.pooled_key),
        launch.aligned(merged.pooled_value),
    )
    total = launch.aligned(merged.lse)
    delta = torch.empty_like(total)
    layout = launch.layout_of(query, sparse, output, grad, d_query, d_key, d_value, d_sparse)
    calls = Calls(("merge_backward", *layout, key_lengths is None, block_q, block_kv, scale))
    numbers: dict[str, int | str] = {
        "LENGTHS": key_lengths is not None,
        "P": padded(head_dim),
        "BLOCK_KV": block_kv,
    }
    products: dict[str, int | str] = {
        "PRECISION": launch.precision(query.dtype),
        "BLOCK_Q": block_q,
    }
    config = tiling.merge_pooled_queries(query.dtype, block_q, _columns(t_n))
    calls.launch(
        kernels.merge_backward_queries,
        batch * heads * t_m * block_q // config["TILE_M"],
        calls.tiles(query, config["TILE_M"]),
        calls.tiles(pooled_key, config["TILE_N"]),
        calls.tiles(pooled_value, config["TILE_N"]),
        calls.tiles(sparse, config["TILE_M"]),
        calls.tiles(output, config["TILE_M"]),
        calls.tiles(grad, config["TILE_M"]),
        calls.tiles(d_query, config["TILE_M"]),
        calls.tiles(d_sparse, config["TILE_M"]),
        d_lse,
        delta,
        lse,
        total,
        labels,
        key_lengths,
        heads,
        tokens_q,
        tokens_kv,
        t_m,
        t_n,
        total.shape[2],
        scale * _LOG2_E,
        scale,
        **products,
        **numbers,
        **config,
    )
    config = tiling.merge_pooled_keys(query.dtype, block_q, _columns(t_n))
    tiles = batch * heads * num_blocks(t_n, config["TILE_N"])
    steps = t_m * block_q // config["TILE_M"]
    splits = num_blocks(launch.programs_of(query, _PROGRAMS), tiles)
    splits = min(splits, steps, _MOST_SPLITS)
    shape = (splits, batch * heads, t_n, head_dim)
    parts = [query.new_empty(shape, dtype=launch.sums_dtype(query.dtype)) for _ in range(2)]
    calls.launch(
        kernels.merge_backward_keys,
        splits * tiles,
        calls.tiles(query, config["TILE_M"]),
        calls.tiles(pooled_key, config["TILE_N"]),
        calls.tiles(pooled_value, config["TILE_N"]),
        calls.tiles(grad, config["TILE_M"]),
        calls.row_numbers(total, config["TILE_M"]),
        calls.row_numbers(delta, config["TILE_M"]),
        *(calls.tiles(part, config["TILE_N"]) for part in parts),
        labels,
        key_lengths,
        heads,
        tokens_kv,
        t_m,
        t_n,
        batch * heads,
        num_blocks(steps, splits),
        scale * _LOG2_E,
        scale,
        **products,
        **numbers,
        **config,
    )
    calls.launch(
        kernels.spread,
        batch * heads * t_n,
        *parts,
        calls.tiles(d_key, block_kv),
        calls.tiles(d_value, block_kv),
        key_lengths,
        heads,
        tokens_kv,
        t_n,
        batch * heads,
        SPLITS=splits,
        D=head_dim,
        **numbers,
    )
    calls.done()
    for result, buffer in zip(results, (d_query, d_key, d_value, d_sparse), strict=True):
        if buffer is not result:
            result.copy_(buffer)
    return results[0], results[1], results[2], results[3], d_lse


def _columns(t_n: int) -> int:
    """Pooled keys of a tile: 32 at least, as `backend.unsupported_reason` says of float32."""
    return min(64, max(32, next_power_of_two(t_n)))
