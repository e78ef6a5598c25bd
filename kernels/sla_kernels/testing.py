"""What tests of a backend need: the tolerance rule, the inputs that break things, NaN poison.

Any backend is tested with these, whatever the device; the oracle is `sla_kernels.reference`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sla_kernels import reference
from sla_kernels.block_map import BlockMap, classify_blocks
from sla_kernels.feature_maps import FeatureMap

GRADIENTS = ("query", "key", "value", "proj_weight", "proj_bias")


@dataclass(frozen=True)
class Case:
    """Arguments of one call of `sparse_linear_attention`, but for the tensors' values.

    Attributes:
        name: what is special about it.
        tokens_kv: None is `tokens_q`.
        layout: `contiguous` (B, H, N, D); `transposed`, a view of (B, N, H, D); `strided`, every
            second feature of a wider tensor.
        values: `normal`; `equal`, all scores and features equal; `large`, scores of about 1e3.
    """

    name: str
    batch: int = 1
    heads: int = 2
    tokens_q: int = 256
    tokens_kv: int | None = None
    head_dim: int = 64
    block_q: int = 32
    block_kv: int = 32
    critical: float = 0.25
    negligible: float = 0.25
    always_critical: int = 0
    feature_map: str = "softmax"
    layout: str = "contiguous"
    values: str = "normal"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


AWKWARD_CASES: tuple[Case, ...] = (
    Case("plain"),
    Case("blocks of 64", tokens_q=320, block_q=64, block_kv=64),
    Case("paper defaults", tokens_q=1344, block_q=64, block_kv=64, critical=0.05, negligible=0.1),
    Case("batch and heads", batch=3, heads=5, tokens_q=96, block_q=16, block_kv=16),
    Case("tokens not a multiple of either block", tokens_q=203, block_q=32, block_kv=48),
    Case("one token over", tokens_q=129, block_q=64, block_kv=32),
    Case("wide query blocks", tokens_q=200, block_q=64, block_kv=16),
    Case("wide key blocks", tokens_q=200, block_q=16, block_kv=64),
    Case("fewer tokens than a block", tokens_q=19, block_q=64, block_kv=64),
    Case("one token", tokens_q=1, block_q=64, block_kv=64),
    Case("one block only", tokens_q=64, block_q=64, block_kv=64),
    Case("two key blocks", tokens_q=64, critical=0.5, negligible=0.5),
    Case("all critical", tokens_q=150, critical=1.0, negligible=0.0),
    Case("critical and negligible are all", tokens_q=256, critical=0.25, negligible=0.75),
    Case("no negligible", critical=0.125, negligible=0.0),
    Case("fractions round to nothing", critical=0.0, negligible=0.01),
    Case("head_dim 96", head_dim=96),
    Case("head_dim 128", head_dim=128),
    Case("head_dim 40", head_dim=40),
    Case("transposed", batch=2, layout="transposed"),
    Case("transposed and ragged", batch=2, tokens_q=203, layout="transposed"),
    Case("strided features", layout="strided"),
    Case("all scores equal", values="equal"),
    Case("large values", values="large"),
    Case("more keys than queries", tokens_q=100, tokens_kv=333),
    Case("more queries than keys", tokens_q=333, tokens_kv=100),
    Case("one query", tokens_q=1, tokens_kv=200),
    Case("one key", tokens_q=70, tokens_kv=1),
    Case("leading tokens", tokens_q=224, always_critical=40),
    Case("leading tokens fill blocks", tokens_q=203, always_critical=64, critical=0.125),
    Case("leading tokens leave one block", tokens_q=128, always_critical=90),
    Case("leading tokens are all", tokens_q=70, always_critical=70),
    Case("leading tokens of more keys", tokens_q=48, tokens_kv=200, always_critical=50),
    Case("elu+1", feature_map="elu+1"),
    Case("relu", feature_map="relu"),
)


@dataclass
class Inputs:
    """Tensors and arguments of a case, all leaves that require gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    grad: Tensor
    block_map: BlockMap
    case: Case
    feature_map: str | FeatureMap = field(default="softmax")

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, as new leaves of the same strides; same map."""

        def cast(tensor: Tensor) -> Tensor:
            copy = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=dtype, device=tensor.device
            )
            return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

        names = (*GRADIENTS, "grad")
        return replace(self, **{name: cast(getattr(self, name)) for name in names})


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs of a case: values that `dtype` represents, and the map of the float64 routing.

    Values are drawn on the CPU, so that every device sees the same.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_kv = case.tokens_q if case.tokens_kv is None else case.tokens_kv

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tokens(count: int, constant: bool) -> Tensor:
        shape = (case.batch, case.heads, count, case.head_dim)
        values = torch.full(shape, 0.5, dtype=torch.float64) if constant else draw(*shape)
        if case.values == "large" and not constant:
            values = values * 12.0
        return _lay_out(values.to(dtype).to(device), case.layout)

    equal = case.values == "equal"
    query, key = tokens(case.tokens_q, equal), tokens(tokens_kv, equal)
    value, grad = tokens(tokens_kv, False), tokens(case.tokens_q, False)
    weight = (draw(case.head_dim, case.head_dim) * case.head_dim**-0.5).to(dtype).to(device)
    bias = draw(case.head_dim).to(dtype).to(device)
    block_map = classify_blocks(
        query.double(),
        key.double(),
        critical=case.critical,
        negligible=case.negligible,
        block_q=case.block_q,
        block_kv=case.block_kv,
        always_critical=case.always_critical,
    )
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, weight, bias)]
    return Inputs(*leaves, grad, block_map, case, case.feature_map)


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]
    raise ValueError(f"layout is {layout!r}; it must be 'contiguous', 'transposed' or 'strided'")


Operator = Callable[..., Tensor]


def run(operator: Operator, inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """Output and gradients of `operator(query, key, value, block_map, proj_weight, proj_bias)`.

    Returns:
        `output` and the names of `GRADIENTS`.
    """
    leaves = [getattr(inputs, name) for name in GRADIENTS]
    query, key, value, weight, bias = leaves
    output = operator(
        query,
        key,
        value,
        inputs.block_map,
        weight,
        bias,
        feature_map=inputs.feature_map,
        **options,
    )
    grads = torch.autograd.grad(output, leaves, inputs.grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(GRADIENTS, grads, strict=True))}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected||_F / ||expected||_F in float64; the plain norm where expected is 0.

    Infinite when shapes differ or a value is not finite.
    """
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    difference = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm > 0.0 else difference


