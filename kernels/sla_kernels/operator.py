"""The public functions: argument checks, and the choice of a backend.

A backend is a pair of functions for the two branches and a statement of what it supports, with a
routing or a fusion of the whole where it has one; a new one (`register_backend`) needs no change
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_kernels import eager, reference
from sla_kernels.block_map import BlockMap, all_marginal, route
from sla_kernels.feature_maps import FeatureMap, get_feature_map
from sla_kernels.pooled import merge_pooled

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SparseBranch = Callable[
    [Tensor, Tensor, Tensor, BlockMap, float, bool], tuple[Tensor, Tensor | None]
]
LinearBranch = Callable[[Tensor, Tensor, Tensor, BlockMap | None, FeatureMap], Tensor]
LowBitBranch = Callable[[Tensor, Tensor, Tensor, BlockMap, float], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Backend:
    """An implementation of the two branches, and of more where it has it.

    Attributes:
        sparse_branch: (query, key, value, block_map, scale, want_lse) -> O^s, and the natural
            log-sum-exp of each row's scaled critical scores, (B, H, N_q), float32 or wider, -inf
            for a row without (may be None if not wanted); both differentiable.
        linear_branch: (query, key, value, block_map or None, feature_map) -> O^l, possibly in a
            wider dtype than the inputs.
        unsupported_reason: (query, block_q, block_kv) -> why it cannot work on such tensors in
            blocks of that many tokens, or None.
        priority: `auto` takes the supported backend of the highest priority; below zero, never.
        auto_devices: types of the devices on which `auto` takes it; None for all.
        fused: (query, key, value, proj_weight, proj_bias, feature_map, scale, *, block_map or
            routing) -> output: the whole operator, with a given routing or with the arguments of
            `block_map.route` (without scale); None if it does not fuse this one. Without it the
            branches are added.
        route: as `block_map.route`, with the same blocks; None: that one.
        merge_pooled: as `pooled.merge_pooled`; None: that one.
        low_bit_branch: (query, key, value, block_map, scale) -> (O^s, log-sum-exp) computed in FP8
            by the numerics of `low_bit`, without gradients; None where it cannot on these tensors.
            Without it they are simulated.

    All of them honour `block_map.key_lengths`, and `sparse_branch` `block_lengths`: padding keys
    and values add nothing to the output and get zero gradients.
    """

    sparse_branch: SparseBranch
    linear_branch: LinearBranch
    unsupported_reason: Callable[[Tensor, int, int], str | None]
    priority: int
    auto_devices: tuple[str, ...] | None = None
    fused: Callable[..., Tensor | None] | None = None
    route: Callable[..., BlockMap] | None = None
    low_bit_branch: LowBitBranch | None = None
    merge_pooled: Callable[..., Tensor] | None = None


class Branches(NamedTuple):
    """The two branches of the operator before they are added.

    Attributes:
        sparse: O^s, (B, H, N, D).
        linear: O^l before Proj, (B, H, N, D).
    """

    sparse: Tensor
    linear: Tensor


_BACKENDS: dict[str, Backend] = {}

# Of the linear branch over all keys, where the caller names no blocks and the result has none.
_BLOCK = 64

_BOTH = (
    "key_lengths is given beside block_map, whose own key_lengths count; give key_lengths to "
    "whatever makes the block_map, or leave out block_map"
)


def register_backend(name: str, backend: Backend) -> None:
    """Add a backend under a name.

    Raises:
        ValueError: the name is taken or reserved.
    """
    if name == "auto" or name in _BACKENDS:
        raise ValueError(f"backend name {name!r} is taken")
    _BACKENDS[name] = backend


def available_backends() -> list[str]:
    """Names that `backend` arguments take beside `auto`, sorted."""
    return sorted(_BACKENDS)


def _anything(query: Tensor, block_q: int, block_kv: int) -> str | None:
    return None


register_backend("eager", Backend(eager.sparse_branch, eager.linear_branch, _anything, 0))
register_backend(
    "reference", Backend(reference.sparse_branch, reference.linear_branch, _anything, -1)
)
# On other systems than Linux there is no Triton.
if find_spec("triton") is not None:
    from sla_kernels.triton import backend as _triton

    register_backend(
        "triton",
        Backend(
            _triton.sparse_branch,
            _triton.linear_branch,
            _triton.unsupported_reason,
            priority=1,
            auto_devices=("cuda",),
            fused=_triton.fused,
            route=_triton.route,
            low_bit_branch=_triton.low_bit_branch,
            merge_pooled=_triton.merge_pooled,
        ),
    )


def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_q: int = 64,
    block_kv: int = 64,
    feature_map: str | FeatureMap = "softmax",
    scale: float | None = None,
    always_critical: int = 0,
    backend: str = "auto",
    block_map: BlockMap | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Sparse-Linear Attention: O = O^s + Proj(O^l) (arXiv 2509.24006, equation 6).

    Each row of blocks is routed by pooled scores: its critical blocks get exact softmax attention
    (O^s), its marginal ones linear attention (O^l), its negligible ones nothing. Differentiable in
    every tensor; the routing itself has no gradient.

    Args:
        query: (B, H, N_q, D), float16, bfloat16, float32 or float64, any strides.
        key, value: (B, H, N_kv, D), dtype and device of `query`.
        proj_weight: (D, D) as `torch.nn.Linear` has it (x W^T + b); None for the identity.
        proj_bias: (D,), only with `proj_weight`. It is added to every row, also where the marginal
            set is empty and O^l is zero.
        critical: fraction k_h of a row's key blocks: max(1, floor(critical * T_n)) blocks.
        negligible: fraction k_l: floor(negligible * T_n) blocks, never more than are left.
        block_q, block_kv: tokens in a block of queries, of keys.
        feature_map: phi: a name of `available_feature_maps()`, or a callable (..., D) -> (..., F)
            with non-negative values.
        scale: factor on the scores; 1 / sqrt(D) if None.
        always_critical: the first n tokens are attended exactly by all and attend exactly to all:
            their key blocks are critical in every row, in addition to the count above, and their
            query blocks hold every key block as critical.
        backend: `auto`, or a name of `available_backends()`.
        block_map: a routing to use instead of `critical`, `negligible`, `block_q`, `block_kv` and
            `always_critical`, which are then ignored. Its own `key_lengths` count.
        key_lengths: (B,) int32 or int64, device of `query`: the first keys of each sample that
            count, 0 to N_kv; the rest is padding and may hold anything. A sample is routed and
            computed as it would be alone with its valid keys; without any, only the bias is left.
            Queries are computed whatever the lengths. The range is checked on the CPU only: on
            another device that would wait for it. None: all N_kv. Not with `block_map`.

    Returns:
        (B, H, N_q, D), dtype of `query`.

    Raises:
        ValueError, TypeError: an argument that cannot be used; names it, its value, and what is
            allowed.
    """
    query, key, value = _inputs(query, key, value)
    _check_projection(query, proj_weight, proj_bias)
    phi = get_feature_map(feature_map)
    factor = _scale(query, scale)
    routing: dict[str, Any] | None = None
    if block_map is None:
        _check_routing(critical, negligible, block_q, block_kv, always_critical)
        routing = {
            "critical": critical,
            "negligible": negligible,
            "block_q": block_q,
            "block_kv": block_kv,
            "always_critical": always_critical,
            "key_lengths": _key_lengths(query, key, key_lengths),
        }
    elif key_lengths is not None:
        raise ValueError(_BOTH)
    else:
        _check_block_map(query, key, block_map)
        block_q, block_kv = block_map.block_q, block_map.block_kv
    chosen = _backend(backend, query, block_q, block_kv)
    with torch.autocast(query.device.type, enabled=False):
        if chosen.fused is not None:
            tensors = (query, key, value, proj_weight, proj_bias)
            output = chosen.fused(*tensors, phi, factor, block_map=block_map, routing=routing)
            if output is not None:
                return output
        if block_map is None:
            assert routing is not None
            block_map = (chosen.route or route)(query, key, scale=factor, **routing)
        sparse, _ = chosen.sparse_branch(query, key, value, block_map, factor, False)
        linear = chosen.linear_branch(query, key, value, block_map, phi)
        if proj_weight is not None:
            bias = None if proj_bias is None else proj_bias.to(linear.dtype)
            linear = F.linear(linear, proj_weight.to(linear.dtype), bias)
        return (sparse + linear).to(query.dtype)


