"""The attention methods: time against what their exact work predicts, and what comes on top.

Every method runs through the module that models use, at the same inputs. Of its GPU time, the
kernels of the sparse branch are told apart from everything else (pooling, selection, gates, linear
branches, moving tokens): the sparse branch should take what its share of exact scores predicts from
`sparse_only` at the same block sizes, and the rest are the method's own extras.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sla_kernels.testing import relative_error
from torch import Tensor

from sla.attention import (
    AttentionConfig,
    AttentionContext,
    AttentionMethod,
    LinearOnlyConfig,
    LinearPlusSparseConfig,
    SLA2Config,
    SLAConfig,
    SpargeConfig,
    SparseOnlyConfig,
    SparsePooledConfig,
    VMoBAConfig,
    VSAConfig,
    build_attention,
)
from sla.benchmark import timing
from sla.benchmark.kernels import SEED, quantiles
from sla.benchmark.recording import add_options, results_file

WAN_GRID = (21, 30, 52)  # 480p, 81 frames: 32,760 tokens
CHECK_GRID = (5, 10, 12)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
DIRECTIONS = ("forward", "backward")
# The sparse branch's kernels, with the tables that it makes of a block map.
SPARSE_KERNELS = (
    "forward",
    "forward_low_bit",
    "row_table",
    "backward_queries",
    "backward_keys",
    "longest_first",
)
HEAD = (
    f"{'method':>22} {'exact':>7} {'direction':>9} {'ms':>8} {'sparse':>8} {'predicted':>9} "
    f"{'ratio':>6} {'extras':>8}"
)


@dataclass(frozen=True)
class Arm:
    """A method to measure.

    Attributes:
        label: unique name.
        config: its numbers.
        layer_index: for methods that differ by layer.
    """

    label: str
    config: AttentionConfig
    layer_index: int = 0

    @property
    def blocks(self) -> tuple[int, int]:
        """Queries and keys in a block of its sparse branch."""
        config: Any = self.config
        if isinstance(config, VSAConfig):
            return config.block, config.block
        return getattr(config, "block_q", 64), getattr(config, "block_kv", 64)


def _sparse(block_q: int, block_kv: int) -> Arm:
    config = SparseOnlyConfig(critical=0.05, block_q=block_q, block_kv=block_kv)
    return Arm(f"sparse_only-{block_q}x{block_kv}", config)


# The first ones are what the others' times are predicted from.
BASELINES = (_sparse(64, 64), _sparse(128, 64), _sparse(128, 128))
ARMS: tuple[Arm, ...] = (
    *BASELINES,
    Arm("linear_only", LinearOnlyConfig()),
    Arm("sla", SLAConfig()),
    Arm("sla-all-keys", SLAConfig(linear_scope="all")),
    Arm("linear_plus_sparse", LinearPlusSparseConfig()),
    Arm("sparse_pooled", SparsePooledConfig()),
    Arm("sparge-5%", SpargeConfig(selection="density", critical=0.05)),
    Arm("sparge-15%", SpargeConfig(selection="density", critical=0.15)),
    Arm("sparge-union", SpargeConfig(selection="union")),
    Arm("vsa-11%", VSAConfig()),
    Arm("vsa-11%-3x5x4", VSAConfig(cube=(3, 5, 4))),
    Arm("vsa-5%-3x5x4", VSAConfig(critical=0.05, cube=(3, 5, 4))),
    Arm("vmoba-1d", VMoBAConfig(), 0),
    Arm("vmoba-2d", VMoBAConfig(), 1),
    Arm("vmoba-3d", VMoBAConfig(), 2),
    Arm("sla2", SLA2Config()),
    Arm("sla2-fp8", SLA2Config(precision="fp8")),
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--methods", nargs="+", choices=[arm.label for arm in ARMS])
    parser.add_argument("--grid", type=int, nargs=3, default=list(WAN_GRID))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=3, help="on a CPU")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="on a GPU")
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked; 1 if a method failed or gave a wrong result."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file = results_file(options, "attention", seed=SEED)
    chosen = [arm for arm in ARMS if not options.methods or arm.label in options.methods]
    # A prediction needs its baseline.
    wanted = {arm.blocks for arm in chosen}
    arms = [arm for arm in BASELINES if arm.blocks in wanted]
    arms += [arm for arm in chosen if arm not in arms]
    print(HEAD)
    status = 0
    baselines: dict[tuple[tuple[int, int], str], Mapping[str, Any]] = {}
    for arm in arms:
        for row in measure(arm, options, device):
            key = (arm.blocks, str(row["direction"]))
            row |= derive(row, baselines.get(key, row if arm in BASELINES else None))
            if arm in BASELINES:
                baselines[key] = row
            status = 1 if row["error"] else status
            if file is not None:
                file.append(row)
            print(line(row), flush=True)
    if file is not None and file.path.exists():
        print(f"recorded in {file.path}")
    return status


def measure(
    arm: Arm, options: argparse.Namespace, device: torch.device
) -> Sequence[dict[str, Any]]:
    """A row for each direction."""
    grid = (options.grid[0], options.grid[1], options.grid[2])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base: dict[str, Any] = {
        "method": arm.label,
        "name": arm.config.name,
        "layer_index": arm.layer_index,
        "grid": list(grid),
        "tokens": math.prod(grid),
        "heads": options.heads,
        "head_dim": options.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "block_q": arm.blocks[0],
        "block_kv": arm.blocks[1],
        "exact_fraction": None,
        "flops": None,
        "relative_error": None,
        "ms_median": None,
        "ms_p20": None,
        "ms_p80": None,
        "stages": None,
        "peak_extra_bytes": None,
        "error": None,
    }
    try:
        base["relative_error"] = check(arm, options, device, dtype)
        method = build(arm, options, device)
        tensors, context = make_inputs(grid, options, device, dtype)
        with torch.no_grad():
            base["exact_fraction"] = method.exact_fraction(tensors[0], tensors[1], context)
        base["flops"] = method.flops(grid, base["exact_fraction"])
        rows = []
        for direction in options.directions:
            step = make_step(method, tensors, context, direction)
            row: dict[str, Any] = {**base, "direction": direction}
            rows.append(row | _times(step, options, device))
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        error.__traceback__ = None  # its frames hold tensors
        rows = [base | {"direction": direction, "error": text} for direction in options.directions]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _times(step: timing.Step, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return quantiles(timing.cpu_times(step, options.repeats))
    found: dict[str, Any] = quantiles(timing.gpu_times(step, options.budget_ms))
    found["peak_extra_bytes"] = timing.gpu_peak_bytes(step)
    found["stages"] = timing.gpu_stages(step)
    return found


def build(
    arm: Arm, options: argparse.Namespace, device: torch.device, backend: str = "auto"
) -> AttentionMethod:
    """The method with its learned parts moved off their initial zeros, so that all of it works."""
    dim = options.heads * options.head_dim
    config = arm.config
    if hasattr(config, "backend"):
        config = replace(config, backend=backend)  # type: ignore[call-arg]
    method = build_attention(config, options.heads, options.head_dim, dim, arm.layer_index)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return method.to(device)


def make_inputs(
    grid: tuple[int, int, int],
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Tensor], AttentionContext]:
    """Normal random query, key and value, (1, H, N, D) seen through a transpose, and a context."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    tokens = math.prod(grid)
    shape = (1, tokens, options.heads, options.head_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    tensors = [draw(*shape).transpose(1, 2).requires_grad_() for _ in range(3)]
    hidden = draw(1, tokens, options.heads * options.head_dim)
    return tensors, AttentionContext(grid=grid, hidden_states=hidden)


def make_step(
    method: AttentionMethod, tensors: list[Tensor], context: AttentionContext, direction: str
) -> timing.Step:
    """The function to time: a forward without a graph, or a backward alone."""

    def forward() -> object:
        with torch.no_grad():
            return method(*tensors, context)

    if direction == "forward":
        return forward
    output = method(*tensors, context)
    grad = torch.randn_like(tensors[0])
    leaves = [*tensors, *(p for p in method.parameters() if p.requires_grad)]

    def backward() -> object:
        return torch.autograd.grad(output, leaves, grad, retain_graph=True, allow_unused=True)

    return backward


def check(arm: Arm, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> float:
    """Error of the output against the eager backend on a small grid.

    Raises:
        ArithmeticError: it is too large.
    """
    tensors, context = make_inputs(CHECK_GRID, options, device, dtype)
    with torch.no_grad():
        found = build(arm, options, device)(*tensors, context)
        expected = build(arm, options, device, "eager")(*tensors, context)
    error = relative_error(found, expected)
    if not error < TOLERANCE[dtype]:
        raise ArithmeticError(
            f"relative error {error:.1e} against the eager backend, limit {TOLERANCE[dtype]:.0e}"
        )
    return error


def derive(row: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields computed from a row's stages and from `sparse_only` at the same block sizes.

    sparse_ms: time of the sparse branch's kernels. extras_ms: of all others. predicted_ms: the
    baseline's sparse_ms times the ratio of the exact fractions. ratio: sparse_ms over it. None
    where there are no stages; a method without exact scores has extras only.
    """
    nothing = dict.fromkeys(("sparse_ms", "extras_ms", "predicted_ms", "ratio"))
    stages: Mapping[str, float] | None = row["stages"]
    if not stages:
        return nothing
    if not row["exact_fraction"]:
        return {**nothing, "extras_ms": sum(stages.values())}
    sparse = sum(ms for name, ms in stages.items() if name in SPARSE_KERNELS)
    extras = sum(stages.values()) - sparse
    found: dict[str, Any] = {**nothing, "sparse_ms": sparse, "extras_ms": extras}
    if baseline is not None:
        reference = sum(ms for name, ms in baseline["stages"].items() if name in SPARSE_KERNELS)
        predicted = reference * row["exact_fraction"] / baseline["exact_fraction"]
        found |= {"predicted_ms": predicted, "ratio": sparse / predicted}
    return found


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    if row["error"]:
        return f"{row['method']:>22} {'':>7} {row['direction']:>9} {row['error']}"

    def number(key: str, width: int) -> str:
        return f"{row[key]:{width}.3f}" if row[key] is not None else " " * width

    return (
        f"{row['method']:>22} {row['exact_fraction']:7.2%} {row['direction']:>9} "
        f"{number('ms_median', 8)} {number('sparse_ms', 8)} {number('predicted_ms', 9)} "
        f"{number('ratio', 6)} {number('extras_ms', 8)}"
    )
