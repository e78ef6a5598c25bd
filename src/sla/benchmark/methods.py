"""What is timed: attention functions of one set of inputs, each with what it needs.

Shape letters: B batch, H heads, N tokens, D head_dim, T_m and T_n query and key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sla_kernels import BlockMap, classify_blocks, sparse_attention, sparse_linear_attention
from sla_kernels.block_map import CRITICAL, NEGLIGIBLE, block_counts, num_blocks
from sla_kernels.low_bit import low_bit_sparse_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sla.benchmark.suites import Point

SINK_FRACTION = 0.01


@dataclass(frozen=True)
class Inputs:
    """Tensors of one shape, the operator's numbers, and a block map of them."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor
    numbers: dict[str, Any]
    block_map: BlockMap

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.query, self.key, self.value, self.weight, self.bias]


@dataclass(frozen=True)
class Method:
    """One way to compute attention.

    Attributes:
        prepare: (inputs) -> the function that is timed; what it does itself is not timed.
        kind: `exact`; `whole` (both branches and Proj); `sparse` (the sparse branch alone).
        unavailable_reason: (inputs) -> why it cannot run on them, or None.
        routes: it makes its own block map, so that it has no time on a given, skewed one.
        is_ours: its kernels are listed in `stages`.
        tolerance: largest relative error of its forward; None: that of the dtype.
    """

    prepare: Callable[[Inputs], Callable[[], Tensor]]
    kind: str
    unavailable_reason: Callable[[Inputs], str | None]
    routes: bool = False
    is_ours: bool = False
    tolerance: float | None = None

    def takes(self, block_map: str) -> bool:
        """Whether it can be measured on maps of this name."""
        return block_map == "uniform" or not self.routes


def _anything(inputs: Inputs) -> str | None:
    return None


def _needs_cuda(inputs: Inputs) -> str | None:
    if not inputs.query.is_cuda:
        return "needs a CUDA device"
    if inputs.query.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {inputs.query.dtype}"
    return None


def _needs_fp8(inputs: Inputs) -> str | None:
    if not inputs.query.is_cuda or torch.cuda.get_device_capability(inputs.query.device) < (8, 9):
        return "needs a CUDA device of compute capability 8.9 or newer, for FP8 products"
    return None


def _sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    """Exact attention by PyTorch's own choice of kernel."""
    return lambda: scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


