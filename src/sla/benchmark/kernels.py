"""The operator against exact attention: time by length.

The whole operator is timed: routing, feature maps, both branches, Proj and the add. Before a time
is taken, the operator is compared with the dense reference on the first queries of the same inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sla_kernels import BlockMap, attention_branches, classify_blocks, sparse_linear_attention
from sla_kernels.testing import relative_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.results import write_results

SEED = 0
# Largest relative error against the reference at which a time is printed.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_QUERY_BLOCKS = 4
HEAD = f"{'tokens':>8} {'direction':>17} {'method':>6} {'ms':>9} {'p20':>9} {'p80':>9} {'ratio':>7}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of one shape, and the operator's numbers."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor
    numbers: dict[str, Any]


def sdpa(inputs: Inputs) -> Tensor:
    """Exact attention by PyTorch's own choice of kernel."""
    return scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


def sla(inputs: Inputs) -> Tensor:
    """The whole operator."""
    return sparse_linear_attention(
        inputs.query, inputs.key, inputs.value, inputs.weight, inputs.bias, **inputs.numbers
    )


METHODS: dict[str, Callable[[Inputs], Tensor]] = {"sdpa": sdpa, "sla": sla}


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.95, help="1 - critical fraction")
    parser.add_argument("--negligible", type=float, default=0.10)
    parser.add_argument("--block-q", type=int, default=64)
    parser.add_argument("--block-kv", type=int, default=64)
    parser.add_argument("--dtype", choices=[str(d).split(".")[1] for d in TOLERANCE])
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--record", action="store_true", help="keep the rows under results/")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked."""
    rows: list[dict[str, Any]] = []
    print(HEAD)
    for tokens in options.tokens:
        inputs = make_inputs(options, tokens)
        error = check(inputs)
        limit = TOLERANCE[inputs.query.dtype]
        if not error <= limit:
            print(f"{tokens} tokens: wrong result, error {error:.1e} > {limit}", file=sys.stderr)
            return 1
        for direction in ("forward", "forward_backward"):
            exact = 0.0
            for name, method in METHODS.items():
                times = measure(method, inputs, direction, options.repeats)
                row = describe(options, inputs, tokens) | {
                    "method": name,
                    "direction": direction,
                    "ms_median": statistics.median(times),
                    "ms_p20": statistics.quantiles(times, n=5)[0],
                    "ms_p80": statistics.quantiles(times, n=5)[-1],
                    "relative_error": error if name == "sla" else None,
                }
                rows.append(row)
                exact = exact or row["ms_median"]
                print(line(row, exact), flush=True)
    if options.record:
        print(f"recorded in {write_results('kernels', rows, seed=SEED)}")
    return 0


def line(row: dict[str, Any], exact: float) -> str:
    """A row as it is printed, with the ratio of exact attention's time to its own."""
    times = " ".join(f"{row[key]:9.2f}" for key in ("ms_median", "ms_p20", "ms_p80"))
    what = f"{row['tokens']:>8} {row['direction']:>17} {row['method']:>6}"
    return f"{what} {times} {exact / row['ms_median']:6.1f}x"


def make_inputs(options: argparse.Namespace, tokens: int) -> Inputs:
    """Normal random tensors as models hold them: (B, N, H, D) seen through a transpose."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    dtype = getattr(torch, options.dtype or default)
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def tensor() -> Tensor:
        shape = (options.batch, tokens, options.heads, options.head_dim)
        return draw(*shape).transpose(1, 2).requires_grad_()

    head_dim = options.head_dim
    numbers = {
        "critical": round(1 - options.sparsity, 9),
        "negligible": options.negligible,
        "block_q": options.block_q,
        "block_kv": options.block_kv,
    }
    weight = (draw(head_dim, head_dim) / head_dim**0.5).requires_grad_()
    return Inputs(tensor(), tensor(), tensor(), weight, draw(head_dim).requires_grad_(), numbers)


@torch.no_grad()
def check(inputs: Inputs) -> float:
    """Relative error of the operator on the first query blocks, all keys, in float32 or better."""
    block_map = classify_blocks(inputs.query, inputs.key, **inputs.numbers)
    rows = min(inputs.query.shape[2], CHECKED_QUERY_BLOCKS * block_map.block_q)
    blocks = -(-rows // block_map.block_q)
    part = BlockMap(
        block_map.labels[:, :, :blocks],
        block_map.block_q,
        block_map.block_kv,
        rows,
        block_map.tokens_kv,
    )
    query, key, value = (t.float() for t in (inputs.query[:, :, :rows], inputs.key, inputs.value))
    branches = attention_branches(query, key, value, part, backend="reference")
    projected = branches.linear @ inputs.weight.float().T + inputs.bias.float()
    return relative_error(sla(inputs)[:, :, :rows], branches.sparse + projected)


def measure(
    method: Callable[[Inputs], Tensor], inputs: Inputs, direction: str, repeats: int
) -> list[float]:
    """Milliseconds of each repeat, after two that warm up."""
    leaves = [inputs.query, inputs.key, inputs.value, inputs.weight, inputs.bias]
    grad = torch.randn(inputs.query.shape).to(inputs.query)

    def forward() -> None:
        with torch.no_grad():
            method(inputs)

    def forward_backward() -> None:
        torch.autograd.grad(method(inputs), leaves, grad, allow_unused=True)

    step = forward if direction == "forward" else forward_backward
    times = []
    for repeat in range(repeats + 2):
        synchronize(inputs.query)
        start = time.perf_counter()
        step()
        synchronize(inputs.query)
        if repeat >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def synchronize(tensor: Tensor) -> None:
    """Wait for the GPU, if the tensor is on one."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def describe(options: argparse.Namespace, inputs: Inputs, tokens: int) -> dict[str, Any]:
    """The fields of a row that say what was measured."""
    return {
        "batch": options.batch,
        "heads": options.heads,
        "tokens": tokens,
        "head_dim": options.head_dim,
        "dtype": str(inputs.query.dtype).removeprefix("torch."),
        "sparsity": options.sparsity,
        **inputs.numbers,
        "feature_map": "softmax",
        "map": "uniform",
        "peak_extra_bytes": None,
    }
