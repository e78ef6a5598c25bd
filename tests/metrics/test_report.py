"""Folders of videos to reports, and the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sla_eval.report
import torch
from sla_eval import (
    VideoError,
    bootstrap_interval,
    find_videos,
    markdown_table,
    read_video,
    score_folder,
    write_json,
)
from sla_eval.__main__ import main

from sla.data.video import write_video


def ramp(step: int, frames: int = 4, height: int = 32, width: int = 160) -> np.ndarray:
    """Grey frames, each `step` levels brighter than the last."""
    levels = (60 + step * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three videos and a corrupt one; references of two of them and of one more."""
    root = tmp_path_factory.mktemp("videos")
    videos, references = root / "videos", root / "references"
    for name, step in {"c": 30, "a": 0, "b": 10}.items():
        write_video(videos / f"{name}.mp4", ramp(step), fps=8, crf=0)
    (videos / "broken.mp4").write_bytes(b"not a video at all" * 50)
    (videos / "notes.txt").write_text("not a video")
    write_video(references / "a.mp4", ramp(0), fps=8, crf=0)
    write_video(references / "b.mp4", ramp(0), fps=8, crf=0)
    write_video(references / "other.mp4", ramp(0), fps=8, crf=0)
    return videos, references


def test_videos_are_found_by_name(folders: tuple[Path, Path]) -> None:
    names = [path.name for path in find_videos(folders[0])]
    assert names == ["a.mp4", "b.mp4", "broken.mp4", "c.mp4"]
    with pytest.raises(ValueError, match="folder must be an existing folder"):
        find_videos(folders[0] / "a.mp4")


@pytest.mark.parametrize("width", [64, 98, 126, 128, 160])  # decord alone errs on some below 128
def test_frames_come_back_at_every_width(tmp_path: Path, width: int) -> None:
    x = np.linspace(0, 200, width).astype(np.uint8)
    frames = np.broadcast_to(x[None, None, :, None], (3, 16, width, 3)).copy()
    frames[1] = 255 - frames[1]
    write_video(tmp_path / "x.mp4", frames, fps=8, crf=0)
    video = read_video(tmp_path / "x.mp4")
    assert video.dtype == torch.uint8
    assert video.shape == (3, 3, 16, width)
    found = video.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found - frames).max() <= 4  # yuv420p


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello" * 100)
    for name, reason in {"missing": "No such file", "empty": "empty", "text": "container"}.items():
        with pytest.raises(VideoError, match=rf"{name}\.mp4: .*{reason}"):
            read_video(tmp_path / f"{name}.mp4")


def test_report_of_a_folder(folders: tuple[Path, Path]) -> None:
    report = score_folder(*folders)
    assert list(report["unreadable"]) == ["broken.mp4"]
    flicker = report["metrics"]["temporal_flickering"]
    expected = {"a.mp4": 1.0, "b.mp4": 245 / 255, "c.mp4": 225 / 255}
    assert flicker["per_video"] == pytest.approx(expected, abs=2 / 255)  # yuv levels
    assert flicker["mean"] == pytest.approx(np.mean(list(flicker["per_video"].values())))
    assert flicker["low"] <= flicker["mean"] <= flicker["high"]
    psnr = report["metrics"]["psnr"]
    assert psnr["per_video"]["a.mp4"] == math.inf
    assert psnr["per_video"]["b.mp4"] == pytest.approx(
        10 * math.log10(255**2 / np.mean([0, 100, 400, 900])), abs=1
    )
    assert psnr["skipped"] == {"c.mp4": "no reference video of this name"}
    assert psnr["mean"] == math.inf
    ssim = report["metrics"]["ssim"]
    assert ssim["per_video"]["a.mp4"] == pytest.approx(1.0, abs=1e-9)


