"""SpargeAttn: blocks chosen by pooled scores, but only where a block is like its mean.

Shape letters as in `interface`. arXiv 2502.18137, and its successor arXiv 2602.13515.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sla_kernels import BlockMap, sparse_attention
from sla_kernels.block_map import (
    CRITICAL,
    NEGLIGIBLE,
    accumulation_dtype,
    block_counts,
    fraction_of,
    num_blocks,
    pool_blocks,
)
from torch import Tensor

from sla.attention.config import SPARGE_DEFAULTS, SpargeConfig
from sla.attention.interface import AttentionContext, AttentionMethod, Grid, tokens_of
from sla.attention.registry import register_attention


@register_attention("sparge", SpargeConfig)
class SpargeAttention(AttentionMethod):
    """Exact attention over the chosen key blocks of each query block (arXiv 2502.18137).

    Blocks are represented by their means, so a block whose tokens differ has no good
    representative. `self_similarity` finds these "fix" blocks (below theta): as queries they attend
    all, as keys all attend them. The rest goes by P = softmax(pool(Q) pool(K)^T / sqrt(D)), from
    which fix keys are left out (Section 3.2, equations 4 and 5). `selection` says how:

    - `mass`: the highest entries of a row as long as their sum is at most tau, as in the paper's
      listing and in the public code (so without the entry that crosses tau), but at least one.
    - `density`: the same number of blocks in every row, max(1, floor(critical * T_n)): fix keys
      first, then the others, each by pooled score. Fix queries attend as many as the others.
    - `union` (arXiv 2602.13515, equation 9): the top max(1, floor(critical * T_n)) entries and the
      fewest highest entries that sum to `mass` or more.

    The method learns nothing and routing has no gradient; gradients reach query, key and value
    through the chosen blocks. "Sparge-T" of arXiv 2509.24006 is a model fine-tuned with this
    module in place, "Sparge-F" one that is not.

    Left out: the second stage, which skips the product P V for rows whose scores in a block all
    lie far below their running maximum (Section 3.4: an approximation that saves time and chooses
    no blocks); the 8-bit products of SageAttention (Section 3.5); the search of theta and tau for
    every layer (Section 3.6); the Hilbert curve (Section 3.7), instead of which tokens may come in
    tiles (`attention.tile`).

    Raises:
        ValueError: a number or the selection of the config is out of range.
    """

    config: SpargeConfig

    def __init__(
        self, config: SpargeConfig, num_heads: int, head_dim: int, dim: int, layer_index: int
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        if config.selection not in SPARGE_DEFAULTS:
            raise ValueError(
                f"attention.selection is {config.selection!r}; "
                f"it must be one of {', '.join(SPARGE_DEFAULTS)}"
            )
        if config.similarity is not None and not -1.0 <= config.similarity <= 1.0:
            raise ValueError(
                f"attention.similarity is {config.similarity}; it must be in [-1, 1] or null"
            )
        if config.mass is not None and not 0.0 <= config.mass <= 1.0:
            raise ValueError(f"attention.mass is {config.mass}; it must be in [0, 1] or null")
        if config.critical is not None and not 0.0 < config.critical <= 1.0:
            raise ValueError(
                f"attention.critical is {config.critical}; it must be in (0, 1] or null"
            )
        for field in ("block_q", "block_kv"):
            if getattr(config, field) < 1:
                raise ValueError(f"attention.{field} is {getattr(config, field)}; must be >= 1")

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        block_map = self.block_map(query, key, context)
        return sparse_attention(query, key, value, block_map, backend=self.config.backend)

    @torch.no_grad()
    def block_map(self, query: Tensor, key: Tensor, context: AttentionContext) -> BlockMap:
        """The chosen blocks as critical, all others as negligible.

        In float32 (float64 for float64 inputs), from pooled tensors; the lower block index first
        among equal scores. The blocks of `context.always_critical` are fix blocks, in addition to
        any count.
        """
        config = self.config
        # Autocast would lower the precision of the scores.
        with torch.autocast(query.device.type, enabled=False):
            pooled_key = pool_blocks(key, config.block_kv)
            scores = pool_blocks(query, config.block_q) @ pooled_key.transpose(-1, -2)
            scores = scores / math.sqrt(query.shape[-1])
        fixed_keys = self._fix_blocks(key, config.block_kv, smooth=config.smooth_key)
        tokens = query.shape[2]
        always_queries = num_blocks(min(context.always_critical, tokens), config.block_q)
        always_keys = num_blocks(min(context.always_critical, tokens), config.block_kv)
        if config.selection == "density":
            chosen = self._by_density(scores, fixed_keys, always_keys)
            chosen[..., :always_queries, :] = True
        else:
            fixed_queries = self._fix_blocks(query, config.block_q)
            fixed_queries[..., :always_queries] = True
            fixed_keys[..., :always_keys] = True
            chosen = self._by_mass(scores, fixed_keys)
            chosen |= fixed_keys.unsqueeze(-2) | fixed_queries.unsqueeze(-1)
        labels = torch.full_like(chosen, NEGLIGIBLE, dtype=torch.int8)
        labels.masked_fill_(chosen, CRITICAL)
        return BlockMap(labels, config.block_q, config.block_kv, tokens, tokens)

    def _fix_blocks(self, tensor: Tensor, block: int, smooth: bool = False) -> Tensor:
        """bool (B, H, blocks): those that are not self-similar."""
        threshold = self._number("similarity")
        if threshold <= 0.0:
            shape = (*tensor.shape[:2], num_blocks(tensor.shape[2], block))
            return torch.zeros(shape, dtype=torch.bool, device=tensor.device)
        if smooth:
            # Of the keys' similarity only: to the scores it would add a constant in each row, which
            # softmax takes out again.
            tensor = tensor.to(accumulation_dtype(tensor))
            tensor = tensor - tensor.mean(dim=2, keepdim=True)
        return self_similarity(tensor, block) < threshold

    def _by_density(self, scores: Tensor, fixed_keys: Tensor, always_keys: int) -> Tensor:
        """bool (B, H, T_m, T_n): as many blocks of every row."""
        count, _ = block_counts(self._number("critical"), 0.0, scores.shape[-1], always_keys)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        priority = fixed_keys.to(torch.int8)
        priority[..., :always_keys] = 2
        # Stable: by score within a priority.
        by_score = priority.unsqueeze(-2).expand(scores.shape).gather(-1, order)
        order = order.gather(-1, by_score.argsort(dim=-1, descending=True, stable=True))
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        return chosen.scatter_(-1, order[..., :count], True)

    def _by_mass(self, scores: Tensor, fixed_keys: Tensor) -> Tensor:
        """bool (B, H, T_m, T_n): top-cdf, or the union of top-k and top-p; without fix blocks."""
        mass = self._number("mass")
        if mass >= 1.0:
            # All, whatever the rounding of the sums.
            return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(fixed_keys.unsqueeze(-2), -math.inf)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        # NaN, of which no comparison is true, where all keys are fixed and none is left to choose.
        sums = scores.softmax(dim=-1).cumsum(dim=-1)
        if self.config.selection == "mass":
            first, by_rank = 1, sums <= mass
        else:
            first = max(1, fraction_of(self._number("critical"), scores.shape[-1]))
            # The sum before an entry, so that the one which crosses `mass` is in.
            by_rank = F.pad(sums[..., :-1], (1, 0)) < mass
        by_rank[..., :first] = True
        return torch.empty_like(by_rank).scatter_(-1, order, by_rank)

    def _number(self, name: str) -> float:
        """A number of the config, or the default of the selection."""
        given: float | None = getattr(self.config, name)
        return SPARGE_DEFAULTS[self.config.selection][name] if given is None else given

    def density(self, grid: Grid) -> float | None:
        if self.config.selection != "density":
            return None
        t_n = num_blocks(tokens_of(grid), self.config.block_kv)
        return block_counts(self._number("critical"), 0.0, t_n)[0] / t_n

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """Exact attention on the chosen blocks, plus 2 T_m T_n D for the pooled scores."""
        tokens = tokens_of(grid)
        t_m = num_blocks(tokens, self.config.block_q)
        t_n = num_blocks(tokens, self.config.block_kv)
        exact = 4.0 * tokens**2 * self.head_dim * self._density(grid, density)
        return self.num_heads * (exact + 2.0 * t_m * t_n * self.head_dim)


def self_similarity(tensor: Tensor, block: int) -> Tensor:
    """Mean cosine similarity of all pairs of tokens in each block, a token with itself included.

    It is the squared length of the mean of the unit vectors, in [0, 1]: O(N D), no pair is
    formed. This is the measure of the public code. The paper writes CosSim(X) = mean(X X^T) /
    |max(X X^T)|, which is the same for tokens of one length; where lengths differ, the longest
    token sets the scale there and the block looks less alike. A zero token has a cosine of zero
    with all.

    Args:
        tensor: (B, H, N, D) floating.
        block: tokens in a block; a short last block counts its real tokens.

    Returns:
        (B, H, ceil(N / block)), float64 for float64 and float32 for everything else.
    """
    unit = F.normalize(tensor.to(accumulation_dtype(tensor)), dim=-1)
    return pool_blocks(unit, block).square().sum(dim=-1)
