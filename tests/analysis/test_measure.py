"""The measures of a whole capture as rows, methods among them, and the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.capture_files import Capture, Captured, CapturePlan, Moment, start_folder
from sla.analysis.capture_files import write_captured as write
from sla.analysis.capture_qkv import CaptureError
from sla.analysis.measure import HISTOGRAM_EDGES, MeasureConfig, evenly, measure
from sla.analysis.methods import Case, method_cases, method_error
from sla.analysis.routing import routing_recall
from sla.analysis.weights import attention_weights, drop_errors, stable_rank, weight_shares
from sla.attention import (
    FullConfig,
    LinearOnlyConfig,
    SLAConfig,
    SparseOnlyConfig,
    available_attention,
)
from sla.capture import main as capture_command
from sla.cli.main import main
from sla.config import load_experiment
from sla.models.dit import VideoDiT
from sla.models.families import family
from sla.models.testing import open_branches
from sla.results import read_all
from sla.training.build import build_networks, trained_part
from sla.training.testing import write_tiny_experiment

GRID, HEADS, DIM, TOKENS = (4, 4, 8), 2, 8, 128
SMALL = MeasureConfig(
    rows=1000,
    block=16,
    tiles=(None, (2, 2, 4)),
    method_critical=(0.25,),
    critical=(0.25, 0.5),
    branch_critical=(0.25,),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made_up(moment: Moment, seed: int, rows: int = TOKENS) -> Captured:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (2 * torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(3))
    return Captured(
        moment=moment,
        heads=(0, 1),
        grid=GRID,
        rows=torch.arange(rows),
        query=query[:, :rows].contiguous(),
        key=key,
        value=value,
        labels=None,
        error_l1=torch.tensor([0.25, 0.5]),
        error_l2=torch.tensor([0.25, 0.5]),
        exact_fraction=0.5,
    )


def plan(**changes: Any) -> CapturePlan:
    return CapturePlan(
        **{
            "samples": ({"kind": "clip"}, {"kind": "clip"}),
            "timesteps": (900.0, 100.0),
            "layers": (0, 3),
            "heads": (0, 1),
            "grid": GRID,
            "num_heads": HEADS,
            "head_dim": DIM,
            "query_blocks": None,
            "block": 16,
            "orders": (None,),
            "dtype": "float32",
            "values": True,
            "attention": asdict(FullConfig()),
            "probe": asdict(SLAConfig()),
            "probe_is_model": False,
            "weights": "w",
            "weights_sha256": "abcdef0123",
            "seed": 7,
            "config": {"model": {"name": "dit"}, "run": {"name": "r"}},
            **changes,
        }
    )


def write_capture(folder: Path, rows: int = TOKENS, **changes: Any) -> Capture:
    made = plan(**changes)
    for seed, moment in enumerate(start_folder(folder, made, {"command": "c", "commit": "k"})):
        captured = made_up(moment, seed, rows)
        if not made.values:
            captured = replace(captured, value=None)
        write(folder, captured, made, {})
    return Capture(folder)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return write_capture(tmp_path_factory.mktemp("captured") / "c")


@pytest.fixture(scope="module")
def rows(capture: Capture) -> list[dict[str, Any]]:
    return measure(capture, SMALL)


def row(rows: list[dict[str, Any]], measure: str, **values: Any) -> dict[str, Any]:
    (found,) = [
        r for r in rows if r["measure"] == measure and all(r[k] == v for k, v in values.items())
    ]
    return found


def test_rows_are_means_over_samples(capture: Capture, rows: list[dict[str, Any]]) -> None:
    place = {"layer": 3, "head": 1, "timestep": 100.0}
    found = [capture.read(Moment(sample, 100.0, 3)) for sample in (0, 1)]
    weights = [attention_weights(each.query[1], each.key[1]) for each in found]

    of_weights = row(rows, "weights", **place)
    expected = sum(weight_shares(w).above for w in weights) / 2
    assert of_weights["above"] == pytest.approx(expected, rel=1e-3)
    expected = sum(stable_rank(w) for w in weights) / 2
    assert of_weights["stable_rank"] == pytest.approx(expected, rel=1e-3)
    assert of_weights["probe_error_l1"] == 0.5

    curve = row(rows, "drop_error", **place)
    kept = [1 - s for s in curve["sparsity"]]
    errors = [drop_errors(w, f.value[1], kept) for w, f in zip(weights, found, strict=True)]  # type: ignore[index]
    expected = [(a.dropped + b.dropped) / 2 for a, b in zip(*errors, strict=True)]  # type: ignore[assignment]
    assert curve["dropped"] == pytest.approx(expected, rel=1e-3)
    assert curve["dropped"] == sorted(curve["dropped"])

    for order, tile in (("raster", None), ("2x2x4", (2, 2, 4))):
        recall = row(rows, "recall", order=order, **place)
        each = [
            routing_recall(
                f.query[1],
                f.key[1],
                f.rows,
                GRID,
                tile=tile,
                critical=(0.25, 0.5),
                block_q=16,
                block_kv=16,
            )
            for f in found
        ]
        assert recall["critical"] == [0.25, 0.5]
        assert recall["pooled"][0] == pytest.approx(sum(e[0].pooled for e in each) / 2, rel=1e-3)
        assert recall["blocks"] == [2, 4]


def test_there_is_a_row_of_means_over_everything(rows: list[dict[str, Any]]) -> None:
    for name in ("weights", "drop_error", "recall"):
        of_maps = [r for r in rows if r["measure"] == name and r["layer"] is not None]
        assert len(of_maps) == 2 * 2 * 2 * (2 if name == "recall" else 1)
    maps = [r["above"] for r in rows if r["measure"] == "weights" and r["layer"] is not None]
    mean = row(rows, "weights", layer=None)
    assert mean["maps"] == 8
    assert mean["above"] == pytest.approx(sum(maps) / 8, rel=1e-3)
    assert mean["above_sd"] == pytest.approx(torch.tensor(maps).std(correction=0).item(), rel=1e-2)
    histogram = row(rows, "histogram", layer=None)
    assert len(histogram["share"]) == len(HISTOGRAM_EDGES) - 1
    assert sum(histogram["share"]) == pytest.approx(1.0, rel=1e-3)
    described = row(rows, "capture")
    assert described["weights_sha256"] == "abcdef0123"
    assert (described["captured_rows"], described["rows"]) == (TOKENS, TOKENS)
    assert described["unsupported"] == {}
    json.dumps(rows, allow_nan=False)


def test_every_method_is_measured(rows: list[dict[str, Any]]) -> None:
    defaults = [r for r in rows if r["measure"] == "method" and r["default"]]
    assert {r["method"] for r in defaults} == set(available_attention())
    full = row(rows, "method", method="full", layer=None, timestep=None)
    assert full["exact_fraction"] == 1.0
    assert full["error_l1"] < 1e-5
    sparse = [r for r in rows if r["measure"] == "method" and r["method"] == "sparse_only"]
    assert {(r["layer"], r["timestep"]) for r in sparse} == {
        *((None, None), (0, None), (3, None)),
        *((None, 900.0), (None, 100.0)),
    }
    assert (
        row(rows, "method", method="linear_only", layer=None, timestep=None)["exact_fraction"] == 0
    )


def test_method_error_against_the_dense_definition(capture: Capture) -> None:
    captured = capture.read(capture.moments[0])
    config = SparseOnlyConfig(critical=0.25, block_q=16, block_kv=16, tile=(2, 2, 4))
    found = method_error(Case("x", config), captured, device="cpu")
    # The same tokens in tile order by hand.
    index = torch.arange(TOKENS).view(GRID)
    order = torch.cat(
        [
            index[f : f + 2, h : h + 2, w : w + 4].flatten()
            for f in (0, 2)
            for h in (0, 2)
            for w in (0, 4)
        ]
    )
    query, key = captured.query[:, order], captured.key[:, order]
    assert captured.value is not None
    value = captured.value[:, order]
    errors = []
    for head in range(HEADS):
        scores = query[head] @ key[head].T / DIM**0.5
        pooled = (
            query[head].unflatten(0, (8, 16)).mean(1) @ key[head].unflatten(0, (8, 16)).mean(1).T
        )
        keep = torch.zeros(8, 8, dtype=torch.bool).scatter_(1, pooled.topk(2).indices, True)
        keep = keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
        output = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1) @ value[head]
        exact = torch.softmax(scores, -1) @ value[head]
        errors.append(((output - exact).abs().sum() / exact.abs().sum()).item())
    assert found.error_l1 == pytest.approx(sum(errors) / HEADS, rel=1e-3)
    assert found.exact_fraction == pytest.approx(0.25)


def test_linear_attention_is_measured_against_exact(capture: Capture) -> None:
    captured = capture.read(capture.moments[0])
    found = method_error(Case("x", LinearOnlyConfig()), captured, device="cpu")
    assert captured.value is not None
    features = torch.softmax(captured.query, -1), torch.softmax(captured.key, -1)
    scores = features[0] @ features[1].transpose(-1, -2)
    output = scores / scores.sum(-1, keepdim=True) @ captured.value
    exact = scaled_dot_product_attention(captured.query, captured.key, captured.value)
    each = (output - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert found.error_l2 == pytest.approx(each.mean().item(), rel=1e-3)


def test_sweeps_are_named_and_in_range() -> None:
    cases = method_cases((0.05, 1.0))
    assert {c.config.critical for c in cases if c.label == "vsa" and not c.default} == {0.05, 1.0}  # type: ignore[attr-defined]
    assert len({(c.label, c.default, repr(c.config)) for c in cases}) == len(cases)


def test_rows_are_evenly_spaced() -> None:
    assert evenly(torch.arange(5), 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly(torch.arange(10), 2).tolist() == [2, 7]
    assert evenly(torch.arange(4), 1).tolist() == [2]


def test_what_a_capture_lacks_is_named(tmp_path: Path) -> None:
    part = write_capture(tmp_path / "part", rows=32)
    with pytest.raises(CaptureError, match=r"holds 32 of 128 queries; .*--query-blocks all"):
        measure(part, replace(SMALL, tiles=(None,)))
    found = measure(part, replace(SMALL, tiles=(None,), method_critical=()))
    assert row(found, "capture")["captured_rows"] == 32
    assert not [r for r in found if r["measure"] == "method"]
    with pytest.raises(CaptureError, match=r"no block of 16 queries in tiles of 4x2x2"):
        measure(part, replace(SMALL, tiles=((4, 2, 2),), method_critical=()))
    without = write_capture(tmp_path / "without", values=False)
    with pytest.raises(CaptureError, match="holds no values"):
        measure(without, SMALL)
    with pytest.raises(CaptureError, match="rows is 0"):
        MeasureConfig(rows=0)


# ---------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny experiment with weights; returns the config of its SLA arm."""
    folder = tmp_path_factory.mktemp("experiment")
    config = write_tiny_experiment(folder)
    loaded = load_experiment(config)
    model, text_encoder = build_networks(loaded)
    assert isinstance(model, VideoDiT)
    open_branches(model)
    family("dit").export(folder / "weights", model, trained_part(text_encoder), {}, None)
    (weights,) = (folder / "weights").rglob("*.safetensors")
    sla = config.with_name("sla.yaml")
    sla.write_text(sla.read_text().replace("run:\n", f"run:\n  init_weights: {weights}\n", 1))
    return sla


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_commands_from_model_to_record(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "capture"
    command = ("capture", "--config", experiment, "--out", out, "--timesteps", "800,200")
    assert call(*command, "--layers", "1") == 0
    assert "2 files written" in capsys.readouterr().out
    assert call(*command, "--layers", "1") == 0
    assert "0 files written, 2 in" in capsys.readouterr().out
    assert call(*command) == 2
    assert "differs in layers" in capsys.readouterr().err
    capture = Capture(out)
    assert capture.plan.timesteps == (800.0, 200.0)
    assert capture.plan.samples[0]["caption"].startswith("A square moves")
    assert capture.plan.probe["name"] == "sla"
    assert len(capture.plan.weights_sha256) == 64
    labels = capture.read(capture.moments[0]).labels
    assert labels is not None
    assert set(labels.unique().tolist()) == {-1, 0, 1}

    assert call("analyse", "--capture", out, "--record", "--rows", "64") == 0
    printed = capsys.readouterr().out
    assert "above 1/N" in printed
    (recorded,) = read_all("analysis", tmp_path / "results")
    assert recorded.provenance["command"]
    described = row(recorded.rows, "capture")
    assert described["rows"] == 64
    assert described["weights"] == capture.plan.weights
    assert "stage" not in described

    stage = ("--record", "--stage", "after 3 steps", "--no-methods", "--rows", "64")
    assert call("analyse", "--capture", out, *stage) == 0
    found = [
        row(r.rows, "capture").get("stage") for r in read_all("analysis", tmp_path / "results")
    ]
    assert sorted(found, key=str) == [None, "after 3 steps"]


def test_prompts_are_captured_at_the_samplers_steps(
    experiment: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "capture"
    command = ("capture", "--config", experiment, "--out", out, "--prompt", "a square")
    assert call(*command, "--timesteps", "700", "sampling.steps=4", "--heads", "1") == 0
    capture = Capture(out)
    # Of 4 Euler steps, shifted by 3: sigma 1, 0.9, 0.75, 0.5.
    assert capture.plan.timesteps == (pytest.approx(750.0, abs=0.1),)
    assert len(capture.moments) == 2
    assert capture.plan.samples[0]["kind"] == "prompt"
    assert capture.read(capture.moments[0]).query.shape == (1, 256, 16)
    del capsys


def test_the_module_is_the_command(capsys: Any) -> None:
    assert capture_command(["--config", "nowhere.yaml"]) == 2
    assert "no config file nowhere.yaml" in capsys.readouterr().err


def test_bad_calls_are_refused(experiment: Path, tmp_path: Path, capsys: Any) -> None:
    command = ("capture", "--config", experiment, "--out", tmp_path / "c")
    for arguments, message in (
        (("--timesteps", "1200"), "--timesteps holds [1200.0]"),
        (("--max-gib", "0"), "--max-gib is 0.0"),
        (("--max-gib", "1e-6"), "more than --max-gib"),
        (("--layers", "9"), "the model has layers 0 to 1"),
        (("--clips", "3"), "there are 2 validation clips"),
    ):
        assert call(*command, *arguments) in (1, 2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert call("analyse", "--capture", tmp_path / "c") == 1
    assert "make capture" in capsys.readouterr().err
    assert call(*command, "--query-blocks", "1", "--timesteps", "500") == 0
    analyse = ("analyse", "--capture", tmp_path / "c", "--no-methods")
    for arguments, message in (
        (("--block", "0"), "block is 0"),
        (("--block", "300"), "a smaller --block"),
        (("--rows", "0"), "rows is 0"),
    ):
        assert call(*analyse, *arguments) == 2
        assert message in capsys.readouterr().err


def test_branches_are_taken_apart(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    found = [r for r in rows if r["measure"] == "branches"]
    assert {(r["order"], r["layer"], r["timestep"]) for r in found} == {
        (order, *place)
        for order in ("raster", "2x2x4")
        for place in ((None, None), (0, None), (3, None), (None, 900.0), (None, 100.0))
    }
    whole = row(rows, "branches", order="raster", layer=None, timestep=None)
    layers = [row(rows, "branches", order="raster", layer=i, timestep=None) for i in (0, 3)]
    assert whole["critical"] == [0.25]
    for name in ("mass", "sparse", "mixed", "proj_head", "proj_layer", "mixed_proj_layer"):
        mean = (layers[0][name][0] + layers[1][name][0]) / 2
        assert whole[name] == [pytest.approx(mean, rel=1e-3)]

    single = write_capture(tmp_path / "c", samples=({"kind": "clip"},))
    config = replace(SMALL, tiles=(None,), method_critical=())
    (whole, *_) = [r for r in measure(single, config) if r["measure"] == "branches"]
    assert "sparse" in whole
    assert "proj_layer" not in whole  # a fit to the only sample would say too much
