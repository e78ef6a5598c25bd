"""The fused kernels against the float64 reference: on a CPU interpreted and small."""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sla_kernels import (
    BlockMap,
    Hedgehog,
    attention_branches,
    classify_blocks,
    linear_attention,
    sparse_attention,
)
from sla_kernels import sparse_linear_attention as sla
from sla_kernels.testing import (
    AWKWARD,
    Case,
    assert_low_precision_close,
    random_inputs,
    random_projection,
    relative_error,
    supported,
    with_gradients,
)
from torch import Tensor

pytest.importorskip("triton")
GPU = os.environ.get("SLA_TEST_GPU") == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # log2(0) in NumPy
HALF = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
HALVES = pytest.mark.parametrize("dtype", HALF, ids=str)


def cut(case: Case) -> Case:
    """The case as it is tested on this device."""
    if GPU:
        return supported(case)
    small = supported(case, tokens=64 if case.head_dim < 64 else 32, heads=1)
    return small if case.key_lengths else replace(small, batch=1)


CASES = pytest.mark.parametrize("case", [cut(case) for case in AWKWARD], ids=lambda case: case.name)
NAMED = {case.name: cut(case) for case in AWKWARD}
SMALL = Case("small", 36, 36, block_q=16, block_kv=16, critical=0.4, heads=1)
# Padding past: nothing, one block, a block and a key, the whole sample.
PADDED = Case("padded", 36, 61, block_kv=16, critical=0.3, batch=4, heads=1)
PADDED = replace(PADDED, key_lengths=(61, 16, 17, 0))


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key, value, weight and bias."""
    tensors = random_inputs(case, dtype, device=device)
    return [*tensors, *random_projection(case.head_dim, dtype, device)]


def compare(found: list[Tensor], plain: list[Tensor] | None, exact: list[Tensor]) -> None:
    """Output and gradients against the reference, in float32 or (then with `plain`) in less."""
    for index, (got, want) in enumerate(zip(found, exact, strict=True)):
        assert got.isfinite().all(), index
        if plain is None:
            assert got.dtype == torch.float32
            assert relative_error(got, want) < 2e-5, index
            continue
        assert got.dtype == plain[index].dtype
        if index not in (1, 2):
            assert_low_precision_close(got, plain[index], want)
            continue
        # The score of a row's only key has no gradient: what is left is the rounding of the
        # difference of two numbers of the size of value's gradient.
        sizes = exact[3].flatten(1).norm(dim=1)
        lonely = want.flatten(1).norm(dim=1) < 1e-12 * sizes
        rounding = torch.finfo(got.dtype).eps * sizes[lonely]
        assert (got[lonely].double().flatten(1).norm(dim=1) <= rounding).all()
        if not lonely.all():
            assert_low_precision_close(got[~lonely], plain[index][~lonely], want[~lonely])


def check(function, tensors: list[Tensor], **options: object) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Run triton and the reference on the same tensors and compare."""
    exact = with_gradients(function, [t.double() for t in tensors], backend="reference", **options)
    plain = None
    if tensors[0].dtype != torch.float32:
        plain = with_gradients(function, tensors, backend="reference", **options)
    found = with_gradients(function, tensors, backend="triton", **options)
    compare(found, plain, exact)
    return found


def by_hand(device: str, case: Case = SMALL, lengths: Tensor | None = None) -> BlockMap:
    """Rows of all, none and random critical blocks; a column of none; a row without marginal."""
    t_m = math.ceil(case.tokens_q / case.block_q)
    t_n = math.ceil(case.tokens_kv / case.block_kv)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(-1, 2, (case.batch, case.heads, t_m, t_n), generator=generator)
    labels[0, 0, 0], labels[0, 0, 1] = 1, 0
    labels[1, 0, :, 1] = -1
    labels[1, 0, 2] = -1
    labels[1, 0, 0] = torch.where(labels[1, 0, 0] == 0, 1, labels[1, 0, 0])
    numbers = (case.block_q, case.block_kv, case.tokens_q, case.tokens_kv)
    return BlockMap(labels.to(device, torch.int8), *numbers, lengths)


@CASES
@DTYPES
def test_equals_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    tensors = inputs(case, dtype, device)
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    check(sla, tensors, block_map=block_map)


@pytest.mark.gpu
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", ["plain", "lengths", "text"])
@DTYPES
def test_real_blocks(
    dtype: torch.dtype, name: str, head_dim: int, block_q: int, block_kv: int, device: str
) -> None:
    case = Case(name, 1100, 1100, head_dim, block_q, block_kv)
    if name == "lengths":
        case = replace(case, key_lengths=(257, 1100))
    if name == "text":
        case = replace(case, always_critical=77)
    tensors = inputs(case, dtype, device)
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    check(sla, tensors, block_map=block_map)


