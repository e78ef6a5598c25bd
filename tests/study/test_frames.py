"""Frames of samples: the picture holds them without loss, and says what they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sla.data.manifest import DataError
from sla.data.module import DataConfig
from sla.results import ResultsError
from sla.study.frames import (
    Strips,
    frame_indices,
    read_strips,
    real_clips_of,
    spread,
    write_strips,
)
from sla.study.labels import read_prompts
from sla.study.plan import StudyError, load_plan
from sla.study.testing import coloured_square, write_coloured_shards, write_tiny_study
from sla.study.videos import real_clips, strips_of


def strips(seed: int = 0, arm: str = "sla", digest: str = "0123456789abcdef") -> Strips:
    frames = np.random.default_rng(seed).integers(0, 256, (2, 3, 8, 12, 3), dtype=np.uint8)
    texts = ("A red square – “quoted”.", "B")
    return Strips("video", arm, digest, seed, texts, ("t/0", "t/5"), (7, 12), (0, 4, 8), frames)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = write_strips(strips(), tmp_path)
    assert path == tmp_path / "study/frames/video/sla-0-01234567.png"
    (found,) = read_strips(tmp_path).values()
    assert found.key == ("video", "sla", "0123456789abcdef", 0)
    assert np.array_equal(found.frames, strips().frames)
    names = ("prompts", "clips", "noise_seeds", "indices")
    assert [getattr(found, n) for n in names] == [getattr(strips(), n) for n in names]
    with Image.open(path) as image:  # a row a prompt, a column a frame
        picture = np.asarray(image)
    assert np.array_equal(picture[8:16, 24:36], strips().frames[1, 2])
    before = path.read_bytes()
    assert write_strips(strips(), tmp_path).read_bytes() == before


def test_a_picture_of_something_else_is_refused(tmp_path: Path) -> None:
    assert read_strips(tmp_path) == {}
    path = write_strips(strips(), tmp_path)
    Image.fromarray(np.zeros((16, 36, 3), np.uint8)).save(path)
    with pytest.raises(ResultsError, match=r"sla-0-01234567\.png is not a picture"):
        read_strips(tmp_path)
    with pytest.raises(ValueError, match="there are 2 prompts and 2 indices"):
        Strips("v", "a", "d", 0, ("p", "q"), ("c", "d"), (), (0, 1), strips().frames)
    with pytest.raises(ValueError, match="must be uint8"):
        Strips("v", "a", "d", 0, ("p",), ("c",), (), (0,), np.zeros((1, 1, 2, 2, 3)))  # type: ignore[arg-type]


def test_which_frames_and_prompts() -> None:
    assert frame_indices(32) == (0, 6, 12, 19, 25, 31)
    assert frame_indices(4) == (0, 1, 2, 3)
    assert frame_indices(1) == (0,)
    assert spread(4, 64) == (8, 24, 40, 56)
    assert spread(4, 2) == (0, 1)
    assert spread(0, 64) == spread(4, 0) == ()


def test_frames_of_the_chosen_videos(tmp_path: Path) -> None:
    write_coloured_shards(tmp_path)
    prompts = read_prompts([f"{tmp_path}/test-*.tar"], ["colour"], 6)
    videos = np.random.default_rng(0).integers(0, 256, (6, 9, 4, 4, 3), dtype=np.uint8)
    found = strips_of(("s", "a", "d" * 16, 1), videos, prompts, 100, (1, 4))
    assert found.noise_seeds == (101, 104)  # as `sample_prompts` has them
    assert found.clips == (prompts[1].id, prompts[4].id)
    assert found.indices == (0, 2, 3, 5, 6, 8)
    assert np.array_equal(found.frames[1, 3], videos[4, 5])


def test_real_clips_are_those_of_the_prompts(tmp_path: Path) -> None:
    write_coloured_shards(tmp_path)
    shards = [f"{tmp_path}/test-*.tar"]
    every = read_prompts(shards, ["colour", "motion"], 6)
    prompts = [every[4], every[1]]
    data = DataConfig(
        source="webdataset",
        shards=[f"{tmp_path}/train-*.tar"],
        shard_cache=str(tmp_path / "cache"),
        num_frames=4,
        height=16,
        width=16,
        frame_stride=[1],
    )
    videos = real_clips(data, shards, prompts)
    assert videos.shape == (2, 4, 16, 16, 3)
    drawn = [
        coloured_square(p.attributes["colour"], p.attributes["motion"], 60 + 7 * k % 60)
        for k, p in enumerate(every)
    ]
    for wanted, video in zip((4, 1), videos, strict=True):  # H.264 in between
        differences = [np.abs(video.astype(float) - clip).mean() for clip in drawn]
        assert differences.index(min(differences)) == wanted
    other = prompts[0].__class__("test-00000/none", "x", {})
    with pytest.raises(DataError, match=r"test-00000/none .* cannot be read"):
        real_clips(data, shards, [other])


def test_keeping_frames_leaves_arms_what_they_are(tmp_path: Path) -> None:
    arms = write_tiny_study(tmp_path)

    def digests(**measures: Any) -> list[str]:
        lines = "".join(f"  {name}: {value}\n" for name, value in measures.items())
        path = tmp_path / "changed.yaml"
        path.write_text(arms.read_text().replace("  prompts: 2\n", lines))
        plan = load_plan(path)
        return [plan.digest(job, "w", "e") for job in plan.jobs()]

    assert digests(prompts=2) == digests(prompts=2, frames=0) == digests(prompts=2, frames=9)
    assert set(digests(prompts=2)).isdisjoint(digests(prompts=3))
    with pytest.raises(StudyError, match=r"measures\.frames is -1"):
        digests(prompts=2, frames=-1)


def test_the_key_of_real_clips_is_that_of_their_picture(tmp_path: Path) -> None:
    of_real = Strips(
        *real_clips_of("video"), ("p",), ("c",), (), (0,), np.zeros((1, 1, 2, 2, 3), np.uint8)
    )
    path = write_strips(of_real, tmp_path)
    assert path.name == "real_clips.png"
    assert list(read_strips(tmp_path)) == [real_clips_of("video")]
    with Image.open(path) as image:
        assert json.loads(image.info["sla"])["noise_seeds"] == []