def attention_branches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    feature_map: str | FeatureMap = "softmax",
    scale: float | None = None,
    backend: str = "auto",
) -> Branches:
    """O^s and O^l of a given routing, for analysis; arguments as `sparse_linear_attention`.

    O^l may come in a wider dtype than `query`.
    """
    query, key, value = _inputs(query, key, value)
    _check_block_map(query, key, block_map)
    phi = get_feature_map(feature_map)
    chosen = _backend(backend, query, block_map.block_q, block_map.block_kv)
    with torch.autocast(query.device.type, enabled=False):
        factor = _scale(query, scale)
        sparse, _ = chosen.sparse_branch(query, key, value, block_map, factor, False)
        return Branches(sparse, chosen.linear_branch(query, key, value, block_map, phi))


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The sparse branch alone: exact attention over the critical blocks (equation 4).

    Args:
        block_map: whose critical blocks are used; marginal and negligible ones are skipped.
        return_lse: return the log-sum-exp too. Attention over disjoint sets of keys is then merged
            exactly: O = sum_i exp(L_i - L) O_i with L = logsumexp_i(L_i).

    Other arguments, result and errors as `sparse_linear_attention`. A row without critical blocks
    gives zero.

    Returns:
        output, (B, H, N_q, D) in the dtype of `query`; with `return_lse` (output, lse), lse the
        natural log of the sum of exp of the scaled critical scores, (B, H, N_q), float32 (float64
        for float64 inputs), -inf for a row without critical blocks, differentiable.
    """
    query, key, value = _inputs(query, key, value)
    _check_block_map(query, key, block_map, linear=False)
    chosen = _backend(backend, query, block_map.block_q, block_map.block_kv)
    with torch.autocast(query.device.type, enabled=False):
        factor = _scale(query, scale)
        output, lse = chosen.sparse_branch(query, key, value, block_map, factor, return_lse)
    if not return_lse:
        return output
    assert lse is not None
    return output, lse


def sparse_pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Critical blocks exactly, each marginal block as its mean key and value, in one softmax.

    A mean counts as often as its block has keys. It is the monopole of Multipole Attention (arXiv
    2506.13059) on blocks of consecutive tokens, and the first term of PISA's expansion (arXiv
    2602.01077); neither is differentiated there. Exact where all keys of a marginal block are
    equal, or none is marginal.

    Args:
        block_map: the routing; negligible blocks are skipped. Its own `key_lengths` count.

    Other arguments, result and errors as `sparse_linear_attention`. Triton's kernels round the
    means to the dtype of the inputs, as they are multiplied by queries; the other backends keep
    them, and N x T_n scores a chunk of queries at a time, in float32 (float64 for float64).
    """
    query, key, value = _inputs(query, key, value)
    _check_block_map(query, key, block_map)
    sparse, lse = sparse_attention(
        query, key, value, block_map, scale=scale, backend=backend, return_lse=True
    )
    chosen = _backend(backend, query, block_map.block_q, block_map.block_kv)
    merge = chosen.merge_pooled or merge_pooled
    with torch.autocast(query.device.type, enabled=False):
        return merge(query, key, value, block_map, sparse, lse, _scale(query, scale))


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None = None,
    *,
    feature_map: str | FeatureMap = "softmax",
    backend: str = "auto",
    key_lengths: Tensor | None = None,
) -> Tensor:
    """The linear branch alone: phi(Q) H / (phi(Q) Z) (equation 5).

    Args:
        block_map: whose marginal blocks are summed over; None for all keys.
        key_lengths: keys of each sample that count, if there is no `block_map`.

    Other arguments, result and errors as `sparse_linear_attention`.
    """
    query, key, value = _inputs(query, key, value)
    if block_map is not None:
        if key_lengths is not None:
            raise ValueError(_BOTH)
        _check_block_map(query, key, block_map)
    elif key_lengths is not None:
        lengths = _key_lengths(query, key, key_lengths)
        block_map = all_marginal(query, key, _BLOCK, lengths)
    phi = get_feature_map(feature_map)
    block_q, block_kv = (
        (_BLOCK, _BLOCK) if block_map is None else (block_map.block_q, block_map.block_kv)
    )
    chosen = _backend(backend, query, block_q, block_kv)
    with torch.autocast(query.device.type, enabled=False):
        return chosen.linear_branch(query, key, value, block_map, phi).to(query.dtype)


