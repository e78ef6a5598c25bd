"""Memory and the fused kernels: strides, uninitialised buffers, equal runs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from sla_kernels import classify_blocks, linear_attention, sparse_attention
from sla_kernels import sparse_linear_attention as sla
from sla_kernels.testing import (
    AWKWARD,
    Case,
    random_inputs,
    random_projection,
    supported,
    with_gradients,
)
from torch import Tensor

launch = pytest.importorskip("sla_kernels.triton.launch")
GPU = os.environ.get("SLA_TEST_GPU") == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # log2(0) in NumPy
HALF = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
HALVES = pytest.mark.parametrize("dtype", HALF, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
NAMED = {c.name: supported(c) if GPU else supported(c, tokens=32, heads=1) for c in AWKWARD}
TOKENS = 100 if GPU else 20
CASE = Case("layouts", TOKENS, TOKENS, block_q=16, block_kv=16, critical=0.4)


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    tensors = random_inputs(case, dtype, device=device)
    return [*tensors, *random_projection(case.head_dim, dtype, device)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got.isfinite().all(), index
        assert torch.equal(got, want), index


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def packed(tensor: Tensor) -> Tensor:
    """The second of three in a (B, N, 3, H, D) tensor."""
    rows = tensor.transpose(1, 2)
    return torch.stack([-rows, rows, rows + 1], dim=2)[:, :, 1].transpose(1, 2)


def columns_outside(tensor: Tensor) -> Tensor:
    """The last dimension is not contiguous."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def unaligned(tensor: Tensor) -> Tensor:
    """Starts between two multiples of 16 bytes."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def odd_rows(tensor: Tensor) -> Tensor:
    """Rows that start between two multiples of 16 bytes."""
    wide = tensor.new_empty((*tensor.shape[:3], tensor.shape[3] + 1))
    return wide[..., :-1].copy_(tensor)


COPIED = (columns_outside, unaligned, odd_rows)


@pytest.mark.parametrize("layout", [transposed, packed, *COPIED], ids=lambda f: f.__name__)
@HALVES
def test_layouts_change_nothing(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str
) -> None:
    tensors, options = inputs(CASE, dtype, device), {**CASE.routing(device), "backend": "triton"}
    expected = with_gradients(sla, [t.contiguous() for t in tensors], **options)
    arranged = [layout(t) for t in tensors[:3]]
    for tensor, plain in zip(arranged, tensors[:3], strict=True):
        assert torch.equal(tensor, plain)
    assert_equal(with_gradients(sla, [*arranged, *tensors[3:]], **options), expected)


@pytest.mark.parametrize("layout", [transposed, packed, columns_outside], ids=lambda f: f.__name__)
def test_layouts_of_the_projection_and_in_float32(
    layout: Callable[[Tensor], Tensor], device: str
) -> None:
    tensors, options = inputs(CASE, torch.float32, device), {**CASE.routing(device)}
    options["backend"] = "triton"
    expected = with_gradients(sla, [t.contiguous() for t in tensors], **options)
    arranged = [layout(t) for t in tensors[:3]]
    weight = tensors[3].t().contiguous().t()
    found = with_gradients(sla, [*arranged, weight, tensors[4]], **options)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)  # PyTorch's Proj may sum in another order


@pytest.mark.parametrize("layout", [contiguous, transposed, packed], ids=lambda f: f.__name__)
@HALVES
def test_the_output_has_the_querys_strides(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str
) -> None:
    query, key, value, *projection = inputs(CASE, dtype, device)
    query, key, value = (layout(t) for t in (query, key, value))
    assert all(launch.described(t) is t for t in (query, key, value)), "nothing is copied"
    output = sla(query, key, value, *projection, **CASE.routing(device), backend="triton")
    assert output.stride() == torch.empty_like(query).stride()
    if layout is not packed:
        assert output.stride() == query.stride()


@pytest.mark.parametrize("layout", COPIED, ids=lambda f: f.__name__)
def test_what_the_copy_engine_cannot_address_is_copied(
    layout: Callable[[Tensor], Tensor], device: str
) -> None:
    tensor = layout(inputs(CASE, torch.float16, device)[0])
    copy = launch.described(tensor)
    assert copy is not tensor
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    assert launch.described(copy) is copy


@HALVES
def test_expanded_heads(dtype: torch.dtype, device: str) -> None:
    """Heads that share keys and values, with a stride of zero."""
    query, key, value, *projection = inputs(CASE, dtype, device)
    options = {**CASE.routing(device), "backend": "triton"}
    shared = [t[:, :1].expand(-1, 2, -1, -1) for t in (key, value)]
    copied = [t.contiguous() for t in shared]
    expected = with_gradients(sla, [query, *copied, *projection], **options)
    assert_equal(with_gradients(sla, [query, *shared, *projection], **options), expected)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "columns_outside"])
@HALVES
def test_layouts_of_the_outputs_gradient(kind: str, dtype: torch.dtype, device: str) -> None:
    leaves = [t.requires_grad_() for t in inputs(CASE, dtype, device)]
    output = sla(*leaves, **CASE.routing(device), backend="triton")
    plain = torch.ones_like(output, memory_format=torch.contiguous_format)
    if kind == "expanded":
        grad = plain[:1, :1, :1, :1].expand_as(plain)
    else:
        plain = torch.randn_like(plain)
        grad = transposed(plain) if kind == "transposed" else columns_outside(plain)
    expected = torch.autograd.grad(output, leaves, plain, retain_graph=True)
    assert_equal(list(torch.autograd.grad(output, leaves, grad)), list(expected))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling


POISONED = [
    "ragged_both",
    "shorter_than_a_block",
    "one_block",
    "one_token",
    "nothing_marginal",
    "fewer_keys",
    "wide_query_blocks",
    "head_dim_96",
    "text_tokens",
    "padded",
    "padded_to_a_block_and_to_nothing",
    "padded_text_tokens",
]


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("name", POISONED)
@DTYPES
def test_nothing_is_read_before_it_is_written(name: str, dtype: torch.dtype, device: str) -> None:
    if not GPU and dtype == torch.float32 and POISONED.index(name) % 3:
        pytest.skip("every third is enough in the interpreter")
    case = NAMED[name]
    if not GPU and case.key_lengths is None:
        case = replace(case, batch=1)
    tensors, options = inputs(case, dtype, device), {**case.routing(device), "backend": "triton"}
    expected = with_gradients(sla, tensors, **options)
    with poisoned_memory():
        found = with_gradients(sla, tensors, **options)
    assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("branch", [sparse_attention, linear_attention], ids=["sparse", "linear"])
@HALVES
def test_branches_alone_read_nothing_unwritten(
    branch: Callable[..., Tensor], dtype: torch.dtype, device: str
) -> None:
    case = NAMED["padded_text_tokens"]
    tensors = inputs(case, dtype, device)[:3]
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    expected = with_gradients(branch, tensors, block_map=block_map, backend="triton")
    with poisoned_memory():
        found = with_gradients(branch, tensors, block_map=block_map, backend="triton")
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["ragged_by_one", "padded_text_tokens"])
@HALVES
def test_two_runs_are_equal(name: str, dtype: torch.dtype, device: str) -> None:
    case = NAMED[name]
    tensors, options = inputs(case, dtype, device), {**case.routing(device), "backend": "triton"}
    first = with_gradients(sla, tensors, **options)
    assert_equal(with_gradients(sla, tensors, **options), first)


@pytest.mark.gpu
@HALVES
def test_two_runs_are_equal_at_real_shapes(dtype: torch.dtype, device: str) -> None:
    case = Case("real", 4100, 4100, 128, 128, 64, heads=8)
    tensors, options = inputs(case, dtype, device), {**case.routing(device), "backend": "triton"}
    first = with_gradients(sla, tensors, **options)
    for _ in range(3):
        assert_equal(with_gradients(sla, tensors, **options), first)


@HALVES
def test_groups_of_heads_change_nothing(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block sums of one head at a time, as where all do not fit."""
    tensors, options = inputs(CASE, dtype, device), {**CASE.routing(device), "backend": "triton"}
    expected = with_gradients(sla, tensors, **options)
    monkeypatch.setattr(launch, "_SUMS_BYTES", 1)
    monkeypatch.setattr(launch, "_SUMS_PER_QUERY", 0.001)
    found = with_gradients(sla, tensors, **options)
    assert_equal(found[:4], expected[:4])
    for got, want in zip(found[4:], expected[4:], strict=True):
        torch.testing.assert_close(got, want)  # sums over other parts
