"""The FP8 kernel against its definition and the exact result: on a CPU interpreted and small."""

import math
import os
from dataclasses import dataclass, replace

import pytest
import torch
from sla_kernels import BlockMap, classify_blocks, sparse_attention
from sla_kernels.low_bit import (
    dequantise_blocks,
    low_bit_sparse_attention,
    quantise_blocks,
    quantise_channels,
    simulated_branch,
)
from sla_kernels.testing import Case, random_inputs, relative_error, with_gradients
from torch import Tensor

pytest.importorskip("triton")
from sla_kernels.triton import backend, calls, low_bit, operators

GPU = os.environ.get("SLA_TEST_GPU") == "1"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # log2(0) in NumPy
    pytest.mark.skipif(
        GPU and torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no e4m3 products"
    ),
]
LOW = torch.bfloat16 if GPU else torch.float16
SCALE = 0.2
# A tensor core keeps some 13 bits of a sum of FP8 products, the interpreter float32's 24.
SCORE_ERROR = 4e-2 if GPU else 1e-5

PLAIN = Case("plain", 70, 100, 32, 32, 32, critical=0.5, heads=1)
CASES = [
    PLAIN,
    Case("whole", 64, 64, 32, 32, 32, critical=0.5, heads=1),
    Case("one_token", 1, 1, 32, 32, 32, critical=0.5, heads=1),
    Case("shorter_than_a_block", 10, 10, 32, 32, 64, critical=0.5, heads=1),
    Case("everything", 40, 97, 32, 64, 32, critical=1.0, negligible=0.0, heads=1),
    Case("parts_of_blocks", 150, 130, 32, 128, 128, critical=0.5, negligible=0.0, heads=1),
    Case("head_dim_40", 33, 65, 40, 16, 32, critical=0.5, heads=1),
    Case("head_dim_128", 33, 65, 128, 32, 64, critical=0.5, heads=2, batch=1),
    replace(PLAIN, name="text", always_critical=40),
    replace(PLAIN, name="padded", key_lengths=(61, 100)),
    replace(PLAIN, name="padded_to_a_block_and_to_nothing", key_lengths=(32, 0)),
]


@dataclass
class Dense:
    """Attention over rounded tensors with unrounded weights, in float64.

    Attributes:
        output, lse: the result.
        error: what rounding the weights, relative to any score from the highest one so far to the
            highest, can do at most to each number of the output.
        size: weighted mean of the magnitudes of the values.
    """

    output: Tensor
    lse: Tensor
    error: Tensor
    size: Tensor


def dense(query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap) -> Dense:
    rounded_query, rounded_key = (
        dequantise_blocks(*quantise_blocks(tensor, block), block, torch.float64)
        for tensor, block in ((query, block_map.block_q), (key, block_map.block_kv))
    )
    values, scales = quantise_channels(value)
    rounded_value = values.double() * scales.double()
    scores = rounded_query @ rounded_key.transpose(-1, -2) * SCALE
    mask = block_map.token_labels() == 1
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    size = weights @ rounded_value.abs()
    # Half a step of e4m3: 2^-4 of a weight, or 2^-10 of the 448th part of the highest one.
    highest = weights.amax(-1, keepdim=True)
    error = 2.0**-4 * size + 2.0**-10 / 448 * highest * (mask.double() @ rounded_value.abs())
    return Dense(weights @ rounded_value, lse, error, size)