@pytest.mark.gpu
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
@HALVES
def test_sanitized(dtype: torch.dtype, block_q: int, block_kv: int, device: str) -> None:
    """Our kernels and no others' (`make sanitize`: a library's may be reported for races)."""
    case = Case("lengths", 300, 300, 96, block_q, block_kv, key_lengths=(257, 300), heads=1)
    tensors = inputs(case, dtype, device)
    for result in with_gradients(sla, tensors, **case.routing(device), backend="triton"):
        assert result.isfinite().all()


@pytest.mark.gpu
@DTYPES
def test_a_long_sequence(dtype: torch.dtype, device: str) -> None:
    case = Case("long", 8192, 8192, 64, 64, 64, 0.05, 0.1, batch=1, heads=2)
    tensors = inputs(case, dtype, device)
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    check(sla, tensors, block_map=block_map)


@pytest.mark.gpu
def test_more_heads_than_a_grid_is_high(device: str) -> None:
    case = Case("heads", 40, 40, 16, 16, 16, 0.4, batch=1100, heads=64)
    tensors = inputs(case, torch.float16, device)
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    check(sla, tensors, block_map=block_map)


@pytest.mark.parametrize("name", ["ragged_by_one", "text_tokens", "padded", "padded_text_tokens"])
@HALVES
def test_fused_with_its_routing_equals_a_given_map(
    name: str, dtype: torch.dtype, device: str
) -> None:
    case = NAMED[name]
    tensors, routing = inputs(case, dtype, device), case.routing(device)
    block_map = classify_blocks(*tensors[:2], **routing, backend="triton")
    given_map = with_gradients(sla, tensors, block_map=block_map, backend="triton")
    for got, want in zip(
        with_gradients(sla, tensors, **routing, backend="triton"), given_map, strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("feature_map", ["softmax", "elu+1", "relu"])
@HALVES
def test_fused_feature_maps(feature_map: str, dtype: torch.dtype, device: str) -> None:
    block_map = by_hand(device)
    check(sla, inputs(SMALL, dtype, device), block_map=block_map, feature_map=feature_map)


def test_a_feature_map_of_the_callers(device: str) -> None:
    tensors = inputs(SMALL, torch.float32, device)
    block_map = by_hand(device)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        phi = Hedgehog(16).to(device, dtype)
        phi.weight.data.copy_(mixing)
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = sla(*leaves, block_map=block_map, feature_map=phi, backend=backend)
        return [output.detach(), *torch.autograd.grad(output.sin().sum(), [*leaves, phi.weight])]

    compare(run(torch.float32, "triton"), None, run(torch.float64, "reference"))


@DTYPES
def test_features_that_are_all_zero_give_zero(dtype: torch.dtype, device: str) -> None:
    query, key, value = (-t.abs() for t in random_inputs(SMALL, dtype, device=device))
    found = [t.requires_grad_() for t in (query, key, value)]
    branches = attention_branches(*found, by_hand(device), feature_map="relu", backend="triton")
    assert (branches.linear == 0).all()
    (branches.linear.sum() + branches.sparse.sum()).backward()
    assert all(t.grad.isfinite().all() for t in found)  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [None, 0.7])
@DTYPES
def test_the_sparse_branch_alone(scale: float | None, dtype: torch.dtype, device: str) -> None:
    tensors = inputs(SMALL, dtype, device)[:3]
    check(sparse_attention, tensors, block_map=by_hand(device), scale=scale)


@pytest.mark.parametrize("feature_map", ["softmax", "elu+1", "relu"])
@DTYPES
def test_the_linear_branch_alone(feature_map: str, dtype: torch.dtype, device: str) -> None:
    tensors = inputs(SMALL, dtype, device)[:3]
    options = {"block_map": by_hand(device), "feature_map": feature_map}
    check(linear_attention, tensors, **options)


@DTYPES
def test_the_linear_branch_over_all_keys(dtype: torch.dtype, device: str) -> None:
    check(linear_attention, inputs(PADDED, dtype, device)[:3])


@DTYPES
def test_the_linear_branch_over_the_valid_keys(dtype: torch.dtype, device: str) -> None:
    lengths = PADDED.routing(device)["key_lengths"].long()
    check(linear_attention, inputs(PADDED, dtype, device)[:3], key_lengths=lengths)


@pytest.mark.parametrize("count", [3, 4])
@DTYPES
def test_without_projection_or_bias(count: int, dtype: torch.dtype, device: str) -> None:
    check(sla, inputs(SMALL, dtype, device)[:count], block_map=by_hand(device))


@HALVES
def test_a_projection_wider_than_the_inputs(dtype: torch.dtype, device: str) -> None:
    tensors = inputs(SMALL, dtype, device)
    wide = [*tensors[:3], *(t.float() for t in tensors[3:])]
    expected = with_gradients(sla, tensors, block_map=by_hand(device), backend="triton")
    found = with_gradients(sla, wide, block_map=by_hand(device), backend="triton")
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.to(dtype), want)
    assert [t.dtype for t in found[4:]] == [torch.float32] * 2


