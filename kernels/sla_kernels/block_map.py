"""Routing (paper, Section 4): which blocks are critical, marginal, negligible.

Shape letters: B batch, H heads, N query tokens, M key tokens, D head_dim, T_m query blocks,
T_n key blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

CRITICAL = 1
MARGINAL = 0
NEGLIGIBLE = -1

# Scores ranked at once; bounds the temporary memory of the ranking (16 bytes a score).
_SCORES_AT_ONCE = 1 << 24


class ClassFractions(NamedTuple):
    """Fractions of the blocks of a map in each class; they sum to 1."""

    critical: float
    marginal: float
    negligible: float


class CompressedBlocks(NamedTuple):
    """Lists of block indices, one per group, in compressed (CSR) form.

    The blocks of group g are `indices[offsets[g] : offsets[g + 1]]`, in ascending order.

    Attributes:
        offsets: int64, (groups + 1,).
        indices: int64, (blocks of all groups,).
    """

    offsets: Tensor
    indices: Tensor

    @property
    def counts(self) -> Tensor:
        """Blocks in each group: int64, (groups,)."""
        return self.offsets.diff()


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The class of every block of scores, and the tables that kernels read.

    `classify_blocks` makes one by the paper's routing, `BlockMap.from_labels` from any labels.
    The tables are built when first asked for and kept.

    Attributes:
        labels: M_c of equation 3: 1 critical, 0 marginal, -1 negligible; int8, (B, H, T_m, T_n).
        block_q, block_kv: tokens in a block of queries, of keys; the last may hold fewer.
        tokens_q, tokens_kv: N and M.

    Raises:
        TypeError: `labels` is not an int8 tensor.
        ValueError: `labels` does not have the shape that the token counts and block sizes give.
    """

    labels: Tensor
    block_q: int
    block_kv: int
    tokens_q: int
    tokens_kv: int

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "tokens_q", "tokens_kv"):
            _check_count(name, getattr(self, name), lowest=1)
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int8:
            found = getattr(self.labels, "dtype", type(self.labels).__name__)
            raise TypeError(f"labels has type {found}; it must be an int8 tensor")
        expected = (
            math.ceil(self.tokens_q / self.block_q),
            math.ceil(self.tokens_kv / self.block_kv),
        )
        if self.labels.ndim != 4 or tuple(self.labels.shape[2:]) != expected:
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)}; {self.tokens_q} queries in blocks "
                f"of {self.block_q} and {self.tokens_kv} keys in blocks of {self.block_kv} need "
                f"(batch, heads, {expected[0]}, {expected[1]})"
            )

    @classmethod
    def from_labels(
        cls, labels: Tensor, *, block_q: int, block_kv: int, tokens_q: int, tokens_kv: int
    ) -> BlockMap:
        """A map from labels that did not come from `classify_blocks`.

        Rows need not have equal counts. A row without critical blocks gives O^s = 0.

        Args:
            labels: values 1, 0, -1; any integer dtype, (B, H, T_m, T_n). Copied only if the
                dtype is not int8 or the memory not contiguous.

        Raises:
            TypeError: `labels` is not an integer tensor.
            ValueError: another value or a wrong shape.
        """
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            found = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"labels has type {found}; it must be an integer tensor")
        if labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < NEGLIGIBLE or high > CRITICAL:
                raise ValueError(
                    f"labels has values from {low} to {high}; they must be "
                    "1 (critical), 0 (marginal) or -1 (negligible)"
                )
        return cls(labels.to(torch.int8).contiguous(), block_q, block_kv, tokens_q, tokens_kv)

    @property
    def blocks_q(self) -> int:
        """T_m."""
        return self.labels.shape[2]

    @property
    def blocks_kv(self) -> int:
        """T_n."""
        return self.labels.shape[3]

    def fractions(self) -> ClassFractions:
        """Share of each class among all blocks; a short last block counts as one block."""
        critical = (self.labels == CRITICAL).float().mean().item()
        negligible = (self.labels == NEGLIGIBLE).float().mean().item()
        return ClassFractions(critical, max(0.0, 1.0 - critical - negligible), negligible)

    @cached_property
    def critical_rows(self) -> CompressedBlocks:
        """Critical key blocks of each query block; groups run over (B, H, T_m) flattened."""
        return _compress(self.labels == CRITICAL)

    @cached_property
    def critical_columns(self) -> CompressedBlocks:
        """Critical query blocks of each key block; groups run over (B, H, T_n) flattened."""
        return _compress((self.labels == CRITICAL).transpose(2, 3))

    @cached_property
    def critical_counts(self) -> Tensor:
        """Critical key blocks of each query block: int32, (B, H, T_m)."""
        counts = self.critical_rows.counts
        return counts.to(torch.int32).view(self.labels.shape[:3])

    @cached_property
    def critical_indices(self) -> Tensor:
        """Row table: int32, (B, H, T_m, largest count).

        Entries up to the row's `critical_counts` are its critical key blocks in ascending order;
        those after it are -1. With `always_critical` some rows are full: there the compressed
        form, `critical_rows`, is far smaller.
        """
        offsets, indices = self.critical_rows
        counts = offsets.diff()
        width = int(counts.max())
        slot = torch.arange(width, device=indices.device)
        table = torch.full((len(counts), width), -1, dtype=torch.int32, device=indices.device)
        table[slot < counts[:, None]] = indices.to(torch.int32)
        return table.view(*self.labels.shape[:3], width)

    def marginal_mask(self, dtype: torch.dtype) -> Tensor:
        """1 where a block is marginal, else 0: (B, H, T_m, T_n)."""
        return (self.labels == MARGINAL).to(dtype)

    def token_mask(self, label: int) -> Tensor:
        """Which scores lie in blocks of this label: bool, (B, H, N, M). Memory is N x M."""
        mask = (self.labels == label).repeat_interleave(self.block_q, dim=2)
        mask = mask[:, :, : self.tokens_q].repeat_interleave(self.block_kv, dim=3)
        return mask[..., : self.tokens_kv]

    def check_matches(self, query: Tensor, key: Tensor) -> None:
        """Raise ValueError unless the map was made for tensors of these shapes and device."""
        made_for = (*self.labels.shape[:2], self.tokens_q, self.tokens_kv)
        got = (*query.shape[:3], key.shape[2])
        if made_for != got:
            raise ValueError(
                f"block_map is for (batch, heads, query tokens, key tokens) = {made_for}; "
                f"query and key have {got}"
            )
        if self.labels.device != query.device:
            raise ValueError(
                f"block_map is on {self.labels.device}; query is on {query.device}: "
                "they must be on one device"
            )


