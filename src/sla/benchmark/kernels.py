"""The operator against exact attention: time, memory, and FLOPs over time.

The whole operator is timed: routing, feature maps, both branches, Proj and the add. Before a time
is taken, a method is compared with the dense reference: its output on the first queries of the same
inputs, its gradients on a short sequence. Rows are written as they are measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sla.benchmark import timing
from sla.benchmark.checks import (
    TOLERANCE,
    WrongResultError,
    check_backward,
    check_forward,
    check_routing,
)
from sla.benchmark.methods import (
    EXACT_METHODS,
    METHODS,
    Inputs,
    Method,
    make_inputs,
    make_tensors,
)
from sla.benchmark.recording import add_options, results_file
from sla.benchmark.suites import EVERYTHING, SUITES, Point, Shape, grouped, plan
from sla.figures.paper import GPU_BLOCKS, NEGLIGIBLE, SPARSITY
from sla.results import ResultsFile

SEED = 0
GRAPH_BELOW_MS = 3.0  # shorter steps are also timed as a CUDA graph
# Operations over those of a forward, as the paper counts them.
FLOPS = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}
CPU_DEFAULTS: dict[str, Any] = {
    "heads": 4,
    "head_dim": 64,
    "block_q": 64,
    "block_kv": 64,
    "directions": ["forward", "forward_backward"],
}
GPU_DEFAULTS: dict[str, Any] = {
    "heads": 12,
    "head_dim": 128,
    "block_q": GPU_BLOCKS[0],
    "block_kv": GPU_BLOCKS[1],
    "directions": list(FLOPS),
}
DEFAULTS: dict[str, Any] = {
    "tokens": [2048, 4096, 8192],
    "batch": 1,
    "sparsity": SPARSITY,
    "negligible": NEGLIGIBLE,
}
ACCURACY = ("relative_error", "gradient_error", "routing_mismatch")
OF_A_POINT = ("batch", "heads", "head_dim", "sparsity", "negligible", "block_q", "block_kv")
HEAD = (
    f"{'tokens':>8} {'blocks':>9} {'direction':>17} {'method':>17} "
    f"{'ms':>9} {'p20':>9} {'p80':>9}  times faster than"
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark. What is not given comes from the suite, else from the device."""
    parser.add_argument("--suite", choices=[*SUITES, "all"], help="a named list of shapes")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 2048 4096 8192")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--heads", type=int, help="default: 4; on a GPU 12")
    parser.add_argument("--head-dim", type=int, help="default: 64; on a GPU 128")
    parser.add_argument("--sparsity", type=float, help="1 - critical fraction; default: 0.95")
    parser.add_argument("--negligible", type=float, help="default: 0.10")
    parser.add_argument("--block-q", type=int, help="default: 64; on a GPU 128")
    parser.add_argument("--block-kv", type=int, help="default: 64; on a GPU 128")
    parser.add_argument("--map", nargs="+", choices=["uniform", "skewed"], default=["uniform"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS])
    parser.add_argument("--directions", nargs="+", choices=[*FLOPS])
    parser.add_argument("--dtype", choices=[str(d).split(".")[1] for d in TOLERANCE])
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=11, help="on a CPU")
    parser.add_argument(
        "--budget-ms", type=float, default=200.0, help="on a GPU: milliseconds of repeats"
    )
    parser.add_argument("--max-seconds", type=float, help="start no measurement after this long")
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = _with_defaults(options, device)
    skewed = "skewed" if "skewed" in options.map else None
    label = "-".join(part for part in (options.suite, skewed) if part)
    file = results_file(options, "kernels", seed=SEED, label=label)
    session = _Session(options, device, file)
    print(HEAD)
    try:
        for point, methods in points_of(options, device).items():
            session.measure_point(point, methods)
    finally:
        if file is not None and file.path.exists():
            print(f"recorded in {file.path}")
        if session.left_out:
            print(f"left out after {options.max_seconds} s:", file=sys.stderr)
            print("\n".join(f"  {what}" for what in session.left_out), file=sys.stderr)
    return session.status


