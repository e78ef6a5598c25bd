"""Which blocks are critical, marginal and negligible: pooling, routing, tables.

Shape letters: B batch, H heads, N_q and N_kv tokens, D head_dim, T_m = ceil(N_q / block_q) query
blocks, T_n = ceil(N_kv / block_kv) key blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1


# Two maps are equal if they are the same object: comparing tensors by == has no single answer.
@dataclass(frozen=True, eq=False)
class BlockMap:
    """Class of every pair of a query block and a key block (M_c, equation 3).

    Attributes:
        labels: int8 (B, H, T_m, T_n): 1 critical, 0 marginal, -1 negligible. Blocks that lie wholly
            past `key_lengths` are made negligible, unless `row_table` is given, whose maker has
            done so.
        block_q, block_kv: tokens in a block; the last one may be shorter.
        tokens_q, tokens_kv: N_q and N_kv.
        key_lengths: int32 (B,): the first keys of each sample that count, 0 to N_kv; the rest is
            padding. None: all N_kv.
        row_table: `critical_blocks` and `critical_counts`, if whoever built the map has them.
        block_lengths: int32 (T_n,): the first keys of each key block that count, 1 to block_kv, in
            every sample and head; the rest of the block is filling that the caller put there to
            make blocks of unequal parts (any finite numbers). For the sparse branch alone, with
            whole blocks and without key_lengths. None: all.

    Raises:
        ValueError: a tensor of the wrong shape for these tokens and blocks, or on another device;
            block_lengths beside key_lengths or a short last block.
        TypeError: labels that are not int8, lengths or a table that are not int32.
    """

    labels: Tensor
    block_q: int
    block_kv: int
    tokens_q: int
    tokens_kv: int
    key_lengths: Tensor | None = None
    row_table: tuple[Tensor, Tensor] | None = None
    block_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int8:
            raise TypeError(f"labels is {self.labels.dtype}; it must be torch.int8")
        wanted = (
            num_blocks(self.tokens_q, self.block_q),
            num_blocks(self.tokens_kv, self.block_kv),
        )
        if self.labels.ndim != 4 or tuple(self.labels.shape[2:]) != wanted:
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)}; it must be (B, H, {wanted[0]}, "
                f"{wanted[1]}) for {self.tokens_q} queries in blocks of {self.block_q} and "
                f"{self.tokens_kv} keys in blocks of {self.block_kv}"
            )
        for name, tensor, shape in self._optional_tensors():
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} is {tensor.dtype}; it must be torch.int32")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
            if tensor.device != self.labels.device:
                raise ValueError(f"{name} is on {tensor.device}, labels on {self.labels.device}")
        if self.block_lengths is not None:
            if self.key_lengths is not None:
                raise ValueError("block_lengths is given beside key_lengths; give one of them")
            if self.tokens_kv % self.block_kv:
                raise ValueError(
                    f"block_lengths is given with {self.tokens_kv} keys, no multiple of block_kv = "
                    f"{self.block_kv}; fill the last block up too"
                )
        if self.key_lengths is not None and self.row_table is None:
            padding = past_length(self.key_lengths, wanted[1], self.block_kv)
            labels = self.labels.masked_fill(padding[:, None, None], NEGLIGIBLE)
            object.__setattr__(self, "labels", labels)

    def _optional_tensors(self) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """Name, tensor and wanted shape of those that are given."""
        batch, heads, t_m, t_n = self.labels.shape
        found: list[tuple[str, Tensor, tuple[int, ...]]] = []
        if self.key_lengths is not None:
            found.append(("key_lengths", self.key_lengths, (batch,)))
        if self.block_lengths is not None:
            found.append(("block_lengths", self.block_lengths, (t_n,)))
        if self.row_table is not None:
            blocks, counts = self.row_table
            width = min(blocks.shape[-1], t_n) if blocks.ndim else 0
            found.append(("row_table[0]", blocks, (batch, heads, t_m, width)))
            found.append(("row_table[1]", counts, (batch, heads, t_m)))
        return found

    @cached_property
    def critical_counts(self) -> Tensor:
        """int32 (B, H, T_m): critical blocks of each row."""
        if self.row_table is not None:
            return self.row_table[1]
        return (self.labels == CRITICAL).sum(-1, dtype=torch.int32)

    @cached_property
    def critical_blocks(self) -> Tensor:
        """Row table, int32 (B, H, T_m, W), W at most T_n: a row's critical key blocks in ascending
        order come first, `critical_counts` of them; the rest of the row is filling, any block."""
        if self.row_table is not None:
            return self.row_table[0]
        # A stable sort of "is not critical" keeps ascending block order among equals.
        order = (self.labels != CRITICAL).to(torch.int8).argsort(dim=-1, stable=True)
        return order.to(torch.int32)

    @cached_property
    def column_counts(self) -> Tensor:
        """int32 (B, H, T_n): rows that hold each key block as critical."""
        return (self.labels == CRITICAL).sum(-2, dtype=torch.int32)

    @cached_property
    def column_blocks(self) -> Tensor:
        """Column table, int32 (B, H, T_n, T_m): the query blocks that hold a key block as
        critical, as `critical_blocks`."""
        by_column = (self.labels != CRITICAL).to(torch.int8).transpose(-1, -2)
        return by_column.argsort(dim=-1, stable=True).to(torch.int32)

    def fractions(self) -> dict[str, float]:
        """Share of all pairs of blocks in each class; blocks of padding are negligible."""
        total = self.labels.numel()
        names = {"critical": CRITICAL, "marginal": MARGINAL, "negligible": NEGLIGIBLE}
        return {name: (self.labels == label).sum().item() / total for name, label in names.items()}

    def exact_fraction(self) -> float:
        """Share of all scores that are critical, by tokens: short blocks count less, filling not
        at all. Waits for the device."""
        device = self.labels.device
        starts = torch.arange(0, self.tokens_q, self.block_q, device=device)
        queries = (self.tokens_q - starts).clamp(max=self.block_q).double()
        if self.block_lengths is None:
            starts = torch.arange(0, self.tokens_kv, self.block_kv, device=device)
            keys = (self.tokens_kv - starts).clamp(max=self.block_kv).double()
        else:
            keys = self.block_lengths.double()
        critical = torch.einsum("bhmn,m,n->", (self.labels == CRITICAL).double(), queries, keys)
        heads = self.labels.shape[0] * self.labels.shape[1]
        return critical.item() / (heads * self.tokens_q * keys.sum().item())

    def token_labels(self) -> Tensor:
        """int8 (B, H, N_q, N_kv): the class of every score, negligible for padding and filling.

        For references and pictures only.
        """
        rows = self.labels.repeat_interleave(self.block_q, dim=2)[:, :, : self.tokens_q]
        labels = rows.repeat_interleave(self.block_kv, dim=3)[..., : self.tokens_kv]
        if self.block_lengths is not None:
            token = torch.arange(self.block_kv, device=labels.device)
            filling = (token >= self.block_lengths[:, None]).flatten()
            return labels.masked_fill(filling, NEGLIGIBLE)
        if self.key_lengths is None:
            return labels
        padding = past_length(self.key_lengths, self.tokens_kv)
        return labels.masked_fill(padding[:, None, None], NEGLIGIBLE)


def all_marginal(
    query: Tensor, key: Tensor, block: int, key_lengths: Tensor | None = None
) -> BlockMap:
    """The map of linear attention over all valid keys, in blocks of `block` tokens."""
    tokens_q, tokens_kv = query.shape[2], key.shape[2]
    shape = (*query.shape[:2], num_blocks(tokens_q, block), num_blocks(tokens_kv, block))
    labels = query.new_full(shape, MARGINAL, dtype=torch.int8)
    return BlockMap(labels, block, block, tokens_q, tokens_kv, key_lengths)


def num_blocks(tokens: int, block: int) -> int:
    """ceil(tokens / block)."""
    # Not -(-tokens // block): with a symbolic number of tokens that is not simplified.
    return (tokens + block - 1) // block


def past_length(key_lengths: Tensor, count: int, step: int = 1) -> Tensor:
    """bool (B, count): whether token i * step lies at or past the length of its sample."""
    starts = torch.arange(0, count * step, step, device=key_lengths.device)
    return starts >= key_lengths[:, None]


def fraction_of(fraction: float, blocks: int) -> int:
    """floor(fraction * blocks), with 0.29 * 100 = 28.999999999999996 counted as 29."""
    return math.floor(fraction * blocks + 1e-9 * blocks)


def block_counts(
    critical: float, negligible: float, key_blocks: int, forced: int = 0
) -> tuple[int, int]:
    """Critical and negligible blocks of a row.

    Args:
        critical, negligible: fractions k_h and k_l.
        key_blocks: T_n.
        forced: leading key blocks that are critical in any case, in addition.

    Returns:
        min(T_n, forced + max(1, floor(k_h T_n))), and floor(k_l T_n) or what is left.
    """
    chosen = min(key_blocks, forced + max(1, fraction_of(critical, key_blocks)))
    skipped = min(fraction_of(negligible, key_blocks), key_blocks - chosen)
    return chosen, skipped


def sample_counts(
    key_lengths: Tensor, critical: float, negligible: float, block_kv: int, always_critical: int
) -> Tensor:
    """`block_counts` of samples of different length, without waiting for the device.

    Args:
        key_lengths: int (B,), valid keys of each sample.

    Returns:
        int32 (B, 3) on the device of `key_lengths`: T_n of the sample alone, critical blocks (those
        of `always_critical` included) and negligible blocks of a row. A sample without keys has 0
        of each.
    """

    def blocks_of(tokens: Tensor) -> Tensor:
        return torch.div(tokens + (block_kv - 1), block_kv, rounding_mode="floor")

    def fraction(share: float) -> Tensor:
        # The arithmetic of `fraction_of`, in its precision.
        accurate = key_blocks.double()
        return (accurate * share + accurate * 1e-9).floor().to(lengths.dtype)

    lengths = key_lengths.to(torch.int32)
    key_blocks = blocks_of(lengths)
    forced = blocks_of(lengths.clamp(max=always_critical))
    chosen = torch.minimum(key_blocks, forced + fraction(critical).clamp(min=1))
    skipped = torch.minimum(fraction(negligible), key_blocks - chosen)
    return torch.stack([key_blocks, chosen, skipped], dim=1)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over a tensor are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tokens_in_blocks(lengths: Tensor, tokens: int, block: int) -> Tensor:
    """int (B, T): how many of the first `lengths` (B,) tokens lie in each block of `tokens`.

    1 where there is none, as it is divided by.
    """
    starts = torch.arange(0, tokens, block, device=lengths.device)
    return (lengths[:, None] - starts).clamp(1, block)


def pool_blocks(tensor: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """Mean over the tokens of each block; a short last block over its real tokens (Section 4.1).

    Args:
        tensor: (B, H, N, D) floating.
        block: tokens in a block.
        lengths: int (B,), the first tokens of each sample that count; None for all. A block of
            none gives zero.

    Returns:
        (B, H, T, D), float64 for float64 and float32 for everything else.
    """
    accurate = tensor.to(accumulation_dtype(tensor))
    tokens = tensor.shape[2]
    if lengths is not None:
        # Filled, not multiplied by zero: padding may hold anything, NaN too.
        real = accurate.masked_fill(past_length(lengths, tokens)[:, None, :, None], 0.0)
        sums = F.pad(real, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block)).sum(dim=3)
        return sums / tokens_in_blocks(lengths, tokens, block)[:, None, :, None]
    whole = tokens // block
    parts = []
    if whole:
        parts.append(accurate[:, :, : whole * block].unflatten(2, (whole, block)).mean(dim=3))
    if tokens % block:
        parts.append(accurate[:, :, whole * block :].mean(dim=2, keepdim=True))
    return torch.cat(parts, dim=2)


@torch.no_grad()
def route(
    query: Tensor,
    key: Tensor,
    *,
    critical: float,
    negligible: float,
    block_q: int,
    block_kv: int,
    scale: float,
    always_critical: int,
    key_lengths: Tensor | None = None,
) -> BlockMap:
    """`classify_blocks` after its checks.

    Blocks of a row are ranked by pool(Q) pool(K)^T, highest first, the lower index first among
    equals; softmax, which P_c applies, does not change the order. The first ones are critical, the
    last ones negligible. With `key_lengths`, int32 (B,), each sample is ranked and counted as it
    would be alone with its valid keys; blocks past them are negligible. Routing has no gradient.
    """
    tokens_q, tokens_kv = query.shape[2], key.shape[2]
    pooled_key = pool_blocks(key, block_kv, key_lengths)
    scores = pool_blocks(query, block_q) @ pooled_key.transpose(-1, -2)
    scores = scores * scale
    key_blocks = scores.shape[-1]
    forced_keys = num_blocks(min(always_critical, tokens_kv), block_kv)
    forced_queries = num_blocks(min(always_critical, tokens_q), block_q)
    scores[..., :forced_keys] = math.inf
    if key_lengths is not None:
        # After the forced blocks, so that those of padding come last too.
        padding = past_length(key_lengths, key_blocks, block_kv)
        scores.masked_fill_(padding[:, None, None], -math.inf)

    order = scores.argsort(dim=-1, descending=True, stable=True)
    labels = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    if key_lengths is None:
        chosen, skipped = block_counts(critical, negligible, key_blocks, forced_keys)
        labels.scatter_(-1, order[..., :chosen], CRITICAL)
        labels.scatter_(-1, order[..., key_blocks - skipped :], NEGLIGIBLE)
    else:
        # Counts differ by sample and stay on the device: the class is a function of the rank.
        counts = sample_counts(key_lengths, critical, negligible, block_kv, always_critical)
        valid, chosen_of, skipped_of = counts[:, :, None].unbind(1)
        rank = torch.arange(key_blocks, device=scores.device)
        by_rank = (rank < chosen_of).to(torch.int8) - (rank >= valid - skipped_of).to(torch.int8)
        labels.scatter_(-1, order, by_rank[:, None, None].expand_as(order))
    labels[..., :forced_queries, :] = CRITICAL
    # BlockMap takes padding out of the forced rows.
    return BlockMap(labels, block_q, block_kv, tokens_q, tokens_kv, key_lengths)
