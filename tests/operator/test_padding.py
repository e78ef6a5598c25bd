"""A padded batch gives what each of its samples gives alone, whatever the padding holds."""

import math
from dataclasses import replace

import pytest
import sla_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sla_kernels import BlockMap, Hedgehog, attention_branches, classify_blocks
from sla_kernels import sparse_linear_attention as sla
from sla_kernels.block_map import block_counts, num_blocks, sample_counts
from sla_kernels.testing import Case, random_inputs, relative_error
from torch import Tensor

# One key, one block, a block and a key, in the middle of a block, all.
MIXED = Case("mixed", 50, 61, critical=0.3, negligible=0.3, batch=5, key_lengths=(1, 8, 9, 30, 61))
EMPTY = Case("empty", 50, 61, batch=2, key_lengths=(0, 61))
CASES = pytest.mark.parametrize(
    "case", [MIXED, replace(MIXED, always_critical=11)], ids=["plain", "always_critical"]
)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "reference"])
DOUBLE = torch.float64


def inputs(case: Case) -> list[Tensor]:
    """Query, key, value, projection weight and bias."""
    generator = torch.Generator().manual_seed(9)
    dim = case.head_dim
    weight = torch.randn(dim, dim, generator=generator, dtype=DOUBLE) / math.sqrt(dim)
    bias = torch.randn(dim, generator=generator, dtype=DOUBLE)
    return [*random_inputs(case, DOUBLE), weight, bias]


def fill_padding(tensors: list[Tensor], case: Case, filling: float) -> list[Tensor]:
    """The same with other padding keys and values."""
    query, key, value, *rest = (t.clone() for t in tensors)
    for sample, length in enumerate(case.key_lengths or ()):
        key[sample, :, length:] = filling
        value[sample, :, length:] = filling
    return [query, key, value, *rest]


