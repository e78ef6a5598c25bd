"""Recall of pooled routing against brute force, and where the answer is known."""

import pytest
import torch
from sla_kernels.block_map import block_counts
from torch import Tensor

from sla.analysis.routing import block_mass, routing_recall, whole_blocks
from sla.analysis.weights import attention_weights
from sla.attention.token_order import tile_order

GRID, TILE, BLOCK, DIM = (4, 4, 4), (2, 2, 2), 8, 6
TOKENS = 64
EVERY = torch.arange(TOKENS)


def tensors(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (2 * torch.randn(TOKENS, DIM, generator=generator) for _ in range(2))
    return query, key


def test_only_whole_blocks_are_found() -> None:
    rows = torch.tensor([0, 1, 2, 3, 5, 8, 9, 10, 11])
    found = whole_blocks(rows, 14, 4, torch.arange(14))
    assert found.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    order = torch.tensor([9, 8, 1, 0, 4, 5, 6, 7, 11, 10, 3, 2])
    assert rows[whole_blocks(rows, 12, 4, order)].tolist() == [[9, 8, 1, 0], [11, 10, 3, 2]]


def test_block_mass_against_a_loop() -> None:
    query, key = tensors()
    key = key[:61]  # a short last block
    weights = attention_weights(query[:16], key)
    found = block_mass(query[:16], key, BLOCK, BLOCK)
    assert found.shape == (2, 8)
    for m in range(2):
        for n in range(8):
            part = weights[m * 8 : (m + 1) * 8, n * 8 : (n + 1) * 8]
            assert found[m, n].item() == pytest.approx(part.sum().item() / 8, rel=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


@pytest.mark.parametrize("tile", [None, TILE])
def test_recall_against_brute_force(tile: tuple[int, int, int] | None) -> None:
    query, key = tensors()
    order = EVERY if tile is None else tile_order(GRID, tile)
    ordered_query, ordered_key = query[order], key[order]
    weights = attention_weights(ordered_query, ordered_key)
    fractions = [0.125, 0.25, 1.0]
    found = routing_recall(
        query, key, EVERY, GRID, tile=tile, critical=fractions, block_q=BLOCK, block_kv=BLOCK
    )
    for recall in found:
        count, _ = block_counts(recall.critical, 0.0, 8)
        pooled, oracle, agreed = [], [], []
        for m in range(8):
            own = slice(m * BLOCK, (m + 1) * BLOCK)
            blocks = [slice(n * BLOCK, (n + 1) * BLOCK) for n in range(8)]
            mass = torch.stack([weights[own, b].sum() / BLOCK for b in blocks])
            scores = torch.stack(
                [ordered_query[own].mean(0) @ ordered_key[b].mean(0) for b in blocks]
            )
            chosen = set(scores.argsort(descending=True)[:count].tolist())
            best = set(mass.argsort(descending=True)[:count].tolist())
            pooled.append(sum(mass[n].item() for n in chosen))
            oracle.append(sum(mass[n].item() for n in best))
            agreed.append(len(chosen & best) / count)
        assert (recall.blocks, recall.key_blocks) == (count, 8)
        assert recall.pooled == pytest.approx(sum(pooled) / 8, rel=1e-5)
        assert recall.oracle == pytest.approx(sum(oracle) / 8, rel=1e-5)
        assert recall.agreement == pytest.approx(sum(agreed) / 8)
        assert recall.pooled <= recall.oracle + 1e-6
    assert found[-1].pooled == pytest.approx(1.0)
    assert found[0].agreement < 1


def test_uniform_attention_is_held_in_proportion() -> None:
    query, key = torch.zeros(TOKENS, DIM), tensors()[1]
    (found,) = routing_recall(
        query, key, EVERY, GRID, tile=None, critical=[0.25], block_q=BLOCK, block_kv=BLOCK
    )
    assert found.pooled == pytest.approx(0.25)
    assert found.oracle == pytest.approx(0.25)


def test_attention_within_tiles_is_found_in_tile_order_alone() -> None:
    """Tokens of a tile share a direction: one tile holds everything, a raster block a part."""
    code = torch.eye(8)[torch.empty(TOKENS, dtype=torch.int64).index_copy_(
        0, tile_order(GRID, TILE), torch.arange(TOKENS) // 8
    )]  # fmt: skip
    query = key = 12 * code
    in_tiles, in_raster = (
        routing_recall(
            query, key, EVERY, GRID, tile=tile, critical=[0.125], block_q=BLOCK, block_kv=BLOCK
        )[0]
        for tile in (TILE, None)
    )
    assert in_tiles.pooled == pytest.approx(1.0, abs=1e-4)
    assert in_raster.oracle == pytest.approx(0.5, abs=1e-4)


def test_rows_of_another_order_are_named() -> None:
    query, key = tensors()
    rows = EVERY[:BLOCK]  # one raster block, no whole tile
    with pytest.raises(ValueError, match=r"no block of 8 queries in tiles of 2x2x2 is whole"):
        routing_recall(
            query[rows], key, rows, GRID, tile=TILE, critical=[0.5], block_q=BLOCK, block_kv=BLOCK
        )
    found = routing_recall(
        query[rows], key, rows, GRID, tile=None, critical=[0.25], block_q=BLOCK, block_kv=BLOCK
    )
    assert 0 < found[0].pooled <= found[0].oracle
