"""Host side of the kernels: layouts, buffers, order of launches. No autograd here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from sla_kernels.block_map import block_counts, num_blocks, sample_counts
from sla_kernels.triton import aggregate as aggregate_kernels
from sla_kernels.triton import backward as backward_kernels
from sla_kernels.triton import forward as forward_kernels
from sla_kernels.triton import prepare as prepare_kernels
from sla_kernels.triton import routing as routing_kernels
from sla_kernels.triton import tiling
from sla_kernels.triton.calls import Calls, next_power_of_two, padded

BLOCKS = (16, 32, 64, 128)  # 64 and 128 are for use, the small ones for tests in the interpreter
MAX_HEAD_DIM = 128
MAX_ROUTED_BLOCKS = 4096  # a row of scores stays in registers
_LOG2_E = math.log2(math.e)
# The block sums may take this many times the query's memory (and this much in any case); heads are
# worked on in groups that keep to it.
_SUMS_PER_QUERY = 2
_SUMS_BYTES = 2**26
_SCORE_TILE = 64
_ROUTE_TILE = 4096  # scores that a program of the router holds
_TABLE_LINES = 32
_LONG_COLUMNS = 32  # the longest of so many columns of a head are started before all others

Group = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor.

    Attributes:
        block_q, block_kv: tokens in a block.
        long_rows: leading query blocks of every head that hold many more critical blocks than the
            others; they are started first.
        feature_map: `softmax`, `elu+1` or `relu`.
        scale: factor on the scores, positive.
        sparse, linear: which branches are computed.
    """

    block_q: int
    block_kv: int
    long_rows: int
    feature_map: str
    scale: float
    sparse: bool = True
    linear: bool = True


@dataclass(frozen=True)
class Routing:
    """The numbers of `classify_blocks` that are not in `Problem`; scale has any sign."""

    critical: float
    negligible: float
    always_critical: int
    scale: float


@dataclass(frozen=True)
class Routed:
    """Labels, row table and counts, as `BlockMap` has them."""

    labels: Tensor
    rows: Tensor
    counts: Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def precision(dtype: torch.dtype) -> str:
    """How float32 products are done: to float32's accuracy for float32 tensors. (tf32 has the
    mantissa of float16, whose block sums are float32 for their range.)"""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the block sums. Gradients of float16 models may leave float16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def described(tensor: Tensor) -> Tensor:
    """The tensor itself if the copy engine can address it, else a contiguous copy."""
    size = tensor.element_size()
    strides = tensor.stride()
    legal = (strides[-1] == 1 or tensor.shape[-1] == 1) and tensor.data_ptr() % 16 == 0
    for stride, count in zip(strides[:-1], tensor.shape[:-1], strict=True):
        legal = legal and (count == 1 or (stride > 0 and stride * size % 16 == 0))
    return tensor if legal else tensor.clone(memory_format=torch.contiguous_format)


@overload
def aligned(tensor: Tensor) -> Tensor: ...
@overload
def aligned(tensor: Tensor | None) -> Tensor | None: ...
def aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor contiguous and on a 16-byte boundary, as records of launches (`Calls`) assume."""
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def new_row_numbers(query: Tensor) -> Tensor:
    """A float32 a query: (B, H, N rounded up), so that the copy engine can address each head."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, heads, num_blocks(tokens, 16) * 16), dtype=torch.float32)


def new_tables(query: Tensor, key: Tensor, problem: Problem, routing: Routing) -> Routed:
    """Buffers that routing fills. The row table is as wide as the longest row needs."""
    batch, heads, tokens_q, _ = query.shape
    t_m = num_blocks(tokens_q, problem.block_q)
    t_n = num_blocks(key.shape[2], problem.block_kv)
    width = t_n
    if not routing.always_critical:
        width = block_counts(routing.critical, routing.negligible, t_n)[0]
    return Routed(
        query.new_empty((batch, heads, t_m, t_n), dtype=torch.int8),
        query.new_empty((batch, heads, t_m, width), dtype=torch.int32),
        query.new_empty((batch, heads, t_m), dtype=torch.int32),
    )