def _sdpa_backend(backend: SDPBackend) -> Callable[[Inputs], Callable[[], Tensor]]:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)

        return call

    return prepare


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    """FlexAttention, compiled, over the critical blocks; its BlockMask is made here, untimed."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    # FlexAttention takes a table as wide as the map: not the router's narrow one.
    given = replace(inputs.block_map, row_table=None)
    full, indices = given.critical_counts, given.critical_blocks
    partial = torch.zeros_like(full)
    mask = BlockMask.from_kv_blocks(
        partial,
        indices,
        full,
        indices,
        BLOCK_SIZE=(given.block_q, given.block_kv),
        seq_lengths=(given.tokens_q, given.tokens_kv),
    )
    # Its default tiles of 128 must divide the blocks; it has no such option for the backward.
    tiles = {"fwd_BLOCK_M": min(128, given.block_q), "fwd_BLOCK_N": min(128, given.block_kv)}
    options: Any = None if min(given.block_q, given.block_kv) >= 128 else tiles
    torch.compiler.reset()  # every point is a compilation of its own, never a dynamic shape
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        inputs.query, inputs.key, inputs.value, block_mask=mask, kernel_options=options
    )


def _sla(inputs: Inputs) -> Callable[[], Tensor]:
    """The whole operator: routing, feature maps, both branches, Proj and the add."""
    return lambda: sparse_linear_attention(
        inputs.query, inputs.key, inputs.value, inputs.weight, inputs.bias, **inputs.numbers
    )


def _sla_given_map(inputs: Inputs) -> Callable[[], Tensor]:
    """The operator without its routing."""
    return lambda: sparse_linear_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.weight,
        inputs.bias,
        block_map=inputs.block_map,
    )


def _sparse_only(inputs: Inputs) -> Callable[[], Tensor]:
    """The sparse branch alone, on a given map."""
    return lambda: sparse_attention(inputs.query, inputs.key, inputs.value, inputs.block_map)


def _sparse_only_fp8(inputs: Inputs) -> Callable[[], Tensor]:
    """The sparse branch alone with an FP8 forward, rounding included; a 16-bit backward."""
    return lambda: low_bit_sparse_attention(
        inputs.query, inputs.key, inputs.value, inputs.block_map
    )


METHODS: dict[str, Method] = {
    "sdpa": Method(_sdpa, "exact", _anything),
    "flash_attention_2": Method(_sdpa_backend(SDPBackend.FLASH_ATTENTION), "exact", _needs_cuda),
    "cudnn": Method(_sdpa_backend(SDPBackend.CUDNN_ATTENTION), "exact", _needs_cuda),
    "flex_block_sparse": Method(_flex, "sparse", _needs_cuda),
    "sla": Method(_sla, "whole", _anything, routes=True, is_ours=True),
    "sla_given_map": Method(_sla_given_map, "whole", _anything, is_ours=True),
    "sparse_only": Method(_sparse_only, "sparse", _anything, is_ours=True),
    # On normal random tensors rounding alone makes an error of 5 %.
    "sparse_only_fp8": Method(_sparse_only_fp8, "sparse", _needs_fp8, is_ours=True, tolerance=0.08),
}
EXACT_METHODS = tuple(name for name, method in METHODS.items() if method.kind == "exact")


def make_tensors(
    point: Point, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, Proj weight and bias: normal random, with gradients.

    The first three are as models hold them: (B, N, H, D) seen through a transpose.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        # float32 first: every dtype then sees the same numbers.
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def tensor() -> Tensor:
        shape = (point.batch, point.tokens, point.heads, point.head_dim)
        return draw(*shape).transpose(1, 2).requires_grad_()

    query, key, value = tensor(), tensor(), tensor()
    weight = (draw(point.head_dim, point.head_dim) / point.head_dim**0.5).requires_grad_()
    return query, key, value, weight, draw(point.head_dim).requires_grad_()


def make_inputs(point: Point, tensors: tuple[Tensor, ...], seed: int) -> Inputs:
    """The tensors of a point's shape with its numbers and its map."""
    query, key, value, weight, bias = tensors
    numbers: dict[str, Any] = {
        "critical": point.critical,
        "negligible": point.negligible,
        "block_q": point.block_q,
        "block_kv": point.block_kv,
    }
    if point.map == "skewed":
        block_map = skewed_map(point, query.device, seed)
    else:
        block_map = classify_blocks(query.detach(), key.detach(), **numbers)
    return Inputs(query, key, value, weight, bias, numbers, block_map)


def skewed_map(point: Point, device: torch.device, seed: int) -> BlockMap:
    """A map with sinks: every row holds the first 1 % of key blocks (at least one) as critical.

    The rest is random; every row has the counts that routing would give it.
    """
    rows, columns = (
        num_blocks(point.tokens, point.block_q),
        num_blocks(point.tokens, point.block_kv),
    )
    chosen, skipped = block_counts(point.critical, point.negligible, columns)
    sinks = min(chosen, max(1, round(SINK_FRACTION * columns)))
    generator = torch.Generator(device).manual_seed(seed)
    shape = (point.batch, point.heads, rows, columns)
    scores = torch.rand(shape, generator=generator, device=device)
    scores[..., :sinks] = 2.0
    order = scores.argsort(dim=-1, descending=True)
    labels = torch.zeros(shape, dtype=torch.int8, device=device)
    labels.scatter_(-1, order[..., :chosen], CRITICAL)
    labels.scatter_(-1, order[..., columns - skipped :], NEGLIGIBLE)
    return BlockMap(labels, point.block_q, point.block_kv, point.tokens, point.tokens)