def _with_defaults(options: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The options with those filled in that do not depend on a suite."""
    filled = argparse.Namespace(**vars(options))
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    if options.suite is None:
        for name, value in (DEFAULTS | defaults).items():
            if getattr(options, name) is None:
                setattr(filled, name, value)
    filled.directions = options.directions or defaults["directions"]
    filled.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return filled


def points_of(options: argparse.Namespace, device: torch.device) -> dict[Point, tuple[str, ...]]:
    """Points to measure, each with its methods; options given by hand override a suite's."""
    if options.suite:
        base = plan(options.suite)
    else:
        base = {Point(1, 1, 1, 1): EVERYTHING}
    given = {n: getattr(options, n) for n in OF_A_POINT if getattr(options, n) is not None}
    found: dict[Point, tuple[str, ...]] = {}
    for point, of_suite in base.items():
        for tokens in options.tokens or [point.tokens]:
            for kind in options.map:
                changed = replace(point, tokens=tokens, map=kind, **given)
                methods = tuple(options.methods or of_suite)
                if device.type != "cuda" and not options.methods:
                    methods = ("sdpa", "sla" if kind == "uniform" else "sla_given_map")
                wanted = (*found.get(changed, ()), *methods)
                # Exact ones come first: the others' ratios need them.
                order = [n for n in METHODS if n in wanted and METHODS[n].takes(kind)]
                found[changed] = tuple(order)
    return grouped(found)


@dataclass
class _Session:
    """State of a run: what was measured, how it ended."""

    options: argparse.Namespace
    device: torch.device
    file: ResultsFile | None
    status: int = 0
    left_out: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    # Times of exact methods, by shape; None where there is none.
    exact: dict[tuple[Shape, str, str], float | None] = field(default_factory=dict)
    gradients: dict[Any, float | str] = field(default_factory=dict)
    tensors: tuple[Shape, tuple[Tensor, ...]] | None = None

    def measure_point(self, point: Point, names: tuple[str, ...]) -> None:
        """All methods at one point."""
        wanted = [
            n for n in names if (point.shape, n, self.options.directions[0]) not in self.exact
        ]
        if not wanted or self._is_late(point, wanted):
            return
        inputs, failure = self._inputs(point)
        for name in wanted:
            if not self._is_late(point, [name]):
                self._measure_method(point, name, inputs, failure)

    def _inputs(self, point: Point) -> tuple[Inputs | None, str | None]:
        try:
            if self.tensors is None or self.tensors[0] != point.shape:
                self.tensors = None  # frees the last shape's first
                dtype = getattr(torch, self.options.dtype)
                self.tensors = point.shape, make_tensors(point, self.device, dtype, SEED)
            return make_inputs(point, self.tensors[1], SEED), None
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError):
                self.status = 1
            return None, self._failure(error)

    def _measure_method(
        self, point: Point, name: str, inputs: Inputs | None, failure: str | None
    ) -> None:
        method = METHODS[name]
        errors: dict[str, str | None] = dict.fromkeys(self.options.directions, failure)
        accuracy: dict[str, float | None] = dict.fromkeys(ACCURACY)
        call: Callable[[], Tensor] | None = None
        if inputs is not None:
            call = self._prepare(point, name, inputs, errors, accuracy)
        for direction in self.options.directions:
            row = self._describe(point, name, direction, inputs) | accuracy
            row["error"] = errors[direction]
            if inputs is not None and call is not None and row["error"] is None:
                if self._is_late(point, [name], direction):
                    continue
                try:
                    row |= self._time(call, method, inputs, direction)
                except Exception as error:
                    row["error"] = self._failure(error, method)
            if method.kind == "exact" and inputs is not None:
                self.exact[point.shape, name, direction] = row["ms_median"]
            baselines = {n: self.exact.get((point.shape, n, direction)) for n in EXACT_METHODS}
            row |= derive(row, baselines)
            if self.file is not None:
                self.file.append(row)
            print(line(row), flush=True)

    def _prepare(
        self,
        point: Point,
        name: str,
        inputs: Inputs,
        errors: dict[str, str | None],
        accuracy: dict[str, float | None],
    ) -> Callable[[], Tensor] | None:
        """The function to time, checked; fills in errors by direction, and the accuracy found."""
        method = METHODS[name]
        reason = method.unavailable_reason(inputs)
        if reason is not None:
            errors.update(dict.fromkeys(errors, f"unavailable: {reason}"))
            return None
        if method.kind != "exact" and set(errors) != {"forward"}:
            found = self._check_gradients(point, name, inputs)
            if isinstance(found, str):
                errors.update({d: found for d in errors if d != "forward"})
            else:
                accuracy["gradient_error"] = found
        try:
            call = method.prepare(inputs)
            if method.routes:
                accuracy["routing_mismatch"] = check_routing(inputs)
            if method.kind != "exact":
                accuracy["relative_error"] = check_forward(
                    call, method.kind, inputs, method.tolerance
                )
        except Exception as error:
            errors.update(dict.fromkeys(errors, self._failure(error, method)))
            return None
        return call

    def _check_gradients(self, point: Point, name: str, inputs: Inputs) -> float | str:
        """The error of a method's gradients, or why it fails; once a run for these blocks."""
        key = (name, point.block_q, point.block_kv, point.head_dim, point.map)
        if key not in self.gradients:
            try:
                self.gradients[key] = check_backward(METHODS[name], point, inputs.query, SEED)
            except Exception as error:
                self.gradients[key] = self._failure(error, METHODS[name])
        return self.gradients[key]

    def _time(
        self, call: Callable[[], Tensor], method: Method, inputs: Inputs, direction: str
    ) -> dict[str, Any]:
        step = make_step(call, inputs, direction)
        if self.device.type != "cuda":
            return quantiles(timing.cpu_times(step, self.options.repeats))
        row: dict[str, Any] = quantiles(timing.gpu_times(step, self.options.budget_ms))
        if direction != "backward":
            row["peak_extra_bytes"] = timing.gpu_peak_bytes(step)
        # A longer step hides its launches; a backward alone cannot be captured without its forward.
        if direction == "forward" and row["ms_median"] < GRAPH_BELOW_MS:
            try:
                row["ms_graph"] = timing.gpu_graph_ms(step, self.options.budget_ms)
            except Exception as error:
                print(f"no CUDA graph: {error}", file=sys.stderr)
        if method.is_ours and direction != "forward_backward":
            try:
                row["stages"] = timing.gpu_stages(step)
            except Exception as error:  # a machine may forbid profiling; the times stand
                print(f"no stages: {error}", file=sys.stderr)
        return row

    def _describe(
        self, point: Point, name: str, direction: str, inputs: Inputs | None
    ) -> dict[str, Any]:
        """The fields of a row that say what was measured; None where one has no meaning."""
        method = METHODS[name]
        is_exact = method.kind == "exact"
        fractions = None if is_exact or inputs is None else inputs.block_map.fractions()
        numbers = {
            "sparsity": point.sparsity,
            "critical": point.critical,
            "negligible": point.negligible,
            "block_q": point.block_q,
            "block_kv": point.block_kv,
            "feature_map": "softmax" if method.kind == "whole" else None,
            "map": point.map,
        }
        return {
            "batch": point.batch,
            "heads": point.heads,
            "tokens": point.tokens,
            "head_dim": point.head_dim,
            "dtype": self.options.dtype,
            **(dict.fromkeys(numbers) if is_exact else numbers),
            "critical_measured": fractions and fractions["critical"],
            "device": self.device.type,
            "suite": self.options.suite,
            "method": name,
            "direction": direction,
            "ms_median": None,
            "ms_p20": None,
            "ms_p80": None,
            "ms_graph": None,
            "peak_extra_bytes": None,
            "stages": None,
            "error": None,
        }

    def _is_late(self, point: Point, names: list[str], direction: str | None = None) -> bool:
        limit = self.options.max_seconds
        if limit is None or time.monotonic() - self.start < limit:
            return False
        blocks = f"{point.block_q}x{point.block_kv}"
        what = f"{point.heads} x {point.tokens} tokens, {point.sparsity:.0%}, {blocks}, {point.map}"
        self.left_out.append(f"{what}: {', '.join(names)} {direction or ''}".rstrip())
        return True

    def _failure(self, error: Exception, method: Method | None = None) -> str:
        """What a row says of an exception; decides the exit status; gives memory back."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, WrongResultError):
            text, self.status = str(error), 1
        elif isinstance(error, torch.OutOfMemoryError):
            text = "out of memory"
        elif method is not None and method.is_ours:
            self.status = 1
        error.__traceback__ = None  # its frames hold tensors
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return text


def make_step(call: Callable[[], Tensor], inputs: Inputs, direction: str) -> timing.Step:
    """The function to time: forward without a graph, gradients alone, or both."""
    leaves = inputs.leaves
    grad = torch.randn_like(inputs.query)  # its layout too: (B, N, H, D) seen through a transpose

    def forward() -> object:
        with torch.no_grad():
            return call()

    def forward_backward() -> object:
        return torch.autograd.grad(call(), leaves, grad, allow_unused=True)

    if direction == "forward":
        return forward
    if direction == "forward_backward":
        return forward_backward
    output = call()

    def backward() -> object:
        return torch.autograd.grad(output, leaves, grad, retain_graph=True, allow_unused=True)

    return backward


def quantiles(times: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"ms_median": statistics.median(times), "ms_p20": fifths[0], "ms_p80": fifths[-1]}


def derive(row: Mapping[str, Any], baselines: Mapping[str, float | None]) -> dict[str, Any]:
    """Fields computed from a row and the times of the exact methods, same shape and direction.

    tflops_full: operations of full attention, 4 B H N^2 D in a forward, over this method's time
    (the paper's Figure 6a). tflops_computed: those of the critical blocks alone over the time.
    floor_ratio: time over the critical fraction of cuDNN's time. ratio_*: that method's time over
    this one's. All None where there is no time.
    """
    ms = row["ms_median"]
    density = row["critical_measured"] if row["critical_measured"] is not None else 1.0
    size = row["batch"] * row["heads"] * row["tokens"] ** 2 * row["head_dim"]
    full = 4 * size * FLOPS[row["direction"]]
    cudnn = baselines.get("cudnn")
    is_sparse = row["critical_measured"] is not None
    return {
        "tflops_full": full / ms / 1e9 if ms else None,
        "tflops_computed": density * full / ms / 1e9 if ms else None,
        "floor_ratio": ms / (density * cudnn) if ms and cudnn and is_sparse else None,
        **{f"ratio_{name}": time / ms if ms and time else None for name, time in baselines.items()},
    }


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed; our methods' kernels follow, each with its share."""
    blocks = f"{row['block_q']}x{row['block_kv']}" if row["block_q"] else ""
    what = f"{row['tokens']:>8} {blocks:>9} {row['direction']:>17} {row['method']:>17}"
    if row["ms_median"] is None:
        return f"{what} {row['error']}"
    times = " ".join(f"{row[key]:9.3f}" for key in ("ms_median", "ms_p20", "ms_p80"))
    found = {name: row[f"ratio_{name}"] for name in EXACT_METHODS if name != row["method"]}
    ratios = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in found.items() if ratio)
    lines = [f"{what} {times}  {ratios}".rstrip()]
    stages: Mapping[str, float] = row["stages"] or {}
    total = sum(stages.values())
    lines += [f"{ms:58.3f} ms {ms / total:6.1%}  {name}" for name, ms in stages.items() if ms]
    return "\n".join(lines)
