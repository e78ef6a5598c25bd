"""VSA against a dense reference that is written over token masks."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.attention import (
    AttentionContext,
    UnsupportedAttentionError,
    VSAAttention,
    VSAConfig,
    build_attention,
)
from sla.attention.tile_blocks import tile_blocks
from sla.attention.token_order import tile_order

HEADS, HEAD_DIM, DIM, BATCH = 2, 8, 12, 2
WHOLE, RAGGED = (4, 4, 6), (3, 5, 7)
CUBE = (2, 2, 2)


def build(**numbers: object) -> VSAAttention:
    config = VSAConfig(**{"cube": CUBE, "critical": 0.2, **numbers})  # type: ignore[arg-type]
    method = build_attention(config, HEADS, HEAD_DIM, DIM, 0)
    assert isinstance(method, VSAAttention)
    return method


def open_gates(method: VSAAttention) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def inputs(grid: tuple[int, int, int]) -> tuple[list[Tensor], AttentionContext]:
    tokens = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, tokens, HEADS, HEAD_DIM)
    qkv = [torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3)]
    hidden = torch.randn(BATCH, tokens, DIM, generator=generator)
    return qkv, AttentionContext(grid=grid, hidden_states=hidden)


def members(grid: tuple[int, int, int], cube: tuple[int, int, int]) -> Tensor:
    """float (C, N): whether the token, in raster order, lies in the cube."""
    coordinates = list(itertools.product(*(range(size) for size in grid)))
    cubes = [tuple(x // s for x, s in zip(token, cube, strict=True)) for token in coordinates]
    return torch.tensor([[float(c == which) for c in cubes] for which in sorted(set(cubes))])


def reference(
    method: VSAAttention, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
) -> tuple[Tensor, Tensor]:
    """Output, and the mask of exact scores (B, H, N, N), for tokens in raster order."""
    of_cube = members(context.grid, method.config.cube)
    mean = of_cube / of_cube.sum(1, keepdim=True)
    scale = 1 / math.sqrt(HEAD_DIM)
    scores = (mean @ query) @ (mean @ key).transpose(-1, -2) * scale
    coarse = of_cube.T @ (scores.softmax(-1) @ (mean @ value))

    cubes = len(of_cube)
    count = max(1, int(method.config.critical * cubes + 1e-6))
    chosen = torch.zeros_like(scores)
    for row, kept in zip(scores.flatten(0, 2), chosen.view(-1, cubes), strict=True):
        best = sorted(range(cubes), key=lambda cube: (-row[cube].item(), cube))
        kept[best[:count]] = 1
    mask = (of_cube.T @ chosen @ of_cube).bool()
    fine = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf).softmax(-1) @ value

    def gate(linear: torch.nn.Module) -> Tensor:
        values = context.hidden_states @ linear.weight.T + linear.bias
        return values.view(BATCH, -1, HEADS, HEAD_DIM).transpose(1, 2)

    if method.to_gate_fine is not None:
        fine = (1 + gate(method.to_gate_fine)) * fine
    return fine + gate(method.to_gate_compress) * coarse, mask


@pytest.mark.parametrize("fine_gate", ["fixed", "learned"])
@pytest.mark.parametrize(
    ("grid", "tile", "cube"),
    [
        (WHOLE, None, CUBE),
        (WHOLE, CUBE, CUBE),
        (WHOLE, (4, 2, 3), CUBE),
        (WHOLE, None, (1, 2, 3)),  # six tokens in blocks of eight
        (WHOLE, (1, 2, 3), (1, 2, 3)),
        (RAGGED, None, CUBE),
        (RAGGED, CUBE, CUBE),
        (RAGGED, (1, 4, 4), CUBE),
    ],
)
def test_output_and_gradients_match_the_dense_reference(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int] | None,
    cube: tuple[int, int, int],
    fine_gate: str,
) -> None:
    method = build(fine_gate=fine_gate, cube=cube)
    open_gates(method)
    qkv, context = inputs(grid)
    leaves = [t.requires_grad_() for t in (*qkv, context.hidden_states, *method.parameters())]
    expected, mask = reference(method, *qkv, context)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)

    order = torch.arange(math.prod(grid)) if tile is None else tile_order(grid, tile)
    ordered = replace(context, tile=tile, hidden_states=context.hidden_states[:, order])
    output = method(*(t[:, :, order] for t in qkv), ordered)
    found = torch.autograd.grad((output * weight[:, :, order]).sum(), leaves)
    torch.testing.assert_close(output, expected[:, :, order], atol=2e-6, rtol=1e-5)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    exact = method.exact_fraction(*(t[:, :, order] for t in qkv[:2]), ordered)
    assert exact == pytest.approx(mask.double().mean().item())


def test_it_starts_as_the_fine_branch_alone() -> None:
    qkv, context = inputs(RAGGED)
    for fine_gate in ("fixed", "learned"):
        method = build(fine_gate=fine_gate)
        fine = build(fine_gate="fixed")
        expected, _ = reference(fine, *qkv, context)
        torch.testing.assert_close(method(*qkv, context), expected, atol=2e-6, rtol=1e-5)
        exact = build(fine_gate=fine_gate, critical=1.0)(*qkv, context)
        torch.testing.assert_close(exact, scaled_dot_product_attention(*qkv), atol=2e-6, rtol=1e-5)


def test_every_cube_attends_to_the_asked_share_of_cubes() -> None:
    (query, key, _), context = inputs(WHOLE)  # 2 x 2 x 3 cubes
    for critical, chosen in ((0.2, 2), (0.01, 1), (0.5, 6), (1.0, 12)):
        method = build(critical=critical)
        block_map = method.block_map(query, key, context)
        assert block_map.critical_counts.eq(chosen).all()
        assert method.density(WHOLE) == chosen / 12
        assert method.exact_fraction(query, key, context) == pytest.approx(chosen / 12)


def test_equal_scores_take_the_first_cubes() -> None:
    (query, key, _), context = inputs(WHOLE)
    labels = build(critical=0.25).block_map(query, torch.zeros_like(key), context).labels
    assert (labels[..., :3] == 1).all()
    assert (labels[..., 3:] == -1).all()


@pytest.mark.parametrize("grid", [WHOLE, RAGGED, (4, 2, 2)])
def test_tokens_move_only_where_they_are_not_in_place(grid: tuple[int, int, int]) -> None:
    like = torch.zeros(1)
    sizes = [(2, 2, 2), (1, 1, 1), (1, 1, 2), (1, 2, 9), (2, 9, 9), (4, 2, 2), (9, 1, 1)]
    raster = torch.arange(math.prod(grid))
    seen = set()
    for tile, order in itertools.product(sizes, [None, *sizes]):
        blocks = tile_blocks(grid, tile, order, 1, like)
        come = raster if order is None else tile_order(grid, order)
        same = torch.equal(tile_order(grid, tile), come)
        whole = (blocks.lengths == blocks.slots).all()
        # A grid one token wide has more orders that agree; not to see one costs a copy.
        assert not blocks.in_place or (same and whole), (tile, order)
        frames_whole = tile[1] >= grid[1] and tile[2] >= grid[2]
        if order == tile or (order is None and frames_whole):
            assert blocks.in_place == bool(whole), (tile, order)
        seen.add(blocks.in_place)
        tokens = torch.randn(2, 2, len(raster), 3, generator=torch.Generator().manual_seed(0))
        spread = blocks.spread(tokens)
        assert (spread is tokens) == blocks.in_place
        assert torch.equal(blocks.collect(spread), tokens)
        assert (
            spread.unflatten(2, (-1, blocks.slots)).count_nonzero(dim=(0, 1, 3, 4)).tolist()
            == (12 * blocks.lengths).tolist()
        )
    assert seen == {True, False}


def test_gates_stay_float32_and_work_in_low_precision() -> None:
    qkv, context = inputs(RAGGED)
    method = build(fine_gate="learned")
    open_gates(method)
    expected = method(*qkv, context)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = method(*qkv, context)
    method.to(torch.bfloat16)
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    low = [t.bfloat16() for t in qkv]
    hidden = context.hidden_states.bfloat16()
    output = method(*low, replace(context, hidden_states=hidden))
    for found in (output, under_autocast):
        assert found.dtype == torch.bfloat16
        # Rounded queries may choose another cube here and there.
        error = (found.float() - expected).abs().mean() / expected.abs().mean()
        assert error < 0.05


def test_indices_made_without_gradients_serve_a_pass_with_them() -> None:
    grid = (2, 3, 11)  # of no other test: nothing is kept for it
    qkv, context = inputs(grid)
    method = build()
    with torch.inference_mode():
        method(*(t.clone() for t in qkv), context)
    query = qkv[0].requires_grad_()
    method(*qkv, context).sum().backward()
    assert query.grad is not None


def test_inputs_without_a_grid_or_gates_are_refused() -> None:
    method = build()
    qkv, context = inputs(WHOLE)
    for wrong, reason in (
        (replace(context, grid=None), "no grid"),
        (replace(context, grid=(4, 4, 5)), "96 tokens, but a grid of 4 x 4 x 5 = 80"),
        (replace(context, always_critical=3), "3 leading tokens"),
        (replace(context, hidden_states=None), "no hidden_states"),
        (replace(context, hidden_states=torch.zeros(1, 96, DIM)), r"\(1, 96, 12\)"),
    ):
        with pytest.raises(UnsupportedAttentionError, match=reason):
            method(*qkv, wrong)
    with pytest.raises(UnsupportedAttentionError, match="no grid"):
        method.block_map(*qkv[:2], replace(context, grid=None))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"critical": 0.0}, "critical is 0.0"),
        ({"critical": 1.5}, "critical is 1.5"),
        ({"fine_gate": "open"}, "fine_gate is 'open'"),
        ({"cube": (4, 4)}, "cube is"),
        ({"cube": (4, 4, 0)}, "cube is"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**numbers)


def test_flops_count_both_branches_and_the_gates() -> None:
    tokens, cubes = 96, 12
    fine = 4 * tokens**2 * HEAD_DIM * 2 / 12
    coarse, gate = 4 * cubes**2 * HEAD_DIM, 2 * tokens * DIM * HEAD_DIM
    assert build().flops(WHOLE) == pytest.approx(HEADS * (fine + coarse + gate))
    learned = build(fine_gate="learned")
    assert learned.flops(WHOLE, 1.0) == pytest.approx(HEADS * (6 * fine + coarse + 2 * gate))
