"""The figures of the study show what its rows and pictures say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sla.figures import claims, frame_strips, quality_sparsity, training_progress
from sla.figures.analysis import new_figure
from sla.figures.arms import percent_axis
from sla.figures.figure6a import FigureError
from sla.results import read_results
from sla.study.frames import Strips, read_strips, real_clips_of, write_strips
from sla.study.records import FRECHET, StudyResults, measurement, read_records

FILES: dict[Path, StudyResults] = {}  # one a folder: arms are in the order of the rows
CLIPS = np.random.default_rng(0).uniform(0.5, 1.5, (20, 2))


def write(
    root: Path,
    arm: str,
    losses: dict[int, float],
    *,
    group: str = "main",
    method: str = "sla",
    seeds: tuple[int, ...] = (0, 1, 2),
    exact: float = 0.05,
    weights: str = "w",
    date: str = "2026-01-01",
    **more: Any,
) -> None:
    """An arm whose loss at each step is that factor of every clip's, and 0.01 more by seed."""
    results = FILES.setdefault(root, StudyResults(root, command=["sla", "study", "--it"]))
    name = more.get("name", "video")
    for seed in seeds:
        common = {"study": name, "group": group, "arm": arm, "digest": "d" * 16, "seed": seed}
        common["method"] = method
        rows: list[dict[str, Any]] = []
        for step, factor in losses.items():
            by_seed = 0.0 if arm.startswith("full") else 0.01 * seed
            rows += [
                measurement(step, "val_loss", (factor + by_seed) * CLIPS),
                measurement(step, "attention_error_l1", [0.1 + step + seed, 0.3 + step + seed]),
                measurement(step, "exact_fraction", [exact, exact]),
                measurement(step, "attention_flops_ratio", exact + 0.02),
            ]
        if more.get("frechet", True):
            rows.append(measurement(max(losses), FRECHET, 4.0 + seed))
        end = {"status": "finished", "date": date, "weights_sha256": weights}
        results.append([*({**common, **row} for row in rows), {**common, **end}])


def keep(root: Path, arm: str, value: int, *, seed: int = 0, **fields: Any) -> Strips:
    """Frames of one value, of two prompts and two frames."""
    frames = np.full((2, 2, 4, 6, 3), value, np.uint8)
    of_all: dict[str, Any] = {
        "study": "video",
        "arm": arm,
        "digest": "d" * 16,
        "seed": seed,
        "prompts": ("a red ball", "a blue cube"),
        "clips": ("t/0", "t/1"),
        "noise_seeds": (7, 8),
        "indices": (0, 31),
        "frames": frames,
    }
    strips = Strips(**{**of_all, **fields})
    write_strips(strips, root)
    return strips


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    write(folder, "pretrained", {0: 1.5}, group="reference", method="full", seeds=(0,), exact=1)
    write(folder, "full", {0: 1.5, 100: 1.0}, method="full", exact=1.0)
    write(folder, "sla", {0: 3.0, 100: 1.1})
    write(folder, "linear_only", {0: 4.0, 100: 2.0}, method="linear_only", exact=0.0)
    write(folder, "sla_elu", {0: 3.0, 100: 1.2}, group="feature_map", seeds=(1,))
    return folder


