"""Critical blocks exactly and the mean of each marginal one, in one softmax, on every backend."""

import os
from dataclasses import replace

import pytest
import torch
from sla_kernels import (
    BlockMap,
    available_backends,
    classify_blocks,
    pooled,
    sparse_attention,
    sparse_pooled_attention,
)
from sla_kernels.block_map import CRITICAL, MARGINAL
from sla_kernels.testing import (
    AWKWARD,
    Case,
    assert_low_precision_close,
    random_inputs,
    relative_error,
    supported,
    with_gradients,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GPU = os.environ.get("SLA_TEST_GPU") == "1"
LOW = torch.bfloat16 if GPU else torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # log2(0) in NumPy
ALL = [name for name in ("reference", "eager", "triton") if name in available_backends()]
NAMES = ("ragged_by_one", "text_tokens", "padded_to_a_block_and_to_nothing", "fewer_keys")
CASES = [
    *(supported(case, 64, 1) for case in AWKWARD if case.name in NAMES),
    # Few enough heads that several programs share the queries; tiles of half a block.
    Case("one_head", 70, 70, block_kv=16, critical=0.3, batch=1, heads=1),
    Case("halved_blocks", 130, 130, head_dim=24, block_q=128, block_kv=64, heads=1, batch=1),
]
if GPU:
    CASES += [
        Case("wan", 1500, 1500, 128, 64, 64, critical=0.05, heads=3),
        Case("wide", 1500, 1500, 128, 128, 128, critical=0.1, heads=3),
        Case("many_blocks", 3000, 5000, 64, 64, 32, critical=0.03, key_lengths=(4000, 5000)),
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap) -> Tensor:
    """The definition: every mean is a key of its own, counted as often as it has keys."""
    tokens, block = key.shape[2], block_map.block_kv
    real = torch.ones(key.shape[0], 1, tokens, 1, dtype=torch.bool, device=key.device)
    if block_map.key_lengths is not None:
        places = torch.arange(tokens, device=key.device)
        real = (places < block_map.key_lengths[:, None])[:, None, :, None]
    means, counts = [], []
    for first in range(0, tokens, block):
        part = slice(first, first + block)
        counts.append(real[:, :, part].sum(2))
        means.append([(t * real)[:, :, part].sum(2) / counts[-1].clamp(1) for t in (key, value)])
    count = torch.stack(counts, 2).squeeze(-1)[:, :, None]  # (B, 1, 1, T_n)
    mean_key, mean_value = (torch.stack(each, 2) for each in zip(*means, strict=True))
    rows = torch.arange(query.shape[2], device=query.device) // block_map.block_q
    scale = query.shape[-1] ** -0.5
    exact = (query @ key.mT * scale).exp() * (block_map.token_labels() == CRITICAL)
    blurred = (query @ mean_key.mT * scale).exp() * count
    blurred = blurred * (block_map.labels == MARGINAL)[:, :, rows]
    total = exact.sum(-1, keepdim=True) + blurred.sum(-1, keepdim=True)
    return (exact @ value + blurred @ mean_value) / total.masked_fill(total == 0, 1.0)


def routed(case: Case, tensors: list[Tensor]) -> BlockMap:
    return classify_blocks(*tensors[:2], **case.routing(tensors[0].device), backend="eager")


@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_output_and_gradients_are_those_of_the_definition(
    case: Case, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in chunks of a few queries, which end anywhere in a block."""
    monkeypatch.setattr(pooled, "_CHUNK_CPU", 7 * case.batch * case.heads)
    tensors = list(random_inputs(case, torch.float64, device=device))
    block_map = routed(case, tensors)
    expected = with_gradients(dense, tensors, block_map=block_map)
    found = with_gradients(sparse_pooled_attention, tensors, block_map=block_map, backend=backend)
    for got, want in zip(found, expected, strict=True):
        # Of one token alone the gradients of query and key are zero, but for rounding.
        assert (got - want).norm() < 1e-12 * max(1.0, want.norm().item())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backends_in_their_precisions(
    case: Case, dtype: torch.dtype, backend: str, device: str
) -> None:
    if backend == "reference" and dtype == LOW and case.tokens_kv > 1000:
        pytest.skip("over so many keys the definition, rounded after each step, is no measure")
    tensors = list(random_inputs(case, dtype, device=device))
    block_map = routed(case, tensors)
    exact = with_gradients(dense, [t.double() for t in tensors], block_map=block_map)
    plain = with_gradients(dense, tensors, block_map=block_map)
    found = with_gradients(sparse_pooled_attention, tensors, block_map=block_map, backend=backend)
    assert [t.dtype for t in found] == [dtype] * 4
    for got, rounded, want in zip(found, plain, exact, strict=True):
        if dtype == torch.float32:
            assert relative_error(got, want) < 1e-5
        else:
            assert_low_precision_close(got, rounded, want)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("label", [CRITICAL, MARGINAL])
def test_one_token_is_its_value(label: int, backend: str, device: str) -> None:
    case = Case("one_token", 1, 1, head_dim=24, block_q=16, block_kv=16)
    tensors = list(random_inputs(case, device=device))
    labels = torch.full((2, 2, 1, 1), label, dtype=torch.int8, device=device)
    block_map = BlockMap(labels, 16, 16, 1, 1)
    found = with_gradients(sparse_pooled_attention, tensors, block_map=block_map, backend=backend)
    torch.testing.assert_close(found[0], tensors[2], atol=1e-6, rtol=1e-6)
    for gradient in found[1:3]:  # the weight is 1, whatever the score
        assert gradient.norm() < 1e-5


@pytest.mark.skipif("triton" not in ALL, reason="needs Triton")
@pytest.mark.parametrize("scale", [0.7, -0.5, 0.0])
def test_the_kernels_take_any_scale(scale: float, device: str) -> None:
    case = CASES[0]
    tensors = list(random_inputs(case, device=device))
    block_map = routed(case, tensors)
    found, expected = (
        with_gradients(
            sparse_pooled_attention, tensors, block_map=block_map, scale=scale, backend=backend
        )
        for backend in ("triton", "eager")
    )
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() < 1e-5 * max(1.0, want.norm().item())


@pytest.mark.parametrize("backend", ALL)
def test_what_lies_in_the_padding_does_not_matter(backend: str, device: str) -> None:
    case = replace(CASES[2], key_lengths=(64, 0))
    query, key, value = random_inputs(case, device=device)
    block_map = routed(case, [query, key])
    found = []
    # The reference multiplies padding by zero.
    for filling in (0.0, 1e30 if backend == "reference" else torch.nan):
        filled = [query, key.clone(), value.clone()]
        for tensor in filled[1:]:
            tensor[0, :, 64:], tensor[1] = filling, filling
        found.append(
            with_gradients(sparse_pooled_attention, filled, block_map=block_map, backend=backend)
        )
    for got, want in zip(*found, strict=True):
        if GPU and backend == "eager":  # its sums have no fixed order there
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(got, want)
    for gradient in found[1][2:]:
        assert not gradient[0, :, 64:].any()
        assert not gradient[1].any()


@pytest.mark.skipif("triton" not in ALL, reason="needs Triton")
@pytest.mark.parametrize("kind", ["token", "offset", "packed"])
def test_the_kernels_take_any_strides(kind: str, device: str) -> None:
    case = CASES[0]
    tensors = list(random_inputs(case, device=device))
    block_map = routed(case, tensors)
    if kind == "token":  # tokens last in memory
        other = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    elif kind == "offset":  # not on a boundary that the copy engine knows
        other = []
        for t in tensors:
            buffer = t.new_empty(t.numel() + 1)
            other.append(buffer[1:].view(t.shape).copy_(t))
    else:
        other = list(torch.cat(tensors, -1).split(case.head_dim, -1))
    found, expected = (
        with_gradients(sparse_pooled_attention, each, block_map=block_map, backend="triton")
        for each in (other, tensors)
    )
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ALL)
def test_it_is_exact_where_all_keys_of_a_block_are_equal(backend: str, device: str) -> None:
    case = Case("equal", 64, 64, block_q=16, block_kv=16, heads=1)
    query, key, value = random_inputs(case, device=device)
    key = key[:, :, ::16].repeat_interleave(16, 2)
    block_map = classify_blocks(query, key, critical=0.25, negligible=0.0, block_q=16, block_kv=16)
    found = sparse_pooled_attention(query, key, value, block_map, backend=backend)
    exact = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_overflows_and_nothing_vanishes(backend: str, device: str) -> None:
    """Scores of hundreds, once of the critical block and once of the pooled one: it takes all."""
    case = Case("large", 32, 32, block_q=16, block_kv=16, heads=1, batch=1)
    query, key, value = random_inputs(case, device=device)
    labels = torch.tensor([[[[1, 0], [1, 0]]]], dtype=torch.int8, device=device)
    block_map = BlockMap(labels, 16, 16, 32, 32)
    query = query.abs() * 3
    for sign in (1.0, -1.0):
        shifted = torch.cat([key[:, :, :16] + sign * 40, key[:, :, 16:] - sign * 40], 2)
        found = with_gradients(
            sparse_pooled_attention, [query, shifted, value], block_map=block_map, backend=backend
        )
        assert all(t.isfinite().all() for t in found)
        critical = sparse_attention(query, shifted, value, block_map, backend=backend)
        pooled_alone = value[:, :, 16:].mean(2, keepdim=True).expand_as(critical)
        expected = critical if sign > 0 else pooled_alone
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_the_merge_compiles_as_one_graph(device: str) -> None:
    """Of other functions Dynamo of PyTorch 2.11 makes other gradients: see `eager`."""
    case = Case("compiled", 64, 64, block_q=16, block_kv=16)
    tensors = list(random_inputs(case, device=device))
    block_map = routed(case, tensors)
    sparse = sparse_attention(*tensors, block_map, backend="eager", return_lse=True)

    def merge(*leaves: Tensor) -> Tensor:
        query, key, value, output, lse = leaves
        return pooled.merge_pooled(2 * query, key, value, block_map, output.sin(), lse, 0.25).cos()

    torch._dynamo.reset()
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    expected = with_gradients(merge, [*tensors, *sparse])
    for got, want in zip(with_gradients(compiled, [*tensors, *sparse]), expected, strict=True):
        assert relative_error(got, want) < 1e-6


def test_a_block_map_of_filled_blocks_is_refused(device: str) -> None:
    case = Case("filled", 32, 32, block_q=16, block_kv=16, heads=1, batch=1)
    query, key, value = random_inputs(case, device=device)
    labels = torch.ones(1, 1, 2, 2, dtype=torch.int8, device=device)
    lengths = torch.tensor([16, 3], dtype=torch.int32, device=device)
    block_map = BlockMap(labels, 16, 16, 32, 32, block_lengths=lengths)
    with pytest.raises(ValueError, match="block_lengths"):
        sparse_pooled_attention(query, key, value, block_map)
