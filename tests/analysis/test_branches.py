"""What keeps two branches from exact attention, against definitions and known answers."""

import pytest
import torch
from sla_kernels import (
    BlockMap,
    classify_blocks,
    linear_attention,
    sparse_attention,
    sparse_pooled_attention,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.branches import ProjFit, branch_errors, held_out_errors, solve_proj
from sla.attention.token_order import tile_order

GRID, TILE, BLOCK, DIM, TOKENS = (4, 4, 8), (2, 2, 4), 16, 6, 128
EVERY = torch.arange(TOKENS)


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn(TOKENS, DIM, generator=generator) for _ in range(3)]


def relative(output: Tensor, exact: Tensor) -> float:
    return ((output - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("tile", [None, TILE])
def test_errors_against_the_operators(tile: tuple[int, int, int] | None) -> None:
    query, key, value = tensors()
    (found,) = branch_errors(
        query, key, value, EVERY, GRID, tile=tile, critical=[0.25], negligible=0.25, block=BLOCK
    )
    order = EVERY if tile is None else tile_order(GRID, tile)
    q, k, v = (t[order][None, None] for t in (query, key, value))
    exact = scaled_dot_product_attention(q, k, v)
    block_map = classify_blocks(q, k, critical=0.25, negligible=0.25, block_q=BLOCK, block_kv=BLOCK)
    sparse, lse = sparse_attention(q, k, v, block_map, return_lse=True)
    linear = linear_attention(q, k, v, block_map)
    whole = (q @ k.transpose(-1, -2) * DIM**-0.5).logsumexp(-1)
    mass = (lse - whole).exp()[..., None]
    # The marginal blocks as critical ones: exact attention over them.
    swapped = block_map.labels.clone()
    swapped[block_map.labels == 1] = -1
    swapped[block_map.labels == 0] = 1
    of_marginal = BlockMap(swapped, BLOCK, BLOCK, TOKENS, TOKENS)
    marginal = sparse_attention(q, k, v, of_marginal)

    no_block_skipped = classify_blocks(
        q, k, critical=0.25, negligible=0.0, block_q=BLOCK, block_kv=BLOCK
    )
    pooled = sparse_pooled_attention(q, k, v, no_block_skipped)

    assert found.critical == 0.25
    for name, output in (
        ("sparse", sparse),
        ("scaled", mass * sparse),
        ("mixed", mass * sparse + (1 - mass) * linear),
        ("mixed_exact", mass * sparse + (1 - mass) * marginal),
        ("pooled", pooled),
    ):
        assert getattr(found, name) == pytest.approx(relative(output, exact), rel=1e-4), name
    assert found.mass == pytest.approx(mass.mean().item(), rel=1e-5)

    ones = torch.ones_like(mass)
    for fit, base, branch, scale in (
        (found.proj, sparse, linear, ones),
        (found.proj_exact, sparse, marginal, ones),
        (found.mixed_proj, mass * sparse, linear, 1 - mass),
    ):
        inputs = (scale * torch.cat([branch, ones], dim=-1))[0, 0].double()
        target = (exact - base)[0, 0].double()
        best = torch.linalg.lstsq(inputs, target).solution
        expected = ((inputs @ best - target).norm() / exact.norm()).item()
        assert fit.error(solve_proj([fit])) == pytest.approx(expected, rel=1e-4)
        assert fit.error(torch.zeros_like(best)) == pytest.approx(
            (target.norm() / exact.norm()).item(), rel=1e-5
        )


def test_nothing_is_missed_if_all_blocks_are_critical() -> None:
    query, key, value = tensors()
    (found,) = branch_errors(query, key, value, EVERY, GRID, tile=None, critical=[1.0], block=BLOCK)
    assert found.mass == pytest.approx(1.0)
    assert max(found.sparse, found.scaled, found.mixed, found.mixed_exact, found.pooled) < 1e-5


def test_query_blocks_are_some_of_the_whole_ones() -> None:
    query, key, value = tensors()
    rows = torch.cat([EVERY[:8], EVERY[32:96]])  # the first block in part
    (some,) = branch_errors(
        query[rows], key, value, rows, GRID, tile=None, critical=[0.25], block=BLOCK, query_blocks=2
    )
    chosen = EVERY[[*range(48, 64), *range(80, 96)]]
    (same,) = branch_errors(
        query[chosen], key, value, chosen, GRID, tile=None, critical=[0.25], block=BLOCK
    )
    assert some.sparse == same.sparse
    with pytest.raises(
        ValueError, match="raster order is whole among the 8 captured rows of 128 tok"
    ):
        branch_errors(
            query[:8], key, value, EVERY[:8], GRID, tile=None, critical=[0.25], block=BLOCK
        )


def made_up_fits(count: int, noise: float, weight: Tensor) -> dict[tuple[int, int], ProjFit]:
    """Calls (clip, head) whose exact output is a fixed map of the branch, and noise."""
    generator = torch.Generator().manual_seed(3)
    fits = {}
    for clip in range(count):
        branch = torch.randn(40, DIM, generator=generator)
        target = branch @ weight.T + noise * torch.randn(40, DIM, generator=generator)
        fits[clip, 0] = ProjFit(branch, target, torch.ones(40, 1), target)
    return fits


def test_a_proj_that_all_clips_share_is_found_from_the_others() -> None:
    weight = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1))
    fits = made_up_fits(4, 0.0, weight)
    errors = held_out_errors(fits, lambda call: call[1], lambda call: call[0])
    assert errors.keys() == fits.keys()
    assert max(errors.values()) < 1e-4
    solution = solve_proj(list(fits.values()))
    torch.testing.assert_close(solution[:-1], weight.T.double(), atol=1e-5, rtol=1e-5)


def test_a_proj_of_noise_promises_nothing_for_other_clips() -> None:
    fits = made_up_fits(4, 1.0, torch.zeros(DIM, DIM))
    own = [fit.error(solve_proj([fit])) for fit in fits.values()]
    held_out = held_out_errors(fits, lambda call: call[1], lambda call: call[0])
    assert max(own) < 0.97
    assert min(held_out.values()) > 0.98
    with pytest.raises(ValueError, match="two parts or more"):
        held_out_errors({(0, 0): fits[0, 0]}, lambda call: call[1], lambda call: call[0])
