"""SLA2: learned routing, and a learned ratio that mixes the two branches (arXiv 2602.12675).

O = alpha O^s + (1 - alpha) O^l. Two classes: O^s is exact attention over the critical blocks of a
row, O^l linear attention over all others; there is no Proj. Softmax over the critical keys alone is
too large by the factor 1 / (P_1 1), P_1 the critical part of the true weights P: alpha stands for
P_1 1. A row without other blocks has P_1 1 = 1, and gets alpha = 1 exactly.

Routing. P_c = softmax(proj_q(pool(Q)) proj_k(pool(K))^T / sqrt(D)), of which a row's largest are
critical. The matrices proj_q and proj_k start as the identity, which is SLA's routing. A hard top-k
gives them no gradient: they are trained in stage 1 (`sla.training.router`) through `soft_attend`,
and are frozen ever after, so `requires_grad` is off unless stage 1 has turned it on.

Keys are smoothed first: their mean over the tokens of a head is subtracted, and everything after
sees the smoothed keys: pooling, both branches, the rounding to FP8. O^s and the order of P_c do not
depend on a vector that all keys share; phi(K), and so O^l, does.

Where this is not the paper: the paper learns one alpha for each query block and head, which ties
parameters to the number of tokens. That is `mixing: block` here; the default is one a layer, for
any number of tokens and heads.

Shape letters as in `interface`; R query blocks that were asked for, n tokens in them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from sla_kernels import BlockMap, get_feature_map, linear_attention, sparse_attention
from sla_kernels.block_map import (
    CRITICAL,
    MARGINAL,
    accumulation_dtype,
    block_counts,
    num_blocks,
    pool_blocks,
)
from sla_kernels.low_bit import low_bit_sparse_attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sla.attention.config import SLA2Config
from sla.attention.feature_maps import FeatureMap
from sla.attention.interface import (
    AttentionContext,
    Float32Parameters,
    Grid,
    UnsupportedAttentionError,
    tokens_of,
)
from sla.attention.registry import register_attention
from sla.attention.sparse_only import BlockSparseAttention

MIXINGS = ("scalar", "head", "block")
PRECISIONS = ("16bit", "fp8")

# Numbers in the largest temporary of a chunk of `soft_attend`.
_CHUNK = 2**26


class Router(Float32Parameters):
    """The learnable part of the routing, shared by a layer's heads.

    Attributes:
        proj_q, proj_k: (D, D), applied as `torch.nn.Linear` does (x W^T); frozen when built.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.proj_q = nn.Parameter(torch.eye(head_dim), requires_grad=False)
        self.proj_k = nn.Parameter(torch.eye(head_dim), requires_grad=False)

    def forward(self, pooled_query: Tensor, pooled_key: Tensor) -> Tensor:
        """proj_q(pool(Q)) proj_k(pool(K))^T / sqrt(D): (.., T_m, D), (.., T_n, D) to (T_m, T_n)."""
        queries = F.linear(pooled_query, self.proj_q.to(pooled_query.dtype))
        keys = F.linear(pooled_key, self.proj_k.to(pooled_key.dtype))
        return queries @ keys.transpose(-1, -2) * pooled_query.shape[-1] ** -0.5


class MixingRatio(Float32Parameters):
    """alpha = sigmoid(logit).

    Args:
        mixing: `scalar`, `head` or `block`, see `SLA2Config`.
        num_heads: H.
        blocks: query blocks of a sample, for `block`.
        initial: alpha when built.
    """

    def __init__(self, mixing: str, num_heads: int, blocks: int, initial: float) -> None:
        super().__init__()
        shape = {"scalar": (1, 1), "head": (num_heads, 1), "block": (num_heads, blocks)}[mixing]
        self.logit = nn.Parameter(torch.full(shape, math.log(initial / (1.0 - initial))))

    def forward(self) -> Tensor:
        """alpha, float32, broadcastable to (H, T_m)."""
        return torch.sigmoid(self.logit)


