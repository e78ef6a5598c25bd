"""The eager backend against the dense reference, and both against what must hold anyway."""

import math

import pytest
import sla_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sla_kernels import BlockMap, Hedgehog, attention_branches, classify_blocks
from sla_kernels import sparse_linear_attention as sla
from sla_kernels.testing import (
    AWKWARD,
    Case,
    assert_low_precision_close,
    random_inputs,
    relative_error,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

CASES = pytest.mark.parametrize("case", AWKWARD, ids=lambda case: case.name)
# The kernels, which take neither float64 nor every block, have tests of their own.
FAST = [name for name in sla_kernels.available_backends() if name not in ("reference", "triton")]
BACKENDS = pytest.mark.parametrize("backend", FAST)
SMALL = Case("small", 100, 100)
NAMES = ["output", "query", "key", "value", "proj_weight", "proj_bias"]


def projection(head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(head_dim, head_dim, generator=generator) / math.sqrt(head_dim)
    return weight.to(dtype), torch.randn(head_dim, generator=generator).to(dtype)


def run(tensors: list[Tensor], backend: str, **options: object) -> list[Tensor]:
    """Output and the gradients of all five tensors, of a fixed random functional."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = sla(*leaves, backend=backend, **options)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return [output, *torch.autograd.grad((output * weight.to(output)).sum(), leaves)]


@CASES
@BACKENDS
def test_equals_the_reference(case: Case, backend: str) -> None:
    tensors = [*random_inputs(case, torch.float64), *projection(case.head_dim, torch.float64)]
    block_map = classify_blocks(tensors[0], tensors[1], **case.routing())
    expected = run(tensors, "reference", block_map=block_map)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        found = run([t.to(dtype) for t in tensors], backend, block_map=block_map)
        for name, got, want in zip(
            ["o", "q", "k", "v", "weight", "bias"], found, expected, strict=True
        ):
            assert got.dtype == dtype
            assert relative_error(got, want) < limit, name


@CASES
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_plain_pytorch(
    case: Case, backend: str, dtype: torch.dtype
) -> None:
    tensors = [*random_inputs(case, dtype), *projection(case.head_dim, dtype)]
    block_map = classify_blocks(tensors[0], tensors[1], **case.routing())
    exact = run([t.double() for t in tensors], "reference", block_map=block_map)
    plain = run(tensors, "reference", block_map=block_map)
    for got, low, want in zip(
        run(tensors, backend, block_map=block_map), plain, exact, strict=True
    ):
        assert got.dtype == dtype
        assert_low_precision_close(got, low, want)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("always_critical", [0, 3])
def test_gradients_are_those_of_finite_differences(backend: str, always_critical: int) -> None:
    case = Case("tiny", 7, 9, head_dim=4, block_q=3, block_kv=2, batch=1, heads=1)
    tensors = [*random_inputs(case, torch.float64), *projection(4, torch.float64)]
    routing = {**case.routing(), "critical": 0.4, "always_critical": always_critical}
    block_map = classify_blocks(tensors[0], tensors[1], **routing)
    assert torch.autograd.gradcheck(
        lambda *leaves: sla(*leaves, block_map=block_map, backend=backend),
        [t.clone().requires_grad_() for t in tensors],
    )


@BACKENDS
@pytest.mark.parametrize("feature_map", ["softmax", "elu+1", "relu", Hedgehog(16).double()])
def test_feature_maps(backend: str, feature_map: object) -> None:
    tensors = [*random_inputs(SMALL, torch.float64), *projection(16, torch.float64)]
    options = {**SMALL.routing(), "feature_map": feature_map}
    for got, want in zip(
        run(tensors, backend, **options), run(tensors, "reference", **options), strict=True
    ):
        assert relative_error(got, want) < 1e-12


@BACKENDS
def test_features_that_are_all_zero_give_zero(backend: str) -> None:
    query, key, value = (-t.abs() for t in random_inputs(SMALL))
    block_map = classify_blocks(query, key, **SMALL.routing())
    found = [t.requires_grad_() for t in (query, key, value)]
    branches = attention_branches(*found, block_map, feature_map="relu", backend=backend)
    assert torch.equal(branches.linear, torch.zeros_like(branches.linear))
    (branches.linear.sum() + branches.sparse.sum()).backward()
    assert all(t.grad.isfinite().all() for t in found)  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_everything_critical_is_exact_attention(backend: str) -> None:
    query, key, value = random_inputs(SMALL)
    exact = scaled_dot_product_attention(query, key, value)
    found = sla(query, key, value, critical=1.0, negligible=0.0, backend=backend)
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)
    scaled = scaled_dot_product_attention(query, key, value, scale=0.7)
    found = sla(query, key, value, critical=1.0, negligible=0.0, scale=0.7, backend=backend)
    torch.testing.assert_close(found, scaled, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_an_empty_marginal_set_leaves_the_sparse_branch_and_the_bias(backend: str) -> None:
    case = next(case for case in AWKWARD if case.name == "nothing_marginal")
    query, key, value = random_inputs(case)
    weight, bias = projection(16)
    block_map = classify_blocks(query, key, **case.routing())
    assert block_map.fractions()["marginal"] == 0
    sparse = sla_kernels.sparse_attention(query, key, value, block_map, backend=backend)
    found = sla(query, key, value, weight, bias, block_map=block_map, backend=backend)
    torch.testing.assert_close(found, sparse + bias)


@BACKENDS
def test_rows_of_very_different_length(backend: str) -> None:
    """A given map with a row of all blocks, one of none, and random ones between."""
    case = Case("given", 100, 100)
    tensors = [*random_inputs(case, torch.float64), *projection(16, torch.float64)]
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(-1, 2, (2, 2, 7, 13), generator=generator).to(torch.int8)
    labels[0, 0, 0], labels[0, 1, 3], labels[1, 0, 6] = 1, 0, -1
    block_map = BlockMap(labels, 16, 8, 100, 100)
    expected = run(tensors, "reference", block_map=block_map)
    for got, want in zip(run(tensors, backend, block_map=block_map), expected, strict=True):
        assert got.isfinite().all()
        assert relative_error(got, want) < 1e-12
    skipped = attention_branches(*tensors[:3], block_map, backend=backend)
    assert skipped.sparse[1, 0, 96:].abs().sum() == 0
    assert skipped.linear[1, 0, 96:].abs().sum() == 0


@BACKENDS
def test_linear_attention_over_all_keys(backend: str) -> None:
    query, key, value = random_inputs(Case("lengths", 37, 120), torch.float64)
    phi_q, phi_k = query.softmax(-1), key.softmax(-1)
    weights = phi_q @ phi_k.transpose(-1, -2)
    expected = (weights / weights.sum(-1, keepdim=True)) @ value
    found = sla_kernels.linear_attention(query, key, value, backend=backend)
    assert relative_error(found, expected) < 1e-12


@BACKENDS
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_extreme_inputs_stay_finite(backend: str, size: float) -> None:
    tensors = [*(size * t for t in random_inputs(SMALL)), *projection(16)]
    for got in run(tensors, backend, **SMALL.routing()):
        assert got.isfinite().all()


@BACKENDS
def test_without_projection_the_branches_are_added(backend: str) -> None:
    query, key, value = random_inputs(SMALL)
    block_map = classify_blocks(query, key, **SMALL.routing())
    branches = attention_branches(query, key, value, block_map, backend=backend)
    found = sla(query, key, value, block_map=block_map, backend=backend)
    torch.testing.assert_close(found, branches.sparse + branches.linear)
    eye = sla(query, key, value, torch.eye(16), block_map=block_map, backend=backend)
    torch.testing.assert_close(found, eye)


@BACKENDS
def test_autocast_works_in_its_dtype(backend: str) -> None:
    query, key, value = random_inputs(SMALL)
    weight, bias = projection(16)
    with torch.autocast("cpu", torch.bfloat16):
        found = sla(query, key, value, weight, bias, **SMALL.routing(), backend=backend)
    assert found.dtype == torch.bfloat16
    low = [t.to(torch.bfloat16) for t in (query, key, value)]
    expected = sla(*low, weight, bias, **SMALL.routing(), backend="reference")
    assert relative_error(found, expected) < 0.02


@BACKENDS
def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    query, key, value = random_inputs(SMALL)
    sla(query, key, value.requires_grad_(), **SMALL.routing(), backend=backend).sum().backward()
    assert value.grad is not None
    assert query.grad is None


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@BACKENDS
def test_nothing_of_size_n_by_n_is_made(backend: str) -> None:
    case = Case("long", 4096, 4096, block_q=64, block_kv=64, batch=1, heads=1, critical=0.05)
    query, key, value = (t.requires_grad_() for t in random_inputs(case))
    with LargestTensor() as largest:
        sla(query, key, value, **case.routing(), backend=backend).sum().backward()
    assert 0 < largest.numel < 4096 * 4096 / 8


@given(
    tokens=st.integers(1, 70),
    block_q=st.integers(1, 33),
    block_kv=st.integers(1, 33),
    critical=st.floats(0, 1),
    share=st.floats(0, 1),
    always=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_and_routing(
    tokens: int,
    block_q: int,
    block_kv: int,
    critical: float,
    share: float,
    always: int,
    seed: int,
) -> None:
    case = Case(
        "any", tokens, tokens, 8, block_q, block_kv, critical, (1 - critical) * share, always
    )
    tensors = [*random_inputs(case, torch.float64, seed), *projection(8, torch.float64)]
    expected = run(tensors, "reference", **case.routing())
    for backend in FAST:
        for got, want in zip(run(tensors, backend, **case.routing()), expected, strict=True):
            assert relative_error(got, want) < 1e-11