def clean(case: Case, key: Tensor, value: Tensor) -> list[Tensor]:
    """Keys and values with zeros for padding."""
    if case.key_lengths is None:
        return [key, value]
    lengths = torch.tensor(case.key_lengths, device=key.device)[:, None, None, None]
    padding = torch.arange(key.shape[2], device=key.device)[:, None] >= lengths
    return [tensor.masked_fill(padding, 0.0) for tensor in (key, value)]


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """The kernel and the simulation against `dense`, and against each other."""
    query, key, value = random_inputs(case, dtype, device=device)
    block_map = classify_blocks(query, key, **case.routing(device), backend="eager")
    exact = dense(query, *clean(case, key, value), block_map)
    if case.key_lengths is not None:
        for sample, length in enumerate(case.key_lengths):
            key[sample, :, length:] = value[sample, :, length:] = math.nan
    found = backend.low_bit_branch(query, key, value, block_map, SCALE)
    assert found is not None
    simulated = simulated_branch(query, key, value, block_map, SCALE)
    for output, lse in (found, simulated):
        assert output.dtype == dtype
        assert lse.shape == query.shape[:3]
        rounding = torch.finfo(dtype).eps * exact.output.abs() + 1e-7
        # A score's error is its weight's relative error, and may be its normaliser's too.
        allowed = exact.error + 2 * SCORE_ERROR * exact.size + rounding
        assert ((output.double() - exact.output).abs() <= allowed).all()
        empty = exact.lse == -math.inf
        assert torch.equal(lse == -math.inf, empty)
        assert ((lse.double() - exact.lse)[~empty].abs() < SCORE_ERROR).all()
        assert (output[empty] == 0).all()
    # The same numbers but for the order of tiles: much nearer than any of them to zero.
    assert relative_error(found[0], simulated[0]) < 0.03


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
def test_equals_its_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("block_kv", [64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("lengths", [None, (257, 1100)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_real_blocks(
    dtype: torch.dtype,
    lengths: tuple[int, ...] | None,
    head_dim: int,
    block_q: int,
    block_kv: int,
    device: str,
) -> None:
    case = Case("real", 1100, 1100, head_dim, block_q, block_kv, 0.3, key_lengths=lengths)
    check(case, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_a_long_sequence(block: int, device: str) -> None:
    case = Case("long", 8190, 8190, 128, block, block, 0.05, 0.1, batch=1)
    check(case, torch.bfloat16, device)


@pytest.mark.parametrize("name", ["plain", "padded"])
def test_keys_and_values_have_the_bits_of_the_definition(name: str, device: str) -> None:
    case = next(case for case in CASES if case.name == name)
    _, key, value = random_inputs(case, LOW, device=device)
    key, value = key * torch.logspace(-4, 2, 100, device=device)[:, None].to(LOW), value.clone()
    value[..., 3] *= 100.0
    value[..., 4] = 0.0
    expected_key, expected_value = clean(case, key, value)
    lengths = None
    if case.key_lengths is not None:
        lengths = torch.tensor(case.key_lengths, dtype=torch.int32, device=device)
    found = low_bit.quantise(calls.Calls("test"), key, value, lengths, None, 32)
    values, scales = quantise_blocks(expected_key, 32)
    pairs = case.batch * case.heads
    assert torch.equal(found.key_scales.view_as(scales), scales)
    assert torch.equal(found.key.float(), values.float().view(pairs, 100, 32))
    values, scales = quantise_channels(expected_value)
    assert torch.equal(found.value_scales.view_as(scales), scales)
    transposed = values.float().view(pairs, 100, 32).transpose(1, 2)
    assert torch.equal(found.value[..., :100].float(), transposed)
    assert (found.value[..., 100:].float() == 0).all()


def test_filling_of_blocks_is_ignored(device: str) -> None:
    case = Case("filled", 64, 96, 32, 32, 32, heads=1)
    query, key, value = random_inputs(case, LOW, device=device)
    lengths = torch.tensor([32, 5, 17], dtype=torch.int32, device=device)
    labels = torch.ones(2, 1, 2, 3, dtype=torch.int8, device=device)
    labels[0, 0, 0, 0] = -1
    block_map = BlockMap(labels, 32, 32, 64, 96, block_lengths=lengths)
    filling = (torch.arange(32, device=device) >= lengths[:, None]).flatten()
    key[:, :, filling] = value[:, :, filling] = 3e4
    output, lse = operators_output(query, key, value, block_map)
    expected, expected_lse = simulated_branch(query, key, value, block_map, SCALE)
    exact = sparse_attention(query, key, value, block_map, scale=SCALE, backend="eager")
    assert (lse - expected_lse).abs().max() < SCORE_ERROR
    assert relative_error(output, expected) < 0.03
    assert relative_error(output, exact) < 0.1


def operators_output(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    found = backend.low_bit_branch(query, key, value, block_map, scale)
    assert found is not None
    return found


@pytest.mark.parametrize("scale", [-SCALE, 0.0])
def test_scales_of_any_sign(scale: float, device: str) -> None:
    query, key, value = random_inputs(PLAIN, LOW, device=device)
    block_map = classify_blocks(query, key, **PLAIN.routing(device), backend="eager")
    output, lse = operators_output(query, key, value, block_map, scale)
    expected, expected_lse = simulated_branch(query, key, value, block_map, scale)
    assert (lse - expected_lse).abs().max() < SCORE_ERROR
    assert relative_error(output, expected) < 0.03


def test_long_sums_do_not_drift(device: str) -> None:
    """Every weight is 448, so that only the sum over the keys has any error."""
    tokens = 8192 if GPU else 128
    case = Case("long", 64, tokens, 64, 64, 64, critical=1.0, negligible=0.0, batch=1, heads=1)
    query, key, value = random_inputs(case, torch.float32, device=device)
    query, value = query * 0.0, value.abs() + 0.5
    block_map = classify_blocks(query, key, **case.routing(device), backend="eager")
    output, _ = operators_output(query, key, value, block_map)
    expected, _ = simulated_branch(query, key, value, block_map, SCALE)
    # 13 bits of the 64 keys of a tile; of all 8,192 they would leave hardly any of a product.
    assert relative_error(output, expected) < (5e-3 if GPU else 1e-6)


def test_the_public_function_takes_the_kernel_and_the_exact_gradients(device: str) -> None:
    tensors = random_inputs(PLAIN, LOW, device=device)
    block_map = classify_blocks(*tensors[:2], **PLAIN.routing(device), backend="triton")
    options = {"block_map": block_map, "backend": "triton"}
    found = with_gradients(low_bit_sparse_attention, tensors, **options)
    kernel, _ = operators_output(*tensors, block_map, 32**-0.5)
    assert torch.equal(found[0], kernel)
    expected = with_gradients(sparse_attention, tensors, **options)
    assert not torch.equal(found[0], expected[0])
    for got, want in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 16}, "head_dim is 16; FP8 products take more than 16"),
        ({"block_kv": 16}, "block_kv is 16; FP8 products take blocks of 32"),
    ],
)
def test_what_it_cannot_take_is_simulated(
    changes: dict[str, int], reason: str, device: str
) -> None:
    case = replace(PLAIN, **changes)
    query, key, value = random_inputs(case, LOW, device=device)
    block_map = classify_blocks(query, key, **case.routing(device), backend="triton")
    assert reason in (low_bit.unsupported_reason(query, block_map.block_kv) or "")
    found = low_bit_sparse_attention(query, key, value, block_map, backend="triton", scale=SCALE)
    assert torch.equal(found, simulated_branch(query, key, value, block_map, SCALE)[0])


def test_opcheck(device: str) -> None:
    # Whole blocks: no filling in the log-sum-exp, which opcheck would compare.
    case = Case("whole", 32, 64, 32, 32, 32, critical=0.5, batch=1, heads=1)
    tensors = random_inputs(case, LOW, device=device)
    block_map = classify_blocks(*tensors[:2], **case.routing(device), backend="eager")
    tables = (block_map.critical_blocks, block_map.critical_counts)
    arguments = (*tensors, None, None, *tables, 32, 32, SCALE)
    torch.library.opcheck(operators.attend_low_bit, arguments)


@pytest.mark.gpu
def test_a_repeated_call_gives_the_same_bits(device: str) -> None:
    def run(seed: int) -> Tensor:
        query, key, value = random_inputs(PLAIN, LOW, seed, device)
        block_map = classify_blocks(query, key, **PLAIN.routing(device), backend="eager")
        return operators_output(query, key, value, block_map)[0]

    calls._records.clear()
    first = [run(seed) for seed in (0, 1)]
    calls._records.clear()
    run(2)
    assert all(torch.equal(run(seed), first[seed]) for seed in (0, 1))
