"""Scoring many videos: what must not change a score, sets, crashes, memory."""

from __future__ import annotations

import ctypes
import inspect
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import sla_eval.runner
import torch
from sla_eval.__main__ import build_parser
from sla_eval.backbones import BackboneUnavailableError
from sla_eval.metrics import TemporalFlickering, VideoMetric, metric_class
from sla_eval.metrics.base import MetricUnavailableError, NetworkMetric, VideoSetMetric
from sla_eval.prompts import Prompt
from sla_eval.report import choose_metrics, score_files, score_folder
from sla_eval.runner import Job, Scored, Scorer, default_workers, score_videos
from sla_eval.videos import decode_video
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from sla.data.video import write_video

CLASSES = {name: metric_class(name) for name in ("psnr", "ssim", "temporal_flickering")}
FLOWS = {name: metric_class(name) for name in ("flow_magnitude", "warping_error")}


class MeanDistance(VideoSetMetric):
    """Difference of the mean levels of two sets; needs no weights."""

    name = "mean_distance"
    title = "Mean distance"
    higher_is_better = False
    value_range = (0.0, 255.0)

    total: Tensor
    reference_total: Tensor
    levels: list[Tensor]

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        for state in ("total", "reference_total"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("levels", [], dist_reduce_fx="cat")  # features are kept so

    def add(self, video: Tensor, is_reference: bool) -> None:
        if is_reference:
            self.reference_total += video.double().mean()
        else:
            self.total += video.double().mean()
            self.levels.append(video.double().mean()[None])

    def distance(self) -> Tensor:
        assert dim_zero_cat(self.levels).sum() == pytest.approx(float(self.total), rel=1e-12)
        return (self.total / self.count - self.reference_total / self.reference_count).abs()


class Words(VideoMetric):
    """Number of words of the prompt over the frame rate."""

    name = "words"
    title = "Words"
    higher_is_better = None
    value_range = (0.0, 1e9)
    needs_prompt = True
    needs_fps = True

    def score(self, video: Tensor, reference: Tensor | None, prompt: str, fps: float) -> float:
        return len(prompt.split()) / fps


class Weighted(TemporalFlickering):
    """Counts a video by its frames."""

    name = "weighted"

    def weight(self, video: Tensor) -> float:
        return float(len(video))


class Absent(VideoMetric):
    """Its weights are never there."""

    name = "absent"
    title = "Absent"
    higher_is_better = True
    value_range = (0.0, 1.0)

    @classmethod
    def availability(cls, weights_dir: object = None) -> str | None:
        return "put absent.pth into weights/"

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        raise AssertionError("never runs")


class Damaged(Absent):
    """Its weights are there, and turn out to be unusable."""

    name = "damaged"

    @classmethod
    def availability(cls, weights_dir: object = None) -> str | None:
        return None

    def __init__(self, **kwargs: object) -> None:
        raise MetricUnavailableError("damaged.pth has another checksum")


class NotANumber(VideoMetric):
    name = "not_a_number"
    title = "Not a number"
    higher_is_better = True
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        return float("nan")


def picture(seed: int, frames: int = 5, height: int = 32, width: int = 144) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Eight videos of unlike length, one corrupt; references of six and of two more."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(8):
        frames = 3 + i % 3
        write_video(root / f"videos/{i}.mp4", picture(i, frames), fps=8)
        if i < 6:
            write_video(root / f"references/{i}.mp4", picture(100 + i, frames), fps=8)
    for name in ("x", "y"):
        write_video(root / f"references/{name}.mp4", picture(ord(name), 7), fps=8)
    (root / "videos/4.mp4").write_bytes(b"this is not a video" * 99)
    return sorted((root / "videos").iterdir()), sorted((root / "references").iterdir())


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets worker processes find by name what this file defines."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(sys.modules, "test_runner", sys.modules[__name__])
    for defined in (MeanDistance, crash_on_two):
        monkeypatch.setattr(defined, "__module__", "test_runner")


def by_name(paths: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in paths}


def test_processes_and_order_never_change_a_score(sets: tuple[list[Path], list[Path]]) -> None:
    videos, references = sets
    expected = score_videos(videos, CLASSES, references=by_name(references))
    assert expected.unreadable.keys() == {"4.mp4"}
    assert len(expected.values["temporal_flickering"]) == 7
    assert len(expected.values["psnr"]) == 5
    shuffled = random.Random(0).sample(videos, len(videos))
    turned = dict(reversed(CLASSES.items()))
    for workers, order, classes in (
        (0, shuffled, turned),
        (1, shuffled, CLASSES),
        (3, videos, turned),
    ):
        found = score_videos(order, classes, references=by_name(references), workers=workers)
        assert found == expected, f"{workers} processes"
        for name, values in expected.values.items():
            assert list(found.values[name]) == list(values)  # files in the order of names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_processes_on_a_gpu_give_the_same(sets: tuple[list[Path], list[Path]]) -> None:
    videos, references = sets
    given = {"references": by_name(references), "device": "cuda"}
    expected = score_videos(videos, CLASSES, **given)
    assert len(expected.values["psnr"]) == 5
    assert score_videos(videos, CLASSES, **given, processes=2) == expected


def test_threads_ahead_of_a_device_give_the_same(sets: tuple[list[Path], list[Path]]) -> None:
    """The way of a GPU, computing on the CPU."""
    classes = CLASSES | FLOWS
    videos, references = sets
    expected = score_videos(videos, classes, references=by_name(references))
    jobs = [Job(v, by_name(references).get(v.name), None, tuple(classes)) for v in videos]
    for threads, side_by_side in ((1, False), (3, True)):
        with sla_eval.runner.one_thread():
            scorer = Scorer(classes, torch.device("cpu"), side_by_side=side_by_side)
            found = list(sla_eval.runner._with_decoding_threads(jobs, scorer, threads))
        assert [scored.job.name for scored in found] == [path.name for path in videos]
        for scored in found:
            name = scored.job.name
            assert (scored.unreadable is not None) == (name == "4.mp4")
            has = {metric for metric, of in expected.values.items() if name in of}
            assert set(scored.values) == has
            for metric, (value, _) in scored.values.items():
                assert value == expected.values[metric][name]


def test_a_score_is_that_of_the_metric_alone(sets: tuple[list[Path], list[Path]]) -> None:
    videos, references = sets
    found = score_videos(videos, CLASSES, references=by_name(references))
    for name, cls in CLASSES.items():
        metric = cls()
        metric.update(decode_video(videos[2]).frames, decode_video(references[2]).frames)
        assert found.values[name]["2.mp4"] == pytest.approx(float(metric.compute()), rel=1e-12)


@pytest.mark.usefixtures("importable")
def test_sets_take_every_video_and_every_reference(sets: tuple[list[Path], list[Path]]) -> None:
    videos, references = sets
    report = score_files(videos, references, {"mean_distance": MeanDistance})
    entry = report["metrics"]["mean_distance"]
    readable = [path for path in videos if path.name != "4.mp4"]
    ours, theirs = (
        np.mean([decode_video(path).frames.double().mean() for path in paths])
        for paths in (readable, references)
    )
    # The corrupt video's reference is not lost.
    assert entry["mean"] == pytest.approx(abs(ours - theirs), rel=1e-12)
    assert entry["count"] == 7
    assert entry["set_level"]
    assert entry["per_video"] == {}
    assert np.isnan(entry["low"])
    again = score_files(videos[::-1], references, {"mean_distance": MeanDistance}, workers=2)
    assert again["metrics"]["mean_distance"]["mean"] == entry["mean"], "bit for bit"
    few = score_files(videos[:1], references, {"mean_distance": MeanDistance})
    assert "at least 2 videos" in few["metrics"]["mean_distance"]["not_available"]


class Gain(NetworkMetric):
    """Mean level times a network's weight."""

    name = "gain"
    title = "Gain"
    higher_is_better = True
    value_range: ClassVar[tuple[float, float]] = (0.0, 255.0)
    backbones = ("raft",)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        return float(video.float().mean() * self.backbone.weight)


class Absence(Gain):
    """A network that is not there."""

    name = "absence"
    backbones = ("amt_s",)


def test_networks_can_be_given_and_are_loaded_once(sets: tuple[list[Path], list[Path]]) -> None:
    asked: list[str] = []

    def load(name: str) -> nn.Module:
        asked.append(name)
        if name == "amt_s":
            raise BackboneUnavailableError("no amt_s here")
        network = nn.Linear(1, 1, bias=False)
        nn.init.constant_(network.weight, 0.5)
        return network

    classes = {"gain": Gain, "again": Gain, "absence": Absence, **CLASSES}
    found = score_videos(sets[0][:2], classes, load=load)
    assert sorted(asked) == ["amt_s", "raft"]
    expected = decode_video(sets[0][0]).frames.float().mean() / 2
    assert found.values["gain"]["0.mp4"] == pytest.approx(float(expected))
    assert found.values["again"] == found.values["gain"]
    assert found.not_available["absence"] == "no amt_s here"
    assert len(found.values["temporal_flickering"]) == 2


def test_reports_take_published_weights_alone() -> None:
    for function in (score_files, score_folder):
        assert "load" not in inspect.signature(function).parameters
    assert "random" not in build_parser().format_help()


def test_prompt_and_frame_rate_reach_the_metric(sets: tuple[list[Path], list[Path]]) -> None:
    videos = sets[0][:3]
    prompts = {"0.mp4": Prompt("a red fox"), "1.mp4": Prompt("a fox")}
    found = score_videos(videos, {"words": Words}, prompts=prompts)
    assert found.values["words"] == {"0.mp4": 3 / 8, "1.mp4": 2 / 8}
    assert found.skipped["words"] == {"2.mp4": "its prompt is not known"}
    none = score_videos(videos, {"words": Words})
    assert "needs the videos' prompts" in none.not_available["words"]


def test_vbench_prompts_keep_to_their_dimensions(sets: tuple[list[Path], list[Path]]) -> None:
    prompts = {
        "0.mp4": Prompt("a", ("temporal_flickering",)),
        "1.mp4": Prompt("b", ("color",)),
        "2.mp4": Prompt("c"),
    }
    videos, references = sets
    report = score_files(videos[:3], references, CLASSES, prompts=prompts)["metrics"]
    assert report["temporal_flickering"]["per_video"].keys() == {"0.mp4", "2.mp4"}
    assert report["temporal_flickering"]["other_dimension"] == 1
    assert report["psnr"]["count"] == 3


def test_a_weighted_mean_counts_by_the_weights(sets: tuple[list[Path], list[Path]]) -> None:
    entry = score_files(sets[0], None, {"weighted": Weighted})["metrics"]["weighted"]
    weights = [entry["weights"][file] for file in entry["per_video"]]
    assert set(weights) == {3.0, 4.0, 5.0}
    values = list(entry["per_video"].values())
    assert entry["mean"] == pytest.approx(np.average(values, weights=weights))
    assert entry["mean"] != pytest.approx(np.mean(values))
    assert entry["low"] < entry["mean"] < entry["high"]


def test_what_is_not_available_says_so_and_the_rest_runs(
    sets: tuple[list[Path], list[Path]],
) -> None:
    classes = {"absent": Absent, "damaged": Damaged, "not_a_number": NotANumber, **CLASSES}
    metrics = score_files(sets[0][:2], None, classes)["metrics"]
    assert metrics["absent"]["not_available"] == "put absent.pth into weights/"
    assert metrics["damaged"]["not_available"] == "damaged.pth has another checksum"
    assert "its score is not a number" in metrics["not_a_number"]["not_available"]
    assert metrics["temporal_flickering"]["count"] == 2
    assert metrics["psnr"]["not_available"] == "needs reference videos, none were given"


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("pause", [0.0, 1.5])  # the next job is given out after the process died
def test_a_video_that_kills_its_process_is_listed(
    sets: tuple[list[Path], list[Path]], monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr(sla_eval.runner, "_score_in_worker", crash_on_two)
    progress: list[str] = []

    def after_each(done: int, total: int, name: str) -> None:
        if not progress:
            time.sleep(pause)
        progress.append(name)

    found = score_videos(
        sets[0], {"temporal_flickering": TemporalFlickering}, workers=2, progress=after_each
    )
    assert found.unreadable == {
        "2.mp4": "the process that decoded and scored it died",
        "4.mp4": "not a video container, or cut off",
    }
    assert list(found.values["temporal_flickering"]) == [f"{i}.mp4" for i in (0, 1, 3, 5, 6, 7)]
    assert progress == [path.name for path in sets[0]]


def crash_on_two(job: Job) -> Scored:
    if job.name == "2.mp4":
        ctypes.string_at(0)  # a decoder's fault ends so
    return sla_eval.runner._own_scorer().score(job)


def test_metrics_that_workers_cannot_import_are_refused(
    sets: tuple[list[Path], list[Path]],
) -> None:
    class Local(TemporalFlickering):
        name = "local"

    with pytest.raises((RuntimeError, AttributeError), match=r"importable|[Ll]ocal"):
        score_videos(sets[0], {"local": Local}, workers=1)


def test_bad_arguments_are_refused(sets: tuple[list[Path], list[Path]]) -> None:
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        score_videos(sets[0], CLASSES, workers=-1)
    with pytest.raises(ValueError, match="processes must be 0 or more, got -2"):
        score_videos(sets[0], CLASSES, processes=-2)
    with pytest.raises(ValueError, match="processes is 2, which is for a GPU; on a CPU set work"):
        score_videos(sets[0], CLASSES, processes=2)
    with pytest.raises(ValueError, match="different file names, got 8 names for 9"):
        score_videos([*sets[0], sets[0][0]], CLASSES)


def test_few_videos_start_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert [default_workers(n) for n in (0, 2, 15, 16, 31, 1000)] == [0, 0, 0, 2, 3, 4]


@pytest.mark.slow  # decodes a thousand videos
def test_memory_stays_flat_over_a_thousand_videos(tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    write_video(tmp_path / "0000.mp4", picture(0, frames=8, height=64, width=144), fps=8)
    for i in range(1, 1000):
        shutil.copy(tmp_path / "0000.mp4", tmp_path / f"{i:04d}.mp4")
    resident: dict[int, float] = {}

    def note(done: int, total: int, name: str) -> None:
        if done in (300, 1000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident[done] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    report = score_folder(tmp_path, None, ["temporal_flickering"], progress=note)
    assert report["metrics"]["temporal_flickering"]["count"] == 1000
    # Frames of the 700 videos in between would be 148 MiB.
    assert resident[1000] - resident[300] < 8


def test_all_metrics_can_be_asked_for() -> None:
    assert choose_metrics("all") == choose_metrics(["all"])
    assert list(choose_metrics(["ssim", "psnr", "ssim"])) == ["ssim", "psnr"]
