"""Lists of clips: manifests, folders, and what is wrong with them."""

import json
import logging

import pytest

from sla.data.manifest import (
    DataError,
    FaultLog,
    load_clips,
    validation_by_hash,
)
from sla.data.testing import moving_square, write_clip_set
from sla.data.video import write_video


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    return write_clip_set(tmp_path_factory.mktemp("set"), train=6, val=3)


def folder_of(tmp_path, names):
    for k, name in enumerate(names):
        write_video(tmp_path / f"{name}.mp4", moving_square(8, 16, 16, shade=k), 10)
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}\n")
    return tmp_path


def test_jsonl(clip_set):
    clips = load_clips(clip_set)
    assert [c.id for c in clips.train] == [f"clip-{k:02d}" for k in range(6)]
    assert [c.id for c in clips.val] == [f"clip-{k:02d}" for k in range(6, 9)]
    assert clips.faults == {}
    assert clips.train[2].caption == "A square moves to the right, take 2."
    assert clips.train[2].video.is_file()


def test_csv_equals_jsonl(clip_set, tmp_path):
    lines = ["id,video,caption,split,extra"]
    for line in (clip_set / "manifest.jsonl").read_text().splitlines():
        e = json.loads(line)
        lines.append(f'{e["id"]},{clip_set / e["video"]},"{e["caption"]}",{e["split"]},7')
    path = tmp_path / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    ours, plain = load_clips(tmp_path, "list.csv"), load_clips(clip_set)
    assert [(c.id, c.caption, c.split) for c in ours.train + ours.val] == [
        (c.id, c.caption, c.split) for c in plain.train + plain.val
    ]
    assert ours.train[0].info == {"extra": "7"}
    # also as a path seen from the working folder
    assert len(load_clips("elsewhere", str(path)).train) == 6


def test_caption_with_line_breaks(tmp_path):
    folder_of(tmp_path, ["a"])
    (tmp_path / "manifest.csv").write_text('video,caption,split\na.mp4,"one,\n two",train\n')
    assert load_clips(tmp_path).train[0].caption == "one, two"
    separator = "one \u2028 two"  # a line separator in Unicode, none in JSON lines
    entry = json.dumps({"video": "a.mp4", "caption": separator, "split": "val"}, ensure_ascii=False)
    (tmp_path / "manifest.jsonl").write_text(entry, encoding="utf-8")
    assert load_clips(tmp_path).val[0].caption == "one two"


def test_folder_with_captions_beside(tmp_path):
    (tmp_path / "deep").mkdir()
    folder_of(tmp_path, ["b", "deep/a", "c"])
    clips = load_clips(tmp_path, val_fraction=0.0)
    assert [c.id for c in clips.train] == ["b", "c", "deep/a"]
    assert clips.train[2].caption == "caption of deep/a"
    assert len(load_clips(tmp_path, val_fraction=1.0).val) == 3


def test_split_by_hash_has_the_right_share_and_ignores_other_clips():
    names = [f"clip {k}" for k in range(5000)]
    share = sum(validation_by_hash(n, 0.1) for n in names) / len(names)
    assert 0.08 < share < 0.12
    small = {n for n in names if validation_by_hash(n, 0.1)}
    assert small < {n for n in names if validation_by_hash(n, 0.3)}  # a larger share only adds


def test_faults_are_counted_and_named_once(tmp_path, caplog):
    folder_of(tmp_path, [f"good-{k}" for k in range(4)])
    good = (tmp_path / "good-0.mp4").read_bytes()
    bad = {
        "no-caption": (good, None),
        "empty-caption": (good, " \n\t\n"),
        "not-utf8": (good, b"caf\xe9"),
        "cut": (good[: len(good) // 2], "a caption"),
        "empty": (b"", "a caption"),
        "text": (b"no video at all\n" * 100, "a caption"),
    }
    for name, (video, caption) in bad.items():
        (tmp_path / f"{name}.mp4").write_bytes(video)
        if isinstance(caption, bytes):
            (tmp_path / f"{name}.txt").write_bytes(caption)
        elif caption is not None:
            (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "readme.txt").write_text("a text without a video is no clip")
    with caplog.at_level(logging.WARNING):
        clips = load_clips(tmp_path, max_bad_fraction=0.7)
    assert sorted(c.id for c in clips.train + clips.val) == [f"good-{k}" for k in range(4)]
    assert {name.removesuffix(".mp4") for name in clips.faults} == set(bad)
    assert clips.total == 10
    for name in bad:
        assert sum(f"clip {name}.mp4 is left out" in r.message for r in caplog.records) == 1
    with pytest.raises(DataError, match=r"6 of 10 clips cannot be used(.|\n)*cut\.mp4"):
        load_clips(tmp_path, max_bad_fraction=0.5)


def test_manifest_faults(clip_set, tmp_path):
    good = {"video": str(clip_set / "clip-00.mp4"), "caption": "fine", "split": "train"}
    lines = [
        json.dumps({**good, "id": "first"}),
        json.dumps({**good, "id": "first"}),
        "{not json",
        json.dumps(["a", "list"]),
        json.dumps({"caption": "which video?"}),
        json.dumps({**good, "id": "missing", "video": "nowhere.mp4"}),
        json.dumps({**good, "id": "silent", "caption": ""}),
        json.dumps({**good, "id": "number", "caption": 3}),
        json.dumps({**good, "id": "null", "caption": None}),
        "",
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    for probe in (True, False):
        clips = load_clips(tmp_path, "m.jsonl", max_bad_fraction=0.9, probe_videos=probe)
        assert [c.id for c in clips.train] == ["first"]
        assert len(clips.faults) == 8
    reasons = " ".join(clips.faults.values())
    for word in ("taken by an earlier", "not JSON", "no field `video`", "no such file", "empty"):
        assert word in reasons


def test_short_videos_are_left_out_but_no_fault(tmp_path):
    folder_of(tmp_path, ["short"])
    write_video(tmp_path / "long.mp4", moving_square(20, 16, 16), 10)
    (tmp_path / "long.txt").write_text("long")
    clips = load_clips(tmp_path, min_frames=16, max_bad_fraction=0.0)
    assert [c.id for c in clips.train + clips.val] == ["long"]
    assert clips.short == {"short.mp4": "it has 8 frames, 16 are needed"}


def test_wrong_split_is_an_error(clip_set, tmp_path):
    entry = {"video": str(clip_set / "clip-00.mp4"), "caption": "x", "split": "test"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"split of clip .* \('train', 'val'\), got 'test'"):
        load_clips(tmp_path)


@pytest.mark.parametrize(
    ("root", "manifest"), [("nowhere", ""), (".", ""), (".", "list.jsonl"), (".", "list.xml")]
)
def test_nothing_there_says_what_to_do(tmp_path, root, manifest):
    with pytest.raises(DataError, match="make data"):
        load_clips(tmp_path / root, manifest)


def test_unknown_manifest_format(tmp_path):
    (tmp_path / "list.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"\.jsonl or \.csv"):
        load_clips(tmp_path, "list.xml")


def test_fault_log_counts_each_clip_once_and_stops_over_the_limit(caplog):
    faults = FaultLog(10, total=20, before={"x": "gone"}, limit=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            faults.report(4, "four", "cut off")
    assert faults.count == 2
    assert len(caplog.records) == 1
    with pytest.raises(DataError, match=r"3 of 20(.|\n)*four: cut off"):
        faults.report(5, "five", "cut off")
