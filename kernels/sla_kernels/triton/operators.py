"""The kernels as PyTorch operators: `torch.library` registrations with shapes and gradients.

`torch.compile` sees one operator and no graph break. Results have the strides of what they belong
to: a query that is a transposed (B, N, H, D) tensor gives an output that is one too.

In eager mode `run` and the backward call the functions behind the operators themselves: around a
custom operator with gradients `torch.library` puts much Python, and short calls wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sla_kernels.triton import launch, low_bit, pooled
from sla_kernels.triton.launch import Problem, Routed, Routing


@torch.library.custom_op("sla_kernels::route", mutates_args=())
def route(
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    always_critical: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, row table and counts of a `BlockMap`."""
    with _device_of(query):
        routing = Routing(critical, negligible, always_critical, scale)
        problem = Problem(block_q, block_kv, 0, "softmax", 1.0)
        routed = launch.route_alone(query, key, key_lengths, routing, problem)
        return routed.labels, routed.rows, routed.counts


@route.register_fake
def _(
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    always_critical: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    routing = Routing(critical, negligible, always_critical, scale)
    routed = launch.new_tables(query, key, Problem(block_q, block_kv, 0, "softmax", 1.0), routing)
    return routed.labels, routed.rows, routed.counts


@torch.library.custom_op("sla_kernels::row_table", mutates_args=())
def row_table(labels: Tensor) -> tuple[Tensor, Tensor]:
    """`critical_blocks` and `critical_counts` of a `BlockMap` from its labels."""
    with _device_of(labels):
        return launch.row_tables(launch.aligned(labels), columns=False)


@row_table.register_fake
def _(labels: Tensor) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape, dtype=torch.int32), labels.new_empty(
        labels.shape[:3], dtype=torch.int32
    )


def _sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    always_critical: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Routing and both branches: output, log-sum-exp, labels, row table, counts."""
    with _device_of(query):
        routing = Routing(critical, negligible, always_critical, scale)
        long_rows = launch.num_blocks(always_critical, block_q)
        problem = Problem(block_q, block_kv, long_rows, feature_map, scale)
        output, lse, routed = launch.attend(
            query, key, value, weight, bias, key_lengths, problem, routing=routing
        )
        return output, lse, routed.labels, routed.rows, routed.counts


sparse_linear_attention = torch.library.custom_op(
    "sla_kernels::sparse_linear_attention", _sparse_linear_attention, mutates_args=()
)


@sparse_linear_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    always_critical: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    routing = Routing(critical, negligible, always_critical, scale)
    problem = Problem(block_q, block_kv, 0, feature_map, scale)
    routed = launch.new_tables(query, key, problem, routing)
    lse = launch.new_row_numbers(query)
    return torch.empty_like(query), lse, routed.labels, routed.rows, routed.counts


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    counts: Tensor,
    block_q: int,
    block_kv: int,
    feature_map: str,
    scale: float,
    sparse: bool,
    linear: bool,
) -> tuple[Tensor, Tensor]:
    """One branch, or both, of a given routing: output and log-sum-exp."""
    with _device_of(query):
        problem = Problem(block_q, block_kv, 0, feature_map, scale, sparse, linear)
        routed = Routed(*(launch.aligned(tensor) for tensor in (labels, rows, counts)))
        output, lse, _ = launch.attend(
            query,
            key,
            value,
            weight,
            bias,
            key_lengths,
            problem,
            routed=routed,
            block_lengths=block_lengths,
        )
        return output, lse


attend = torch.library.custom_op("sla_kernels::attend", _attend, mutates_args=())


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    counts: Tensor,
    block_q: int,
    block_kv: int,
    feature_map: str,
    scale: float,
    sparse: bool,
    linear: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), launch.new_row_numbers(query)


def _attend_backward(
    grad: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    labels: Tensor,
    rows: Tensor,
    counts: Tensor,
    block_q: int,
    block_kv: int,
    long_rows: int,
    feature_map: str,
    scale: float,
    sparse: bool,
    linear: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, weight and bias; empty where there is no such tensor."""
    with _device_of(query):
        problem = Problem(block_q, block_kv, long_rows, feature_map, scale, sparse, linear)
        routed = Routed(*(launch.aligned(tensor) for tensor in (labels, rows, counts)))
        d_query, d_key, d_value, d_weight, d_bias = launch.attend_backward(
            grad,
            query,
            key,
            value,
            weight,
            bias,
            key_lengths,
            output,
            lse,
            routed,
            problem,
            d_lse=d_lse,
            block_lengths=block_lengths,
        )
        nothing = query.new_empty(0)
        return (
            d_query,
            d_key,
            d_value,
            nothing if d_weight is None else d_weight,
            nothing.clone() if d_bias is None else d_bias,
        )


attend_backward = torch.library.custom_op(
    "sla_kernels::attend_backward", _attend_backward, mutates_args=()
)


