"""Token orders: blocks of consecutive tokens as compact pieces of space-time.

In raster order 64 consecutive tokens are a strip of one frame. In tile order the latent grid is cut
into tiles of (frames, height, width) tokens, tile after tile in raster order, the tokens of a tile
in raster order: with tiles of 4 x 4 x 4 a block of 64 tokens is one tile, where the tile divides
the grid; else tiles at the far ends are smaller and later blocks drift against the tiles.

Orders are computed on the device that asks, without waiting for it, and kept there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Device = torch.device | str

_KEPT = 64
_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def tile_shape(grid: Grid, tile: Grid) -> Grid:
    """Number of tiles in each direction, the partial ones at the ends included.

    Raises:
        ValueError: `grid` or `tile` is not three positive integers.
    """
    _check("grid", grid)
    _check("tile", tile)
    frames, height, width = (
        (size + step - 1) // step for size, step in zip(grid, tile, strict=True)
    )
    return frames, height, width


def tile_index(grid: Grid, tile: Grid, device: Device = "cpu") -> Tensor:
    """int64 (N,): the tile of each token in raster order. Not to be written to.

    Raises:
        ValueError: as `tile_shape`.
    """
    return _keep(_tile_index, grid, tile, device)


def tile_order(grid: Grid, tile: Grid, device: Device = "cpu") -> Tensor:
    """int64 (N,): the raster index of the token at each place of the tile order.

    `tokens[:, tile_order(grid, tile)]` goes from raster to tile order. Not to be written to.

    Raises:
        ValueError: as `tile_shape`.
    """
    return _keep(_tile_order, grid, tile, device)


def raster_order(grid: Grid, tile: Grid, device: Device = "cpu") -> Tensor:
    """int64 (N,): the place in the tile order of each token in raster order.

    `tokens[:, raster_order(grid, tile)]` goes back from tile to raster order. Not to be written to.

    Raises:
        ValueError: as `tile_shape`.
    """
    return _keep(_raster_order, grid, tile, device)


def inverse_order(order: Tensor) -> Tensor:
    """int64 (N,): `tensor[order][inverse_order(order)]` is `tensor`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _tile_index(grid: Grid, tile: Grid, device: torch.device) -> Tensor:
    _, rows, columns = tile_shape(grid, tile)
    frame, row, column = (
        torch.div(torch.arange(size, device=device), step, rounding_mode="floor")
        for size, step in zip(grid, tile, strict=True)
    )
    index = (frame[:, None, None] * rows + row[:, None]) * columns + column
    return index.flatten()


def _tile_order(grid: Grid, tile: Grid, device: torch.device) -> Tensor:
    return _tile_index(grid, tile, device).argsort(stable=True)


def _raster_order(grid: Grid, tile: Grid, device: torch.device) -> Tensor:
    return inverse_order(_tile_order(grid, tile, device))


def _keep(
    compute: Callable[[Grid, Grid, torch.device], Tensor], grid: Grid, tile: Grid, device: Device
) -> Tensor:
    """compute(grid, tile, device), once for each of the latest arguments."""
    device = torch.device(device)
    if torch.compiler.is_compiling():  # part of the graph, for any grid
        return compute(grid, tile, device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (compute, tuple(grid), tuple(tile), device)
    found = _kept.pop(key, None)
    if found is None:
        # An inference tensor could never be an index of a pass with gradients.
        with torch.inference_mode(False):
            found = compute(grid, tile, device)
        if not _is_real(found):
            return found
        if len(_kept) >= _KEPT:
            _kept.popitem(last=False)
    _kept[key] = found
    return found


def _is_real(tensor: Tensor) -> bool:
    """Whether it holds numbers: no fake tensor, none of a CUDA graph that is only recorded."""
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(tensor) is Tensor and not capturing


def _check(name: str, sizes: Sequence[int]) -> None:
    # Under torch.compile a size may be symbolic.
    if len(sizes) != 3 or not all(isinstance(n, int | torch.SymInt) and n >= 1 for n in sizes):
        raise ValueError(
            f"{name} is {tuple(sizes)}; it must be three positive integers: frames, height, width"
        )
