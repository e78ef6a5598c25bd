"""Tile sizes, warps and pipeline depths: measured on an H100, see kernels/NOTES.md.

One function a kernel. bfloat16 is tuned at head_dim 128 in blocks of 64 and 128; float16 and
float32, whose block sums are float32, take what fits the shared memory.
"""

from __future__ import annotations

import torch

Tiling = dict[str, int]


def forward(dtype: torch.dtype, block_q: int, block_kv: int) -> Tiling:
    """Two small programs on a multiprocessor overlap one's products with the other's
    exponentials; larger tiles were no faster."""
    if dtype == torch.float32:
        return {
            "TILE_M": min(64, block_q),
            "TILE_N": min(32, block_kv),
            "STAGES": 2,
            "num_warps": 8,
        }
    return {"TILE_M": min(64, block_q), "TILE_N": min(64, block_kv), "STAGES": 3, "num_warps": 4}


def forward_low_bit(block_q: int, block_kv: int) -> Tiling:
    """As `forward`, whatever the dtype of the inputs; with 168 registers three programs fit a
    multiprocessor. Not yet tuned on a GPU."""
    return {
        "TILE_M": min(64, block_q),
        "TILE_N": min(64, block_kv),
        "STAGES": 3,
        "num_warps": 4,
        "maxnreg": 168,
    }


def backward_queries(dtype: torch.dtype, block_q: int, block_kv: int) -> Tiling:
    if dtype == torch.float32:
        return {"TILE_N": min(32, block_kv), "STAGES": 1, "num_warps": 8}
    if block_q == 128:
        return {"TILE_N": min(64, block_kv), "STAGES": 3, "num_warps": 8}
    return {"TILE_N": min(32, block_kv), "STAGES": 3, "num_warps": 4}


def backward_keys(dtype: torch.dtype, block_q: int, block_kv: int) -> Tiling:
    if dtype == torch.float32:
        return {"TILE_M": min(32, block_q), "STAGES": 1, "num_warps": 8}
    if block_q < 32:
        # The copy engine writes to 128-byte boundaries: of several buffers of 16 numbers the second
        # would not lie on one.
        return {"TILE_M": block_q, "STAGES": 1, "num_warps": 4}
    if block_kv == 128:
        return {"TILE_M": min(64, block_q), "STAGES": 3, "num_warps": 8}
    return {"TILE_M": min(64, block_q), "STAGES": 2, "num_warps": 4}


def backward_linear(dtype: torch.dtype, block_q: int, block_kv: int) -> Tiling:
    if dtype == torch.bfloat16:
        return {"TILE": min(64, block_kv), "STAGES": 2, "num_warps": 8}
    return {"TILE": min(32, block_kv), "STAGES": 1, "num_warps": 8}


def merge_pooled(dtype: torch.dtype, block_q: int, columns: int) -> Tiling:
    """As `forward`; so many pooled keys a tile."""
    if dtype == torch.float32:
        return {"TILE_M": min(64, block_q), "TILE_N": min(32, columns), "STAGES": 2, "num_warps": 8}
    return {"TILE_M": min(64, block_q), "TILE_N": columns, "STAGES": 3, "num_warps": 4}


def merge_pooled_queries(dtype: torch.dtype, block_q: int, columns: int) -> Tiling:
    if dtype == torch.float32:
        return {"TILE_M": min(32, block_q), "TILE_N": min(32, columns), "STAGES": 1, "num_warps": 8}
    return {"TILE_M": min(64, block_q), "TILE_N": min(32, columns), "STAGES": 3, "num_warps": 4}


def merge_pooled_keys(dtype: torch.dtype, block_q: int, columns: int) -> Tiling:
    """Tiles of queries as in `backward_keys`."""
    if dtype == torch.float32:
        return {"TILE_M": min(32, block_q), "TILE_N": min(32, columns), "STAGES": 1, "num_warps": 8}
    stages = 1 if block_q < 32 else 2
    return {"TILE_M": min(64, block_q), "TILE_N": columns, "STAGES": stages, "num_warps": 4}


def prepare(dtype: torch.dtype, block_q: int, block_kv: int) -> Tiling:
    """Two programs on a multiprocessor, for which registers are the limit."""
    if dtype == torch.bfloat16:
        return {"TILE": block_kv, "STAGES": 1, "num_warps": 8, "maxnreg": 128}
    return {
        "TILE": min(64 if dtype == torch.float16 else 32, block_kv),
        "STAGES": 1,
        "num_warps": 8,
    }


def aggregate(sums_dtype: torch.dtype) -> Tiling:
    if sums_dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 3, "num_warps": 4}