def check_against_reference(operator: Operator, inputs: Inputs, **options: Any) -> None:
    """Raise AssertionError unless output and all gradients are as good as their dtype allows.

    The rule: with the float64 reference on the same values as truth, the relative error may be
    at most twice the error of the reference run in the dtype of the inputs, plus one rounding of
    that dtype. Where the true gradient is zero or cancels to nothing against its terms (below
    the square root of the rounding, relative to the gradient that reached the output), the error
    is measured relative to that scale instead.

    Args:
        operator: as for `run`.
        inputs: in the dtype to test.
        options: passed to the operator.
    """
    dtype = inputs.query.dtype
    truth = run(reference.sparse_linear_attention_with_map, inputs.to(torch.float64))
    same_dtype = run(reference.sparse_linear_attention_with_map, inputs)
    actual = run(operator, inputs, **options)
    rounding = torch.finfo(dtype).eps
    # A gradient that cancels has no relative accuracy in any implementation.
    floor = rounding**0.5 * inputs.grad.double().norm().item()
    failures = []
    for name, expected in truth.items():
        if actual[name].dtype != dtype:
            failures.append(f"{name} has dtype {actual[name].dtype}, not {dtype}")
        norm = expected.norm().item()
        rescale = norm / floor if 0.0 < norm < floor else (1.0 / floor if norm == 0.0 else 1.0)
        error = relative_error(actual[name], expected) * rescale
        plain = relative_error(same_dtype[name], expected) * rescale
        if not error <= 2.0 * plain + rounding:
            failures.append(f"{name}: error {error:.2e}, reference in {dtype} {plain:.2e}")
    if failures:
        raise AssertionError(f"{inputs.case.name}: " + "; ".join(failures))


class PoisonUninitialised(TorchDispatchMode):
    """While active, tensors from `torch.empty` and its kin hold NaN (integers: the largest).

    A kernel that reads or leaves unwritten what it allocated shows itself.
    """

    _EMPTY = frozenset(
        {
            torch.ops.aten.empty.memory_format,
            torch.ops.aten.empty_like.default,
            torch.ops.aten.empty_strided.default,
            torch.ops.aten.new_empty.default,
            torch.ops.aten.new_empty_strided.default,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.poisoned = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._EMPTY:
            self.poisoned += 1
            if result.is_floating_point():
                result.fill_(float("nan"))
            elif result.dtype != torch.bool:
                result.fill_(torch.iinfo(result.dtype).max)
        return result


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of tensor storages made while active.

    Sees every tensor that an operation returns, on any device; not the scratch memory inside an
    operation.

    Attributes:
        largest: bytes of the largest storage.
        live: bytes of the storages that still exist.
        peak: largest value of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                self._ignore(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _ignore(self, tensor: Tensor) -> None:
        """What an operation is given and was not counted existed before."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.live += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


@contextlib.contextmanager
def poison_uninitialised() -> Iterator[PoisonUninitialised]:
    """`PoisonUninitialised` for a block; fails if nothing was allocated, so nothing tested."""
    with PoisonUninitialised() as mode:
        yield mode
    if not mode.poisoned:
        raise AssertionError("no uninitialised tensor was allocated: the poison tested nothing")
