"""SLA in plain PyTorch operations, on any device, at a cost proportional to the critical blocks.

Both branches work through slices of heads, and the sparse branch through chunks of query blocks
inside a slice, so that the temporary memory has a bound that does not grow with the batch.
Sums and softmax are float32 (float64 for float64 inputs), whatever the dtype of the inputs.

Shape letters: B batch, H heads, N query tokens, M key tokens, D head_dim, F features,
T_m, T_n blocks of queries and keys, b_q, b_kv tokens in them, R query blocks of a chunk,
C critical blocks of each of them, S heads of a slice (flattened over the batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sla_kernels.block_map import BlockMap, accumulation_dtype
from sla_kernels.feature_maps import FeatureMap, get_feature_map

# Elements of the temporary tensors of a chunk of query blocks and of a slice of heads. On a CPU
# a chunk should stay in the last-level cache; a GPU needs enough work per launch.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 26}
_SLICE_ELEMENTS = {"cpu": 1 << 22, "other": 1 << 26}

# Query blocks whose counts differ by at most this factor share a chunk, padded to the largest.
_COUNT_RATIO = 1.25


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
) -> Tensor:
    """O^s: exact attention over the critical blocks of each row; see `reference`.

    Returns:
        (B, H, N, D), dtype of `query`.
    """
    return _SparseAttention.apply(query, key, value, block_map, scale)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None,
    feature_map: str | FeatureMap,
) -> Tensor:
    """O^l: linear attention over the marginal blocks, or over all keys; see `reference`.

    Returns:
        (B, H, N, D), float32 (float64 for float64 inputs).
    """
    phi = get_feature_map(feature_map)
    dtype = accumulation_dtype(query.dtype)
    features_q, features_k = phi(query.to(dtype)).to(dtype), phi(key.to(dtype)).to(dtype)
    if block_map is None:
        # All keys for all queries: a map of one block that is marginal.
        batch, heads, tokens_q, _ = query.shape
        labels = torch.zeros(batch, heads, 1, 1, dtype=torch.int8, device=query.device)
        block_map = BlockMap(labels, tokens_q, key.shape[2], tokens_q, key.shape[2])
    return _LinearAttention.apply(features_q, features_k, value, block_map)


class _SparseAttention(torch.autograd.Function):
    """Sparse branch; keeps the inputs, the output and the row log-sum-exp for the backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
    ) -> Tensor:
        with _without_autocast(query.device):
            output, log_sum_exp = _sparse_forward(query, key, value, block_map, scale)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.block_map = block_map
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad.device):
            grads = _sparse_backward(
                grad, *ctx.saved_tensors, ctx.block_map, ctx.scale, ctx.needs_input_grad[:3]
            )
        return *grads, None, None