def classify_blocks(
    query: Tensor,
    key: Tensor,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_q: int = 64,
    block_kv: int = 64,
    scale: float | None = None,
    always_critical: int = 0,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
) -> BlockMap:
    """Route: the class of every pair of blocks, from pooled queries and keys (equations 2 and 3).

    Arguments and errors as `sparse_linear_attention`. Ranking is in float32 (float64 for float64
    inputs), highest score first, the lower block index first among equals. No gradient.
    """
    query, key, _ = _inputs(query, key, key)
    _check_routing(critical, negligible, block_q, block_kv, always_critical)
    factor = _scale(query, scale)
    key_lengths = _key_lengths(query, key, key_lengths)
    chosen = _backend(backend, query, block_q, block_kv)
    with torch.autocast(query.device.type, enabled=False):
        return (chosen.route or route)(
            query,
            key,
            critical=critical,
            negligible=negligible,
            block_q=block_q,
            block_kv=block_kv,
            scale=factor,
            always_critical=always_critical,
            key_lengths=key_lengths,
        )


def _backend(name: str, query: Tensor, block_q: int, block_kv: int) -> Backend:
    if name == "auto":
        usable = [
            backend
            for backend in _BACKENDS.values()
            if backend.auto_devices is None or query.device.type in backend.auto_devices
            if backend.unsupported_reason(query, block_q, block_kv) is None
        ]
        best = usable[0]
        for backend in usable[1:]:  # torch.compile does not know max(key=...)
            if backend.priority > best.priority:
                best = backend
        return best
    if name not in _BACKENDS:
        known = ", ".join(["auto", *available_backends()])
        raise ValueError(f"backend is {name!r}; it must be one of {known}")
    reason = _BACKENDS[name].unsupported_reason(query, block_q, block_kv)
    if reason is not None:
        raise ValueError(f"backend is {name!r}, which cannot be used here: {reason}")
    return _BACKENDS[name]


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked inputs, in autocast's dtype where it is on."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be (batch, heads, tokens, "
                "head_dim), none of them zero"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}; it must be float16, bfloat16, float32 or float64"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value)
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, query {query.dtype}; they must be equal")
    wanted = (*query.shape[:2], key.shape[2], query.shape[3])
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be {wanted}: batch, heads and "
                "head_dim as query, tokens as key"
            )
    return query, key, value


