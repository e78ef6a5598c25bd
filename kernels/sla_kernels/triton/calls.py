"""Launches and tensor descriptors, made once for each kind of call and repeated after.

Triton examines every argument of every launch. In Python that takes some 60 microseconds a launch,
longer than a small kernel runs. Which compiled kernel a launch ends in follows from shapes, strides
and numbers alone, so a later call that agrees in these goes to the compiled kernels directly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass
class _Record:
    """What one call did: compiled kernels with their constants, and descriptors, in order."""

    kernels: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list)
    descriptors: list[TensorDescriptor] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """A launch that was asked for."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, int | float | str | bool]


_recording: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Keep launches in the list that this gives, in place of making them."""
    found: list[Launch] = []
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


_MOST_RECORDS = 512
_records: OrderedDict[Hashable, _Record] = OrderedDict()


class Calls:
    """The launches of one call of an operator.

    Args:
        key: all that the launches' arguments depend on besides the tensors' contents and addresses;
            every address must lie on a 16-byte boundary (`aligned`).
    """

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._known = _records.get(key)
        self._new = _Record()
        self._kernels = self._descriptors = 0

    def launch(
        self, kernel: Any, programs: int, *arguments: Any, **constants: int | float | str | bool
    ) -> None:
        """kernel[(programs,)](*arguments, **constants); constants come last in its signature."""
        kept = _recording.get()
        if kept is not None:
            kept.append(Launch(kernel, programs, arguments, constants))
            return
        place, self._kernels = self._kernels, self._kernels + 1
        if self._known is not None:
            compiled, values = self._known.kernels[place]
            compiled[(programs, 1, 1)](*arguments, *values)
            return
        compiled = kernel[(programs,)](*arguments, **constants)
        if compiled is not None:  # the interpreter compiles nothing
            values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            self._new.kernels.append((compiled, values))

    def done(self) -> None:
        """Keep what the call did for others like it."""
        if self._known is None and self._kernels and len(self._new.kernels) == self._kernels:
            _records[self._key] = self._new
            while len(_records) > _MOST_RECORDS:
                _records.popitem(last=False)

    def tiles(self, tensor: Tensor, rows: int) -> TensorDescriptor:
        """(rows, P) tiles of a (B, H, N, D) tensor."""
        known = self._again(tensor)
        if known is not None:
            return known
        # The stride of a dimension of one is never used but must be a legal one.
        strides = [s if n > 1 else 128 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
        strides[-1] = 1
        block = [1, 1, rows, padded(tensor.shape[-1])]
        return self._describe(tensor, list(tensor.shape), strides, block)

    def squares(self, tensor: Tensor | None) -> TensorDescriptor | None:
        """The (D, D) matrices of a (..., D or D + 1, D) tensor."""
        if tensor is None:
            return None
        known = self._again(tensor)
        if known is not None:
            return known
        rows, head_dim = tensor.shape[-2:]
        count, size = tensor.numel() // (rows * head_dim), padded(head_dim)
        strides = [rows * head_dim, head_dim, 1]
        return self._describe(tensor, [count, head_dim, head_dim], strides, [1, size, size])

    def single_rows(self, tensor: Tensor) -> TensorDescriptor:
        """Single rows of the matrices of a (..., D + 1, D) tensor."""
        known = self._again(tensor)
        if known is not None:
            return known
        rows, head_dim = tensor.shape[-2:]
        shape = [tensor.numel() // (rows * head_dim), rows, head_dim]
        strides = [rows * head_dim, head_dim, 1]
        return self._describe(tensor, shape, strides, [1, 1, padded(head_dim)])

    def matrices(
        self, tensor: Tensor, shape: tuple[int, ...], tile: tuple[int, ...]
    ) -> TensorDescriptor:
        """Tiles of a contiguous tensor, seen as rows of tensor.stride(1), of the given shape."""
        known = self._again(tensor)
        if known is not None:
            return known
        strides = [tensor.stride(0), tensor.stride(1), 1]
        return self._describe(tensor, list(shape), strides[-len(shape) :], list(tile))

    def row_numbers(self, tensor: Tensor, rows: int) -> TensorDescriptor:
        """(1, rows) tiles of a (B, H, N) tensor."""
        known = self._again(tensor)
        if known is not None:
            return known
        batch, heads, tokens = tensor.shape
        return self._describe(tensor, [batch * heads, tokens], [tokens, 1], [1, rows])

    def _again(self, tensor: Tensor) -> TensorDescriptor | None:
        place, self._descriptors = self._descriptors, self._descriptors + 1
        if self._known is None:
            return None
        # The same numbers over other memory, without the checks that the first one passed.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self._known.descriptors[place].__dict__)
        descriptor.base = tensor
        return descriptor

    def _describe(
        self, tensor: Tensor, shape: list[int], strides: list[int], block: list[int]
    ) -> TensorDescriptor:
        descriptor = TensorDescriptor(tensor, shape, strides, block)
        template = object.__new__(TensorDescriptor)
        template.__dict__.update(descriptor.__dict__)
        template.base = None  # a record must not keep anyone's memory
        self._new.descriptors.append(template)
        return descriptor


def next_power_of_two(number: int) -> int:
    """The least power of two that is not less. (Triton's own takes microseconds.)"""
    return 1 << max(number - 1, 0).bit_length()


def padded(head_dim: int) -> int:
    """P: columns of a tile."""
    return max(16, next_power_of_two(head_dim))
