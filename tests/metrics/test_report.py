"""Folders of videos to reports, and the command line."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sla_eval.report
import sla_eval.runner
import sla_eval.videos
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
from sla_eval.report import paired_differences, read_report, write_table
from sla_eval.tables import Table, difference_table, latex_escape, method_table

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


@pytest.mark.parametrize("width", [64, 160])  # of either decoder
def test_a_video_too_large_for_memory_is_refused(tmp_path: Path, width: int) -> None:
    write_video(tmp_path / "x.mp4", ramp(5, width=width), fps=8)
    size = 4 * 3 * 32 * width
    found = sla_eval.videos.decode_video(tmp_path / "x.mp4", max_bytes=size)
    assert found.frames.numel() == size
    assert found.fps == pytest.approx(8)
    with pytest.raises(VideoError, match="too large"):
        sla_eval.videos.decode_video(tmp_path / "x.mp4", max_bytes=size - 1)


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

    def counting(path: Path) -> sla_eval.videos.Video:
        decoded.append(path)
        return sla_eval.videos.decode_video(path)

    monkeypatch.setattr(sla_eval.runner, "decode_video", counting)
    score_folder(*folders)
    assert len(decoded) == len(set(decoded)) == 4 + 2  # videos, references of the same name


def test_without_references_the_rest_is_scored(folders: tuple[Path, Path]) -> None:
    metrics = score_folder(folders[0])["metrics"]
    for name in ("psnr", "ssim"):
        assert metrics[name]["not_available"] == "needs reference videos, none were given"
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
    assert {path.name for path in tmp_path.iterdir()} == {
        "empty",
        *(f"report{suffix}" for suffix in (".json", ".md", ".csv", ".tex")),
    }
    some = ["--metrics", "psnr,temporal_flickering", "--require"]
    assert main(["--videos", videos, *some]) == 1
    error = capsys.readouterr().err
    assert "required metric psnr is not available" in error
    assert "--reference DIR" in error
    assert main(["--videos", videos, "--reference", references, *some]) == 0
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
        (["--videos", ".", "--prompts", "no/such/file"], "No such file"),
        (["--videos", ".", "--out", "report.txt"], "--out must end in .json, got 'report.txt'"),
        (["--videos", ".", "--baseline", "no.json"], "must be a readable JSON file, got 'no.json'"),
        (["--videos", ".", "--device", "toaster"], "such as cpu or cuda:0, got 'toaster'"),
        (["--videos", ".", "--workers", "-1"], "workers must be 0 or more, got -1"),
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


def test_what_is_compared_with_a_baseline_is_paired(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    only = ["--metrics", "temporal_flickering"]
    assert main(["--videos", str(folders[1]), *only, "--out", str(before)]) == 0
    call = ["--videos", str(folders[0]), *only, "--baseline", str(before), "--out", str(after)]
    assert main(call) == 0
    assert f"Difference to {before}" in capsys.readouterr().out
    (found,) = json.loads(after.read_text())["differences"].values()
    entry = found["temporal_flickering"]
    assert entry["per_video"] == pytest.approx({"a.mp4": 0.0, "b.mp4": -10 / 255}, abs=2 / 255)
    assert entry["count"] == 2
    again = score_folder(folders[0], None, ["temporal_flickering"])
    assert read_report(after)["metrics"] == again["metrics"]


def make_report(values: dict[str, float], **videos: dict[str, object]) -> dict[str, object]:
    entry = {
        "title": "Score",
        "higher_is_better": True,
        "needs_reference": False,
        "per_video": values,
    }
    return {"videos": videos or {name: {} for name in values}, "metrics": {"score": entry}}


def test_pairs_are_narrower_than_the_means() -> None:
    random = np.random.default_rng(0)
    prompts = random.normal(0.0, 10.0, 60)  # what both methods have alike
    noise = random.normal(0.0, 0.1, 60)
    first = make_report({f"{i}": float(v) for i, v in enumerate(prompts)})
    second = make_report({f"{i}": float(v) for i, v in enumerate(prompts + 0.5 + noise)})
    entry = paired_differences(second, first)["score"]
    assert entry["mean"] == pytest.approx(0.5 + noise.mean())
    assert 0.4 < entry["low"] < entry["mean"] < entry["high"] < 0.6
    assert entry["high"] - entry["low"] == pytest.approx(3.92 * noise.std() / 60**0.5, rel=0.2)
    assert paired_differences(first, first)["score"]["high"] == 0.0
    negative = paired_differences(first, second)["score"]
    assert negative["mean"] == pytest.approx(-entry["mean"])


def test_pairs_are_by_name_and_finite() -> None:
    first = make_report({"a": 1.0, "b": math.inf, "c": 3.0})
    second = make_report({"c": 5.0, "b": math.inf, "d": 0.0})
    entry = paired_differences(second, first)["score"]
    assert entry["per_video"] == {"c": 2.0}
    assert entry["left_out"] == 1
    assert paired_differences(second, make_report({"x": 1.0})) == {}


def test_weighted_pairs_count_by_their_weights() -> None:
    first = make_report({"a": 1.0, "b": 1.0})
    second = make_report({"a": 2.0, "b": 5.0})
    second["metrics"]["score"]["weights"] = {"a": 3.0, "b": 1.0}  # type: ignore[index]
    assert paired_differences(second, first)["score"]["mean"] == pytest.approx((3 * 1 + 4) / 4)


def test_weights_move_mean_and_interval_as_repeats_do() -> None:
    values = np.random.default_rng(5).normal(size=200).tolist()
    assert bootstrap_interval(values, weights=[2.0] * 200) == pytest.approx(
        bootstrap_interval(values), rel=1e-9
    )
    weights = [9.0 if value > 0 else 1.0 for value in values]
    low, high = bootstrap_interval(values, weights=weights)
    assert low < np.average(values, weights=weights) < high
    assert bootstrap_interval(values)[1] < low


@pytest.mark.parametrize(("key", "other"), [("prompt", "a hen"), ("seed", 2)])
def test_pairs_of_other_prompts_or_seeds_are_refused(key: str, other: object) -> None:
    video = {"prompt": "a fox", "seed": 1}
    first = make_report({"a": 1.0}, a=video)
    second = make_report({"a": 1.0}, a={**video, key: other})
    with pytest.raises(ValueError, match=f"a has {key} .* there"):
        paired_differences(second, first)


def test_report_says_where_it_comes_from(folders: tuple[Path, Path]) -> None:
    report = score_folder(folders[0], None, ["temporal_flickering"])
    origin = report["provenance"]
    assert origin["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"command", "date", "device", "python", "weights"} <= origin.keys()
    assert origin["weights"] == {}, "what needs no weights has none"


AWKWARD = r"50 % of a_b & c | {x} #1 $5 ~ ^ \ <b>"


def test_latex_escapes() -> None:
    assert latex_escape(r"\%_") == r"\textbackslash{}\%\_"
    assert latex_escape("a\nb") == "a b"
    tex = Table(AWKWARD, ["method ↑", AWKWARD], [["[x]", AWKWARD]], [AWKWARD + "\nnext"]).latex()
    escaped = (
        r"50 \% of a\_b \& c \textbar{} \{x\} \#1 \$5 \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{} \textless{}b\textgreater{}"
    )
    assert rf"{{[x]}} & {{{escaped}}} \\" in tex
    assert r"{method $\uparrow$}" in tex
    assert tex.count("\n% ") == 1, "a note with a line break stays a comment"


def test_csv_and_markdown_keep_their_cells() -> None:
    table = Table("t", ["name", "text"], [["a,b", 'say "x"\nthen | y'], ["=1+1", "-2"]])
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows == [["name", "text"], ["a,b", 'say "x"\nthen | y'], ["'=1+1", "-2"]]
    assert table.markdown().splitlines()[2] == r'| a,b | say "x" then \| y |'
    with pytest.raises(ValueError, match="2 cells a row"):
        Table("t", ["a", "b"], [["1"]])


def test_tables_of_methods(folders: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["dover", "psnr", "temporal_flickering"]
    full = score_folder(folders[1], None, names)
    ours = score_folder(*folders, names)
    table = method_table({"full": full, "ours": ours}, baseline="full", extra={"loss": {"full": 2}})
    cells = dict(zip(table.head, table.body[0], strict=True))
    own = dict(zip(table.head, table.body[1], strict=True))
    psnr = next(title for title in table.head if title.lower().startswith("psnr"))
    dover = next(title for title in table.head if title.lower().startswith("dover"))
    assert (cells[psnr], cells["loss"], own["loss"]) == ("reference", "2.0000", "–")
    assert own[psnr].startswith("inf [")
    if "not_available" in ours["metrics"]["dover"]:
        assert table.head[-1] == dover
        assert own[dover] == "not available"
        assert any("not available: DOVER" in note for note in table.notes), "and how to get it"
    files = write_table(tmp_path / "sub" / "table", table)
    assert [path.name for path in files] == ["table.md", "table.csv", "table.tex"]
    records = list(csv.DictReader(files[1].open()))
    value = next(
        r for r in records if (r["method"], r["metric"]) == ("ours", "temporal_flickering")
    )
    assert float(value["mean"]) == ours["metrics"]["temporal_flickering"]["mean"]  # unrounded
    found = difference_table({"ours": paired_differences(ours, full)}, "full")
    assert found.body[0][0] == "ours"
    assert found.body[0][1].startswith("-0.")


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
