"""Token orders: permutations of the grid in which tiles are consecutive."""

import itertools

import pytest
import torch

from sla.attention import AttentionConfig, SLAConfig, attention_config_from_dict, token_order
from sla.attention.token_order import (
    inverse_order,
    raster_order,
    tile_index,
    tile_order,
    tile_shape,
)

# (grid, tile): divided evenly, ragged in each direction, tiles larger than the grid, one token.
CASES = [
    ((4, 8, 12), (4, 4, 4)),
    ((5, 8, 12), (4, 4, 4)),
    ((4, 7, 12), (4, 4, 4)),
    ((4, 8, 9), (4, 4, 4)),
    ((5, 7, 9), (2, 4, 3)),
    ((3, 2, 2), (4, 4, 4)),
    ((1, 1, 1), (4, 4, 4)),
]


def by_hand(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> list[int]:
    """Raster indices tile after tile, in plain loops."""
    starts = itertools.product(*(range(0, n, step) for n, step in zip(grid, tile, strict=True)))
    return [
        (frame * grid[1] + row) * grid[2] + column
        for start in starts
        for frame, row, column in itertools.product(
            *(range(s, min(s + t, n)) for s, t, n in zip(start, tile, grid, strict=True))
        )
    ]


@pytest.mark.parametrize(("grid", "tile"), CASES)
def test_order_is_tile_after_tile(grid, tile):
    order = tile_order(grid, tile)
    assert order.dtype == torch.int64
    assert order.tolist() == by_hand(grid, tile)
    # Consecutive tokens of one tile; tiles in order; as many as the shape says.
    index = tile_index(grid, tile)[order]
    assert index.diff().min() >= 0 if len(index) > 1 else index.item() == 0
    assert index.max() + 1 == torch.tensor(tile_shape(grid, tile)).prod()


@pytest.mark.parametrize(("grid", "tile"), CASES)
def test_raster_order_goes_back(grid, tile):
    tokens = torch.arange(grid[0] * grid[1] * grid[2])
    order, back = tile_order(grid, tile), raster_order(grid, tile)
    assert torch.equal(tokens[order][back], tokens)
    assert torch.equal(tokens[back][order], tokens)
    assert torch.equal(inverse_order(order), back)


def test_blocks_of_64_are_tiles_where_the_tile_divides_the_grid():
    grid, tile = (8, 8, 12), (4, 4, 4)
    place = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), dim=-1
    ).flatten(0, 2)
    blocks = place[tile_order(grid, tile)].unflatten(0, (-1, 64))
    spread = blocks.amax(1) - blocks.amin(1)
    assert (spread == 3).all()
    # In raster order a block is one frame's strip, as wide as the grid.
    raster = place.unflatten(0, (-1, 64))
    assert ((raster.amax(1) - raster.amin(1))[:, 2] == 11).all()


@pytest.mark.parametrize("tile", [(1, 1, 1), (1, 1, 8), (1, 4, 8), (4, 4, 8)])
def test_tiles_that_follow_the_raster_change_nothing(tile):
    assert torch.equal(tile_order((4, 4, 8), tile), torch.arange(128))


def test_orders_are_kept_for_each_grid_tile_and_device():
    grid, tile = (4, 6, 8), (2, 2, 2)
    order = tile_order(grid, tile)
    assert tile_order(grid, tile, torch.device("cpu")) is order
    assert tile_order([4, 6, 8], [2, 2, 2]) is order  # type: ignore[arg-type]
    assert tile_order(grid, (2, 3, 2)) is not order
    assert raster_order(grid, tile) is not order
    assert tile_order(grid, tile, "meta").device.type == "meta"
    assert tile_order(grid, tile) is order


def test_only_the_latest_orders_are_kept():
    first = tile_order((2, 2, 2), (1, 2, 1))
    for width in range(1, 70):
        tile_order((2, 2, width), (1, 2, 3))
        tile_order((2, 2, 2), (1, 2, 1))  # in use: stays
    assert tile_order((2, 2, 2), (1, 2, 1)) is first
    oldest = tile_order((2, 2, 1), (1, 2, 3))
    for width in range(1, 70):
        tile_order((3, 2, width), (1, 2, 3))
    assert tile_order((2, 2, 1), (1, 2, 3)) is not oldest
    assert len(token_order._kept) <= 64


def test_an_order_from_inference_mode_serves_training():
    grid, tile = (2, 6, 10), (2, 3, 5)
    with torch.inference_mode():
        order = tile_order(grid, tile)
    tokens = torch.randn(1, 120, 4, requires_grad=True)
    tokens[:, order].square().sum().backward()
    torch.testing.assert_close(tokens.grad, 2 * tokens.detach())


def test_fake_orders_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    grid, tile = (2, 6, 11), (2, 3, 5)
    with FakeTensorMode():
        assert type(tile_order(grid, tile)) is not torch.Tensor
    assert tile_order(grid, tile).tolist() == by_hand(grid, tile)


@pytest.mark.parametrize("tile", [(4, 4), (0, 4, 4), (4, -1, 4), (4, 4.0, 4)])
@pytest.mark.parametrize("order", [tile_order, tile_index, raster_order, tile_shape])
def test_wrong_sizes_are_named(order, tile):
    with pytest.raises(ValueError, match=r"tile is \(.*three positive integers"):
        order((4, 4, 4), tile)
    with pytest.raises(ValueError, match=r"grid is \(.*three positive integers"):
        order(tile, (4, 4, 4))


# --- the option ------------------------------------------------------------------------------


def test_every_method_has_the_option_and_it_is_off():
    assert AttentionConfig().tile is None
    assert SLAConfig().tile is None
    given = attention_config_from_dict({"name": "sla", "tile": [4, 4, 4], "critical": 0.1})
    assert given == SLAConfig(tile=(4, 4, 4), critical=0.1)


@pytest.mark.parametrize("tile", [[4, 4], [4, 4, 0], [4, 4, 4.0], [True, 4, 4], 4, "444"])
def test_a_wrong_option_is_named(tile):
    with pytest.raises(ValueError, match=r"attention\.tile is .*three positive integers"):
        SLAConfig(tile=tile)