def test_each_figure_is_written_with_its_caption(root: Path, tmp_path: Path) -> None:
    for arm in ("pretrained", "full", "sla"):
        keep(root, arm, 9)
    of_all = {
        "frames_video_main": frame_strips.draw,
        "quality_video": quality_sparsity.draw,
        "training_video": training_progress.draw,
    }
    for name, draw in of_all.items():
        files = {file.name: file for file in draw(tmp_path / "out", root)}
        assert {f"{name}.{ending}" for ending in ("png", "pdf", "txt")} <= files.keys()
        assert files[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert files[f"{name}.pdf"].read_bytes().startswith(b"%PDF")
        caption = files[f"{name}.txt"].read_text()
        assert "study 'video'" in caption
        assert "`sla study --it`" in caption
        (file,) = (root / "study").glob("*.jsonl")
        assert f"Data: study/{file.name} (" in caption


# Frames


def test_a_sheet_has_the_arms_in_order(root: Path) -> None:
    for value, arm in enumerate(("sla", "sla_elu", "full", "pretrained")):
        keep(root, arm, value, seed=1 if arm == "sla_elu" else 0)
    keep(root, "sla", 90, seed=1)  # the first seed's are drawn
    keep(root, "sla", 91, digest="e" * 16)  # of other numbers, of which there is no run
    keep(root, "none", 92)  # not finished
    records, pictures = read_records(root), read_strips(root)
    found = frame_strips.sheet(records, pictures, "video", "main")
    assert [row.strips.arm for row in found.rows] == ["pretrained", "full", "sla"]
    assert [int(row.strips.frames[0, 0, 0, 0, 0]) for row in found.rows] == [3, 2, 0]
    assert found.rows[0].label == "pretrained\n0 % sparse, not trained"
    assert found.rows[2].label == "sla\n95 % sparse"
    assert found.without == ["linear_only"]
    of_other = frame_strips.sheet(records, pictures, "video", "feature_map")
    names = ["pretrained", "full", "sla", "sla_elu"]
    assert [row.strips.arm for row in of_other.rows] == names


def test_frames_of_something_else_are_left_out(root: Path) -> None:
    keep(root, "full", 1)
    keep(root, "sla", 2, noise_seeds=(9, 10))
    keep(root, "linear_only", 3, prompts=("another", "a blue cube"))
    write(root, "sparse", {0: 2.0, 100: 1.5}, weights="others", date="2025-01-01")
    keep(root, "sparse", 4)
    keep(root, *real_clips_of("video")[1:2], 5, digest="", noise_seeds=())
    found = frame_strips.sheet(read_records(root), read_strips(root), "video", "main")
    assert [row.label.split("\n")[0] for row in found.rows] == ["real clip", "full"]
    assert found.apart == ["sla", "linear_only"]  # sparse is no arm of these weights
    caption = frame_strips.caption(found, "video", "main")
    assert "Not drawn, as of other prompts or noise: sla, linear_only." in caption
    assert "Real clip" in caption
    assert "Prompt 2: a blue cube" in caption
    assert "Seeds of the noise: 7, 8; of the training: 0." in caption


def test_a_block_shows_each_frame_at_its_place(root: Path, shown: list[Any]) -> None:
    random = np.random.default_rng(0)
    kept = [
        keep(root, arm, 0, frames=random.integers(0, 255, (2, 2, 4, 6, 3), dtype=np.uint8))
        for arm in ("full", "sla")
    ]
    frame_strips.draw(root / "out", root)
    (figure,) = shown
    for prompt, axes in enumerate(figure.axes):
        picture = np.asarray(axes.images[0].get_array())
        assert picture.shape == (2 * 4 + 2, 2 * 6 + 2, 3)
        for row, strips in enumerate(kept):
            for k in range(2):
                part = picture[6 * row : 6 * row + 4, 8 * k : 8 * k + 6]
                assert np.array_equal(part, strips.frames[prompt, k])
        assert (picture[4:6] == 255).all()
        assert axes.get_title().endswith(strips.prompts[prompt])
        assert [t.get_text() for t in axes.get_xticklabels()] == ["frame 0", "frame 31"]
    labels = [t.get_text().split("\n")[0] for t in figure.axes[0].get_yticklabels()]
    assert labels == ["full", "sla"]


def test_images_are_one_frame(root: Path, shown: list[Any]) -> None:
    write(root, "full", {0: 1.0}, name="images", method="full")
    one: dict[str, Any] = {"indices": (0,), "frames": np.zeros((2, 1, 4, 4, 3), np.uint8)}
    keep(root, "full", 0, study="images", **one)
    files = frame_strips.draw(root / "out", root)
    assert [file.name for file in files] == [
        f"frames_images_main.{e}" for e in ("png", "pdf", "txt")
    ]
    (figure,) = shown
    assert len(figure.axes) == 2
    assert not any(axes.get_xticklabels() for axes in figure.axes)


# Quality


def test_points_are_what_the_rows_say(root: Path) -> None:
    found = quality_sparsity.points(read_records(root), "video")
    sla = found["sla"]
    assert sla.sparsity == pytest.approx(0.95)
    assert sla.flops == pytest.approx(0.07)
    # Of seed s the loss is (1.1 + 0.01 s) times full attention's.
    assert sla.loss.value == pytest.approx(0.11, abs=1e-6)
    half = 4.303 * 0.01 / math.sqrt(3)
    assert (sla.loss.low, sla.loss.high) == pytest.approx((0.11 - half, 0.11 + half), abs=1e-5)
    assert sla.frechet is not None
    assert sla.frechet.value == 5
    assert found["full"].loss.value == 0
    assert found["linear_only"].sparsity == 1
    assert found["pretrained"].loss.value == pytest.approx(0.5)
    assert found["pretrained"].loss.low == pytest.approx(0.5)  # the same at every seed
    assert math.isnan(found["sla_elu"].loss.low)  # one seed
    assert found["sla_elu"].variant
    assert not sla.variant


def test_marks_stand_where_the_points_are(root: Path, shown: list[Any]) -> None:
    write(root, "other", {0: 2.0, 100: 1.5}, weights="others")  # not comparable
    quality_sparsity.draw(root / "out", root)
    (figure,) = shown
    by_sparsity, by_flops, frechet, _ = figure.axes
    marks = {c.get_label(): c.lines[0].get_xydata()[0] for c in by_sparsity.containers}
    assert list(marks) == ["1 pretrained", "2 full", "3 sla", "4 linear_only"]
    assert marks["3 sla"] == pytest.approx((95, 11), abs=1e-3)
    assert marks["4 linear_only"] == pytest.approx((100, 101), abs=1e-3)
    assert by_flops.containers[2].lines[0].get_xydata()[0] == pytest.approx((7, 11), abs=1e-3)
    assert frechet.containers[2].lines[0].get_xydata()[0] == pytest.approx((95, 5))
    (variant,) = [line for line in by_sparsity.lines if line.get_markersize() == 3]
    assert variant.get_xydata()[0] == pytest.approx((95, 21), abs=1e-3)
    assert by_sparsity.containers[0].lines[0].get_markerfacecolor() == "none"  # not trained
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(marks)
    caption = (root / "out" / "quality_video.txt").read_text()
    assert "(sla_elu; their numbers" in caption
    assert "Fewer than 3 seeds: sla_elu (1)." in caption
    assert "other" not in caption.split("Data:")[0].replace("another", "").split()


def test_without_an_evaluator_the_loss_alone_is_drawn(tmp_path: Path, shown: list[Any]) -> None:
    write(tmp_path, "full", {0: 1.0}, method="full", frechet=False)
    quality_sparsity.draw(tmp_path / "out", tmp_path)
    assert len(shown[0].axes) == 2
    assert "Frechet" not in (tmp_path / "out" / "quality_video.txt").read_text()


def test_marks_lie_within_the_axes() -> None:
    axes = new_figure(4, 3).add_subplot()
    axes.plot([0, 1, 2], [-0.5, 3.0, 250.0], "o")
    percent_axis(axes)
    low, high = axes.get_ylim()
    assert -2 < low < -0.5
    assert 250 < high < 1000


# Training


def test_curves_are_what_the_rows_say(root: Path) -> None:
    records = read_records(root)
    losses = training_progress.losses(records, "video", "sla")
    assert list(losses) == [0, 100]
    # At step 0 full attention's is 1.5 and SLA's 3 + 0.01 s.
    assert losses[0].value == pytest.approx(3.01 / 1.5 - 1, abs=1e-6)
    assert losses[100].value == pytest.approx(0.11, abs=1e-6)
    assert losses[100].spread == pytest.approx(0.01, abs=1e-5)
    errors = training_progress.errors(records, "video", "sla")
    assert {step: e.value for step, e in errors.items()} == pytest.approx({0: 1.2, 100: 101.2})
    assert errors[0].spread == pytest.approx(1)
    assert training_progress.losses(records, "video", "full") == {}
    assert training_progress.losses(records, "video", "pretrained") == {}


def test_lines_are_the_curves(root: Path, shown: list[Any]) -> None:
    training_progress.draw(root / "out", root)
    (figure,) = shown
    main, of_maps = figure.axes[0], figure.axes[2]
    assert [axes.get_title() for axes in (main, of_maps)] == ["main", "feature_map"]
    lines = {line.get_label(): line.get_xydata() for line in main.lines[:-1]}
    assert list(lines) == ["sla", "linear_only"]
    expected = [[0, 100 * (3.01 / 1.5 - 1)], [100, 11]]
    assert lines["sla"] == pytest.approx(np.asarray(expected), abs=1e-3)
    assert len(main.collections) == 2  # bands
    assert [line.get_label() for line in of_maps.lines[:-1]] == ["sla", "sla_elu"]
    below = figure.axes[1].lines[0].get_xydata()
    assert below == pytest.approx(np.asarray([[0, 1.2], [100, 101.2]]), abs=1e-5)


def test_more_steps_are_compared_with_full_attention_of_as_many(tmp_path: Path) -> None:
    write(tmp_path, "full", {0: 2.0, 100: 1.0}, method="full", seeds=(0,))
    write(tmp_path, "full_2000", {0: 2.0, 2000: 0.5}, method="full", seeds=(0,), group="steps")
    write(tmp_path, "sla", {0: 2.2, 100: 1.1}, seeds=(0,))
    write(tmp_path, "sla_2000", {0: 2.2, 2000: 0.6}, seeds=(0,), group="steps")
    records = read_records(tmp_path)
    curve = training_progress.losses(records, "video", "sla_2000")
    assert curve[2000].value == pytest.approx(0.2, abs=1e-6)
    assert training_progress._beside_sla(records, "video", ["sla_2000"]) == ["sla_2000"]
    assert math.isnan(curve[2000].spread)


def test_differences_by_seed_are_those_of_the_comparison(root: Path) -> None:
    records = read_records(root)
    found = claims.compare(records, "video", "sla", "full")
    assert found is not None
    assert list(found.by_seed) == claims.by_seed(records, "video", "sla", "full")
    assert found.by_seed == pytest.approx((0.1, 0.11, 0.12), abs=1e-6)
    assert claims.by_seed(records, "video", "sla", "full", 7) == []


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    for draw in (frame_strips.draw, quality_sparsity.draw, training_progress.draw):
        with pytest.raises(FigureError, match=r"has no finished arm; run some: make study"):
            draw(out, empty)
    write(tmp_path, "sla", {0: 2.0, 100: 1.0})
    for draw in (quality_sparsity.draw, training_progress.draw):
        with pytest.raises(FigureError, match=r"full attention; run: make study"):
            draw(out, tmp_path)
    with pytest.raises(FigureError, match=r"measures\.frames"):
        frame_strips.draw(out, tmp_path)
    assert not out.exists()
    (file,) = (tmp_path / "study").glob("*.jsonl")
    assert json.dumps(read_results(file).provenance["command"]) == '"sla study --it"'