@attend_backward.register_fake
def _(
    grad: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    labels: Tensor,
    rows: Tensor,
    counts: Tensor,
    block_q: int,
    block_kv: int,
    long_rows: int,
    feature_map: str,
    scale: float,
    sparse: bool,
    linear: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        query.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        query.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _attend_low_bit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    rows: Tensor,
    counts: Tensor,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The sparse branch of a given routing in FP8: output and log-sum-exp; no gradients."""
    with _device_of(query):
        problem = Problem(block_q, block_kv, 0, "softmax", scale, True, False)
        tensors = (query, key, value, key_lengths, block_lengths, rows, counts)
        return low_bit.attend(*tensors, problem)


attend_low_bit = torch.library.custom_op(
    "sla_kernels::attend_low_bit", _attend_low_bit, mutates_args=()
)


@attend_low_bit.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    block_lengths: Tensor | None,
    rows: Tensor,
    counts: Tensor,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), launch.new_row_numbers(query)


def _merge_pooled(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, its own log-sum-exp, and the pooled keys and values."""
    with _device_of(query):
        tensors = (query, key, value, sparse, lse, key_lengths, labels)
        merged = pooled.merge(*tensors, block_q, block_kv, scale)
        return merged.output, merged.lse, merged.pooled_key, merged.pooled_value


merge_pooled = torch.library.custom_op("sla_kernels::merge_pooled", _merge_pooled, mutates_args=())


@merge_pooled.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    merged = pooled.new_results(query, labels)
    return merged.output, merged.lse, merged.pooled_key, merged.pooled_value


def _merge_pooled_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    labels: Tensor,
    output: Tensor,
    total: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, O^s and its log-sum-exp."""
    with _device_of(query):
        merged = pooled.Merged(output, total, pooled_key, pooled_value)
        tensors = (grad, query, key, value, sparse, lse, key_lengths, labels)
        return pooled.merge_backward(*tensors, merged, block_q, block_kv, scale)


merge_pooled_backward = torch.library.custom_op(
    "sla_kernels::merge_pooled_backward", _merge_pooled_backward, mutates_args=()
)


@merge_pooled_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    labels: Tensor,
    output: Tensor,
    total: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        torch.empty_like(sparse),
        torch.empty_like(lse, memory_format=torch.contiguous_format),
    )


def _device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(tensor)


def _save_routed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, weight, bias, key_lengths = inputs[:6]
    _, _, block_q, block_kv, always_critical, feature_map, scale = inputs[6:]
    ctx.save_for_backward(query, key, value, weight, bias, key_lengths, None, *output)
    long_rows = launch.num_blocks(always_critical, block_q)
    ctx.numbers = (block_q, block_kv, long_rows, feature_map, scale, True, True)
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, tables = inputs[:7], inputs[7:10]
    block_q, block_kv, feature_map, scale, sparse, linear = inputs[10:]
    ctx.save_for_backward(*tensors, *output, *tables)
    ctx.numbers = (block_q, block_kv, 0, feature_map, scale, sparse, linear)
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, d_lse: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None and d_lse is None:
        return (None,) * ctx.inputs
    saved = ctx.saved_tensors  # once: checkpointing unpacks them only once
    tensors, (output, lse, *tables) = saved[:7], saved[7:]
    if grad is None:
        grad = torch.zeros_like(output)
    backward = attend_backward if _observed(grad, tensors[0]) else _attend_backward
    arguments = (grad, d_lse, *tensors, output, lse, *tables, *ctx.numbers)
    grads = backward(*arguments)
    wanted = [
        gradient if tensor is not None else None
        for gradient, tensor in zip(grads, tensors[:5], strict=True)
    ]
    return (*wanted, *(None,) * (ctx.inputs - 5))


def _save_merged(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.numbers = inputs[7:]
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _merged_backward(
    ctx: Any, grad: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.inputs
    saved = ctx.saved_tensors
    observed = _observed(grad, saved[0])
    backward = merge_pooled_backward if observed else _merge_pooled_backward
    return (*backward(grad, *saved, *ctx.numbers), *(None,) * (ctx.inputs - 5))


@dataclass(frozen=True)
class _Parts:
    """What an operator is made of.

    Attributes:
        function: the forward.
        save: keeps inputs and results for the backward.
        backward: gradients of the inputs; only the first five can have one.
    """

    function: Callable[..., Any]
    save: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]


_PARTS: dict[Any, _Parts] = {
    sparse_linear_attention: _Parts(_sparse_linear_attention, _save_routed, _backward),
    attend: _Parts(_attend, _save_given, _backward),
    merge_pooled: _Parts(_merge_pooled, _save_merged, _merged_backward),
}
for _operator, _parts in _PARTS.items():
    _operator.register_autograd(_parts.backward, setup_context=_parts.save)


def run(operator: Any, *inputs: Any) -> Any:
    """operator(*inputs), by the shortest way that nobody can tell from it."""
    if _observed(*inputs[:3]):
        return operator(*inputs)
    parts = _PARTS[operator]
    if torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs[:5]
    ):
        return _Direct.apply(parts, *inputs)
    return parts.function(*inputs)


def run_low_bit(*inputs: Any) -> tuple[Tensor, Tensor]:
    """attend_low_bit(*inputs), as `run`; without gradients."""
    function = attend_low_bit if _observed(*inputs[:3]) else _attend_low_bit
    result: tuple[Tensor, Tensor] = function(*inputs)
    return result


def _observed(*tensors: Tensor) -> bool:
    """Whether someone needs to see the operator: a compiler, a dispatch mode (fake tensors, FLOP
    counters, selective checkpointing), a functional transform, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


class _Direct(torch.autograd.Function):
    """The same gradients as the operators'."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, *inputs: Any) -> Any:
        output = parts.function(*inputs)
        parts.save(ctx, inputs, output)
        ctx.parts = parts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.parts.backward(ctx, *grads))
