"""What tests of every backend share: awkward shapes, inputs, and the rule for tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A shape that breaks things, with its routing numbers."""

    name: str
    tokens_q: int
    tokens_kv: int
    head_dim: int = 16
    block_q: int = 16
    block_kv: int = 8
    critical: float = 0.1
    negligible: float = 0.2
    always_critical: int = 0
    batch: int = 2
    heads: int = 2
    key_lengths: tuple[int, ...] | None = None

    def routing(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """Keyword arguments of `classify_blocks` and `sparse_linear_attention`."""
        names = ("critical", "negligible", "block_q", "block_kv", "always_critical")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.key_lengths is not None:
            arguments["key_lengths"] = torch.tensor(
                self.key_lengths, dtype=torch.int32, device=device
            )
        return arguments


AWKWARD = (
    Case("ragged_both", 100, 100, block_q=16, block_kv=24),
    Case("ragged_by_one", 97, 97),
    Case("shorter_than_a_block", 10, 10),
    Case("one_block", 16, 16, block_kv=16),
    Case("one_token", 1, 1),
    Case("everything_critical", 96, 96, critical=1.0, negligible=0.0),
    Case("nothing_marginal", 96, 96, critical=0.25, negligible=0.75),
    Case("nothing_negligible", 96, 96, negligible=0.0),
    Case("fewer_queries", 37, 120),
    Case("fewer_keys", 120, 37),
    Case("wide_query_blocks", 130, 130, block_q=64, block_kv=8),
    Case("wide_key_blocks", 130, 130, block_q=8, block_kv=64),
    Case("head_dim_64", 130, 130, head_dim=64, block_q=32, block_kv=32, heads=1),
    Case("head_dim_96", 130, 130, head_dim=96, block_q=32, block_kv=32, heads=1),
    Case("head_dim_128", 130, 130, head_dim=128, block_q=32, block_kv=32, heads=1),
    Case("text_tokens", 100, 100, always_critical=11),
    Case("only_text_tokens", 50, 50, always_critical=50),
    Case("padded", 100, 100, critical=0.25, key_lengths=(61, 100)),
    Case("padded_to_a_block_and_to_nothing", 90, 96, block_kv=16, key_lengths=(64, 0)),
    Case("padded_text_tokens", 75, 97, critical=0.2, always_critical=21, key_lengths=(1, 50)),
)


def supported(case: Case, tokens: int | None = None, heads: int | None = None) -> Case:
    """The case in blocks that every backend takes.

    Args:
        tokens: a power of two to which longer sequences are cut; what they are longer than a
            multiple of the blocks by is kept. For backends that run slowly.
        heads: at most so many.
    """
    block_q, block_kv = (
        next(size for size in (16, 32, 64, 128) if size >= block)
        for block in (case.block_q, case.block_kv)
    )

    def cut(count: int) -> int:
        if tokens is None or count <= tokens:
            return count
        return tokens + count % max(block_q, block_kv)

    tokens_q, tokens_kv = cut(case.tokens_q), cut(case.tokens_kv)
    lengths = case.key_lengths
    return replace(
        case,
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=block_q,
        block_kv=block_kv,
        heads=case.heads if heads is None else min(case.heads, heads),
        key_lengths=None if lengths is None else tuple(min(n, tokens_kv) for n in lengths),
    )


def random_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a case, as (B, N, H, D) tensors seen through a transpose."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> Tensor:
        shape = (case.batch, tokens, case.heads, case.head_dim)
        return torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)

    return draw(case.tokens_q), draw(case.tokens_kv), draw(case.tokens_kv)


def random_projection(
    head_dim: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Weight and bias of Proj."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(head_dim, head_dim, generator=generator) / math.sqrt(head_dim)
    return weight.to(device, dtype), torch.randn(head_dim, generator=generator).to(device, dtype)


def with_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], **options: Any
) -> list[Tensor]:
    """Output, and the gradients of all tensors, of a fixed random functional of the output."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves, **options)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; the plain norm where expected is zero."""
    difference = (found.double() - expected.double()).norm()
    norm = expected.double().norm()
    return (difference / norm if norm > 0 else difference).item()


def assert_low_precision_close(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """A result in low precision passes when its error is at most twice that of plain PyTorch.

    Args:
        found: the result under test, in low precision.
        plain: the reference run in that precision.
        exact: the reference run in float64.
    """
    rounding = torch.finfo(found.dtype).eps
    limit = 2 * relative_error(plain, exact) + rounding
    error = relative_error(found, exact)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


def check_rounding(
    found: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Compiled code in low precision may err by twice what rounding does to the eager code, plus
    0.5 %. Rounding alone moves some gradients much: softmax hardly sees a bias of the keys, so its
    gradient is a small sum of large terms.

    Args:
        found: tensors of the compiled code, by name.
        eager: of the same code and precision, not compiled.
        exact: in float32, not compiled.

    Raises:
        AssertionError: names differ, or a tensor errs by more.
    """
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        rounding, error = (eager[name] - tensor).norm(), (found[name] - tensor).norm()
        limit = 2 * rounding + 0.005 * tensor.norm()
        assert error < limit, f"{name}: {error:.1e}, with eager's rounding {rounding:.1e}"