@register_attention("sla2", SLA2Config)
class SLA2Attention(BlockSparseAttention):
    """Learned routing and O = alpha O^s + (1 - alpha) O^l; see the head of this file.

    Raises:
        ValueError: a number of the config is out of range.
    """

    config: SLA2Config

    def __init__(
        self, config: SLA2Config, num_heads: int, head_dim: int, dim: int, layer_index: int
    ) -> None:
        super().__init__(config, num_heads, head_dim, dim, layer_index)
        for name, known in (("mixing", MIXINGS), ("precision", PRECISIONS)):
            if getattr(config, name) not in known:
                raise ValueError(
                    f"attention.{name} is {getattr(config, name)!r}; it must be one of "
                    f"{', '.join(known)}"
                )
        if config.mixing == "block" and config.mixing_blocks < 1:
            raise ValueError(
                f"attention.mixing_blocks is {config.mixing_blocks}; for mixing 'block' it must be "
                "the number of query blocks of a sample, ceil(tokens / block_q)"
            )
        if not 0.0 < config.alpha_init < 1.0:
            raise ValueError(f"attention.alpha_init is {config.alpha_init}; it must be in (0, 1)")
        self.router = Router(head_dim)
        self.mixing = MixingRatio(config.mixing, num_heads, config.mixing_blocks, config.alpha_init)
        self.feature_map = FeatureMap(config.feature_map, head_dim)

    def router_parameters(self) -> list[nn.Parameter]:
        """What stage 1 trains besides the mixing ratio."""
        return list(self.router.parameters())

    def freeze_router(self) -> None:
        """End stage 1: the router gets no gradient from here on, as when built."""
        self.router.requires_grad_(False)
        for parameter in self.router_parameters():
            parameter.grad = None

    def unsupported_reason(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> str | None:
        reason = super().unsupported_reason(query, key, value, context)
        if reason is not None or self.config.mixing != "block":
            return reason
        blocks = num_blocks(query.shape[2], self.config.block_q)
        if blocks != self.config.mixing_blocks:
            return (
                f"{query.shape[2]} tokens are {blocks} query blocks of {self.config.block_q}, and "
                f"mixing 'block' has learned a ratio for each of {self.config.mixing_blocks}; "
                "mixing 'scalar' and 'head' take any number of tokens"
            )
        return None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        backend = self.config.backend
        key = self._smoothed(key)
        block_map = self._route(query, key, context)
        exact = low_bit_sparse_attention if self.config.precision == "fp8" else sparse_attention
        sparse = exact(query, key, value, block_map, backend=backend)
        linear = linear_attention(
            query, key, value, block_map, feature_map=self.feature_map.argument, backend=backend
        )
        ratio = self._ratio((block_map.labels == MARGINAL).any(dim=-1))
        ratio = ratio.repeat_interleave(self.config.block_q, dim=2)[:, :, : query.shape[2], None]
        return (ratio * sparse + (1.0 - ratio) * linear).to(sparse.dtype)

    def block_map(self, query: Tensor, key: Tensor, context: AttentionContext) -> BlockMap:
        return self._route(query, self._smoothed(key), context)

    def soft_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        *,
        critical: float | None = None,
        tau: float = 0.1,
        straight_through: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The output with SoftTop-k in place of top-k: differentiable in the router. For stage 1.

        Row i of blocks has the mask m_i = sigmoid(P_c[i] / tau + lambda_i), see `soft_top_k`; a
        query q of it, with m_j the mask of the block that holds key j and s_j = q k_j / sqrt(D):

            O^s = sum_j m_j exp(s_j) v_j / sum_j m_j exp(s_j)
            O^l = sum_j (1 - m_j) phi(q) phi(k_j) v_j / sum_j (1 - m_j) phi(q) phi(k_j)

        (how a soft mask enters the branches is our choice: the one that is `forward` where every
        m_j is 0 or 1). Never rounded to FP8. Dense over the keys, in chunks of rows that the
        backward computes once more: memory grows with rows x keys of a chunk.

        Args:
            query, key, value: as `forward`.
            context: as `forward`.
            critical: fraction of the blocks that a row's mask sums to; the config's if None.
            tau: temperature. The paper's 0.1 applies to probabilities of about 1 / T_n each, so
                that with many blocks the masks of a row hardly differ; and equal masks cancel in
                O^s, which then is exact attention, whatever the router does.
            straight_through: compute with the hard choice of `forward`, and use the soft mask for
                the gradient alone: not the paper's, but free of that flaw.
            rows: int64 (R,), the query blocks to compute; None for all.

        Returns:
            (B, H, n, D) float32 (float64 for float64), the tokens `row_tokens(rows, N)`.

        Raises:
            UnsupportedAttentionError: as `forward`.
        """
        self._check_supported(query, key, value, context)
        tokens = query.shape[2]
        if rows is None:
            rows = torch.arange(num_blocks(tokens, self.config.block_q), device=query.device)
        accurate = accumulation_dtype(query)
        with torch.autocast(query.device.type, enabled=False):
            key = self._smoothed(key)
            mask = self._soft_mask(query, key, context, critical, tau, straight_through, rows)
            ratio = self._ratio((mask < 1.0).any(dim=-1), rows)
            query, key, value = (tensor.to(accurate) for tensor in (query, key, value))
            size = query.shape[0] * self.num_heads * self.config.block_q * tokens
            step = max(1, _CHUNK // size)
            outputs = []
            for first in range(0, len(rows), step):
                part = slice(first, first + step)
                inputs = (query, key, value, rows[part], mask[:, :, part], ratio[:, :, part])
                if step < len(rows) and torch.is_grad_enabled():
                    outputs.append(checkpoint(self._soft_rows, *inputs, use_reentrant=False))
                else:
                    outputs.append(self._soft_rows(*inputs))
        return torch.cat(outputs, dim=2)

    def row_tokens(self, rows: Tensor, tokens: int) -> Tensor:
        """int64 (n,): the tokens of query blocks `rows` of `tokens` tokens, block after block."""
        return self._tokens_of(rows, tokens)[0]

    def flops(self, grid: Grid, density: float | None = None) -> float:
        """As SLA's without Proj, plus 2 D^2 for the router's projection of each pooled block."""
        t_m, t_n, _ = self.blocks(grid)
        linear = (4.0 * tokens_of(grid) + 2.0 * t_m * t_n) * self.feature_map.width * self.head_dim
        projected = 2.0 * (t_m + t_n) * self.head_dim**2
        return super().flops(grid, density) + self.num_heads * (linear + projected)

    def _tokens_of(self, rows: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """int64 (n,) both: the tokens of query blocks `rows`, and the place in `rows` of each."""
        block = self.config.block_q
        found = (rows[:, None] * block + torch.arange(block, device=rows.device)).flatten()
        place = torch.arange(len(rows), device=rows.device).repeat_interleave(block)
        real = found < tokens  # the sample's last block may be short
        return found[real], place[real]

    def _check_supported(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> None:
        reason = self.unsupported_reason(query, key, value, context)
        if reason is not None:
            raise UnsupportedAttentionError(
                f"soft attention of layer {self.layer_index} does not support these inputs: "
                f"{reason}"
            )

    def _smoothed(self, key: Tensor) -> Tensor:
        if not self.config.smooth_key:
            return key
        # The mean in the keys' own dtype: rounded or not, it is the same for all of them.
        return key - key.mean(dim=2, keepdim=True)

    def _scores(self, query: Tensor, key: Tensor, rows: Tensor | None = None) -> Tensor:
        """What P_c is the softmax of, (B, H, T_m or R, T_n), from smoothed keys."""
        pooled = pool_blocks(query, self.config.block_q)
        if rows is not None:
            pooled = pooled[:, :, rows]
        scores: Tensor = self.router(pooled, pool_blocks(key, self.config.block_kv))
        return scores

    def _forced(self, context: AttentionContext, tokens: int) -> tuple[int, int]:
        """Leading query and key blocks that hold tokens which are always critical."""
        leading = min(context.always_critical, tokens)
        return num_blocks(leading, self.config.block_q), num_blocks(leading, self.config.block_kv)

    @torch.no_grad()
    def _route(self, query: Tensor, key: Tensor, context: AttentionContext) -> BlockMap:
        """The blocks for smoothed keys; ties and counts as `sla_kernels.classify_blocks`."""
        with torch.autocast(query.device.type, enabled=False):
            scores = self._scores(query, key)  # softmax does not change their order
        tokens = query.shape[2]
        forced_queries, forced_keys = self._forced(context, tokens)
        chosen, _ = block_counts(self.config.critical, 0.0, scores.shape[-1], forced_keys)
        labels = _largest(scores, chosen, forced_keys)
        labels[..., :forced_queries, :] = CRITICAL
        return BlockMap(labels, self.config.block_q, self.config.block_kv, tokens, tokens)

    def _ratio(self, has_marginal: Tensor, rows: Tensor | None = None) -> Tensor:
        """alpha of each row of blocks, (B, H, T_m or R); 1 where no block is left for O^l."""
        alpha = self.mixing()
        if rows is not None and alpha.shape[1] > 1:
            alpha = alpha[:, rows]
        return torch.where(has_marginal, alpha, 1.0)

    def _soft_mask(
        self,
        query: Tensor,
        key: Tensor,
        context: AttentionContext,
        critical: float | None,
        tau: float,
        straight_through: bool,
        rows: Tensor,
    ) -> Tensor:
        """m, (B, H, R, T_n); 1 for the blocks that are critical in any case."""
        scores = self._scores(query, key, rows)
        probabilities = scores.softmax(dim=-1)
        forced_queries, forced_keys = self._forced(context, query.shape[2])
        fraction = self.config.critical if critical is None else critical
        chosen, _ = block_counts(fraction, 0.0, probabilities.shape[-1], forced_keys)
        mask = torch.ones_like(probabilities)
        if chosen > forced_keys:
            free = soft_top_k(probabilities[..., forced_keys:] / tau, chosen - forced_keys)
            mask = torch.cat([mask[..., :forced_keys], free], dim=-1)
        if straight_through:
            hard = _largest(scores, chosen, forced_keys).to(mask.dtype)
            # The difference first: it is exactly zero.
            mask = hard + (mask - mask.detach())
        return torch.where((rows < forced_queries)[:, None], 1.0, mask)

    def _soft_rows(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, mask: Tensor, ratio: Tensor
    ) -> Tensor:
        """`soft_attend` of a few rows, all in the accumulation dtype."""
        tokens = query.shape[2]
        of_rows, place = self._tokens_of(rows, tokens)
        query = query[:, :, of_rows]
        included = mask[:, :, place].repeat_interleave(self.config.block_kv, dim=-1)[..., :tokens]
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        # Divided by the largest weight, so that nothing overflows or vanishes; masks may be zero.
        largest = (scores + included.clamp_min(1e-30).log()).detach().amax(dim=-1, keepdim=True)
        sparse = _average(included * (scores - largest).exp(), value)
        phi = get_feature_map(self.feature_map.argument)
        linear = _average((1.0 - included) * (phi(query) @ phi(key).transpose(-1, -2)), value)
        alpha = ratio[:, :, place, None]
        return alpha * sparse + (1.0 - alpha) * linear


@torch.no_grad()
def _largest(scores: Tensor, chosen: int, forced: int) -> Tensor:
    """int8, critical for the `forced` first blocks of a row and the largest others, `chosen` in
    all, the lower index first among equals; marginal for the rest."""
    ranked = scores.clone()
    ranked[..., :forced] = math.inf
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    labels = torch.full(scores.shape, MARGINAL, dtype=torch.int8, device=scores.device)
    return labels.scatter_(-1, order[..., :chosen], CRITICAL)


def _average(weights: Tensor, value: Tensor) -> Tensor:
    """Mean of the values by weight, (.., n, N) and (.., N, D) to (.., n, D); 0 for no weight."""
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    return (weights @ value / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def soft_top_k(scores: Tensor, count: int) -> Tensor:
    """SoftTop-k: sigmoid(scores + lambda), lambda for each row such that the row sums to `count`.

    Differentiable: with s'_j = m_j (1 - m_j), the sum's being constant gives d lambda / d x_l =
    -s'_l / sum s', so a gradient g of m becomes s'_j (g_j - sum(s' g) / sum s').

    Args:
        scores: (..., T) floating: P_c / tau.
        count: k, from 1 to T.

    Returns:
        m in [0, 1], shape and dtype of `scores`.

    Raises:
        ValueError: a count out of range.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count is {count}; it must be from 1 to {scores.shape[-1]}, the row")
    mask: Tensor = _SoftTopK.apply(scores, count)
    return mask


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: int) -> Tensor:
        if count == scores.shape[-1]:
            mask = torch.ones_like(scores)
        else:
            # With all scores equal to the row's largest (smallest) this lambda would do, so the
            # one wanted lies between the two; each halving adds a bit.
            level = math.log(count / (scores.shape[-1] - count))
            low = level - scores.amax(dim=-1, keepdim=True)
            high = level - scores.amin(dim=-1, keepdim=True)
            for _ in range(60 if scores.dtype == torch.float64 else 30):
                middle = (low + high) / 2
                enough = torch.sigmoid(scores + middle).sum(dim=-1, keepdim=True) >= count
                low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
            mask = torch.sigmoid(scores + (low + high) / 2)
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        slope = mask * (1.0 - mask)
        tiny = torch.finfo(mask.dtype).tiny
        total = slope.sum(dim=-1, keepdim=True).clamp_min(tiny)
        mean = (slope * grads[0]).sum(dim=-1, keepdim=True) / total
        return slope * (grads[0] - mean), None
