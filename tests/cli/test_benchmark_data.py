"""The benchmark of reading video measures what it says, and records it."""

import io
import json
from pathlib import Path

import pytest

from sla.benchmark import data
from sla.benchmark.__main__ import main
from sla.data.decode import read_window
from sla.data.testing import write_clip_set

FRAMES = 12


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("clips")
    write_clip_set(root, train=3, val=0, frames=FRAMES, height=128, width=128)
    return sorted(root.glob("*.mp4"))


def test_rows_are_printed_and_recorded(
    clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "8", "--repeats", "1", "--num-frames", "4", "--workers", "0", "1"]
    memory = ["--memory-samples", "20", "40"]
    videos = ["--videos", *map(str, clips)]
    assert main(["data", *videos, *options, *memory, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("data/*.jsonl")
    head, *rows = (json.loads(text) for text in path.read_text().splitlines())
    assert head["provenance"]["seed"] == 0
    pipelines = [row for row in rows if row["what"] == "pipeline"]
    readers = (*data.READERS, *data.LIBRARIES)
    assert [(row["reader"], row["workers"]) for row in pipelines] == [
        (reader, workers) for reader in readers for workers in (0, 1)
    ]
    assert [row["reader"] for row in rows if row["what"] == "raw"] == ["pyav", "decord"]
    for row in pipelines:
        assert row["samples"] == 8
        for name in ("decoded_per_s", "samples_per_s", "first_batch_s", "resume_s", "of_raw_pyav"):
            assert row[name] > 0, name
        # Windows of 4 frames out of 12, each decoded from the first frame on.
        assert 4 <= row["decoded_per_s"] / row["samples_per_s"] <= FRAMES
        assert row["of_raw_decord"] > 0
    (found,) = [row["memory_mib"] for row in rows if row["what"] == "memory"]
    if found is not None:  # elsewhere than on Linux
        assert list(found) == ["20", "40"]
        assert 10 < found["20"] < 10_000
    printed = capsys.readouterr().out
    for reader in readers:
        assert reader in printed
    assert all(len(text) < 140 for text in printed.splitlines()[:-1])


def test_every_raw_decoder_decodes_all_frames(clips: list[Path]) -> None:
    for name in data.RAW:
        found = data.decode(name, clips)
        assert found.frames == 3 * FRAMES
        assert found.per_core > 0


def test_decoded_frames_are_counted(clips: list[Path]) -> None:
    with data.counted() as total:
        read_window(clips[0], lambda track: [3, 7])
        assert total == [8]
        read_window(io.BytesIO(clips[1].read_bytes()), lambda track: [0])
        assert total == [9]
    read_window(clips[0], lambda track: [3])
    assert total == [9]


def test_no_clips_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data"]) == 1
    assert "make data" in capsys.readouterr().err
