"""`python -m sla eval`: videos made once, scores against full attention, the paper's apart."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sla_eval.backbones import get_backbone, registry
from sla_eval.dino import DinoViT

from sla.benchmark import eval as throughput
from sla.benchmark.__main__ import main as benchmark
from sla.cli import evaluate, videos
from sla.cli.main import main
from sla.config import load_experiment
from sla.figures.quality import COLUMNS, QUALITY
from sla.files import file_sha256
from sla.flops import CASES
from sla.models.checkpoint import save_model
from sla.training.build import build_networks
from sla.training.testing import write_tiny_experiment

QUICK = [
    "eval.metrics=[psnr,temporal_flickering]",
    "eval.prompts=builtin",
    "eval.num_prompts=3",
    "eval.validation=false",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with SLA and untrained weights of full attention to start from."""
    path = write_tiny_experiment(tmp_path_factory.mktemp("tiny"))
    experiment = load_experiment(path)
    save_model(path.parent / "start.safetensors", *build_networks(experiment))
    return path.with_name("sla.yaml")


def call(config: Path, out: Path, *more: str) -> list[str]:
    start = f"run.init_weights={config.parent / 'start.safetensors'}"
    return ["eval", "--config", str(config), "--out", str(out), start, *more]


@pytest.fixture(scope="module")
def out(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two methods gave."""
    folder = tmp_path_factory.mktemp("eval")
    assert main(call(config, folder, *QUICK, "eval.methods=[full,sla,sparse_only]")) == 0
    return folder


def test_every_method_has_a_report_and_a_line(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    labels = ["full (reference)", "sla (not fine-tuned)", "sparse_only (not fine-tuned)"]
    assert list(report["methods"]) == labels
    assert len(report["prompts"]) == 3
    records = list(csv.DictReader((out / "table.csv").open()))
    assert {record["method"] for record in records} == set(labels)
    for folder in ("full-reference", "sla-not-fine-tuned", "sparse-only-not-fine-tuned"):
        own = json.loads((out / f"{folder}.json").read_text())
        assert own == {"method": own["method"], **report["methods"][own["method"]]}
        assert len({out / video for video in own["videos"] if (out / video).is_file()}) == 3
        videos = sorted(path.name for path in (out / folder).glob("*.mp4"))
        assert len(videos) == 3
        flicker = own["scores"]["metrics"]["temporal_flickering"]
        assert list(flicker["per_video"]) == videos
        assert flicker["low"] <= flicker["mean"] <= flicker["high"]
        psnr = own["scores"]["metrics"]["psnr"]
        assert ("not_available" in psnr) == (folder == "full-reference")
    for name in ("table", "differences", "paper"):
        assert (out / f"{name}.md").read_text().startswith("| method | ")
        assert r"\begin{tabular}" in (out / f"{name}.tex").read_text()


def test_differences_are_of_the_same_prompt_and_seed(out: Path) -> None:
    methods = json.loads((out / "report.json").read_text())["methods"]
    full = methods["full (reference)"]["scores"]
    for label in list(methods)[1:]:
        ours = methods[label]["scores"]
        assert ours["videos"] == full["videos"]
        assert [video["seed"] for video in ours["videos"].values()] == [0, 1, 2]
        difference = methods[label]["difference"]["temporal_flickering"]
        for file, value in difference["per_video"].items():
            pair = (s["metrics"]["temporal_flickering"]["per_video"][file] for s in (ours, full))
            assert value == pytest.approx(float(next(pair)) - float(next(pair)), abs=1e-12)
        assert "psnr" not in methods[label]["difference"]


def test_the_papers_numbers_stand_apart(out: Path) -> None:
    ours = csv.DictReader((out / "table.csv").open()).fieldnames or []
    paper = csv.DictReader((out / "paper.csv").open()).fieldnames or []
    assert set(ours) & set(paper) == {"method"}
    heads = [(out / f"{name}.md").read_text().splitlines()[0] for name in ("table", "paper")]
    assert not (set(heads[0].split("|")[2:-1]) & set(heads[1].split("|")[2:-1]))
    assert heads[1].count("paper's") == len(COLUMNS) + 2
    assert "not measured by us" in evaluate.paper_table().caption
    labels = [case.label for case in CASES if case.source.endswith("Tables 1 and 2")]
    assert list(QUALITY) == labels
    assert all(len(values) == len(COLUMNS) for values in QUALITY.values())


def test_a_second_call_makes_only_what_is_missing(
    config: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, int]] = []
    plain = videos.sample_videos

    def counting(experiment, module, prompts, *more):  # type: ignore[no-untyped-def]
        made.append((experiment.attention.name, experiment.sampling.seed))
        return plain(experiment, module, prompts, *more)

    monkeypatch.setattr(videos, "sample_videos", counting)
    before = {path: path.read_bytes() for path in out.glob("*/*.mp4")}
    table = (out / "table.csv").read_text()
    files = sorted((out / "sla-not-fine-tuned").glob("*.mp4"))
    files[0].unlink()  # lost
    files[1].write_bytes(b"cut off")  # not what its sidecar says
    files[2].with_suffix(".json").unlink()  # interrupted between video and sidecar
    sparse = sorted((out / "sparse-only-not-fine-tuned").glob("*.json"))
    sparse[1].write_text("{")
    three = "eval.methods=[sla,sparse_only]"
    assert main(call(config, out, *QUICK, three)) == 0
    assert made == [("sla", 0), ("sla", 1), ("sla", 2), ("sparse_only", 1)]
    assert {path: path.read_bytes() for path in before} == before, "same seeds, same videos"
    assert (out / "table.csv").read_text() == table
    assert "full (reference): 3 videos are there already" in capsys.readouterr().out

    made.clear()
    longer = [item.replace("num_prompts=3", "num_prompts=4") for item in QUICK]
    assert main(call(config, out, *longer, "eval.methods=[sla]", "sampling.steps=1")) == 0
    assert len(made) == 8, "other sampling: nothing is taken over"


def test_unreadable_videos_are_listed(config: Path, tmp_path: Path) -> None:
    arguments = call(config, tmp_path, *QUICK)
    assert main(arguments) == 0
    broken = sorted((tmp_path / "sla-not-fine-tuned").glob("*.mp4"))[1]
    broken.write_bytes(b"not a video" * 100)
    sidecar = broken.with_suffix(".json")
    values = json.loads(sidecar.read_text())
    values["video_sha256"] = file_sha256(broken)
    sidecar.write_text(json.dumps(values))
    assert main(arguments) == 0
    scores = json.loads((tmp_path / "sla-not-fine-tuned.json").read_text())["scores"]
    assert list(scores["unreadable"]) == [broken.name]
    assert scores["metrics"]["psnr"]["count"] == 2


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["eval.metrics=[psmr]"], 2, "unknown metric 'psmr'; did you mean 'psnr'"),
        (["eval.methods=[slaa]"], 2, "did you mean 'sla'"),
        (["eval.prompts=nowhere.txt"], 2, "nowhere.txt"),
        (["eval.num_prompts=-1"], 2, "eval.num_prompts is -1"),
        (["eval.weights={vsa: x.safetensors}"], 1, "eval.weights names ['vsa']"),
        (["eval.weights={sla: nowhere.safetensors}"], 1, "no weights nowhere.safetensors of sla"),
        (["run.init_weights=nowhere.safetensors"], 1, "nowhere.safetensors"),
    ],
)
def test_mistakes_are_named(
    config: Path,
    tmp_path: Path,
    overrides: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(call(config, tmp_path, *QUICK, *overrides)) == status
    assert message in capsys.readouterr().err


def test_weights_must_be_of_their_method(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = f"eval.weights={{sla: {config.parent / 'start.safetensors'}}}"
    assert main(call(config, tmp_path, *QUICK, wrong)) == 1
    assert "is to be sla's, but holds a model with full attention" in capsys.readouterr().err


def test_required_metrics_and_records(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sla_eval.metrics.PSNR.availability", lambda *_: "get it from a shop")
    few = call(config, tmp_path, *QUICK, "eval.num_prompts=2", "eval.require=true")
    monkeypatch.chdir(tmp_path)
    assert main([*few, "--record"]) == 1
    assert "psnr: get it from a shop" in capsys.readouterr().err
    (path,) = (tmp_path / "results/eval").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    flicker = [row for row in rows if row["metric"] == "temporal_flickering"]
    assert len(flicker) == 2 * (1 + 2), "a mean and two videos a method"
    assert {row["method"] for row in flicker} == {"full (reference)", "sla (not fine-tuned)"}
    assert all(isinstance(row["value"], float) for row in flicker)
    assert "get it from a shop" in (tmp_path / "table.md").read_text()


def test_throughput_is_measured_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = throughput.videos_per_second

    def as_if_each_took_a_tenth(
        metrics: Mapping[str, Any], *arguments: Any, **options: Any
    ) -> float:
        """Measures, but goes by no clock: decoding and each metric take 0.1 s a video."""
        assert measured(metrics, *arguments, **options) > 0
        return 10.0 / (1 + len(metrics))

    monkeypatch.setattr(throughput, "videos_per_second", as_if_each_took_a_tenth)
    options = ["--videos", "4", "--frames", "3", "--size", "64", "--repeats", "1"]
    chosen = ["--workers", "0", "--metrics", "psnr,temporal_flickering", "--device", "cpu"]
    assert benchmark(["eval", *options, *chosen, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("eval/*-throughput.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    names = ["decode", "all without weights", "psnr", "temporal_flickering"]
    assert [row["metric"] for row in rows] == names
    assert all(row["videos_per_s"] > 0 for row in rows)
    by = {row["metric"]: row for row in rows}
    assert by["all without weights"]["metrics"] == 2
    assert by["all without weights"]["videos_per_s_core"] < by["psnr"]["videos_per_s_core"] * 1.5
    assert by["psnr"]["needs_reference"]
    printed = capsys.readouterr().out
    assert throughput.HEAD in printed
    assert "met" not in printed.replace("metric", ""), "the goal is for 16 frames of 256x256"


def test_time_in_which_no_kernel_ran_is_not_covered() -> None:
    assert throughput.covered([(5, 6), (0, 2), (1, 3)]) == pytest.approx(4 / 6)
    assert throughput.covered([(0, 10), (2, 3), (8, 9)]) == 1.0, "kernels side by side"
    assert throughput.covered([]) is None


SMALL = ["eval", "--videos", "2", "--frames", "3", "--size", "64", "--repeats", "1"]


def test_networks_are_measured_with_random_weights_and_rows_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(
        get_backbone("dino_vitb16"), random=lambda: DinoViT(dim=8, depth=1, heads=1, image=32)
    )
    monkeypatch.setitem(registry._BACKBONES, "dino_vitb16", small)
    names = "subject_consistency,temporal_flickering,motion_smoothness"
    options = [*SMALL, "--random-weights", "--workers", "0", "--device", "cpu"]
    assert benchmark([*options, "--metrics", names, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("eval/*-throughput-random-weights.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert {row["metric"]: row["weights"] for row in rows} == {
        "decode": "none",
        "all": "random",
        "all without weights": "none",
        "subject_consistency": "random",
        "temporal_flickering": "none",
    }
    assert all(row["videos_per_s"] > 0 and row["error"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "weights are RANDOM" in printed
    assert "motion_smoothness        left out: AMT-S with random weights" in printed


def test_a_row_that_fails_is_kept_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL[:-3], "8", "--repeats", "1", "--workers", "0", "--device", "cpu"]
    assert benchmark([*options, "--metrics", "ssim,psnr", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("eval/*-throughput.jsonl")
    by = {r["metric"]: r for r in map(json.loads, path.read_text().splitlines()[1:])}
    assert "at least 11 pixels" in by["ssim"]["error"]
    assert by["ssim"]["videos_per_s"] is None
    assert by["psnr"]["videos_per_s"] > 0
    assert "at least 11 pixels" in capsys.readouterr().out


def test_no_row_begins_after_the_time_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--metrics", "psnr", "--max-seconds", "0", "--device", "cpu"]
    assert benchmark([*options, "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.rglob("*.jsonl"))
    assert "left out: decode, all without weights, psnr" in capsys.readouterr().err


def test_throughput_refuses_too_few_videos(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["eval", "--videos", "1"]) == 2
    assert "--videos must be 2 or more" in capsys.readouterr().err
