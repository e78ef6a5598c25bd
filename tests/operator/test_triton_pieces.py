"""The sparse branch as a piece of other methods: its log-sum-exp, and blocks with filling."""

import os
from collections.abc import Callable

import pytest
import torch
from sla_kernels import BlockMap, available_backends, classify_blocks, sparse_attention
from sla_kernels.testing import AWKWARD, Case, random_inputs, relative_error, supported
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as exact_attention

GPU = os.environ.get("SLA_TEST_GPU") == "1"
LOW = torch.bfloat16 if GPU else torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # log2(0) in NumPy
BACKENDS = pytest.mark.parametrize(
    "backend", [name for name in ("eager", "triton") if name in available_backends()]
)
NAMES = ("ragged_by_one", "text_tokens", "padded_to_a_block_and_to_nothing", "fewer_keys")
CASES = [supported(case, 64, 1) for case in AWKWARD if case.name in NAMES]
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def functional(output: Tensor, lse: Tensor) -> Tensor:
    """A number that depends on both results; rows without keys (-inf) are left out."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in (output, lse)]
    finite = torch.where(lse.isfinite(), lse, 0.0)
    return (output * weights[0]).sum().to(lse.dtype) + (finite * weights[1]).sum()


def results(tensors: list[Tensor], block_map: BlockMap, backend: str) -> list[Tensor]:
    """Output, log-sum-exp, and gradients of a functional of both."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output, lse = sparse_attention(*leaves, block_map, backend=backend, return_lse=True)
    assert lse.shape == output.shape[:3]
    grads = torch.autograd.grad(functional(output, lse), leaves)
    return [output.detach(), lse.detach(), *grads]


def check(tensors: list[Tensor], block_map: BlockMap, backend: str) -> None:
    found = results(tensors, block_map, backend)
    expected = results([t.double() for t in tensors], block_map, "reference")
    assert torch.equal(found[1].isneginf(), expected[1].isneginf())
    for got, want in zip(found, expected, strict=True):
        error = relative_error(got.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0))
        assert error < LIMITS[tensors[0].dtype]
    assert found[1].dtype == torch.float32


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_log_sum_exp_and_its_gradient(
    case: Case, dtype: torch.dtype, backend: str, device: str
) -> None:
    tensors = list(random_inputs(case, dtype, device=device))
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    check(tensors, block_map, backend)


@BACKENDS
def test_a_row_without_critical_blocks_has_no_log_sum_exp(backend: str, device: str) -> None:
    case = Case("holes", 48, 48, block_kv=16, heads=1, batch=1)
    labels = torch.full((1, 1, 3, 3), -1, dtype=torch.int8, device=device)
    labels[0, 0, 1, 2] = 1
    tensors = list(random_inputs(case, device=device))
    block_map = BlockMap(labels, 16, 16, 48, 48)
    check(tensors, block_map, backend)
    lse = results(tensors, block_map, backend)[1]
    assert lse.isneginf().sum() == 32


@BACKENDS
def test_attention_over_parts_of_the_keys_is_merged_exactly(backend: str, device: str) -> None:
    case = Case("parts", 48, 64, block_kv=16, heads=2, batch=1)
    tensors = [t.double() for t in random_inputs(case)]
    labels = torch.randint(0, 2, (1, 2, 3, 4), generator=torch.Generator().manual_seed(2))
    first = (labels * 2 - 1).to(torch.int8)
    maps = [BlockMap(part.to(device), 16, 16, 48, 64) for part in (first, -first)]
    leaves = [t.to(device, torch.float32).requires_grad_() for t in tensors]
    parts = [sparse_attention(*leaves, part, backend=backend, return_lse=True) for part in maps]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(w[..., None] * output for w, (output, _) in zip(weights, parts, strict=True))
    assert isinstance(merged, Tensor)
    plain = [t.to(device).requires_grad_() for t in tensors]
    exact = exact_attention(*plain)
    torch.testing.assert_close(merged.double(), exact, atol=1e-5, rtol=1e-5)
    direction = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device)
    got = torch.autograd.grad((merged * direction).sum(), leaves)
    want = torch.autograd.grad((exact * direction).sum(), plain)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-4)


def filled(block: int, heads: int, lengths: list[int], device: str, block_q: int = 16) -> BlockMap:
    """A map over len(lengths) key blocks with filling, two of them critical in each row."""
    count = len(lengths)
    scores = torch.rand(1, heads, 3, count, generator=torch.Generator().manual_seed(3))
    labels = torch.full(scores.shape, -1, dtype=torch.int8)
    labels.scatter_(-1, scores.argsort(-1)[..., :2], 1)
    block_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    sizes = (block_q, block, 41 * block_q // 16, count * block)
    return BlockMap(labels.to(device), *sizes, block_lengths=block_lengths)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("block", [16, pytest.param(128, marks=pytest.mark.gpu)])
def test_filling_in_a_block_is_not_there(
    block: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    lengths = [block, 1, block - 3, 5]
    heads, block_q = 2, block // 2 if block > 32 else block
    head_dim = 16 if block == 16 else 128
    tokens_q = 41 * block_q // 16
    case = Case("filled", tokens_q, 4 * block, head_dim=head_dim, heads=heads, batch=1)
    tensors = list(random_inputs(case, dtype, device=device))
    block_map = filled(block, heads, lengths, device, block_q)
    check(tensors, block_map, backend)
    before = results(tensors, block_map, backend)
    filling = torch.cat([torch.arange(block) >= length for length in lengths]).to(device)
    for tensor in tensors[1:]:
        tensor[:, :, filling] = 30.0
    after = results(tensors, block_map, backend)
    for got, want in zip(after, before, strict=True):
        assert torch.equal(got, want)
    for gradient in after[3:]:
        assert not gradient[:, :, filling].any()


def test_fractions_count_real_tokens() -> None:
    block_map = filled(16, 1, [16, 16, 16, 2], "cpu")
    labels = block_map.token_labels()
    critical = (labels == 1).sum().item()
    assert block_map.exact_fraction() == pytest.approx(critical / (41 * 50))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: BlockMap(m.labels, 16, 16, 41, 63, block_lengths=m.block_lengths), ValueError,
         "63 keys, no multiple of block_kv"),
        (lambda m: BlockMap(m.labels, 16, 16, 41, 64, torch.ones(1, dtype=torch.int32),
                            block_lengths=m.block_lengths), ValueError, "beside key_lengths"),
        (lambda m: BlockMap(m.labels, 16, 16, 41, 64, block_lengths=m.block_lengths[:3]),
         ValueError, r"block_lengths has shape \(3,\)"),
        (lambda m: BlockMap(m.labels, 16, 16, 41, 64, block_lengths=m.block_lengths.long()),
         TypeError, "block_lengths is torch.int64"),
    ],
)  # fmt: skip
def test_block_lengths_that_fit_nothing_are_refused(
    make: Callable[[BlockMap], BlockMap], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(filled(16, 1, [16, 1, 13, 5], "cpu"))


def test_block_lengths_are_checked_where_they_are_used() -> None:
    case = Case("filled", 41, 64, heads=1, batch=1)
    query, key, value = random_inputs(case)
    good = filled(16, 1, [16, 1, 13, 5], "cpu")
    with pytest.raises(ValueError, match=r"block_lengths is \[16, 0, 13, 17\]"):
        sparse_attention(query, key, value, filled(16, 1, [16, 0, 13, 17], "cpu"))
    from sla_kernels import linear_attention, sparse_linear_attention

    for function in (linear_attention, sparse_linear_attention):
        with pytest.raises(ValueError, match="only the sparse branch honours"):
            function(query, key, value, block_map=good)