@pytest.mark.parametrize("scale", [1.3, -0.4, 0.0])
@DTYPES
def test_scale(scale: float, dtype: torch.dtype, device: str) -> None:
    check(sla, inputs(SMALL, dtype, device), block_map=by_hand(device), scale=scale)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_routing_with_any_scale(scale: float, device: str) -> None:
    tensors = inputs(SMALL, torch.float16, device)
    options = {**SMALL.routing(device), "scale": scale}
    block_map = classify_blocks(*tensors[:2], **options, backend="eager")
    found = sla(*tensors, **options, backend="triton")
    expected = sla(*tensors, block_map=block_map, scale=scale, backend="triton")
    assert torch.equal(found, expected)


@DTYPES
def test_a_map_by_hand_with_lengths(dtype: torch.dtype, device: str) -> None:
    lengths = PADDED.routing(device)["key_lengths"]
    check(sla, inputs(PADDED, dtype, device), block_map=by_hand(device, PADDED, lengths))


def test_rows_of_nothing_are_zero(device: str) -> None:
    query, key, value = random_inputs(SMALL, device=device)
    found = attention_branches(query, key, value, by_hand(device), backend="triton")
    assert (found.sparse[1, 0, 32:] == 0).all()
    assert (found.linear[1, 0, 32:] == 0).all()
    assert (found.sparse[0, 0, 16:32] == 0).all()
    assert (found.linear[0, 0, :16] == 0).all()


@pytest.mark.parametrize("always_critical", [0, 21])
@pytest.mark.parametrize("filling", [math.nan, math.inf])
@DTYPES
def test_poisoned_padding_leaks_nothing(
    dtype: torch.dtype, filling: float, always_critical: int, device: str
) -> None:
    if not GPU and (filling == math.inf) == (always_critical == 0):
        pytest.skip("half of the combinations are enough in the interpreter")
    case = replace(PADDED, always_critical=always_critical)
    clean = inputs(case, dtype, device)
    poisoned = [t.clone() for t in clean]
    for sample, length in enumerate(case.key_lengths or ()):
        poisoned[1][sample, :, length:] = filling
        poisoned[2][sample, :, length:] = -filling
    options = {**case.routing(device), "backend": "triton"}
    expected = with_gradients(sla, clean, **options)
    found = with_gradients(sla, poisoned, **options)
    for got, want in zip(found, expected, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)
    for length, d_key, d_value in zip(case.key_lengths or (), *found[2:4], strict=True):
        assert (d_key[:, length:] == 0).all()
        assert (d_value[:, length:] == 0).all()
    assert torch.equal(found[0][3], clean[4].expand_as(found[0][3])), "a sample without keys"
    assert (found[1][3] == 0).all()


@pytest.mark.parametrize("size", [1e-4, 300.0])
@DTYPES
def test_extreme_inputs_stay_finite(size: float, dtype: torch.dtype, device: str) -> None:
    tensors = inputs(SMALL, dtype, device)
    scaled = [size * tensors[0], size * tensors[1], *tensors[2:]]
    for got in with_gradients(sla, scaled, **SMALL.routing(device), backend="triton"):
        assert got.isfinite().all()


def test_equal_scores(device: str) -> None:
    tensors = [torch.ones_like(t) for t in inputs(SMALL, torch.float16, device)]
    found = sla(*tensors, **SMALL.routing(device), backend="triton")
    # A step of float16: the block sums of float16 tensors are multiplied as tf32, of ten bits.
    torch.testing.assert_close(found, torch.full_like(found, 1 + 16 + 1), rtol=2**-10, atol=0)


@given(
    tokens=st.tuples(st.integers(1, 300 if GPU else 36), st.integers(1, 300 if GPU else 36)),
    head_dim=st.sampled_from([8, 16, 24, 40, 72] if GPU else [8, 16, 24]),
    blocks=st.tuples(*[st.sampled_from([16, 32, 64] if GPU else [16, 32])] * 2),
    critical=st.floats(0, 1),
    share=st.floats(0, 1),
    always=st.sampled_from([0, 0, 5, 30]),
    lengths=st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(0, 1))),
    heads=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, *HALF]),
    seed=st.integers(0, 1000),
)
@pytest.mark.timeout(900)  # on a GPU every example compiles
@settings(max_examples=30 if GPU else 10, deadline=None, derandomize=True)
def test_any_shape_and_routing(
    tokens: tuple[int, int],
    head_dim: int,
    blocks: tuple[int, int],
    critical: float,
    share: float,
    always: int,
    lengths: tuple[float, float] | None,
    heads: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    device = "cuda" if GPU else "cpu"
    case = Case("any", *tokens, head_dim, *blocks, critical, (1 - critical) * share, always)
    case = replace(case, heads=heads)
    assume(not (GPU and dtype == torch.float32 and head_dim > 32 and 16 in blocks))  # refused
    if lengths is not None:
        case = replace(case, key_lengths=tuple(round(share * tokens[1]) for share in lengths))
    tensors = [*random_inputs(case, dtype, seed, device)]
    tensors += random_projection(head_dim, dtype, device)
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="triton")
    check(sla, tensors, block_map=block_map)
