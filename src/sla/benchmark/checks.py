"""Before a time is taken: the method against the dense reference, on a part of its own inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from sla_kernels import BlockMap, attention_branches, classify_blocks
from sla_kernels.testing import relative_error
from torch import Tensor

from sla.benchmark.methods import Inputs, Method, make_inputs, make_tensors
from sla.benchmark.suites import Point

# Largest relative error against the reference at which a time is taken; gradients get twice that.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GRADIENTS = 2.0
ROUTING_MISMATCH = 1e-4  # share of labels that near-ties may change
CHECKED_QUERY_BLOCKS = 4
CHECKED_SCORES = 2**27  # of one call of the reference, which holds several tensors of that size


class WrongResultError(RuntimeError):
    """A method whose result differs from the reference."""


def reference(inputs: Inputs, kind: str) -> Tensor:
    """What a method of this kind computes, in float32 or better, by the definition."""
    query, key, value, weight, bias = (t.float() for t in inputs.leaves)
    branches = attention_branches(query, key, value, inputs.block_map, backend="reference")
    if kind == "sparse":
        return branches.sparse
    return branches.sparse + branches.linear @ weight.T + bias


@torch.no_grad()
def check_forward(
    call: Callable[[], Tensor], kind: str, inputs: Inputs, tolerance: float | None = None
) -> float:
    """Relative error on the first query blocks, all keys, of as many heads as fit.

    Args:
        call: a method prepared for the inputs.
        kind, tolerance: the method's.

    Raises:
        WrongResultError: it is above the tolerance.
    """
    whole = inputs.block_map
    rows = min(whole.tokens_q, CHECKED_QUERY_BLOCKS * whole.block_q)
    batch, heads = inputs.query.shape[:2]
    heads = max(1, min(heads, CHECKED_SCORES // (batch * rows * whole.tokens_kv)))
    labels = whole.labels[:, :heads, : -(-rows // whole.block_q)]
    part = replace(
        inputs,
        query=inputs.query[:, :heads, :rows],
        key=inputs.key[:, :heads],
        value=inputs.value[:, :heads],
        block_map=BlockMap(labels, whole.block_q, whole.block_kv, rows, whole.tokens_kv),
    )
    found = call()[:, :heads, :rows]
    limit = TOLERANCE[inputs.query.dtype] if tolerance is None else tolerance
    return _within(relative_error(found, reference(part, kind)), limit, "output")


@torch.no_grad()
def check_routing(inputs: Inputs) -> float:
    """Share of labels in which the backend's routing differs from the reference's.

    Raises:
        WrongResultError: it is more than near-ties explain.
    """
    expected = classify_blocks(inputs.query, inputs.key, **inputs.numbers, backend="reference")
    mismatch = (inputs.block_map.labels != expected.labels).float().mean().item()
    if mismatch > ROUTING_MISMATCH:
        raise WrongResultError(f"wrong result: {mismatch:.1e} of the labels differ in the routing")
    return mismatch


def check_backward(method: Method, point: Point, like: Tensor, seed: int) -> float:
    """Largest relative error of a gradient on a short ragged sequence.

    Args:
        point: whose blocks, head_dim and map are used.
        like: a tensor of the dtype and device to use.

    Raises:
        WrongResultError: it is above the tolerance.
    """
    block = max(point.block_q, point.block_kv)
    small = replace(point, batch=1, heads=2, tokens=6 * block + 37, sparsity=0.7, negligible=0.2)
    inputs = make_inputs(small, make_tensors(small, like.device, like.dtype, seed), seed)
    grad = torch.randn_like(inputs.query)
    found = torch.autograd.grad(method.prepare(inputs)(), inputs.leaves, grad, allow_unused=True)
    expected = torch.autograd.grad(
        reference(inputs, method.kind), inputs.leaves, grad.float(), allow_unused=True
    )
    errors = []
    for name, got, wanted in zip("qkvwb", found, expected, strict=True):
        if wanted is not None:
            if got is None:
                raise WrongResultError(f"wrong result: no gradient of {name}")
            errors.append(relative_error(got, wanted))
    # max() would pass over a NaN that is not the first.
    worst = max(errors, key=lambda error: error if error == error else float("inf"))
    return _within(worst, GRADIENTS * TOLERANCE[inputs.query.dtype], "gradients")


def _within(error: float, limit: float, what: str) -> float:
    if not error <= limit:
        raise WrongResultError(f"wrong result: error {error:.1e} > {limit} in the {what}")
    return error