def test_each_video_is_decoded_once(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def counting(path: Path) -> torch.Tensor:
        decoded.append(path)
        return read_video(path)

    monkeypatch.setattr(sla_eval.report, "read_video", counting)
    score_folder(*folders)
    assert len(decoded) == len(set(decoded)) == 4 + 2  # videos, references of the same name


def test_without_references_the_rest_is_scored(folders: tuple[Path, Path]) -> None:
    metrics = score_folder(folders[0])["metrics"]
    for name in ("psnr", "ssim"):
        assert metrics[name] == {"not_available": "needs reference videos, none were given"}
    assert len(metrics["temporal_flickering"]["per_video"]) == 3


def test_a_reference_of_another_shape_is_skipped(tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", ramp(5), fps=8)
    write_video(tmp_path / "references" / "a.mp4", ramp(5, frames=3), fps=8)
    metrics = score_folder(tmp_path / "videos", tmp_path / "references")["metrics"]
    assert "a.mp4: reference must have the shape" in metrics["psnr"]["not_available"]
    assert "mean" in metrics["temporal_flickering"]


def test_bootstrap_interval_covers_the_mean_and_narrows() -> None:
    random = np.random.default_rng(1)
    values = random.normal(3.0, 1.0, 400)
    low, high = bootstrap_interval(values.tolist())
    # The mean's standard error is known: 1.96 of them on each side.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.1)
    assert low < values.mean() < high
    few = bootstrap_interval(values[:40].tolist())
    assert few[1] - few[0] > 2 * (high - low)


def test_bootstrap_interval_is_a_function_of_values_and_seed() -> None:
    values = np.random.default_rng(3).random(40).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([math.inf, math.inf]) == (math.inf, math.inf)
    low, high = bootstrap_interval([1.0, 1.0, 1.0, math.inf])
    assert (low, high) == (1.0, math.inf)
    assert all(math.isnan(bound) for bound in bootstrap_interval([2.0]))


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_bootstrap_interval_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values must be one or more numbers"):
        bootstrap_interval(values)


def test_table_and_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = score_folder(*folders)
    table = markdown_table(report)
    assert "| psnr ↑ | inf | " in table
    assert "- psnr skipped c.mp4: no reference video of this name" in table
    assert "- unreadable broken.mp4: " in table
    out = tmp_path / "deep" / "report.json"
    write_json(out, report)
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads(out.read_text(), parse_constant=refuse)
    assert saved["metrics"]["psnr"]["per_video"]["a.mp4"] == "inf"
    assert saved["metrics"]["ssim"] == report["metrics"]["ssim"]


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.json"
    write_json(out, {"metrics": {}, "unreadable": {}})
    before = out.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sla_eval.report.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(out, {"metrics": {"psnr": {}}, "unreadable": {}})
    assert out.read_text() == before
    assert list(tmp_path.iterdir()) == [out]


def test_command_line_exit_codes(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, references = map(str, folders)
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "report.json"
    assert main(["--videos", videos, "--out", str(out)]) == 0
    assert "| temporal_flickering ↑ |" in capsys.readouterr().out
    assert json.loads(out.read_text())["unreadable"].keys() == {"broken.mp4"}
    assert main(["--videos", videos, "--require"]) == 1
    assert "required metric psnr is not available" in capsys.readouterr().err
    assert main(["--videos", videos, "--reference", references, "--require"]) == 0
    assert main(["--videos", videos, "--metrics", "temporal_flickering", "--require"]) == 0
    assert main(["--videos", videos, "--metrics", "psnr,ssim"]) == 1
    assert main(["--videos", str(empty)]) == 1
    assert "the folder has no videos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--videos", "no/such/folder"], "must be an existing folder, got 'no/such/folder'"),
        (["--videos", ".", "--metrics", "psmr"], "unknown metric 'psmr'; did you mean 'psnr'?"),
        (["--videos", ".", "--metrics", ","], "at least one metric"),
        ([], "required: --videos"),
    ],
)
def test_command_line_refuses(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert text in capsys.readouterr().err


def test_runs_as_a_module_without_sla(folders: tuple[Path, Path]) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['sla'] = None  # importing it would fail\n"
        "sys.argv = ['sla_eval', '--videos', sys.argv[1]]\n"
        "runpy.run_module('sla_eval', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders[0])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| temporal_flickering ↑ |" in done.stdout
