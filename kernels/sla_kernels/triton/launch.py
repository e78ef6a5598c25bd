"""Host side of the kernels: layouts, tile sizes, buffers, launches. No autograd here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla_kernels.block_map import block_counts, num_blocks, sample_counts
from sla_kernels.triton import aggregate as aggregate_kernels
from sla_kernels.triton import backward as backward_kernels
from sla_kernels.triton import forward as forward_kernels
from sla_kernels.triton import prepare as prepare_kernels
from sla_kernels.triton import routing as routing_kernels

FEATURE_MAPS = ("softmax", "elu+1", "relu")
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
_LONG_COLUMNS = 32  # the longest of so many columns of a head are started before all others


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor.

    Attributes:
        block_q, block_kv: tokens in a block.
        long_rows: leading query blocks of every head that hold many more critical blocks than the
            others; they are started first.
        feature_map: one of FEATURE_MAPS.
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
    """Classes and row table, flat over samples and heads where kernels want it; see `BlockMap`."""

    labels: Tensor
    rows: Tensor
    counts: Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def padded(head_dim: int) -> int:
    """P: columns of a tile."""
    return max(16, triton.next_power_of_2(head_dim))


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
    strides = [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]
    inner = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    outer = [s for s, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1]
    aligned = all(s > 0 and s * size % 16 == 0 for s in outer) and tensor.data_ptr() % 16 == 0
    if strides and not (inner and aligned):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def tiles(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of (rows, P) tiles of a (B, H, N, D) tensor."""
    # The stride of a dimension of one is never used but must be a legal one.
    strides = [s if n > 1 else 128 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
    strides[-1] = 1
    return TensorDescriptor(
        tensor, list(tensor.shape), strides, [1, 1, rows, padded(tensor.shape[-1])]
    )


def squares(tensor: Tensor | None) -> TensorDescriptor | None:
    """Descriptor of the (D, D) matrices of a (..., D or D + 1, D) tensor."""
    if tensor is None:
        return None
    rows, head_dim = tensor.shape[-2:]
    count, size = tensor.numel() // (rows * head_dim), padded(head_dim)
    shape, strides = [count, head_dim, head_dim], [rows * head_dim, head_dim, 1]
    return TensorDescriptor(tensor, shape, strides, [1, size, size])


def last_rows(tensor: Tensor) -> TensorDescriptor:
    """Descriptor of single rows of a (..., D + 1, D) tensor."""
    rows, head_dim = tensor.shape[-2:]
    shape, strides = [tensor.numel() // (rows * head_dim), rows, head_dim], [rows * head_dim, head_dim, 1]
    return TensorDescriptor(tensor, shape, strides, [1, 1, padded(head_dim)])


def new_row_numbers(query: Tensor) -> Tensor:
    """A float32 a query: (B, H, N rounded up), so that the copy engine can address each head."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, heads, num_blocks(tokens, 16) * 16), dtype=torch.float32)


def row_numbers(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of (1, rows) tiles of such a buffer."""
    batch, heads, tokens = tensor.shape
    return TensorDescriptor(tensor, [batch * heads, tokens], [tokens, 1], [1, rows])


def head_groups(query: Tensor, key: Tensor, problem: Problem) -> Iterator[tuple[int, int]]:
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


def new_tables(query: Tensor, key: Tensor, problem: Problem, routing: Routing) -> Routed:
    """Buffers that `route` fills. A row table as wide as the longest row needs."""
    batch, heads, tokens_q, _ = query.shape
    t_m = num_blocks(tokens_q, problem.block_q)
    t_n = num_blocks(key.shape[2], problem.block_kv)
    forced = num_blocks(min(routing.always_critical, key.shape[2]), problem.block_kv)
    width = block_counts(routing.critical, routing.negligible, t_n, forced)[0]
    if routing.always_critical:
        width = t_n
    return Routed(
        query.new_empty((batch, heads, t_m, t_n), dtype=torch.int8),
        query.new_empty((batch, heads, t_m, width), dtype=torch.int32),
        query.new_empty((batch, heads, t_m), dtype=torch.int32),
    )


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    key_lengths: Tensor | None,
    problem: Problem,
    group: tuple[int, int],
    pooled: tuple[Tensor, Tensor] | None,
    sums: Tensor | None,
) -> None:
    """Mean queries and keys into `pooled`, h_j and z_j into `sums`, each where given."""
    head_dim = key.shape[3]
    t_m = num_blocks(query.shape[2], problem.block_q)
    t_n = num_blocks(key.shape[2], problem.block_kv)
    config = _prepare_config(key.dtype, problem, linear=sums is not None)
    programs = min(
        group[1] * (t_n if pooled is None else max(t_m, t_n)),
        _programs(key, config.pop("per_multiprocessor")),
    )
    prepare_kernels.prepare[(programs,)](
        tiles(query, problem.block_q),
        tiles(key, config["TILE"]),
        tiles(value, config["TILE"]),
        squares(weight) if sums is not None else None,
        key_lengths,
        None if pooled is None else pooled[0],
        None if pooled is None else pooled[1],
        squares(sums),
        sums,
        group[0],
        group[1],
        key.shape[1],
        query.shape[2],
        key.shape[2],
        t_m,
        t_n,
        POOL=pooled is not None,
        LINEAR=sums is not None,
        PROJ=weight is not None and sums is not None,
        LENGTHS=key_lengths is not None,
        FEATURE_MAP=problem.feature_map,
        PRECISION=precision(key.dtype),
        D=head_dim,
        P=padded(head_dim),
        BLOCK_Q=problem.block_q,
        BLOCK=problem.block_kv,
        **config,
    )


def new_pooled(query: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
    """Buffers of the mean queries and keys."""
    batch, heads, _, head_dim = query.shape
    t_m, t_n = routed.labels.shape[2:]
    return (
        query.new_empty((batch * heads, t_m, head_dim), dtype=torch.float32),
        query.new_empty((batch * heads, t_n, head_dim), dtype=torch.float32),
    )


def route(
    query: Tensor,
    pooled: tuple[Tensor, Tensor],
    key_lengths: Tensor | None,
    routing: Routing,
    problem: Problem,
    tokens_kv: int,
    routed: Routed,
) -> None:
    """Fill `routed` from the mean queries and keys of all heads."""
    batch, heads, tokens_q, head_dim = query.shape
    t_m, t_n = routed.labels.shape[2:]
    forced_kv = num_blocks(min(routing.always_critical, tokens_kv), problem.block_kv)
    chosen, skipped = block_counts(routing.critical, routing.negligible, t_n, forced_kv)
    samples = None
    if key_lengths is not None:
        samples = sample_counts(
            key_lengths,
            routing.critical,
            routing.negligible,
            problem.block_kv,
            routing.always_critical,
        )
    columns = max(16, triton.next_power_of_2(t_n))
    lines = max(1, min(8, _ROUTE_TILE // columns, triton.next_power_of_2(t_m)))
    scores = query.new_empty((batch * heads, t_m, t_n), dtype=torch.float32)
    tile = _SCORE_TILE
    routing_kernels.pooled_scores[
        (batch * heads * triton.cdiv(t_m, tile) * triton.cdiv(t_n, tile),)
    ](
        *pooled,
        scores,
        t_m,
        t_n,
        routing.scale,
        D=head_dim,
        TILE=tile,
        CHUNK=32,
    )
    routing_kernels.route[(batch * heads * triton.cdiv(t_m, lines),)](
        scores,
        routed.labels,
        routed.rows,
        routed.counts,
        samples,
        heads,
        t_m,
        t_n,
        routed.rows.shape[3],
        chosen,
        skipped,
        num_blocks(min(routing.always_critical, tokens_q), problem.block_q),
        forced_kv,
        LENGTHS=samples is not None,
        ROWS=lines,
        COLUMNS=columns,
        num_warps=4,
    )


def route_alone(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, routing: Routing, problem: Problem
) -> Routed:
    """Classes and row table, nothing else."""
    routed = new_tables(query, key, problem, routing)
    query, key = described(query), described(key)
    pooled = new_pooled(query, routed)
    everything = (0, query.shape[0] * query.shape[1])
    prepare(query, key, key, None, key_lengths, problem, everything, pooled, None)
    route(query, pooled, key_lengths, routing, problem, key.shape[2], routed)
    return routed


def marginal_mask(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """M of all heads as (B*H, T_m, T_n) numbers, each row on a 16-byte boundary."""
    batch, heads, t_m, t_n = labels.shape
    mask = labels.new_empty((batch * heads, t_m, num_blocks(t_n, 8) * 8), dtype=dtype)
    aggregate_kernels.marginal_mask[(batch * heads * t_m,)](
        labels, mask, t_n, mask.shape[2], COLUMNS=min(1024, triton.next_power_of_2(t_n))
    )
    return mask


def aggregate(
    mask: Tensor,
    parts: Tensor,
    rows: int,
    group: tuple[int, int],
    factor: float,
    precise: str,
    *,
    transposed: bool,
) -> Tensor:
    """factor * M parts, or with M's transpose: (group, T, D + 1, D) to (group, rows, D + 1, D)."""
    inner = parts.shape[1]
    width = parts.shape[2] * parts.shape[3]
    sums = parts.new_empty((parts.shape[0], rows, *parts.shape[2:]))
    config = _aggregate_config(parts.dtype)
    tile = [config["BLOCK_M"], config["BLOCK_K"]]
    tiles_m = triton.cdiv(rows, config["BLOCK_M"])
    tiles_n = triton.cdiv(width, config["BLOCK_N"])
    aggregate_kernels.aggregate[(group[1] * tiles_m * tiles_n,)](
        TensorDescriptor(
            mask,
            [mask.shape[0], mask.shape[1], inner if not transposed else rows],
            list(mask.stride()),
            [1, *(tile[::-1] if transposed else tile)],
        ),
        TensorDescriptor(
            parts,
            [parts.shape[0], inner, width],
            [inner * width, width, 1],
            [1, config["BLOCK_K"], config["BLOCK_N"]],
        ),
        sums,
        group[0],
        rows,
        inner,
        width,
        factor,
        TRANSPOSED=transposed,
        PRECISION=precise,
        **config,
    )
    return sums


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
) -> tuple[Tensor, Tensor, Routed]:
    """The operator: output, log2-sum-exp2 of each row, and the routing (made, or as given)."""
    batch, heads, tokens_q, head_dim = query.shape
    output = torch.empty_like(query)
    lse = new_row_numbers(query)
    query, key, value = described(query), described(key), described(value)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    written = described(output)
    t_n = num_blocks(key.shape[2], problem.block_kv)
    t_m = num_blocks(tokens_q, problem.block_q)
    config = _forward_config(query.dtype, padded(head_dim), problem)
    precise = precision(query.dtype)
    groups = list(head_groups(query, key, problem))
    pooled = mask = None
    if routed is None:
        assert routing is not None
        routed = new_tables(query, key, problem, routing)
        pooled = new_pooled(query, routed)
        if len(groups) > 1 or not problem.linear:
            everything = (0, batch * heads)
            prepare(query, key, value, None, key_lengths, problem, everything, pooled, None)
            route(query, pooled, key_lengths, routing, problem, key.shape[2], routed)
            pooled = None
    for group in groups:
        sums = None
        if problem.linear:
            parts = _new_sums(key, group[1], t_n)
            prepare(query, key, value, weight, key_lengths, problem, group, pooled, parts)
            if pooled is not None:
                assert routing is not None
                route(query, pooled, key_lengths, routing, problem, key.shape[2], routed)
            if mask is None:
                mask = marginal_mask(routed.labels, parts.dtype)
            sums = aggregate(mask, parts, t_m, group, 1.0 / t_n, precise, transposed=False)
            del parts
        forward_kernels.forward[(group[1] * t_m * problem.block_q // config["TILE_M"],)](
            tiles(query, config["TILE_M"]),
            tiles(key, config["TILE_N"]),
            tiles(value, config["TILE_N"]),
            tiles(written, config["TILE_M"]),
            bias,
            lse,
            routed.rows,
            routed.counts,
            squares(sums),
            sums,
            key_lengths,
            group[0],
            group[1],
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
            SAVE=True,
            FEATURE_MAP=problem.feature_map,
            PRECISION=precise,
            D=head_dim,
            P=padded(head_dim),
            BLOCK_Q=problem.block_q,
            BLOCK_KV=problem.block_kv,
            **config,
        )
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, and of Proj's weight and bias where there is one."""
    batch, heads, tokens_q, head_dim = query.shape
    results = [torch.empty_like(t) for t in (query, key, value)]
    written = [described(t) for t in results]
    grad, query, key, value, output = (described(t) for t in (grad, query, key, value, output))
    proj = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    width, precise = padded(head_dim), precision(query.dtype)
    t_m, t_n = routed.labels.shape[2:]
    delta = torch.empty_like(lse)
    mask = None
    if problem.sparse:
        columns = _column_tables(routed.labels)
    d_weight = d_bias = None
    if bias is not None:
        d_bias = query.new_empty((batch * heads * t_m, head_dim), dtype=torch.float32)
    if weight is not None:
        programs = min(_programs(query, 1), batch * heads * t_n)
        d_weight = query.new_zeros((programs, head_dim, head_dim), dtype=torch.float32)
    # What every kernel below takes.
    numbers = {
        "LENGTHS": key_lengths is not None,
        "PRECISION": precise,
        "P": width,
        "BLOCK_KV": problem.block_kv,
    }
    queries_config = _queries_config(query.dtype, width, problem)
    keys_config = _keys_config(query.dtype, width, problem)
    linear_config = _linear_config(query.dtype, width, problem)
    for group in head_groups(query, key, problem):
        sums = d_sums = None
        if problem.linear:
            parts = _new_sums(key, group[1], t_n)
            prepare(query, key, value, proj, key_lengths, problem, group, None, parts)
            if mask is None:
                mask = marginal_mask(routed.labels, parts.dtype)
            sums = aggregate(mask, parts, t_m, group, 1.0 / t_n, precise, transposed=False)
            del parts
            d_sums = torch.empty_like(sums)
        backward_kernels.backward_queries[(group[1] * t_m,)](
            tiles(query, problem.block_q),
            tiles(key, queries_config["TILE_N"]),
            tiles(value, queries_config["TILE_N"]),
            output,
            tiles(grad, problem.block_q),
            tiles(written[0], problem.block_q),
            bias,
            lse,
            delta,
            routed.rows,
            routed.counts,
            squares(sums),
            sums,
            squares(d_sums),
            d_sums,
            d_bias,
            key_lengths,
            group[0],
            group[1],
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
            FEATURE_MAP=problem.feature_map,
            D=head_dim,
            BLOCK_Q=problem.block_q,
            **numbers,
            **queries_config,
        )
        if d_sums is not None:
            del sums
            # H is the mean over all T_n blocks of h over the block size: see `prepare`.
            factor = 1.0 / (t_n * problem.block_kv)
            d_sums = aggregate(mask, d_sums, t_n, group, factor, precise, transposed=True)
            programs = min(_programs(query, 1), group[1] * t_n)
            backward_kernels.backward_linear[(programs,)](
                tiles(key, linear_config["TILE"]),
                tiles(value, linear_config["TILE"]),
                tiles(written[1], linear_config["TILE"]),
                tiles(written[2], linear_config["TILE"]),
                squares(proj),
                squares(d_sums),
                last_rows(d_sums),
                d_weight,
                key_lengths,
                group[0],
                group[1],
                heads,
                key.shape[2],
                t_n,
                PROJ=weight is not None,
                FEATURE_MAP=problem.feature_map,
                D=head_dim,
                **numbers,
                **linear_config,
            )
            del d_sums
        if problem.sparse:
            table, counts, order = columns
            backward_kernels.backward_keys[(group[1] * t_n,)](
                tiles(query, keys_config["TILE_M"]),
                tiles(key, problem.block_kv),
                tiles(value, problem.block_kv),
                tiles(grad, keys_config["TILE_M"]),
                tiles(written[1], problem.block_kv),
                tiles(written[2], problem.block_kv),
                row_numbers(lse, keys_config["TILE_M"]),
                row_numbers(delta, keys_config["TILE_M"]),
                table,
                counts,
                order,
                key_lengths,
                group[0],
                group[1],
                heads,
                t_m,
                t_n,
                num_blocks(t_n, _LONG_COLUMNS),
                problem.scale * _LOG2_E,
                problem.scale,
                ADD=problem.linear,
                BLOCK_Q=problem.block_q,
                **numbers,
                **keys_config,
            )
    for result, buffer in zip(results, written, strict=True):
        if buffer is not result:
            result.copy_(buffer)
    if weight is not None and d_weight is not None:
        d_weight = d_weight.sum(0).to(weight.dtype)
    if bias is not None and d_bias is not None:
        d_bias = d_bias.sum(0).to(bias.dtype)
    return results[0], results[1], results[2], d_weight, d_bias


def row_tables(labels: Tensor, *, columns: bool) -> tuple[Tensor, Tensor]:
    """Critical blocks of each row (or column) of labels, ascending, and their number."""
    batch, heads, t_m, t_n = labels.shape
    lines, entries = (t_n, t_m) if columns else (t_m, t_n)
    table = labels.new_empty((batch, heads, lines, entries), dtype=torch.int32)
    counts = labels.new_empty((batch, heads, lines), dtype=torch.int32)
    tile = 32
    routing_kernels.row_table[(batch * heads * triton.cdiv(lines, tile),)](
        labels,
        table,
        counts,
        lines,
        entries,
        t_m * t_n,
        1 if columns else t_n,
        t_n if columns else 1,
        LINES=tile,
        CHUNK=128,
    )
    return table, counts


def _column_tables(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Table and counts of the columns, and the columns of each head by falling count."""
    table, counts = row_tables(labels, columns=True)
    order = torch.empty_like(counts)
    lines = counts.shape[2]
    tile = 32
    routing_kernels.longest_first[(counts.shape[0] * counts.shape[1] * triton.cdiv(lines, tile),)](
        counts, order, lines, LINES=tile, CHUNK=128
    )
    return table, counts, order


def _new_sums(tensor: Tensor, heads: int, blocks: int) -> Tensor:
    head_dim = tensor.shape[3]
    shape = (heads, blocks, head_dim + 1, head_dim)
    return tensor.new_empty(shape, dtype=sums_dtype(tensor.dtype))


def _programs(tensor: Tensor, per_multiprocessor: int) -> int:
    """Programs that fill the GPU once; two in the interpreter."""
    if not tensor.is_cuda:
        return 2
    device = torch.cuda.get_device_properties(tensor.device)
    return per_multiprocessor * device.multi_processor_count


# Tile sizes, measured on an H100 at the Wan2.1-1.3B shape: see kernels/NOTES.md.


def _forward_config(
    dtype: torch.dtype, width: int, problem: Problem
) -> dict[str, int | bool]:
    # Two small programs on a multiprocessor overlap one's products with the other's exponentials.
    small = dtype == torch.float32
    return {
        "TILE_M": min(64, problem.block_q),
        "TILE_N": min(32 if small else 64, problem.block_kv),
        "STAGES": 2 if small else 3,
        "WARP_SPECIALIZE": False,
        "num_warps": 8 if small else 4,
    }


def _queries_config(dtype: torch.dtype, width: int, problem: Problem) -> dict[str, int]:
    if dtype == torch.float32:
        return {"TILE_N": min(32, problem.block_kv), "STAGES": 1, "num_warps": 8}
    if problem.block_q == 128:
        return {"TILE_N": min(64, problem.block_kv), "STAGES": 3, "num_warps": 8}
    return {"TILE_N": min(32, problem.block_kv), "STAGES": 3, "num_warps": 4}


def _keys_config(dtype: torch.dtype, width: int, problem: Problem) -> dict[str, int]:
    if dtype == torch.float32:
        return {"TILE_M": min(32, problem.block_q), "STAGES": 1, "num_warps": 8}
    if problem.block_kv == 128:
        return {"TILE_M": min(64, problem.block_q), "STAGES": 3, "num_warps": 8}
    return {"TILE_M": min(64, problem.block_q), "STAGES": 2, "num_warps": 4}


def _linear_config(dtype: torch.dtype, width: int, problem: Problem) -> dict[str, int]:
    if dtype == torch.bfloat16:
        return {"TILE": min(64, problem.block_kv), "STAGES": 2, "num_warps": 8}
    return {"TILE": min(32, problem.block_kv), "STAGES": 1, "num_warps": 8}


def _prepare_config(dtype: torch.dtype, problem: Problem, *, linear: bool) -> dict[str, int]:
    if not linear:
        return {"TILE": problem.block_kv, "STAGES": 2, "num_warps": 4, "per_multiprocessor": 4}
    if dtype == torch.bfloat16:
        # Two programs a multiprocessor, for which registers are the limit.
        tile = min(128, problem.block_kv)
        return {"TILE": tile, "STAGES": 1, "num_warps": 8, "per_multiprocessor": 2, "maxnreg": 128}
    tile = min(64 if dtype == torch.float16 else 32, problem.block_kv)
    return {"TILE": tile, "STAGES": 1, "num_warps": 8, "per_multiprocessor": 1}


def _aggregate_config(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 3, "num_warps": 4}