def _sparse_forward(
    query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens_q, head_dim = query.shape
    block_q, block_kv = block_map.block_q, block_map.block_kv
    dtype = accumulation_dtype(query.dtype)
    output = query.new_empty(query.shape)
    log_sum_exp = query.new_full(
        (batch * heads * block_map.blocks_q, block_q, 1), float("inf"), dtype=dtype
    )
    groups = _count_groups(block_map)
    work = _Workspace(query.device, dtype)
    for part in _slices(query.device, batch, heads, 4 * (tokens_q + key.shape[2]) * head_dim):
        q, k, v = (
            _blocks(tensor[part.index], block, dtype)
            for tensor, block in ((query, block_q), (key, block_kv), (value, block_kv))
        )
        o = torch.zeros_like(q)
        lse = log_sum_exp[part.query_blocks(block_map)]
        for chunk in _chunks(block_map, groups, part, head_dim):
            wide = chunk.width * block_kv
            q_chunk = work.gather("q", q, chunk.rows).mul_(scale)
            k_chunk = work.gather("k", k, chunk.blocks).view(-1, wide, head_dim)
            weights = work.take("weights", len(q_chunk), block_q, wide)
            torch.bmm(q_chunk, k_chunk.mT, out=weights)
            if chunk.missing is not None:
                weights.masked_fill_(chunk.missing, float("-inf"))
            highest = weights.amax(dim=-1, keepdim=True)
            sums = weights.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            # The K of this chunk is done with: V takes its place.
            v_chunk = work.gather("k", v, chunk.blocks).view(-1, wide, head_dim)
            o_chunk = torch.bmm(weights, v_chunk, out=work.take("o", *q_chunk.shape))
            o.index_copy_(0, chunk.rows, o_chunk.div_(sums))
            lse.index_copy_(0, chunk.rows, highest.add_(sums.log_()))
        _store(o, output[part.index])
    return output, log_sum_exp


def _sparse_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    block_map: BlockMap,
    scale: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward of FlashAttention over the critical blocks (the paper's Algorithm 2)."""
    batch, heads, tokens_q, head_dim = query.shape
    block_q, block_kv = block_map.block_q, block_map.block_kv
    dtype = accumulation_dtype(query.dtype)
    need_q, need_k, need_v = needed
    grad_query = torch.empty_like(query) if need_q else None
    grad_key = torch.empty_like(key) if need_k else None
    grad_value = torch.empty_like(value) if need_v else None
    groups = _count_groups(block_map)
    work = _Workspace(query.device, dtype)
    for part in _slices(query.device, batch, heads, 5 * (tokens_q + key.shape[2]) * head_dim):
        q, k, v, do, o = (
            _blocks(tensor[part.index], block, dtype)
            for tensor, block in (
                (query, block_q),
                (key, block_kv),
                (value, block_kv),
                (grad, block_q),
                (output, block_q),
            )
        )
        lse = log_sum_exp[part.query_blocks(block_map)]
        delta = torch.linalg.vecdot(do, o).unsqueeze(-1)  # D^s = rowsum(dO * O^s)
        dq = torch.zeros_like(q) if need_q else None
        dk = torch.zeros_like(k) if need_k else None
        dv = torch.zeros_like(v) if need_v else None
        for chunk in _chunks(block_map, groups, part, head_dim):
            wide = chunk.width * block_kv
            gathered = (-1, wide, head_dim)
            q_chunk = work.gather("q", q, chunk.rows).mul_(scale)
            do_chunk = work.gather("do", do, chunk.rows)
            k_chunk = work.gather("k", k, chunk.blocks).view(gathered)
            weights = work.take("weights", len(q_chunk), block_q, wide)
            torch.bmm(q_chunk, k_chunk.mT, out=weights)
            if chunk.missing is not None:
                weights.masked_fill_(chunk.missing, float("-inf"))
            weights.sub_(lse.index_select(0, chunk.rows)).exp_()
            if dv is not None:
                part_dv = work.take("dkv", len(q_chunk), wide, head_dim)
                torch.bmm(weights.mT, do_chunk, out=part_dv)
                dv.index_add_(0, chunk.blocks, part_dv.view(-1, block_kv, head_dim))
            if dq is None and dk is None:
                continue
            v_chunk = work.gather("v", v, chunk.blocks).view(gathered)
            dscores = work.take("dscores", len(q_chunk), block_q, wide)
            torch.bmm(do_chunk, v_chunk.mT, out=dscores)
            dscores.sub_(delta.index_select(0, chunk.rows)).mul_(weights)
            if dq is not None:
                part_dq = torch.bmm(dscores, k_chunk, out=work.take("o", *q_chunk.shape))
                dq.index_copy_(0, chunk.rows, part_dq.mul_(scale))
            if dk is not None:  # q_chunk carries the scale already
                part_dk = work.take("dkv", len(q_chunk), wide, head_dim)
                torch.bmm(dscores.mT, q_chunk, out=part_dk)
                dk.index_add_(0, chunk.blocks, part_dk.view(-1, block_kv, head_dim))
        for blocks, result in ((dq, grad_query), (dk, grad_key), (dv, grad_value)):
            if blocks is not None and result is not None:
                _store(blocks, result[part.index])
    return grad_query, grad_key, grad_value


class _LinearAttention(torch.autograd.Function):
    """Linear branch from features; H and h are recomputed in the backward, not kept.

    H_i = sum over the marginal j of h_j is one matrix product with the 0/1 mask of the map, and
    the backward's dh_j = sum over i of dH_i is one with its transpose.
    """

    @staticmethod
    def forward(
        ctx: Any, features_q: Tensor, features_k: Tensor, value: Tensor, block_map: BlockMap
    ) -> Tensor:
        with _without_autocast(value.device):
            output, inverse = _linear_forward(features_q, features_k, value, block_map)
        ctx.save_for_backward(features_q, features_k, value, output, inverse)
        ctx.block_map = block_map
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad.device):
            grads = _linear_backward(
                grad, *ctx.saved_tensors, ctx.block_map, ctx.needs_input_grad[:3]
            )
        return *grads, None


def _linear_forward(
    features_q: Tensor, features_k: Tensor, value: Tensor, block_map: BlockMap
) -> tuple[Tensor, Tensor]:
    """O^l and 1 / (phi(Q_i) Z_i), the latter 0 where phi(Q_i) Z_i is 0."""
    dtype = features_q.dtype
    batch, heads, tokens_q, features = features_q.shape
    head_dim = value.shape[-1]
    block_q, block_kv = block_map.block_q, block_map.block_kv
    output = features_q.new_empty(batch, heads, tokens_q, head_dim)
    inverse = features_q.new_empty(batch, heads, tokens_q, 1)
    for part in _slices(value.device, batch, heads, _linear_elements(block_map, features, head_dim)):
        phi_q = _blocks(features_q[part.index], block_q, dtype)
        phi_k = _blocks(features_k[part.index], block_kv, dtype)
        v = _blocks(value[part.index], block_kv, dtype)
        marginal = _marginal(block_map, part, dtype)
        sums_v, sums = _marginal_sums(phi_k, v, marginal)
        scale = torch.bmm(phi_q, sums)
        scale = torch.where(scale == 0, 0.0, scale.reciprocal())
        _store(torch.bmm(phi_q, sums_v).mul_(scale), output[part.index])
        _store(scale, inverse[part.index])
    return output, inverse


def _linear_backward(
    grad: Tensor,
    features_q: Tensor,
    features_k: Tensor,
    value: Tensor,
    output: Tensor,
    inverse: Tensor,
    block_map: BlockMap,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype = features_q.dtype
    batch, heads, _, features = features_q.shape
    head_dim = value.shape[-1]
    block_q, block_kv = block_map.block_q, block_map.block_kv
    need_q, need_k, need_v = needed
    grad_q = torch.empty_like(features_q) if need_q else None
    grad_k = torch.empty_like(features_k) if need_k else None
    grad_v = torch.empty_like(value) if need_v else None
    elements = 2 * _linear_elements(block_map, features, head_dim)
    for part in _slices(value.device, batch, heads, elements):
        phi_q = _blocks(features_q[part.index], block_q, dtype)
        phi_k = _blocks(features_k[part.index], block_kv, dtype)
        v = _blocks(value[part.index], block_kv, dtype)
        marginal = _marginal(block_map, part, dtype)
        # dO^l / (phi(Q) Z) and D^l / (phi(Q) Z), the scaled quantities of Algorithm 2.
        scaled = grad[part.index].to(dtype) * inverse[part.index]
        delta = torch.linalg.vecdot(scaled, output[part.index]).unsqueeze(-1)
        scaled, delta = _blocks(scaled, block_q, dtype), _blocks(delta, block_q, dtype)
        if grad_q is not None:
            sums_v, sums = _marginal_sums(phi_k, v, marginal)
            dphi_q = torch.bmm(scaled, sums_v.mT)
            _store(dphi_q.baddbmm_(delta, sums.mT, alpha=-1), grad_q[part.index])
            del dphi_q, sums_v, sums
        if grad_k is None and grad_v is None:
            continue
        d_h = _by_mask(marginal.mT, torch.bmm(phi_q.mT, scaled))
        if grad_k is not None:
            d_z = _by_mask(marginal.mT, torch.bmm(phi_q.mT, delta))
            _store(torch.bmm(v, d_h.mT).sub_(d_z.mT), grad_k[part.index])
        if grad_v is not None:
            _store(torch.bmm(phi_k, d_h), grad_v[part.index])
    return grad_q, grad_k, grad_v


def _marginal_sums(phi_k: Tensor, v: Tensor, marginal: Tensor) -> tuple[Tensor, Tensor]:
    """H_i and Z_i of each query block: (S T_m, F, D) and (S T_m, F, 1)."""
    h = torch.bmm(phi_k.mT, v)
    z = phi_k.sum(dim=1).unsqueeze(-1)
    return _by_mask(marginal, h), _by_mask(marginal, z)


def _by_mask(mask: Tensor, blocks: Tensor) -> Tensor:
    """For each row of the mask the sum of its blocks: (S, I, J) and (S J, ...) give (S I, ...)."""
    parts, rows, columns = mask.shape
    summed = torch.bmm(mask, blocks.reshape(parts, columns, -1))
    return summed.view(parts * rows, *blocks.shape[1:])


def _marginal(block_map: BlockMap, part: _Slice, dtype: torch.dtype) -> Tensor:
    """0/1 mask of the marginal blocks of a slice of heads: (S, T_m, T_n)."""
    return (block_map.labels[part.index] == 0).to(dtype).flatten(0, 1)


def _linear_elements(block_map: BlockMap, features: int, head_dim: int) -> int:
    """Elements of a head's temporaries: h and H, and the blocks of phi(Q), phi(K), V, O."""
    sums = (block_map.blocks_q + block_map.blocks_kv) * features * head_dim
    return sums + (block_map.tokens_q + block_map.tokens_kv) * (features + head_dim)


@dataclass(frozen=True)
class _Slice:
    """Heads that are worked on together: some heads of one sample, or all of several samples.

    Such heads are consecutive when batch and heads are flattened, and indexing a (B, H, ...)
    tensor with `index` gives a view of them whatever its strides.
    """

    index: tuple[slice, slice]
    first: int
    heads: int

    def query_blocks(self, block_map: BlockMap) -> slice:
        """Their query blocks among those of all heads."""
        return slice(
            self.first * block_map.blocks_q, (self.first + self.heads) * block_map.blocks_q
        )


def _slices(device: torch.device, batch: int, heads: int, elements: int) -> Iterator[_Slice]:
    """Cut (batch, heads) into slices whose temporaries stay near the bound of the device.

    Args:
        elements: elements of the temporary tensors that one head needs.
    """
    limit = _SLICE_ELEMENTS.get(device.type, _SLICE_ELEMENTS["other"])
    at_once = max(1, limit // max(1, elements))
    if at_once >= heads:
        step = at_once // heads
        for start in range(0, batch, step):
            stop = min(batch, start + step)
            index = (slice(start, stop), slice(None))
            yield _Slice(index, start * heads, (stop - start) * heads)
        return
    for sample in range(batch):
        for start in range(0, heads, at_once):
            stop = min(heads, start + at_once)
            index = (slice(sample, sample + 1), slice(start, stop))
            yield _Slice(index, sample * heads + start, stop - start)


@dataclass(frozen=True)
class _Chunk:
    """Query blocks of a slice that are worked on together, padded to the same count.

    Attributes:
        rows: the query blocks, numbered within the slice: (R,).
        blocks: their critical key blocks, numbered within the slice: (R * C,).
        width: C.
        missing: keys that do not exist, where a row has fewer than C blocks or a block is short:
            bool, (R, 1, C * b_kv); None where there are none.
    """

    rows: Tensor
    blocks: Tensor
    width: int
    missing: Tensor | None


def _chunks(
    block_map: BlockMap, groups: list[tuple[int, int]], part: _Slice, head_dim: int
) -> Iterator[_Chunk]:
    """Chunks of the query blocks of a slice; those without critical blocks are left out."""
    offsets, indices = block_map.critical_rows
    device = indices.device
    blocks_q, blocks_kv, block_kv = block_map.blocks_q, block_map.blocks_kv, block_map.block_kv
    limit = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["other"])
    here = part.query_blocks(block_map)
    starts = offsets[here]
    counts = offsets[here.start + 1 : here.stop + 1] - starts
    short = block_map.tokens_kv % block_kv  # tokens of a short last block, or 0
    for lowest, width in groups:
        rows = ((counts >= lowest) & (counts <= width)).nonzero().squeeze(1)
        per_row = width * block_kv * (block_map.block_q + 2 * head_dim)
        slot = torch.arange(width, device=device)
        for chosen in rows.split(max(1, limit // per_row)):
            position = starts[chosen, None] + slot
            absent = None
            if lowest < width:
                absent = slot >= counts[chosen, None]
                # Any existing block does: its keys are masked.
                position = torch.where(absent, starts[chosen, None], position)
            column = indices[position]
            missing = None
            if short or absent is not None:
                valid = torch.full_like(column, block_kv)
                if short:
                    valid.masked_fill_(column == blocks_kv - 1, short)
                if absent is not None:
                    valid.masked_fill_(absent, 0)
                token = torch.arange(block_kv, device=device)
                missing = (token >= valid.unsqueeze(-1)).view(len(chosen), 1, -1)
            head = torch.div(chosen, blocks_q, rounding_mode="floor")
            column += head.unsqueeze(1) * blocks_kv
            yield _Chunk(chosen, column.flatten(), width, missing)


def _count_groups(block_map: BlockMap) -> list[tuple[int, int]]:
    """Ranges of counts that share chunks, so that one full row does not widen all others."""
    groups: list[tuple[int, int]] = []
    distinct = [count for count in block_map.critical_rows.counts.unique().tolist() if count]
    ratio = 1.0 if len(distinct) <= 4 else _COUNT_RATIO
    for count in distinct:
        if groups and count <= groups[-1][0] * ratio:
            groups[-1] = (groups[-1][0], count)
        else:
            groups.append((count, count))
    return groups


class _Workspace:
    """Buffers that chunks reuse: fresh memory costs a CPU more than the arithmetic on it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised tensor in the named buffer; ends the life of the last one of the name."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self._dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def gather(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """source[index] in the named buffer."""
        target = self.take(name, len(index), *source.shape[1:])
        return torch.index_select(source, 0, index, out=target)


def _blocks(tensor: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """(s, h, N, D) as blocks (s h T, block, D), the last one filled up with zeros.

    A view where dtype, strides and N allow it.
    """
    heads, (tokens, width) = tensor.shape[:2].numel(), tensor.shape[2:]
    lacking = -tokens % block
    if lacking:
        padded = tensor.new_zeros(*tensor.shape[:2], tokens + lacking, width, dtype=dtype)
        padded[:, :, :tokens] = tensor
        tensor = padded
    return tensor.to(dtype).reshape(heads * ((tokens + lacking) // block), block, width)


def _store(blocks: Tensor, target: Tensor) -> None:
    """Inverse of `_blocks`: write to (s, h, N, D), leaving out what fills up the last block."""
    batch, heads, tokens, width = target.shape
    target.copy_(blocks.view(batch, heads, -1, width)[:, :, :tokens])


def _without_autocast(device: torch.device) -> torch.autocast:
    """The dtypes here are chosen; autocast must not change those of the matrix products."""
    return torch.autocast(device_type=device.type, enabled=False)


def project(output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Proj(O^l) in the dtype of `output`; no weight is the identity."""
    if weight is not None:
        return F.linear(output, weight.to(output.dtype), None if bias is None else bias.to(output.dtype))
    return output if bias is None else output + bias.to(output.dtype)


__all__ = ["linear_attention", "project", "sparse_attention"]