def _check_routing(
    critical: float, negligible: float, block_q: int, block_kv: int, always_critical: int
) -> None:
    for name, fraction in (("critical", critical), ("negligible", negligible)):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{name} is {fraction}; it must be in [0, 1]")
    if critical + negligible > 1.0 + 1e-9:
        raise ValueError(
            f"critical + negligible is {critical} + {negligible}; the sum must be at most 1"
        )
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"{name} is {block!r}; it must be a positive integer")
    if isinstance(always_critical, bool) or not isinstance(always_critical, int):
        raise TypeError(f"always_critical is {always_critical!r}; it must be an integer")
    if always_critical < 0:
        raise ValueError(f"always_critical is {always_critical}; it must be at least 0")


def _check_block_map(
    query: Tensor, key: Tensor, block_map: BlockMap, *, linear: bool = True
) -> None:
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map is a {type(block_map).__name__}; it must be a BlockMap")
    found = (*block_map.labels.shape[:2], block_map.tokens_q, block_map.tokens_kv)
    wanted = (*query.shape[:3], key.shape[2])
    if found != wanted:
        raise ValueError(
            f"block_map is for (batch, heads, queries, keys) = {tuple(found)}; "
            f"the inputs have {tuple(wanted)}"
        )
    if block_map.labels.device != query.device:
        raise ValueError(f"block_map is on {block_map.labels.device}, query on {query.device}")
    if block_map.key_lengths is not None:
        _check_range("key_lengths", block_map.key_lengths, 0, key.shape[2])
    if block_map.block_lengths is not None:
        if linear:
            raise ValueError(
                "block_map has block_lengths, which only the sparse branch honours "
                "(sparse_attention)"
            )
        _check_range("block_lengths", block_map.block_lengths, 1, block_map.block_kv)


def _key_lengths(query: Tensor, key: Tensor, key_lengths: Tensor | None) -> Tensor | None:
    """Checked lengths, int32; on a GPU, where their range is not looked at, clamped to it."""
    if key_lengths is None:
        return None
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths is a {type(key_lengths).__name__}; it must be a tensor")
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths is {key_lengths.dtype}; it must be int32 or int64")
    if tuple(key_lengths.shape) != (query.shape[0],):
        raise ValueError(
            f"key_lengths has shape {tuple(key_lengths.shape)}; it must be ({query.shape[0]},), "
            "one length a sample"
        )
    if key_lengths.device != query.device:
        raise ValueError(f"key_lengths is on {key_lengths.device}, query on {query.device}")
    _check_range("key_lengths", key_lengths, 0, key.shape[2])
    return key_lengths.to(torch.int32).clamp(0, key.shape[2])


def _check_range(name: str, lengths: Tensor, lowest: int, highest: int) -> None:
    # Looking would wait for the device, or break a compiled graph.
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = lengths.tolist()
    if not all(lowest <= length <= highest for length in values):
        raise ValueError(f"{name} is {values}; each must be in [{lowest}, {highest}]")


def _check_projection(query: Tensor, proj_weight: Tensor | None, proj_bias: Tensor | None) -> None:
    head_dim = query.shape[3]
    if proj_weight is None and proj_bias is not None:
        raise ValueError("proj_bias is given without proj_weight; give both, or neither")
    for name, tensor, shape in (
        ("proj_weight", proj_weight, (head_dim, head_dim)),
        ("proj_bias", proj_bias, (head_dim,)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")


def _scale(query: Tensor, scale: float | None) -> float:
    if scale is None:
        return 1.0 / math.sqrt(query.shape[-1])
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    return float(scale)