def run(tensors: list[Tensor], loss_weight: Tensor, **options: object) -> list[Tensor]:
    """Output and the gradients of all tensors, of a given functional."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = sla(*leaves, **options)
    return [output, *torch.autograd.grad((output * loss_weight).sum(), leaves)]


def loss_weight(case: Case) -> Tensor:
    shape = (case.batch, case.heads, case.tokens_q, case.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)


@CASES
@BACKENDS
def test_a_padded_batch_equals_each_sample_alone(case: Case, backend: str) -> None:
    tensors, weight = inputs(case), loss_weight(case)
    output, d_query, d_key, d_value, d_weight, d_bias = run(
        tensors, weight, **case.routing(), backend=backend
    )
    lone = replace(case, key_lengths=None).routing()
    expected_weight, expected_bias = torch.zeros_like(d_weight), torch.zeros_like(d_bias)
    assert case.key_lengths is not None
    for b, length in enumerate(case.key_lengths):
        query, key, value = (t[b : b + 1] for t in tensors[:3])
        sample = [query, key[:, :, :length], value[:, :, :length], *tensors[3:]]
        alone = run(sample, weight[b : b + 1], **lone, backend=backend)
        found = [output, d_query, d_key[:, :, :length], d_value[:, :, :length]]
        for got, want in zip(found, alone[:4], strict=True):
            # Not relative: with a single key the gradient of its score is zero but for rounding.
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-12, atol=1e-13)
        assert (d_key[b, :, length:] == 0).all()
        assert (d_value[b, :, length:] == 0).all()
        expected_weight += alone[4]
        expected_bias += alone[5]
    assert relative_error(d_weight, expected_weight) < 1e-12
    assert relative_error(d_bias, expected_bias) < 1e-12


@CASES
def test_padded_samples_are_routed_as_alone(case: Case) -> None:
    query, key, _ = random_inputs(case, DOUBLE)
    labels = classify_blocks(query, key, **case.routing()).labels
    lone = replace(case, key_lengths=None).routing()
    assert case.key_lengths is not None
    for b, length in enumerate(case.key_lengths):
        alone = classify_blocks(query[b : b + 1], key[b : b + 1, :, :length], **lone).labels
        assert torch.equal(labels[b : b + 1, ..., : alone.shape[-1]], alone)
        assert (labels[b, ..., alone.shape[-1] :] == -1).all()


@pytest.mark.parametrize("always_critical", [0, 11])
def test_lengths_of_all_keys_change_nothing(always_critical: int) -> None:
    case = replace(MIXED, always_critical=always_critical, key_lengths=(61,) * 5)
    query, key, _ = random_inputs(case, DOUBLE)
    padded = classify_blocks(query, key, **case.routing()).labels
    plain = classify_blocks(query, key, **replace(case, key_lengths=None).routing()).labels
    assert torch.equal(padded, plain)


@pytest.mark.parametrize("case", [MIXED, EMPTY, replace(MIXED, always_critical=11)])
@pytest.mark.parametrize("filling", [math.nan, math.inf])
@pytest.mark.parametrize("feature_map", ["softmax", "elu+1", Hedgehog(16).double()])
def test_poisoned_padding_leaks_nothing(case: Case, filling: float, feature_map: object) -> None:
    tensors, weight = inputs(case), loss_weight(case)
    options = {**case.routing(), "feature_map": feature_map}
    clean = run(fill_padding(tensors, case, 0.0), weight, **options, backend="reference")
    found = run(fill_padding(tensors, case, filling), weight, **options, backend="eager")
    for got, want in zip(found, clean, strict=True):
        assert relative_error(got, want) < 1e-12
    for length, d_key, d_value in zip(case.key_lengths or (), *found[2:4], strict=True):
        assert (d_key[:, length:] == 0).all()
        assert (d_value[:, length:] == 0).all()


@BACKENDS
@pytest.mark.parametrize("always_critical", [0, 11])
def test_a_sample_without_keys_gives_the_bias(backend: str, always_critical: int) -> None:
    case = replace(EMPTY, always_critical=always_critical)
    tensors = inputs(case)
    assert (classify_blocks(*tensors[:2], **case.routing()).labels[0] == -1).all()
    output, d_query, *_ = run(tensors, loss_weight(case), **case.routing(), backend=backend)
    assert torch.equal(output[0], tensors[4].expand_as(output[0]))
    assert (d_query[0] == 0).all()
    assert output.isfinite().all()


@BACKENDS
def test_linear_attention_over_the_valid_keys(backend: str) -> None:
    query, key, value = random_inputs(MIXED, DOUBLE)
    lengths = torch.tensor(MIXED.key_lengths)
    found = sla_kernels.linear_attention(query, key, value, key_lengths=lengths, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        sample = query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length]
        alone = sla_kernels.linear_attention(*sample, backend=backend)
        assert relative_error(found[b : b + 1], alone) < 1e-12


def test_a_map_made_by_hand_forgets_its_padding() -> None:
    labels = torch.ones(2, 2, 4, 8, dtype=torch.int8)
    lengths = torch.tensor([17, 0], dtype=torch.int32)
    block_map = BlockMap(labels, 16, 8, 50, 61, lengths)
    assert block_map.critical_counts[:, 0, 0].tolist() == [3, 0]
    assert (block_map.labels[0, ..., 3:] == -1).all()
    assert (labels == 1).all(), "the caller's labels are left alone"
    tokens = block_map.token_labels()
    assert (tokens[0, ..., :17] == 1).all()
    assert (tokens[0, ..., 17:] == -1).all()
    query, key, value = random_inputs(Case("given", 50, 61), DOUBLE)
    expected, found = (
        attention_branches(query, key, value, block_map, backend=name)
        for name in ("reference", "eager")
    )
    assert relative_error(found.sparse, expected.sparse) < 1e-12


def test_a_row_table_narrower_than_the_row_is_enough() -> None:
    query, key, value = random_inputs(MIXED, DOUBLE)
    routed = classify_blocks(query, key, **MIXED.routing())
    width = int(routed.critical_counts.max())
    assert width < routed.labels.shape[-1]
    table = (routed.critical_blocks[..., :width].contiguous(), routed.critical_counts)
    given_table = replace(routed, row_table=table)
    expected, found = (
        attention_branches(query, key, value, block_map, backend="eager")
        for block_map in (routed, given_table)
    )
    assert torch.equal(found.sparse, expected.sparse)


def test_gradients_are_those_of_finite_differences() -> None:
    case = Case("tiny", 5, 9, head_dim=4, block_q=3, block_kv=2, heads=1, key_lengths=(5, 2))
    leaves = [t.requires_grad_() for t in inputs(case)]
    block_map = classify_blocks(*leaves[:2], **{**case.routing(), "critical": 0.4})
    assert torch.autograd.gradcheck(lambda *t: sla(*t, block_map=block_map), leaves)


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    critical=st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda n: n / 100)),
    share=st.floats(0, 1),
    block=st.integers(1, 130),
    always=st.integers(0, 300),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_counts_are_those_of_one_sample(
    lengths: list[int], critical: float, share: float, block: int, always: int
) -> None:
    negligible = (1 - critical) * share
    found = sample_counts(torch.tensor(lengths), critical, negligible, block, always)
    assert found.dtype == torch.int32
    for length, row in zip(lengths, found.tolist(), strict=True):
        key_blocks, forced = num_blocks(length, block), num_blocks(min(always, length), block)
        assert row == [key_blocks, *block_counts(critical, negligible, key_blocks, forced)]
