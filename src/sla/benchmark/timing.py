"""Times, memory and kernels of a function: by the clock on a CPU, by CUDA events on a GPU."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

CPU_WARM_UP = 2
GPU_WARM_UP_MS = 50.0
GPU_REPEATS = (3, 500)  # fewest and most
FLUSHED_BYTES = 256 * 2**20  # more than any L2 cache
PROFILED_ITERATIONS = 3

Step = Callable[[], object]


def cpu_times(step: Step, repeats: int) -> list[float]:
    """Milliseconds of each repeat, after two that warm up."""
    times = []
    for repeat in range(repeats + CPU_WARM_UP):
        start = time.perf_counter()
        step()
        if repeat >= CPU_WARM_UP:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def repeats_within(budget_ms: float, each_ms: float, fewest: int, most: int) -> int:
    """How often a step of `each_ms` fits the budget, within bounds."""
    return max(fewest, min(most, round(budget_ms / max(each_ms, 1e-3))))


def gpu_times(step: Step, budget_ms: float) -> list[float]:
    """Milliseconds of each repeat between CUDA events, each after the L2 cache was flushed."""
    step()  # compiles and tunes
    cache = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    each = _event_times(step, cache, 1)[0]
    if each * GPU_REPEATS[0] < budget_ms:
        _event_times(step, cache, repeats_within(GPU_WARM_UP_MS, each, 1, 50))
        each = sorted(_event_times(step, cache, 3))[1]
    return _event_times(step, cache, repeats_within(budget_ms, each, *GPU_REPEATS))


def gpu_graph_ms(step: Step, budget_ms: float) -> float:
    """Median time of a step recorded in a CUDA graph: without what Python takes to launch it."""
    # Capture wants the allocations of a first run behind it, and a stream of its own.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = sorted(gpu_times(graph.replay, budget_ms))
    return times[len(times) // 2]


def _event_times(step: Step, cache: torch.Tensor, repeats: int) -> list[float]:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in zip(starts, ends, strict=True):
        cache.zero_()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def gpu_peak_bytes(step: Step) -> int:
    """Most memory allocated at once during a step, beyond what was allocated before it.

    Results count (output, or gradients); inputs and the output's gradient do not.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def gpu_stages(step: Step) -> dict[str, float]:
    """Kernel name to milliseconds in one step, longest first; the L2 cache is warm here."""

    def steps() -> None:
        for _ in range(PROFILED_ITERATIONS):
            step()

    kernels = [(name, (end - start) / 1e3) for name, start, end in gpu_kernels(steps)]
    return aggregate(kernels, PROFILED_ITERATIONS)


def gpu_kernels(step: Step) -> list[tuple[str, float, float]]:
    """Kernels of a step: name, start and end in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def aggregate(kernels: Iterable[tuple[str, float]], iterations: int) -> dict[str, float]:
    """Sum of times by kernel function, of one iteration, longest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, ms in kernels:
        sums[function_name(name)] += ms / iterations
    ordered = sorted(sums.items(), key=lambda item: item[1], reverse=True)
    return {name: round(ms, 5) for name, ms in ordered}


def function_name(kernel: str) -> str:
    """`void at::f<4, g<int> >(int)` to `at::f`; a Triton kernel's name stays as it is."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0].strip() or kernel
