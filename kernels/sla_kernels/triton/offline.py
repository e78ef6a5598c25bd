"""Compile the kernels for a GPU that is not here, and say what became of them.

    python -m sla_kernels.triton.offline --target 90 --head-dim 128 --blocks 64 64

Every launch of the operators' forward and backward is compiled by Triton and by its ptxas; no
kernel is run. For each kernel: registers and spills of a thread, shared memory of a program,
tensor-core instructions in its PTX, and whether ptxas serialised them (C7510 to C7515: each product
then waits for the one before).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla_kernels.block_map import num_blocks
from sla_kernels.triton import launch, low_bit, pooled
from sla_kernels.triton.calls import Launch, recorded
from sla_kernels.triton.launch import Problem, Routing

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
_TOKENS, _HEADS, _BATCH = 9000, 3, 2  # more blocks than a tile holds


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that its registers do not hold.
        shared: bytes of a program.
        tensor_core: instructions that multiply matrices, in the PTX.
        serialised: what ptxas says of products that wait for each other; empty if they do not.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int
    tensor_core: int
    serialised: str


def launches(
    dtype: torch.dtype, head_dim: int, block_q: int, block_kv: int, *, fp8: bool = False
) -> list[Launch]:
    """The launches of all operators, forward and backward, each kernel once.

    Args:
        fp8: those of the FP8 forward too.
    """
    shape = (_BATCH, _TOKENS, _HEADS, head_dim)
    query, key, value, grad = (torch.zeros(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
    weight, bias = torch.zeros(head_dim, head_dim, dtype=dtype), torch.zeros(head_dim, dtype=dtype)
    problem = Problem(block_q, block_kv, 0, "softmax", 1.0 / head_dim**0.5)
    routing = Routing(0.05, 0.1, 0, problem.scale)
    with recorded() as found:
        output, lse, routed = launch.attend(
            query, key, value, weight, bias, None, problem, routing=routing
        )
        launch.attend_backward(
            grad, query, key, value, weight, bias, None, output, lse, routed, problem
        )
        row_lse = torch.zeros(_BATCH, _HEADS, _TOKENS)
        inputs = (query, key, value, output, row_lse, None, routed.labels)
        numbers = (block_q, block_kv, problem.scale)
        merged = pooled.merge(*inputs, *numbers)
        pooled.merge_backward(grad, *inputs, merged, *numbers)
        if fp8:
            width = num_blocks(_TOKENS, block_kv)
            rows = torch.zeros(_BATCH, _HEADS, routed.labels.shape[2], width, dtype=torch.int32)
            tensors = (query, key, value, None, None, rows, routed.counts)
            low_bit.attend(*tensors, problem)
    return list({one.kernel: one for one in found}.values())


def compile_for(one: Launch, target: int) -> Compiled:
    """Compile a launch for a compute capability, times ten.

    Raises:
        RuntimeError: Triton runs in its interpreter, or ptxas refuses the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if launch.interpreted():
        raise RuntimeError("TRITON_INTERPRET is 1, which compiles nothing; unset it")
    names = one.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    values = {**dict(zip(names, one.arguments, strict=False)), **one.constants}
    for place, name in enumerate(names):
        value = values[name]
        signature[name] = _type(value) if name not in one.constants else "constexpr"
        if signature[name] == "constexpr":
            constants[place,] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    options = {name: value for name, value in one.constants.items() if name not in names}
    source = ASTSource(one.kernel, signature, constants, attributes)
    found = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = found.asm["ptx"]
    registers, spilled, serialised = _assemble(ptx, target)
    return Compiled(
        one.kernel.__name__,
        registers,
        spilled,
        int(found.metadata.shared),
        len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", ptx)),
        serialised,
    )


def _type(value: Any) -> str:
    """Triton's name of an argument's type."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, int):
        return "i32"
    if isinstance(value, float):
        return "fp32"
    return f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"


def _assemble(ptx: str, target: int) -> tuple[int, int, str]:
    """Registers, spilled bytes, and what ptxas says of serialised products."""
    from triton.backends.nvidia.compiler import get_ptxas

    suffix = "a" if target >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        call = [get_ptxas(target).path, "-v", f"-arch=sm_{target}{suffix}", str(source)]
        done = subprocess.run(
            [*call, "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"ptxas: {said}")
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    serialised = re.search(r"\(C75\d\d\).*?serialized due to (.*?) in (?:the )?function", said)
    return (
        int(registers[1]) if registers else 0,
        int(spilled[1]) if spilled else 0,
        serialised[1] if serialised else "",
    )


def table(rows: Iterable[Compiled]) -> str:
    """As text, a line a kernel."""
    lines = [f"{'kernel':>24} {'registers':>9} {'spilled':>7} {'shared':>7} {'products':>8}"]
    lines += [
        f"{row.kernel:>24} {row.registers:>9} {row.spilled:>7} {row.shared:>7} "
        f"{row.tensor_core:>8}  {f'serialised: {row.serialised}' if row.serialised else ''}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Compile, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m sla_kernels.triton.offline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--target", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--blocks", type=int, nargs=2, default=[64, 64], metavar=("Q", "KV"))
    parser.add_argument("--fp8", action="store_true", help="the FP8 forward too")
    options = parser.parse_args()
    found = launches(DTYPES[options.dtype], options.head_dim, *options.blocks, fp8=options.fp8)
    print(table(compile_for(one, options.target) for one in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