def head_groups(query: Tensor, key: Tensor, problem: Problem) -> Iterator[Group]:
    """(first, number) of (sample, head) pairs whose block sums are in memory together."""
    batch, heads, tokens_q, head_dim = query.shape
    total = batch * heads
    if not problem.linear:
        yield 0, total
        return
    blocks = num_blocks(tokens_q, problem.block_q) + num_blocks(key.shape[2], problem.block_kv)
    per_head = blocks * (head_dim + 1) * head_dim * sums_dtype(query.dtype).itemsize
    allowed = max(_SUMS_BYTES, _SUMS_PER_QUERY * query.numel() * query.element_size())
    # One row more than D in the sums must not split what would fit but for it.
    groups = math.ceil(total * per_head / (1.05 * allowed))
    size = math.ceil(total / min(groups, total))
    for first in range(0, total, size):
        yield first, min(size, total - first)


def route_alone(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, routing: Routing, problem: Problem
) -> Routed:
    """Classes and row table, nothing else."""
    query, key, key_lengths = described(query), described(key), aligned(key_lengths)
    routed = new_tables(query, key, problem, routing)
    calls = Calls(("route", *layout_of(query, key), key_lengths is None, routing, problem))
    _route(calls, query, key, key_lengths, routing, problem, routed, None)
    calls.done()
    return routed


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    problem: Problem,
    *,
    routing: Routing | None = None,
    routed: Routed | None = None,
    block_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routed]:
    """The operator: output, log2-sum-exp2 of each row, and the routing (made, or as given)."""
    _, heads, tokens_q, head_dim = query.shape
    output = torch.empty_like(query)
    lse = new_row_numbers(query)
    query, key, value = described(query), described(key), described(value)
    weight, bias, key_lengths = aligned(weight), aligned(bias), aligned(key_lengths)
    block_lengths = aligned(block_lengths)
    written = described(output)
    optional = tuple(tensor is None for tensor in (weight, bias, key_lengths, block_lengths))
    table = None if routed is None else routed.rows.shape
    groups = tuple(head_groups(query, key, problem))
    calls = Calls(
        (
            "attend",
            *layout_of(query, key, value, written),
            optional,
            table,
            groups,
            routing,
            problem,
        )
    )
    t_m = num_blocks(tokens_q, problem.block_q)
    t_n = num_blocks(key.shape[2], problem.block_kv)
    config = tiling.forward(query.dtype, problem.block_q, problem.block_kv)
    mask = _new_mask(query, t_m, t_n) if problem.linear else None
    if routed is None:
        assert routing is not None
        routed = new_tables(query, key, problem, routing)
        _route(calls, query, key, key_lengths, routing, problem, routed, mask)
    elif mask is not None:
        _fill_mask(calls, routed.labels, mask)
    for group in groups:
        sums = None
        if mask is not None:
            parts = _prepare(calls, key, value, weight, key_lengths, problem, group)
            sums = _aggregate(calls, mask, parts, t_m, group, 1.0 / t_n, query.dtype)
            del parts
        calls.launch(
            forward_kernels.forward,
            group[1] * t_m * problem.block_q // config["TILE_M"],
            calls.tiles(query, config["TILE_M"]),
            calls.tiles(key, config["TILE_N"]),
            calls.tiles(value, config["TILE_N"]),
            calls.tiles(written, config["TILE_M"]),
            bias,
            lse,
            routed.rows,
            routed.counts,
            calls.squares(sums),
            sums,
            key_lengths,
            block_lengths,
            *group,
            heads,
            tokens_q,
            key.shape[2],
            t_m,
            routed.rows.shape[3],
            min(problem.long_rows, t_m),
            lse.shape[2],
            problem.scale * _LOG2_E,
            SPARSE=problem.sparse,
            LINEAR=problem.linear,
            BIAS=bias is not None,
            LENGTHS=key_lengths is not None,
            RAGGED=block_lengths is not None,
            FEATURE_MAP=problem.feature_map,
            PRECISION=precision(query.dtype),
            D=head_dim,
            P=padded(head_dim),
            BLOCK_Q=problem.block_q,
            BLOCK_KV=problem.block_kv,
            **config,
        )
    calls.done()
    if written is not output:
        output.copy_(written)
    return output, lse, routed


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    routed: Routed,
    problem: Problem,
    *,
    d_lse: Tensor | None = None,
    block_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, and of Proj's weight and bias where there is one.

    `d_lse` is the gradient of `attend`'s second result, if it was used.
    """
    batch, heads, tokens_q, head_dim = query.shape
    results = [torch.empty_like(tensor) for tensor in (query, key, value)]
    d_query, d_key, d_value = (described(tensor) for tensor in results)
    grad, query, key, value, output = (
        described(tensor) for tensor in (grad, query, key, value, output)
    )
    proj, bias, key_lengths = aligned(weight), aligned(bias), aligned(key_lengths)
    d_lse, block_lengths = aligned(d_lse), aligned(block_lengths)
    optional = tuple(t is None for t in (weight, bias, key_lengths, d_lse, block_lengths))
    layout = layout_of(query, key, value, output, grad, d_query, d_key, d_value)
    groups = tuple(head_groups(query, key, problem))
    calls = Calls(("backward", *layout, optional, routed.rows.shape, groups, problem))
    t_m, t_n = routed.labels.shape[2:]
    delta = torch.empty_like(lse)
    mask = None
    if problem.linear:
        mask = _new_mask(query, t_m, t_n)
        _fill_mask(calls, routed.labels, mask)
    if problem.sparse:
        columns, column_counts = row_tables(routed.labels, columns=True, calls=calls)
        order = longest_first(column_counts, calls=calls)
    d_weight = d_bias = None
    if bias is not None:
        d_bias = query.new_empty((batch * heads * t_m, head_dim), dtype=torch.float32)
    if proj is not None:
        programs = min(programs_of(query, 1), batch * heads * t_n)
        d_weight = query.new_zeros((programs, head_dim, head_dim), dtype=torch.float32)
    shape = (query.dtype, problem.block_q, problem.block_kv)
    queries_config = tiling.backward_queries(*shape)
    keys_config = tiling.backward_keys(*shape)
    linear_config = tiling.backward_linear(*shape)
    # What every kernel below takes.
    numbers: dict[str, int | str] = {
        "LENGTHS": key_lengths is not None,
        "PRECISION": precision(query.dtype),
        "P": padded(head_dim),
        "BLOCK_KV": problem.block_kv,
    }
    for group in groups:
        sums = d_sums = None
        if mask is not None:
            parts = _prepare(calls, key, value, proj, key_lengths, problem, group)
            sums = _aggregate(calls, mask, parts, t_m, group, 1.0 / t_n, query.dtype)
            del parts
            d_sums = torch.empty_like(sums)
        calls.launch(
            backward_kernels.backward_queries,
            group[1] * t_m,
            calls.tiles(query, problem.block_q),
            calls.tiles(key, queries_config["TILE_N"]),
            calls.tiles(value, queries_config["TILE_N"]),
            output,
            calls.tiles(grad, problem.block_q),
            calls.tiles(d_query, problem.block_q),
            bias,
            lse,
            delta,
            d_lse,
            routed.rows,
            routed.counts,
            calls.squares(sums),
            sums,
            calls.squares(d_sums),
            d_sums,
            d_bias,
            key_lengths,
            block_lengths,
            *group,
            heads,
            tokens_q,
            key.shape[2],
            t_m,
            routed.rows.shape[3],
            min(problem.long_rows, t_m),
            lse.shape[2],
            *output.stride()[:3],
            problem.scale * _LOG2_E,
            problem.scale,
            SPARSE=problem.sparse,
            LINEAR=problem.linear,
            BIAS=bias is not None,
            D_LSE=d_lse is not None,
            RAGGED=block_lengths is not None,
            FEATURE_MAP=problem.feature_map,
            D=head_dim,
            BLOCK_Q=problem.block_q,
            **numbers,
            **queries_config,
        )
        if mask is not None and d_sums is not None:
            del sums
            # H is the mean over all T_n blocks of h over the block size: see prepare.py.
            factor = 1.0 / (t_n * problem.block_kv)
            d_sums = _aggregate(
                calls, mask, d_sums, t_n, group, factor, query.dtype, transposed=True
            )
            calls.launch(
                backward_kernels.backward_linear,
                min(programs_of(query, 1), group[1] * t_n),
                calls.tiles(key, linear_config["TILE"]),
                calls.tiles(value, linear_config["TILE"]),
                calls.tiles(d_key, linear_config["TILE"]),
                calls.tiles(d_value, linear_config["TILE"]),
                calls.squares(proj),
                calls.squares(d_sums),
                calls.single_rows(d_sums),
                d_weight,
                key_lengths,
                *group,
                heads,
                key.shape[2],
                t_n,
                PROJ=proj is not None,
                FEATURE_MAP=problem.feature_map,
                D=head_dim,
                **numbers,
                **linear_config,
            )
            del d_sums
        if problem.sparse:
            calls.launch(
                backward_kernels.backward_keys,
                group[1] * t_n,
                calls.tiles(query, keys_config["TILE_M"]),
                calls.tiles(key, problem.block_kv),
                calls.tiles(value, problem.block_kv),
                calls.tiles(grad, keys_config["TILE_M"]),
                calls.tiles(d_key, problem.block_kv),
                calls.tiles(d_value, problem.block_kv),
                calls.row_numbers(lse, keys_config["TILE_M"]),
                calls.row_numbers(delta, keys_config["TILE_M"]),
                columns,
                column_counts,
                order,
                key_lengths,
                block_lengths,
                *group,
                heads,
                t_m,
                t_n,
                num_blocks(t_n, _LONG_COLUMNS),
                problem.scale * _LOG2_E,
                problem.scale,
                ADD=problem.linear,
                RAGGED=block_lengths is not None,
                BLOCK_Q=problem.block_q,
                **numbers,
                **keys_config,
            )
    calls.done()
    for result, written in zip(results, (d_query, d_key, d_value), strict=True):
        if written is not result:
            result.copy_(written)
    if weight is not None and d_weight is not None:
        d_weight = d_weight.sum(0).to(weight.dtype)
    if bias is not None and d_bias is not None:
        d_bias = d_bias.sum(0).to(bias.dtype)
    return results[0], results[1], results[2], d_weight, d_bias


def row_tables(
    labels: Tensor, *, columns: bool, calls: Calls | None = None
) -> tuple[Tensor, Tensor]:
    """Critical blocks of each row (or column) of contiguous labels, ascending; their number."""
    batch, heads, t_m, t_n = labels.shape
    lines, entries = (t_n, t_m) if columns else (t_m, t_n)
    table = labels.new_empty((batch, heads, lines, entries), dtype=torch.int32)
    counts = labels.new_empty((batch, heads, lines), dtype=torch.int32)
    own = calls or Calls(("row_tables", labels.device, labels.shape, columns))
    own.launch(
        routing_kernels.row_table,
        batch * heads * num_blocks(lines, _TABLE_LINES),
        labels,
        table,
        counts,
        lines,
        entries,
        t_m * t_n,
        1 if columns else t_n,
        t_n if columns else 1,
        LINES=_TABLE_LINES,
        CHUNK=128,
    )
    if calls is None:
        own.done()
    return table, counts


def longest_first(counts: Tensor, *, calls: Calls | None = None) -> Tensor:
    """The lines of each head by falling count."""
    order = torch.empty_like(counts)
    batch, heads, lines = counts.shape
    own = calls or Calls(("longest_first", counts.device, counts.shape))
    programs = batch * heads * num_blocks(lines, _TABLE_LINES)
    arguments = (counts, order, lines)
    own.launch(routing_kernels.longest_first, programs, *arguments, LINES=_TABLE_LINES, CHUNK=128)
    if calls is None:
        own.done()
    return order


def _route(
    calls: Calls,
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    routing: Routing,
    problem: Problem,
    routed: Routed,
    mask: Tensor | None,
) -> None:
    """Fill `routed`, and the marginal mask where it is wanted."""
    batch, heads, tokens_q, head_dim = query.shape
    tokens_kv = key.shape[2]
    t_m, t_n = routed.labels.shape[2:]
    pooled_query = query.new_empty((batch * heads, t_m, head_dim), dtype=torch.float32)
    pooled_key = query.new_empty((batch * heads, t_n, head_dim), dtype=torch.float32)
    scores = query.new_empty((batch * heads, t_m, t_n), dtype=torch.float32)
    calls.launch(
        prepare_kernels.pool,
        batch * heads * (t_m + t_n),
        calls.tiles(query, problem.block_q),
        calls.tiles(key, problem.block_kv),
        key_lengths,
        pooled_query,
        pooled_key,
        batch * heads * t_m,
        heads,
        tokens_q,
        tokens_kv,
        t_m,
        t_n,
        LENGTHS=key_lengths is not None,
        D=head_dim,
        P=padded(head_dim),
        BLOCK_Q=problem.block_q,
        BLOCK_KV=problem.block_kv,
    )
    calls.launch(
        routing_kernels.pooled_scores,
        batch * heads * num_blocks(t_m, _SCORE_TILE) * num_blocks(t_n, _SCORE_TILE),
        pooled_query,
        pooled_key,
        scores,
        t_m,
        t_n,
        routing.scale,
        D=head_dim,
        TILE=_SCORE_TILE,
        CHUNK=32,
    )
    forced_kv = num_blocks(min(routing.always_critical, tokens_kv), problem.block_kv)
    counts = block_counts(routing.critical, routing.negligible, t_n, forced_kv)
    samples = None
    if key_lengths is not None:
        samples = sample_counts(
            key_lengths,
            routing.critical,
            routing.negligible,
            problem.block_kv,
            routing.always_critical,
        )
    columns = max(16, next_power_of_two(t_n))
    lines = max(1, min(8, _ROUTE_TILE // columns, next_power_of_two(t_m)))
    calls.launch(
        routing_kernels.route,
        batch * heads * num_blocks(t_m, lines),
        scores,
        routed.labels,
        routed.rows,
        routed.counts,
        mask,
        samples,
        heads,
        t_m,
        t_n,
        0 if mask is None else mask.stride(1),
        routed.rows.shape[3],
        *counts,
        num_blocks(min(routing.always_critical, tokens_q), problem.block_q),
        forced_kv,
        LENGTHS=samples is not None,
        MASK=mask is not None,
        ROWS=lines,
        COLUMNS=columns,
    )


def _new_mask(query: Tensor, t_m: int, t_n: int) -> Tensor:
    """For M of all heads, (B*H, T_m, T_n) numbers, each row on a 16-byte boundary."""
    shape = (query.shape[0] * query.shape[1], t_m, num_blocks(t_n, 8) * 8)
    return query.new_empty(shape, dtype=sums_dtype(query.dtype))


def _fill_mask(calls: Calls, labels: Tensor, mask: Tensor) -> None:
    batch, heads, t_m, t_n = labels.shape
    calls.launch(
        aggregate_kernels.marginal_mask,
        batch * heads * t_m,
        labels,
        mask,
        t_n,
        mask.shape[2],
        COLUMNS=min(1024, next_power_of_two(t_n)),
    )


def _prepare(
    calls: Calls,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    key_lengths: Tensor | None,
    problem: Problem,
    group: Group,
) -> Tensor:
    """h_j W^T and z_j of a group's key blocks: (heads of the group, T_n, D + 1, D)."""
    heads, tokens, head_dim = key.shape[1:]
    t_n = num_blocks(tokens, problem.block_kv)
    parts = key.new_empty((group[1], t_n, head_dim + 1, head_dim), dtype=sums_dtype(key.dtype))
    config = tiling.prepare(key.dtype, problem.block_q, problem.block_kv)
    calls.launch(
        prepare_kernels.prepare,
        min(group[1] * t_n, programs_of(key, 2)),
        calls.tiles(key, config["TILE"]),
        calls.tiles(value, config["TILE"]),
        calls.squares(weight),
        key_lengths,
        calls.squares(parts),
        parts,
        *group,
        heads,
        tokens,
        t_n,
        PROJ=weight is not None,
        LENGTHS=key_lengths is not None,
        FEATURE_MAP=problem.feature_map,
        PRECISION=precision(key.dtype),
        D=head_dim,
        P=padded(head_dim),
        BLOCK=problem.block_kv,
        **config,
    )
    return parts


