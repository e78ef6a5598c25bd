"""`data-report`: what it counts, and what it says of a set with every kind of fault."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sla.cli.main import main
from sla.data.decode import TooShort, VideoFile, time_window
from sla.data.report import (
    ClipFacts,
    Entry,
    contact_sheet,
    distribution,
    examine,
    examine_clip,
    markdown,
    summarize,
)
from sla.data.shards import RawSample
from sla.data.testing import moving_square
from sla.data.video import read_frames, write_video
from sla.training.testing import write_tiny_experiment


def write_uneven_video(path: Path) -> None:
    """Eight frames, the last four at half the rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k, frame in enumerate(moving_square(8, 48, 64)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = k if k < 4 else 2 * k - 3
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound clips of two sizes and rates, a copy, and one clip of each fault."""
    root = tmp_path_factory.mktemp("set")
    for name, frames, size, fps in (
        ("a", 24, (48, 64), 12),
        ("b", 12, (48, 64), 12),
        ("c", 30, (64, 48), 30),
        ("short", 3, (48, 64), 12),
    ):
        write_video(root / f"{name}.mp4", moving_square(frames, *size, shade=len(name)), fps=fps)
    shutil.copy(root / "a.mp4", root / "copy.mp4")
    data = (root / "a.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(data[: len(data) // 2])
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("no video\n" * 99)
    torn = bytearray(data)
    end = data.index(b"moov") - 4
    torn[end - 60 : end] = bytes(60)  # its last frames; the middle one is sound
    (root / "torn.mp4").write_bytes(torn)
    write_uneven_video(root / "uneven.mp4")
    shutil.copy(root / "b.mp4", root / "no-caption.mp4")
    names = ["a", "b", "c", "short", "copy", "cut", "empty", "text", "torn", "uneven"]
    for k, name in enumerate(names):
        (root / f"{name}.txt").write_text(f"Clip number {k}: " + "x" * k)
    return root


@pytest.fixture(scope="module")
def report(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = write_tiny_experiment(folder)
    out = folder / "report"
    arguments = ["data-report", "--config", str(config), "--out", str(out), "--workers", "2"]
    assert main([*arguments, f"data.root={root}", "data.num_frames=8"]) == 0
    return out


def test_everything_is_counted(report: Path) -> None:
    values = json.loads((report / "report.json").read_text())
    clips = values["clips"]
    assert clips["found"] == 11
    assert clips["sound"] == 6
    assert clips["failed"] == 5
    assert clips["shorter_than_a_sample"] == 1
    assert clips["variable_frame_rate"] == 1
    assert clips["train"] + clips.get("val", 0) == 6
    assert values["resolutions"] == {"64x48": 5, "48x64": 1}
    assert values["frames"]["sum"] == 24 + 12 + 30 + 3 + 24 + 8
    assert values["frame_rates"]["12"] == 4
    assert values["frame_rates"]["30"] == 1
    seconds = values["seconds"]
    assert seconds["max"] == pytest.approx(2.0, abs=1e-3)
    assert seconds["min"] == pytest.approx(0.25, abs=1e-3)
    assert sum(seconds["histogram"]["counts"]) == 6
    assert values["duplicates"] == [["a", "copy"]]
    assert values["all_frames_decoded"]
    assert values["provenance"]["python"]


def test_captions_are_measured(report: Path, root: Path) -> None:
    captions = json.loads((report / "report.json").read_text())["captions"]
    lengths = [len(" ".join(p.read_text().split())) for p in root.glob("*.txt")]
    assert captions["bytes"]["min"] == min(lengths)
    assert captions["bytes"]["median"] == np.median(lengths)
    assert captions["bytes"]["max"] == max(lengths)
    assert captions["cut_off"] == sum(n > 23 for n in lengths) > 0  # text.max_tokens=23
    assert captions["not_unique"] == 0


def test_failures_are_named_with_reasons(report: Path) -> None:
    values = json.loads((report / "report.json").read_text())
    failures = values["failures"]
    assert set(failures) == {"no-caption.mp4", "cut", "empty", "text", "torn"}
    assert failures["no-caption.mp4"] == "no caption file no-caption.txt"
    assert failures["empty"] == "the file is empty"
    assert "not a video" in failures["text"]
    assert "damaged" in failures["torn"]
    assert sum(values["failure_reasons"].values()) == 5


def test_the_page_says_the_same(report: Path) -> None:
    page = (report / "report.md").read_text()
    for part in (
        *("| clips | 11 found, 6 sound (", "| failures | 5 |", "| duplicates | 1 |"),
        *("| 64x48 | 5 |", "- `empty`: the file is empty", "- `a`, `copy`"),
        *("](contact_sheet.png)", "## Caption lengths in bytes"),
    ):
        assert part in page, part


def test_contact_sheet_shows_the_clips(report: Path, root: Path) -> None:
    sheet = np.asarray(Image.open(report / "contact_sheet.png").convert("RGB"))
    assert sheet.shape[0] > 300
    left, top = 8 + (192 - 64) // 2, 8 + (144 - 48) // 2  # of the first clip, in its cell
    shown = sheet[top : top + 48, left : left + 64].astype(int)
    (frame,) = read_frames(root / "a.mp4", [12]).astype(int)
    assert np.abs(shown - frame).mean() < 2
    assert (sheet[top - 40 : top - 2, left : left + 64] == 255).all()


def test_quick_decodes_one_frame(root: Path) -> None:
    entry = Entry("torn", root / "torn.mp4", "torn")
    assert examine_clip(entry, whole=False).failure == ""
    assert "damaged" in examine_clip(entry).failure


def test_bytes_in_memory_equal_the_file(root: Path) -> None:
    path = root / "c.mp4"
    of_file = examine_clip(Entry("c", path, "c"))
    of_bytes = examine_clip(Entry("", lambda: RawSample("c", io.BytesIO(path.read_bytes()), "c")))
    assert of_file == of_bytes
    assert of_file.num_bytes == path.stat().st_size


def test_shards_are_reported_too(root: Path, tmp_path: Path) -> None:
    config = write_tiny_experiment(tmp_path)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name in ("a.mp4", "a.txt", "b.mp4", "torn.mp4", "torn.txt", "c.mp4", "c.txt"):
            tar.add(root / name, name)
    (tmp_path / "00001.tar").write_text("no tar file\n" * 99)
    arguments = ["data-report", "--config", str(config), "--out", str(tmp_path / "out")]
    shards = [f"data.shards=['{tmp_path}/*.tar']", f"data.shard_cache={tmp_path / 'cache'}"]
    assert main([*arguments, "data.source=webdataset", "data.val_fraction=0", *shards]) == 0
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert values["clips"]["found"] == 5
    assert values["clips"]["train"] == values["clips"]["sound"] == 2
    assert set(values["failures"]) == {"00000/b", "00000/torn", "00001"}
    assert values["failures"]["00000/b"] == "no caption"
    assert values["captions"]["words"]["max"] == 4


def test_a_file_that_is_not_there() -> None:
    facts = examine_clip(Entry("gone", Path("nowhere.mp4"), "gone"))
    assert facts.failure == "no such file"
    assert facts.checksum == ""


@pytest.mark.parametrize("wanted", [0, 2, 3, 99])
def test_thumbnails_are_spread_over_the_set(root: Path, wanted: int) -> None:
    entries = [Entry(name, root / f"{name}.mp4", name) for name in ("a", "b", "c", "copy", "short")]
    facts = list(examine(entries, thumbnails=wanted, whole=False, progress=False))
    shown = [k for k, clip in enumerate(facts) if clip.thumbnail is not None]
    assert shown == {0: [], 2: [1, 3], 3: [0, 2, 4], 99: [0, 1, 2, 3, 4]}[wanted]
    sheet = contact_sheet(facts)
    assert (sheet is None) == (wanted == 0)


def test_captions_of_any_kind_are_drawn() -> None:
    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    captions = ["", "word " * 200, "x" * 500, "\u00e4\u4e2d\U0001f600 \ud800"]
    facts = [ClipFacts(Entry(str(k), Path(), c), thumbnail=picture) for k, c in enumerate(captions)]
    sheet = contact_sheet(facts, columns=3)
    assert sheet is not None
    assert sheet.shape == contact_sheet(facts[:3] + facts[:1], columns=3).shape  # type: ignore[union-attr]


def test_a_set_without_a_sound_clip_is_reported_too() -> None:
    summary = summarize([ClipFacts(Entry("x", Path(), "c"), failure="a | b")], {"y": "no caption"})
    assert summary["clips"] == {
        "found": 2,
        "sound": 0,
        "failed": 2,
        "shorter_than_a_sample": 0,
        "variable_frame_rate": 0,
    }
    assert summary["seconds"] is None
    page = markdown(summary, "Data: x")
    assert "2 found, 0 sound" in page
    assert "- `x`: a \\| b" in page


@pytest.mark.parametrize("num_frames", [3, 9, 12, 13, 16])
def test_short_clips_are_those_that_training_leaves_out(root: Path, num_frames: int) -> None:
    """Two clips of 24 frames in 2 s and of 12 in 1 s, resampled to 8 frames a second."""
    names = ["a", "b"]
    facts = [examine_clip(Entry(name, root / f"{name}.mp4", "c"), whole=False) for name in names]
    left_out = 0
    for name in names:
        with VideoFile(root / f"{name}.mp4") as video:
            try:
                time_window(video.track, num_frames, 1, 0.0, 8.0, name)
            except TooShort:
                left_out += 1
    summary = summarize(facts, num_frames=num_frames, fps=8.0)
    assert summary["clips"]["shorter_than_a_sample"] == left_out


def test_distribution() -> None:
    values = distribution([1.0, 2.0, 2.0, 11.0])
    assert values is not None
    assert (values["min"], values["median"], values["max"], values["sum"]) == (1, 2, 11, 16)
    assert values["histogram"]["counts"] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert distribution([]) is None


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny_experiment(tmp_path)
    arguments = ["data-report", "--config", str(config)]
    (tmp_path / "empty").mkdir()
    assert main([*arguments, f"data.root={tmp_path / 'empty'}"]) == 1
    assert "no clips in" in capsys.readouterr().err
    assert main([*arguments, "data.source=latents", "data.cache=x"]) == 2
    assert "a report is about videos" in capsys.readouterr().err
