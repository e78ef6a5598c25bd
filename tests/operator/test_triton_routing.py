"""The kernels' routing against the plain one, ties included."""

import os

import pytest
import torch
from sla_kernels import BlockMap, classify_blocks
from sla_kernels.block_map import CRITICAL, NEGLIGIBLE, pool_blocks
from sla_kernels.testing import AWKWARD, Case, random_inputs, supported
from torch import Tensor

launch = pytest.importorskip("sla_kernels.triton.launch")
GPU = os.environ.get("SLA_TEST_GPU") == "1"
HALF = [torch.float16, torch.bfloat16] if GPU else [torch.float16]


def assert_same_map(found: BlockMap, expected: BlockMap) -> None:
    """Labels, and the row table up to its counts."""
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.critical_counts, expected.critical_counts)
    assert found.row_table is not None
    assert_same_table(found.critical_blocks, expected.critical_blocks, expected.critical_counts)


def assert_same_table(found: Tensor, expected: Tensor, counts: Tensor) -> None:
    width = int(counts.max())
    assert found.shape[-1] >= width
    filling = torch.arange(width, device=counts.device) >= counts[..., None]
    found, expected = (t[..., :width].masked_fill(filling, -1) for t in (found, expected))
    assert torch.equal(found, expected)


def whole_numbers(
    case: Case, dtype: torch.dtype, device: str, largest: int = 1
) -> tuple[Tensor, Tensor]:
    """Query and key whose pooled scores float32 holds exactly; many are equal."""
    generator = torch.Generator().manual_seed(3)
    query, key = (
        torch.randint(
            -largest, largest + 1, (case.batch, case.heads, tokens, 16), generator=generator
        )
        for tokens in (case.tokens_q, case.tokens_kv)
    )
    # The tokens of a block are equal, and so are many blocks' scores.
    query, key = (t[:, :, ::16].repeat_interleave(16, 2)[:, :, : t.shape[2]] for t in (query, key))
    query, key = query * (torch.arange(16) < 3), key * (torch.arange(16) < 3)
    return query.to(device, dtype), key.to(device, dtype)


@pytest.mark.parametrize("always_critical", [0, 21])
@pytest.mark.parametrize("lengths", [None, (100, 32), (0, 129)])
@pytest.mark.parametrize(
    ("critical", "negligible"), [(0.05, 0.1), (0.3, 0.3), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)]
)
def test_equal_scores_are_ranked_alike(
    critical: float,
    negligible: float,
    lengths: tuple[int, int] | None,
    always_critical: int,
    device: str,
) -> None:
    case = Case("ties", 68, 132, 16, 16, 16, critical, negligible, always_critical)
    options = case.routing(device)
    if lengths is not None:
        options["key_lengths"] = torch.tensor(lengths, device=device)
    query, key = whole_numbers(case, torch.float16, device)
    expected = classify_blocks(query, key, **options, backend="eager")
    assert_same_map(classify_blocks(query, key, **options, backend="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *(HALF if GPU else [])], ids=str)
@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 32), (64, 16), (128, 128)])
@pytest.mark.parametrize("scale", [None, -0.5, 0.0])
def test_blocks_and_scales(
    dtype: torch.dtype, block_q: int, block_kv: int, scale: float | None, device: str
) -> None:
    case = Case("blocks", 260, 388, 16, block_q, block_kv, 0.3, 0.3, batch=1, heads=3)
    query, key = whole_numbers(case, dtype, device, largest=4)
    options = {**case.routing(device), "scale": scale}
    expected = classify_blocks(query, key, **options, backend="eager")
    assert_same_map(classify_blocks(query, key, **options, backend="triton"), expected)


@pytest.mark.parametrize("scale", [1e-30, -1e-30])
def test_zeros_of_either_sign_are_equal(scale: float, device: str) -> None:
    """Scores that underflow to 0.0 and -0.0."""
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1])
    key = (1e-10 * signs).repeat_interleave(16)[None, None, :, None].expand(1, 1, 128, 16)
    query = torch.full((1, 1, 16, 16), 1e-10)
    options = {"critical": 0.4, "negligible": 0.4, "block_q": 16, "block_kv": 16, "scale": scale}
    found = classify_blocks(query.to(device), key.to(device), **options, backend="triton")
    assert found.labels.flatten().tolist() == [1, 1, 1, 0, 0, -1, -1, -1]
    expected = classify_blocks(query.to(device), key.to(device), **options, backend="eager")
    assert torch.equal(found.labels, expected.labels)


