"""A repeated call goes straight to compiled kernels: it must do what the first one did."""

import os
from dataclasses import replace

import pytest
import torch
from sla_kernels import classify_blocks
from sla_kernels import sparse_linear_attention as sla
from sla_kernels.testing import Case, random_inputs, random_projection, with_gradients
from torch import Tensor

pytest.importorskip("triton")
from sla_kernels.triton import calls

GPU = os.environ.get("SLA_TEST_GPU") == "1"
DTYPE = torch.bfloat16 if GPU else torch.float16
PLAIN = Case("plain", 70, 70, block_q=16, block_kv=16, critical=0.3, heads=1)
CASES = [
    PLAIN,
    replace(PLAIN, name="text", always_critical=20),
    replace(PLAIN, name="padded", key_lengths=(50, 70)),
    replace(PLAIN, name="fewer_keys", tokens_kv=33),
]


@pytest.fixture(autouse=True)
def no_records() -> None:
    calls._records.clear()


def run(case: Case, seed: int, device: str) -> list[Tensor]:
    tensors = random_inputs(case, DTYPE, seed, device)
    projection = random_projection(case.head_dim, DTYPE, device)
    return with_gradients(sla, [*tensors, *projection], **case.routing(device), backend="triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_repeated_call_gives_the_same_bits(case: Case, device: str) -> None:
    first = [run(case, seed, device) for seed in (0, 1)]
    assert bool(calls._records) is GPU  # the interpreter compiles nothing that could be repeated
    calls._records.clear()
    run(case, 2, device)
    again = [run(case, seed, device) for seed in (0, 1)]
    for before, after in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_shapes_strides_and_numbers_are_other_calls(device: str) -> None:
    """Whatever was recorded before, each call gives what it gives alone."""
    variants = [PLAIN, *CASES[1:], replace(PLAIN, tokens_q=71), replace(PLAIN, critical=0.6)]
    alone = []
    for case in variants:
        calls._records.clear()
        alone.append(run(case, 0, device))
    calls._records.clear()
    for _ in range(2):
        for case, expected in zip(variants, alone, strict=True):
            found = run(case, 0, device)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_map_at_an_odd_address_is_no_other_map(device: str) -> None:
    """The record of the first call is of kernels for addresses on 16-byte boundaries."""
    tensors = random_inputs(PLAIN, DTYPE, 0, device)
    projection = random_projection(PLAIN.head_dim, DTYPE, device)
    given = classify_blocks(*tensors[:2], **PLAIN.routing(device), backend="eager")
    odd = torch.empty(given.labels.numel() + 1, dtype=torch.int8, device=device)[1:]
    odd = odd.view(given.labels.shape).copy_(given.labels)
    assert odd.data_ptr() % 16
    found = [
        with_gradients(
            sla, [*tensors, *projection], block_map=replace(given, labels=labels), backend="triton"
        )
        for labels in (given.labels, odd)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_records_keep_no_tensors(device: str) -> None:
    run(PLAIN, 0, device)
    for record in calls._records.values():
        assert all(descriptor.base is None for descriptor in record.descriptors)
        assert not any(isinstance(v, Tensor) for _, values in record.kernels for v in values)


@pytest.mark.gpu
def test_records_are_bounded(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(calls, "_MOST_RECORDS", 3)
    for tokens in (64, 80, 96):
        run(replace(PLAIN, tokens_q=tokens), 0, device)
    assert len(calls._records) == 3


@pytest.mark.gpu
def test_a_call_can_be_captured_in_a_graph(device: str) -> None:
    query, key, value = random_inputs(replace(PLAIN, tokens_q=70), DTYPE, 0, device)
    weight, bias = random_projection(PLAIN.head_dim, DTYPE, device)
    options = {**PLAIN.routing(device), "backend": "triton"}
    expected = sla(query, key, value, weight, bias, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sla(query, key, value, weight, bias, **options)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)
