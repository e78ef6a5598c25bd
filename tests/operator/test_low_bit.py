"""FP8 forward, 16-bit backward: the numbers, as simulated. (The kernel: test_triton_low_bit.)"""

import math

import pytest
import torch
from sla_kernels import BlockMap, classify_blocks, sparse_attention
from sla_kernels.low_bit import (
    FP8,
    dequantise_blocks,
    low_bit_sparse_attention,
    quantise_blocks,
    quantise_channels,
    simulated_branch,
)
from sla_kernels.testing import relative_error

BLOCK_Q, BLOCK_KV = 32, 16


def inputs(tokens: int = 104, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 16, generator=generator).to(dtype) for _ in range(3)]


def routing(query: torch.Tensor, key: torch.Tensor) -> BlockMap:
    return classify_blocks(
        query, key, critical=0.3, negligible=0.0, block_q=BLOCK_Q, block_kv=BLOCK_KV
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_error_is_that_of_e4m3(dtype: torch.dtype) -> None:
    tensor = inputs(dtype=dtype)[0] * torch.logspace(-3, 3, 104)[:, None].to(dtype)
    values, scales = quantise_blocks(tensor, BLOCK_KV)
    assert values.dtype == FP8
    assert scales.shape == (2, 3, math.ceil(104 / BLOCK_KV))
    exact = tensor.float()
    error = (dequantise_blocks(values, scales, BLOCK_KV, torch.float32) - exact).abs()
    step = scales.repeat_interleave(BLOCK_KV, dim=2)[:, :, :104, None]
    bound = torch.maximum(exact.abs() * 2.0**-4, step * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    # Nothing finer than e4m3: the bound is nearly reached.
    assert (error / bound).max() > 0.9


def test_each_block_has_the_scale_of_its_largest_number() -> None:
    tensor = inputs()[0]
    tensor[0, 1, 96:] = 0.0  # the short last block
    tensor[0, 1, 5, 3] = -1e4
    values, scales = quantise_blocks(tensor, BLOCK_KV)
    assert scales[0, 1, 0] == torch.tensor(1e4) / 448
    assert values[0, 1, 5, 3].float() == -448
    assert scales[0, 1, -1] == 1.0
    assert (dequantise_blocks(values, scales, BLOCK_KV, torch.float32)[0, 1, 96:] == 0).all()
    # The outlier coarsens its own block and no other.
    clean = quantise_blocks(inputs()[0], BLOCK_KV)[1]
    assert torch.equal(scales[0, 1, 1:-1], clean[0, 1, 1:-1])


def test_numbers_of_e4m3_survive() -> None:
    exact = torch.arange(-448, 449, 32).float().repeat(4).view(1, 1, -1, 4) * 0.25
    values, scales = quantise_blocks(exact, 1000)
    assert torch.equal(dequantise_blocks(values, scales, 1000, torch.float32), exact)


def test_channels_have_scales_of_their_own() -> None:
    tensor = inputs()[0]
    tensor[0, 1, 5, 3] = -1e4
    tensor[1, 2, :, 7] = 0.0
    values, scales = quantise_channels(tensor)
    assert values.dtype == FP8
    assert scales.shape == (2, 3, 1, 16)
    assert scales[0, 1, 0, 3] == torch.tensor(1e4) / 448
    assert scales[1, 2, 0, 7] == 1.0
    assert (values[1, 2, :, 7].float() == 0).all()
    error = (values.float() * scales - tensor).abs()
    assert (error <= torch.maximum(tensor.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5)).all()
    # The outlier coarsens its own channel and no other.
    others = [channel for channel in range(16) if channel != 3]
    clean = quantise_channels(inputs()[0])[1]
    assert torch.equal(scales[0, 1, 0, others], clean[0, 1, 0, others])


def test_the_smallest_numbers_are_zeros() -> None:
    for quantise in (lambda t: quantise_blocks(t, BLOCK_KV), quantise_channels):
        values, scales = quantise(inputs()[0] * 1e-38)
        assert (values.float() == 0).all()
        assert (scales == 1).all()


def rounded_by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    """Dequantised tensors from plain slices."""
    rounded = []
    for tensor, block, dims in (
        (query, BLOCK_Q, (-1, -2)),
        (key, BLOCK_KV, (-1, -2)),
        (value, 0, -2),
    ):
        chunks = []
        for chunk in tensor.split(block or tensor.shape[2], dim=2):
            scale = chunk.abs().amax(dims, keepdim=True) / 448
            chunks.append((chunk / scale).to(FP8).float() * scale)
        rounded.append(torch.cat(chunks, dim=2))
    return rounded


def test_forward_is_dense_attention_of_the_rounded_tensors_and_weights() -> None:
    query, key, value = inputs()
    block_map = routing(query, key)
    rounded = rounded_by_hand(query, key, value)
    scores = rounded[0] @ rounded[1].transpose(-1, -2) / 4.0
    scores = scores.masked_fill(block_map.token_labels() != 1, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    expected = (weights * 448).to(FP8).float() @ rounded[2] / (448 * total)
    output = low_bit_sparse_attention(query, key, value, block_map)
    # A score on the edge between two numbers of e4m3 may fall to either side.
    assert relative_error(output, expected) < 1e-3
    assert ((output - expected).abs() < 1e-5).float().mean() > 0.95
    exact_weights = scores.softmax(-1) @ rounded[2]
    assert relative_error(output, exact_weights) > 5e-3
    lse = simulated_branch(query, key, value, block_map, 0.25)[1]
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_output_is_near_the_unrounded_one_but_not_it() -> None:
    query, key, value = inputs()
    block_map = routing(query, key)
    exact = sparse_attention(query, key, value, block_map)
    error = relative_error(low_bit_sparse_attention(query, key, value, block_map), exact)
    assert 0.005 < error < 0.06


def test_equal_values_come_back() -> None:
    """Errors of rounded weights are centred: the unrounded row sum is nearly theirs too."""
    query, key, value = inputs()
    value = value[:, :, :1].expand_as(value).contiguous()
    ratio = low_bit_sparse_attention(query, key, value, routing(query, key)) / value
    assert (ratio - 1).abs().max() <= 2.0**-4
    assert (ratio - 1).mean().abs() < 2e-3


def test_padding_keys_count_for_nothing() -> None:
    query, key, value = inputs()
    lengths = torch.tensor([70, 0], dtype=torch.int32)
    block_map = classify_blocks(
        query, key, critical=0.5, block_q=BLOCK_Q, block_kv=BLOCK_KV, key_lengths=lengths
    )
    alone = BlockMap(block_map.labels[:1, :, :, :5], BLOCK_Q, BLOCK_KV, 104, 70)
    expected = low_bit_sparse_attention(query[:1], key[:1, :, :70], value[:1, :, :70], alone)
    for sample, length in enumerate((70, 0)):
        key[sample, :, length:] = value[sample, :, length:] = math.nan
    output = low_bit_sparse_attention(query, key, value, block_map)
    torch.testing.assert_close(output[:1], expected, atol=1e-6, rtol=1e-5)
    assert (output[1] == 0).all()


def test_filling_of_blocks_counts_for_nothing() -> None:
    query, key, value = (tensor[:, :, :96] for tensor in inputs())
    lengths = torch.tensor([16, 3, 16, 9, 1, 16], dtype=torch.int32)
    labels = torch.ones(2, 3, 3, 6, dtype=torch.int8)
    block_map = BlockMap(labels, BLOCK_Q, BLOCK_KV, 96, 96, block_lengths=lengths)
    filling = (torch.arange(BLOCK_KV) >= lengths[:, None]).flatten()
    outputs = []
    for number in (0.0, 1e30):
        key[:, :, filling] = value[:, :, filling] = number
        outputs.append(low_bit_sparse_attention(query, key, value, block_map))
    assert torch.equal(*outputs)
    exact = sparse_attention(query, key, value, block_map)
    assert relative_error(outputs[0], exact) < 0.06


def test_rows_without_critical_blocks_are_zero() -> None:
    query, key, value = inputs()
    labels = routing(query, key).labels.clone()
    labels[0, 1, 2] = 0
    block_map = BlockMap(labels, BLOCK_Q, BLOCK_KV, 104, 104)
    output, lse = simulated_branch(query, key, value, block_map, 0.25)
    rows = slice(2 * BLOCK_Q, 3 * BLOCK_Q)
    assert (output[0, 1, rows] == 0).all()
    assert (lse[0, 1, rows] == -math.inf).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
def test_gradients_are_those_of_the_unrounded_branch(wanted: tuple[bool, ...]) -> None:
    tensors = [t.requires_grad_(w) for t, w in zip(inputs(), wanted, strict=True)]
    trained = [t for t in tensors if t.requires_grad]
    block_map = routing(tensors[0], tensors[1])
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    low_bit = low_bit_sparse_attention(*tensors, block_map)
    exact = sparse_attention(*tensors, block_map)
    found = torch.autograd.grad((low_bit * weight).sum(), trained)
    expected = torch.autograd.grad((exact * weight).sum(), trained)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_bfloat16_and_autocast() -> None:
    query, key, value = inputs(dtype=torch.bfloat16)
    block_map = routing(query, key)
    output = low_bit_sparse_attention(query, key, value, block_map)
    assert output.dtype == torch.bfloat16
    wide = [t.float().requires_grad_() for t in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        cast = low_bit_sparse_attention(*wide, block_map)
        cast.sum().backward()
    assert torch.equal(cast, output)
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in wide)


def test_bad_arguments_are_named() -> None:
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"tensor has shape \(104, 16\)"):
        quantise_blocks(query[0, 0], BLOCK_Q)
    with pytest.raises(ValueError, match="block is 0"):
        quantise_blocks(query, 0)
    with pytest.raises(ValueError, match="block_map is for"):
        low_bit_sparse_attention(
            query[:, :1], key[:, :1], value[:, :1], routing(query, key), scale=1.0
        )