def classify_blocks(
    query: Tensor,
    key: Tensor,
    *,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    always_critical: int = 0,
) -> BlockMap:
    """Routing without the checks of the public function: see `sla_kernels.classify_blocks`."""
    with torch.no_grad():
        if scale is None:
            scale = query.shape[-1] ** -0.5
        tokens_q, tokens_kv = query.shape[2], key.shape[2]
        pooled_q = pool_blocks(query, block_q)
        pooled_k = pool_blocks(key, block_kv)
        batch, heads, blocks_q, head_dim = pooled_q.shape
        blocks_kv = pooled_k.shape[2]

        # Blocks that overlap the first `always_critical` tokens.
        forced_q = min(blocks_q, math.ceil(always_critical / block_q))
        forced_kv = min(blocks_kv, math.ceil(always_critical / block_kv))
        free = blocks_kv - forced_kv
        count_critical, count_negligible = class_counts(blocks_kv, critical, negligible)
        count_critical = min(count_critical, free)
        count_negligible = min(count_negligible, free - count_critical)

        labels = torch.full(
            (batch * heads, blocks_q, blocks_kv), MARGINAL, dtype=torch.int8, device=query.device
        )
        flat_q = pooled_q.reshape(batch * heads, blocks_q, head_dim)
        flat_k = pooled_k.reshape(batch * heads, blocks_kv, head_dim)[:, forced_kv:]
        at_once = max(1, _SCORES_AT_ONCE // max(1, blocks_q * free))
        for start in range(0, batch * heads if free else 0, at_once):
            chunk = slice(start, start + at_once)
            # softmax is strictly increasing along a row, so the scores rank as P_c does; they
            # also tell apart blocks whose weights would both round to zero.
            scores = torch.bmm(flat_q[chunk], flat_k[chunk].mT).mul_(scale)
            ranking = scores.sort(dim=-1, descending=True, stable=True).indices
            target = labels[chunk, :, forced_kv:]
            target.scatter_(-1, ranking[..., :count_critical], CRITICAL)
            target.scatter_(-1, ranking[..., free - count_negligible :], NEGLIGIBLE)
        labels[:, :, :forced_kv] = CRITICAL
        labels[:, :forced_q] = CRITICAL
        return BlockMap(
            labels.view(batch, heads, blocks_q, blocks_kv), block_q, block_kv, tokens_q, tokens_kv
        )


def class_counts(blocks_kv: int, critical: float, negligible: float) -> tuple[int, int]:
    """Critical and negligible key blocks of a row: max(1, floor(k_h T_n)) and floor(k_l T_n).

    The negligible are never more than the critical leave. floor is guarded against the rounding
    of binary fractions: 0.29 of 100 blocks is 29.
    """
    count_critical = min(blocks_kv, max(1, math.floor(critical * blocks_kv + 1e-6)))
    count_negligible = math.floor(negligible * blocks_kv + 1e-6)
    return count_critical, min(count_negligible, blocks_kv - count_critical)


def pool_blocks(tensor: Tensor, block: int) -> Tensor:
    """Mean over the tokens of each block; a short last block averages its own tokens.

    Args:
        tensor: (B, H, N, D), any strides and floating dtype.
        block: tokens in a block.

    Returns:
        (B, H, ceil(N / block), D), float32 (float64 for float64 input).
    """
    dtype = accumulation_dtype(tensor.dtype)
    tokens = tensor.shape[2]
    full = tokens // block
    parts = []
    if full:
        whole = tensor[:, :, : full * block].unflatten(2, (full, block))
        parts.append(whole.mean(dim=3, dtype=dtype))
    if tokens % block:
        parts.append(tensor[:, :, full * block :].mean(dim=2, keepdim=True, dtype=dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and softmax: float64 for float64 tensors, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compress(mask: Tensor) -> CompressedBlocks:
    groups, width = mask.shape[:3].numel(), mask.shape[3]
    offsets = torch.zeros(groups + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(dim=-1).flatten(), dim=0, out=offsets[1:])
    # nonzero lists row by row, so each group comes out in ascending order.
    indices = mask.flatten().nonzero().squeeze(1).remainder_(width)
    return CompressedBlocks(offsets, indices)


def _check_count(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer >= {lowest}")
    if value < lowest:
        raise ValueError(f"{name} is {value}; it must be an integer >= {lowest}")
