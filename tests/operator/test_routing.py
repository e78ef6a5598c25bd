"""Block classes against a plain Python routing, and the rules on counts and ties."""

import math

import numpy as np
import pytest
import torch
from sla_kernels import BlockMap, classify_blocks
from sla_kernels.block_map import fraction_of, pool_blocks
from sla_kernels.testing import AWKWARD, Case, random_inputs
from torch import Tensor


def plain_labels(query: Tensor, key: Tensor, case: Case) -> np.ndarray:
    """Loops over Section 4.1, in float64."""
    batch, heads, tokens_q, dim = query.shape
    t_m, all_blocks = (
        math.ceil(tokens_q / case.block_q),
        math.ceil(key.shape[2] / case.block_kv),
    )
    labels = np.full((batch, heads, t_m, all_blocks), -1)
    forced_q = math.ceil(min(case.always_critical, tokens_q) / case.block_q)
    for b in range(batch):
        tokens_kv = key.shape[2] if case.key_lengths is None else case.key_lengths[b]
        if tokens_kv == 0:
            continue
        t_n = math.ceil(tokens_kv / case.block_kv)
        forced_k = math.ceil(min(case.always_critical, tokens_kv) / case.block_kv)
        for h in range(heads):
            q, k = query[b, h].double().numpy(), key[b, h, :tokens_kv].double().numpy()
            rows = [q[i * case.block_q : (i + 1) * case.block_q].mean(0) for i in range(t_m)]
            columns = [k[j * case.block_kv : (j + 1) * case.block_kv].mean(0) for j in range(t_n)]
            for i in range(t_m):
                scores = np.array([rows[i] @ column for column in columns]) / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                free = [j for j in range(t_n) if j >= forced_k]
                free.sort(key=lambda j: -weights[j])
                order = [*range(forced_k), *free]
                chosen = min(t_n, forced_k + max(1, math.floor(case.critical * t_n + 1e-6)))
                skipped = min(math.floor(case.negligible * t_n + 1e-6), t_n - chosen)
                labels[b, h, i, :t_n] = 0
                labels[b, h, i, order[:chosen]] = 1
                labels[b, h, i, order[t_n - skipped :]] = -1
                if i < forced_q:
                    labels[b, h, i, :t_n] = 1
    return labels


@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: case.name)
def test_equals_a_plain_routing(case: Case) -> None:
    query, key, _ = random_inputs(case, torch.float64)
    block_map = classify_blocks(query, key, **case.routing())
    assert np.array_equal(block_map.labels.numpy(), plain_labels(query, key, case))


def test_among_equal_scores_the_lower_index_ranks_first() -> None:
    query = key = torch.ones(1, 1, 80, 8)
    labels = classify_blocks(query, key, critical=0.3, negligible=0.2, block_q=8, block_kv=8).labels
    assert (labels[0, 0] == torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, -1, -1])).all()


def test_ties_between_some_blocks() -> None:
    key = torch.zeros(1, 1, 40, 4)
    key[0, 0, 16:24] = 1.0  # block 2 wins, the others are equal
    labels = classify_blocks(
        torch.ones(1, 1, 8, 4), key, critical=0.4, negligible=0.4, block_q=8, block_kv=8
    ).labels
    assert labels.flatten().tolist() == [1, 0, 1, -1, -1]


@pytest.mark.parametrize(
    ("fraction", "blocks", "expected"),
    [(0.29, 100, 29), (0.05, 20, 1), (0.1, 30, 3), (0.05, 19, 0), (1.0, 7, 7), (0.999, 7, 6)],
)
def test_floor_is_safe_from_rounding(fraction: float, blocks: int, expected: int) -> None:
    assert fraction_of(fraction, blocks) == expected


def test_a_short_last_block_is_averaged_over_its_real_tokens() -> None:
    tensor = torch.arange(5.0).view(1, 1, 5, 1)
    assert pool_blocks(tensor, 2).flatten().tolist() == [0.5, 2.5, 4.0]
    assert pool_blocks(tensor, 8).flatten().tolist() == [2.0]
    assert pool_blocks(tensor.bfloat16(), 2).dtype == torch.float32


def test_subtracting_the_mean_key_changes_nothing() -> None:
    query, key, _ = random_inputs(AWKWARD[0], torch.float64)
    centred = key - key.mean(dim=2, keepdim=True)
    routing = AWKWARD[0].routing()
    found = classify_blocks(query, centred, **routing)
    assert torch.equal(found.labels, classify_blocks(query, key, **routing).labels)


def test_tables_list_the_critical_blocks() -> None:
    labels = torch.tensor([[[[1, 0, 1], [-1, -1, 0]]]], dtype=torch.int8)
    block_map = BlockMap(labels, 4, 4, 8, 12)
    assert block_map.critical_counts.tolist() == [[[2, 0]]]
    assert block_map.critical_blocks[0, 0, 0, :2].tolist() == [0, 2]
    assert block_map.column_counts.tolist() == [[[1, 0, 1]]]
    assert block_map.column_blocks[0, 0, 2, 0].item() == 0
    shares = block_map.fractions()
    assert shares == {"critical": 2 / 6, "marginal": 2 / 6, "negligible": 2 / 6}
    assert block_map.token_labels().shape == (1, 1, 8, 12)


def test_a_given_row_table_is_used_and_its_labels_trusted() -> None:
    labels = torch.tensor([[[[1, 0, 1], [-1, -1, 0]]]], dtype=torch.int8)
    table = torch.tensor([[[[0, 2], [0, 0]]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 0]]], dtype=torch.int32)
    lengths = torch.tensor([4], dtype=torch.int32)
    block_map = BlockMap(labels, 4, 4, 8, 12, lengths, (table, counts))
    assert block_map.critical_blocks is table
    assert block_map.critical_counts is counts
    assert block_map.labels is labels


def test_tables_are_int32() -> None:
    query, key, _ = random_inputs(AWKWARD[0])
    block_map = classify_blocks(query, key, **AWKWARD[0].routing())
    for name in ("critical_blocks", "critical_counts", "column_blocks", "column_counts"):
        assert getattr(block_map, name).dtype == torch.int32


def test_routing_has_no_gradient() -> None:
    query, key, _ = random_inputs(AWKWARD[0])
    assert not classify_blocks(query.requires_grad_(), key).labels.requires_grad