def _aggregate(
    calls: Calls,
    mask: Tensor,
    parts: Tensor,
    rows: int,
    group: Group,
    factor: float,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> Tensor:
    """factor * M parts, or with M's transpose: (group, T, D + 1, D) to (group, rows, D + 1, D)."""
    count, inner = parts.shape[:2]
    width = parts.shape[2] * parts.shape[3]
    sums = parts.new_empty((count, rows, *parts.shape[2:]))
    config = tiling.aggregate(parts.dtype)
    tile = (config["BLOCK_M"], config["BLOCK_K"])
    calls.launch(
        aggregate_kernels.aggregate,
        count * num_blocks(rows, config["BLOCK_M"]) * num_blocks(width, config["BLOCK_N"]),
        calls.matrices(
            mask,
            (mask.shape[0], mask.shape[1], rows if transposed else inner),
            (1, *(tile[::-1] if transposed else tile)),
        ),
        calls.matrices(parts, (count, inner, width), (1, config["BLOCK_K"], config["BLOCK_N"])),
        sums,
        group[0],
        rows,
        inner,
        width,
        factor,
        TRANSPOSED=transposed,
        PRECISION=precision(dtype),
        **config,
    )
    return sums


def layout_of(*tensors: Tensor) -> tuple[object, ...]:
    """What a record of launches depends on: device, type, shapes and strides."""
    first = tensors[0]
    return (first.device, first.dtype, *((t.shape, t.stride()) for t in tensors))


def programs_of(tensor: Tensor, per_multiprocessor: int) -> int:
    """Programs that fill the GPU once; two in the interpreter."""
    if not tensor.is_cuda:
        return 2
    device = torch.cuda.get_device_properties(tensor.device)
    return per_multiprocessor * device.multi_processor_count
