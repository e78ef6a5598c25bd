"""The benchmark measures, checks and records."""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sla.benchmark import kernels, timing
from sla.benchmark.__main__ import main
from sla.benchmark.methods import METHODS, Inputs, Method, make_inputs, make_tensors, skewed_map
from sla.benchmark.suites import SUITES, Point, plan

SMALL = ["kernels", "--tokens", "256", "--heads", "1", "--repeats", "3", "--device", "cpu"]
CPU = torch.device("cpu")


def rows_in(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in folder.glob("kernels/*.jsonl"):
        head, *rows = (json.loads(line) for line in path.read_text().splitlines())
        assert head["provenance"]["seed"] == 0
        found += rows
    return found


def test_rows_are_printed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--record"]) == 0
    rows = rows_in(tmp_path / "results")
    assert {(row["method"], row["direction"]) for row in rows} == {
        (method, direction)
        for method in ("sdpa", "sla")
        for direction in ("forward", "forward_backward")
    }
    for row in rows:
        assert row["tokens"] == 256
        assert row["critical"] == (0.05 if row["method"] == "sla" else None)
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["error"] is None
        assert row["tflops_full"] > 0
    by = {(row["method"], row["direction"]): row for row in rows}
    sla, sdpa = by["sla", "forward"], by["sdpa", "forward"]
    assert sla["ratio_sdpa"] == pytest.approx(sdpa["ms_median"] / sla["ms_median"])
    assert sla["critical_measured"] == 1 / 4
    assert sla["routing_mismatch"] == 0
    assert sla["relative_error"] < 1e-5
    assert sla["gradient_error"] < 1e-5
    assert "sla" in capsys.readouterr().out


def test_all_methods_directions_and_maps(tmp_path: Path) -> None:
    names = ["sdpa", "cudnn", "sla", "sla_given_map", "sparse_only"]
    directions = ["forward", "backward", "forward_backward"]
    options = ["--methods", *names, "--directions", *directions, "--map", "uniform", "skewed"]
    assert main([*SMALL, *options, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    keys = [(row["method"], row["map"], row["direction"]) for row in rows]
    assert len(keys) == len(set(keys))
    # Exact attention is measured once a shape; an operator that routes has no skewed map.
    assert {key[:2] for key in keys} == {
        *(("sdpa", None), ("cudnn", None), ("sla", "uniform")),
        *((name, m) for name in ("sla_given_map", "sparse_only") for m in ("uniform", "skewed")),
    }
    for row in rows:
        assert (row["ms_median"] is None) == (row["method"] == "cudnn")
    assert {row["error"] for row in rows} == {None, "unavailable: needs a CUDA device"}


def put(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    monkeypatch.setitem(METHODS, name, replace(METHODS[name], **changes))


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, "sla", prepare=lambda inputs: lambda: inputs.query * 2)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    wrong = [row for row in rows_in(tmp_path) if row["method"] == "sla"]
    assert len(wrong) == 2
    for row in wrong:
        assert row["ms_median"] is None
        assert "wrong result" in row["error"]
    assert "wrong result" in capsys.readouterr().out


def test_fp8_has_a_tolerance_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*SMALL, "--methods", "sparse_only_fp8", "--directions", "forward"]
    assert main([*options, "--out", str(tmp_path / "plain")]) == 0
    (row,) = rows_in(tmp_path / "plain")
    assert row["error"].startswith("unavailable: needs a CUDA device of compute capability 8.9")
    # Simulated, it would be timed: its error is FP8's, above float32's tolerance.
    put(monkeypatch, "sparse_only_fp8", unavailable_reason=lambda inputs: None)
    assert main([*options, "--out", str(tmp_path / "simulated")]) == 0
    (row,) = rows_in(tmp_path / "simulated")
    assert row["ms_median"] > 0
    assert 0.01 < row["relative_error"] < 0.08


def test_wrong_gradients_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = METHODS["sla"].prepare

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        detached = replace(inputs, value=inputs.value.detach())
        return lambda: right(detached)() + 0 * inputs.value

    put(monkeypatch, "sla", prepare=prepare)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    by = {row["direction"]: row for row in rows_in(tmp_path) if row["method"] == "sla"}
    assert by["forward"]["ms_median"] > 0
    assert by["forward_backward"]["ms_median"] is None
    assert "gradients" in by["forward_backward"]["error"]


def test_wrong_routing_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_map(point: Point, tensors: tuple[Tensor, ...], seed: int) -> Inputs:
        inputs = make_inputs(point, tensors, seed)
        return replace(inputs, block_map=skewed_map(point, CPU, seed))

    monkeypatch.setattr(kernels, "make_inputs", other_map)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    wrong = [row for row in rows_in(tmp_path) if row["method"] == "sla"]
    assert all("routing" in row["error"] for row in wrong)


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory"),
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
    ],
)
def test_a_failing_method_gives_a_row(
    error: Exception,
    text: str,
    is_ours: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Tensor:
        raise error

    fake = Method(lambda inputs: fail, "exact", lambda inputs: None, is_ours=is_ours)
    monkeypatch.setitem(METHODS, "cudnn", fake)
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    status = main([*SMALL, "--methods", "cudnn", "sla", "--out", str(tmp_path)])
    assert status == int(is_ours and not out_of_memory)
    rows = rows_in(tmp_path)
    failed = [row for row in rows if row["method"] == "cudnn"]
    assert [row["error"] for row in failed] == [text, text]
    assert all(row["ms_median"] is None and row["tflops_full"] is None for row in failed)
    assert all(row["ms_median"] > 0 for row in rows if row["method"] == "sla")


def test_inputs_that_cannot_be_made_give_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Inputs:
        raise RuntimeError("no routing")

    monkeypatch.setattr(kernels, "make_inputs", fail)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    assert [row["error"] for row in rows_in(tmp_path)] == ["RuntimeError: no routing"] * 4


def test_rows_are_kept_when_the_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(inputs: Inputs) -> Callable[[], Tensor]:
        raise KeyboardInterrupt

    put(monkeypatch, "sla", prepare=interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--out", str(tmp_path)])
    assert {row["method"] for row in rows_in(tmp_path)} == {"sdpa"}


def test_no_run_writes_over_another(tmp_path: Path) -> None:
    for tokens in ("64", "128"):
        assert main([*SMALL, "--methods", "sdpa", "--tokens", tokens, "--out", str(tmp_path)]) == 0
    assert {row["tokens"] for row in rows_in(tmp_path)} == {64, 128}


def test_a_time_limit_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--max-seconds", "0", "--out", str(tmp_path)]) == 0
    assert rows_in(tmp_path) == []
    assert "256 tokens, 95%, 64x64, uniform: sdpa, sla" in capsys.readouterr().err


def test_suites() -> None:
    assert {point.shape for point in plan("wan-1.3b")} == {(1, 12, 32760, 128)}
    assert {point.shape for point in plan("wan-14b-720p")} == {(1, 40, 75600, 128)}
    for name in ("wan-1.3b", "wan-14b-720p"):
        assert [(p.block_q, p.block_kv) for p in plan(name)] == [(128, 128), (64, 64)]
    assert [p.tokens for p in plan("lengths")] == [4096 * 2**i for i in range(6)]
    assert [p.tokens for p in plan("break-even")] == [2304, 3072, 4096]
    assert [p.critical for p in plan("sparsities")] == [0.2, 0.1, 0.05, 0.03]
    assert [(p.block_q, p.block_kv) for p in plan("blocks")] == [
        *((64, 64), (128, 64), (64, 128), (128, 128))
    ]
    everything = plan("all")
    assert set(everything) == {p for suite in SUITES.values() for p in suite.points}
    shapes = [point.shape for point in everything]
    changes = sum(a != b for a, b in itertools.pairwise(shapes))
    assert changes == len(set(shapes)) - 1, "points of one shape lie together"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_parser(parser)
    return parser.parse_args(arguments)


def test_options_override_a_suite() -> None:
    given = options("--suite", "blocks", "--block-q", "64", "--tokens", "512", "--map", "skewed")
    found = kernels.points_of(given, torch.device("cuda"))
    assert [(p.tokens, p.block_q, p.block_kv) for p in found] == [(512, 64, 64), (512, 64, 128)]
    for point, methods in found.items():
        assert (point.heads, point.map) == (12, "skewed")
        assert methods == ("flash_attention_2", "cudnn", "sla_given_map", "sparse_only")


def test_the_skewed_map_has_sinks_and_equal_counts() -> None:
    point = Point(1, 2, 210 * 16 - 5, 8, block_q=32, block_kv=16, map="skewed")
    labels = skewed_map(point, CPU, 0).labels
    assert labels.shape == (1, 2, 105, 210)
    assert bool((labels[..., :2] == 1).all())
    assert bool(((labels == 1).sum(-1) == 10).all())
    assert bool(((labels == -1).sum(-1) == 21).all())
    others = (labels[..., 2:] == 1).sum(-2)
    assert 0 < int(others.max()) < 105 / 2
    small = skewed_map(replace(point, tokens=16), CPU, 0).labels
    assert small.tolist() == [[[[1]], [[1]]]]


def test_derived_fields() -> None:
    row = {
        "batch": 1,
        "heads": 12,
        "tokens": 32760,
        "head_dim": 128,
        "direction": "forward",
        "ms_median": 1.14,
        "critical_measured": 0.05,
    }
    exact = {"flash_attention_2": 18.0, "cudnn": 11.4, "sdpa": None}
    found = kernels.derive(row, exact)
    assert found["tflops_full"] == pytest.approx(6.5942 / 1.14e-3, rel=1e-3)
    assert found["tflops_computed"] == pytest.approx(0.05 * found["tflops_full"])
    assert found["floor_ratio"] == pytest.approx(2.0)
    assert found["ratio_cudnn"] == pytest.approx(10.0)
    assert found["ratio_flash_attention_2"] == pytest.approx(18 / 1.14)
    assert found["ratio_sdpa"] is None
    backward = kernels.derive(row | {"direction": "backward"}, exact)
    assert backward["tflops_full"] == pytest.approx(2.5 * found["tflops_full"])
    dense = kernels.derive(row | {"critical_measured": None}, exact)
    assert dense["tflops_computed"] == dense["tflops_full"]
    assert dense["floor_ratio"] is None
    assert set(kernels.derive(row | {"ms_median": None}, exact).values()) == {None}


def test_the_steps_compute_what_their_names_say() -> None:
    point = Point(1, 1, 128, 8, block_q=32, block_kv=32)
    inputs = make_inputs(point, make_tensors(point, CPU, torch.float32, 0), 0)
    torch.manual_seed(0)
    call = METHODS["sla"].prepare(inputs)
    output: Any = kernels.make_step(call, inputs, "forward")()
    assert not output.requires_grad
    gradients = []
    for direction in ("backward", "forward_backward"):
        torch.manual_seed(0)
        step = kernels.make_step(call, inputs, direction)
        step()
        result: Any = step()  # the graph is kept
        gradients.append(result)
    assert len(gradients[0]) == 5
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other)


def test_kernels_are_summed_by_function() -> None:
    found = timing.aggregate(
        [
            ("void at::native::reduce<4, at::native::f<int> >(long)", 1.0),
            ("void at::native::reduce<2>(long)", 2.0),
            ("void (anonymous namespace)::softmax<float>(int)", 0.5),
            ("Memset (Device)", 0.25),
            ("_sparse_forward", 9.0),
        ],
        iterations=2,
    )
    assert found == {
        "_sparse_forward": 4.5,
        "at::native::reduce": 1.5,
        "softmax": 0.25,
        "Memset": 0.125,
    }
    assert list(found) == ["_sparse_forward", "at::native::reduce", "softmax", "Memset"]


class FakeEvent:
    """Each recorded a millisecond after the one before."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at - self.at


def test_gpu_times_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with CUDA's functions replaced."""
    cache = torch.ones(4)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: cache)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flushed = []

    def step() -> None:
        flushed.append(bool((cache == 0).all()))
        cache.fill_(1)

    assert timing.gpu_times(step, budget_ms=20) == [1.0] * 20
    assert flushed == [False, *[True] * (1 + 50 + 3 + 20)]
    flushed.clear()
    assert timing.gpu_times(step, budget_ms=2) == [1.0] * 3, "a slow step gets no warm-up"
    assert len(flushed) == 1 + 1 + 3

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 170)
    assert timing.gpu_peak_bytes(step) == 70


def test_repeats_fit_the_budget() -> None:
    assert timing.repeats_within(200, 2.0, 3, 500) == 100
    assert timing.repeats_within(200, 900.0, 3, 500) == 3
    assert timing.repeats_within(200, 0.0, 3, 500) == 500


def test_it_needs_torch_and_numpy_alone() -> None:
    """GPU machines may have neither the training stack nor what decodes videos."""
    absent = [
        "lightning",
        "omegaconf",
        "diffusers",
        "av",
        "decord",
        "PIL",
        "matplotlib",
        "sla.data",
    ]
    code = (
        "import sys, sla.benchmark.__main__, sla.results, sla.figures.tables\n"
        f"print([name for name in {absent} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