def assert_ranked(
    block_map: BlockMap, query: Tensor, key: Tensor, case: Case, lengths: Tensor | None
) -> None:
    """No block is in a higher class than one whose float64 score is more than 1e-5 higher."""
    pooled = pool_blocks(key.double(), case.block_kv, lengths)
    scores = pool_blocks(query.double(), case.block_q) @ pooled.transpose(-1, -2)
    forced_q, forced_kv = (
        -(-case.always_critical // block) for block in (case.block_q, case.block_kv)
    )
    tolerance = 1e-5 * scores.abs().amax(-1)
    labels = block_map.labels.clone()
    if lengths is not None:
        starts = torch.arange(0, case.tokens_kv, case.block_kv, device=key.device)
        padding = starts >= lengths[:, None]
        assert (labels.masked_select(padding[:, None, None]) == NEGLIGIBLE).all()
        scores = scores.masked_fill(padding[:, None, None], -float("inf"))
    scores[..., :forced_kv] = float("inf")
    scores, labels, tolerance = (
        scores[:, :, forced_q:],
        labels[:, :, forced_q:],
        tolerance[:, :, forced_q:],
    )
    for is_higher in (labels == CRITICAL, labels != NEGLIGIBLE):
        lowest = scores.masked_fill(~is_higher, float("inf")).amin(-1)
        highest = scores.masked_fill(is_higher, -float("inf")).amax(-1)
        assert (lowest >= highest - tolerance).all()


RANDOM = [
    *(supported(case) for case in AWKWARD),
    Case("many_blocks", 1000, 3000, 32, 16, 16, 0.3, 0.3, batch=1, heads=1),
    Case("many_padded", 300, 2000, 32, 16, 16, 0.3, 0.3, heads=1, key_lengths=(1999, 777)),
]
LARGE = [
    Case("real", 12_800, 12_800, 128, 64, 64, heads=4),
    Case("real_text", 4500, 12_900, 64, 128, 64, heads=4, always_critical=226),
    Case("more_than_the_kernels_route", 200, 66_000, 16, 128, 16, heads=1),
]


@pytest.mark.parametrize(
    "case",
    [*RANDOM, *(pytest.param(case, marks=pytest.mark.gpu) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_random_inputs(case: Case, device: str) -> None:
    query, key, _ = random_inputs(case, torch.float32, device=device)
    options = case.routing(device)
    found = classify_blocks(query, key, **options, backend="triton")
    expected = classify_blocks(query, key, **options, backend="eager")
    assert torch.equal(found.critical_counts, expected.critical_counts)
    for label in (CRITICAL, NEGLIGIBLE):
        assert torch.equal((found.labels == label).sum(-1), (expected.labels == label).sum(-1))
    from_labels = BlockMap(
        found.labels, found.block_q, found.block_kv, case.tokens_q, case.tokens_kv
    )
    assert torch.equal(found.critical_counts, from_labels.critical_counts)
    assert_same_table(found.critical_blocks, from_labels.critical_blocks, found.critical_counts)
    assert_ranked(found, query, key, case, options.get("key_lengths"))


@pytest.mark.parametrize("shape", [(2, 2, 5, 9), (1, 2, 1, 1), (1, 1, 40, 300), (1, 1, 300, 40)])
def test_tables(shape: tuple[int, int, int, int], device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(-1, 2, shape, generator=generator).to(device, torch.int8)
    labels[:, :, 0] = CRITICAL
    labels[:, :, -1] = NEGLIGIBLE
    labels[0, 0, :, -1] = 0
    block_map = BlockMap(labels, 1, 1, shape[2], shape[3])
    rows, counts = launch.row_tables(labels, columns=False)
    assert torch.equal(counts, block_map.critical_counts)
    assert_same_table(rows, block_map.critical_blocks, counts)
    columns, counts = launch.row_tables(labels, columns=True)
    assert torch.equal(counts, block_map.column_counts)
    assert_same_table(columns, block_map.column_blocks, counts)

    order = launch.longest_first(counts)
    expected = torch.arange(shape[3], device=device, dtype=order.dtype).expand_as(order)
    assert torch.equal(order.sort(-1).values, expected)
    assert (counts.gather(-1, order.long()).diff(dim=-1) <= 0).all()
