"""The study set: captions that are true of the pixels, splits that share no combination, shards
that are the same however they were made."""

from __future__ import annotations

import errno
import itertools
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sla.cli.main import main
from sla.config import load_experiment
from sla.data.module import VideoDataModule
from sla.data.study import (
    ATTRIBUTES,
    SPLITS,
    StudyConfig,
    StudyError,
    Words,
    caption,
    combinations,
    encode,
    make_clip,
    shards,
    split_of,
    study_records,
    verify_study,
    write_study,
)
from sla.data.study.observe import motion_fault, name_colour, picture_fault, rebounds
from sla.data.study.physics import FRAMES, simulate
from sla.data.study.render import render
from sla.data.study.scene import CAMERAS, COLOURS, MOTIONS, draw_words
from sla.data.testing import moving_square
from sla.data.video import read_frames, write_video
from sla.models.text import TrainedTextEncoder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = StudyConfig(seed=3, train=3, val=1, test=1, shard_clips=2)
HITS = ("hit_left", "hit_right")


# Words and captions


def some_words(split: str, count: int) -> list[Words]:
    return [draw_words(np.random.default_rng([1, k]), split) for k in range(count)]


def understood(text: str) -> dict[str, Any]:
    """The attributes that a reader takes from a caption, without the code that wrote it."""
    camera = re.search(r"The camera ([a-z ]+)\.", text)
    scene = re.sub(r"The camera [a-z ]+\.", "", text).strip()
    floor = re.search(r"(on|over) an? (\w+) floor", scene)
    assert camera is not None
    assert floor is not None
    scene = scene.replace(floor[0], "")
    other = re.search(r"(near|hits) an? (\w+) (\w+)", scene)
    if other is not None:
        scene = scene.replace(other[0], "hits" if other[1] == "hits" else "")
    found = re.match(r"An? (\w+)( striped| checkered| spotted)? (\w+)\s+([a-z ]+?)\s*\.$", scene)
    assert found is not None, text
    motions = {
        r"stands still": "still",
        r"rolls to the (left|right)": "roll_",
        r"slides to the (left|right)": "slide_",
        r"(?:rolls|slides) towards the camera": "approach",
        r"(?:rolls|slides) away from the camera": "recede",
        r"falls and bounces": "bounce",
        r"falls and stays down": "drop",
        r"spins in place": "spin",
        r"swings on a rod": "swing",
        r"topples over": "topple",
        r"flies in an arc to the (left|right)": "arc_",
        r"floats upwards": "float_up",
        r"(?:rolls|slides) down a ramp to the (left|right)": "ramp_",
        r"(?:rolls|slides) to the (left|right) and hits": "hit_",
    }
    matches = [
        name + "".join(match.groups())
        for pattern, name in motions.items()
        if (match := re.fullmatch(pattern, found[4])) is not None
    ]
    assert len(matches) == 1, found[4]
    cameras = {
        "does not move": "still",
        "pans to the left": "pan_left",
        "pans to the right": "pan_right",
        "moves closer": "closer",
        "moves back": "back",
        "circles to the left": "circle_left",
        "circles to the right": "circle_right",
    }
    return {
        "object": found[3],
        "colour": found[1],
        "pattern": (found[2] or "plain").strip(),
        "motion": matches[0],
        "camera": cameras[camera[1]],
        "floor": floor[2],
        "other_object": other and other[3],
        "other_colour": other and other[2],
    }


def test_a_caption_says_every_attribute_and_no_other() -> None:
    words = some_words("train", 1500)
    assert {w.motion for w in words} == set(MOTIONS)
    for w, variant in itertools.product(words, (0, 1)):
        text = caption(w, variant)
        assert understood(text) == w.attributes()
        assert len(text.encode()) <= 139  # configs/data/study.yaml says so
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.lower())


def test_the_studys_text_encoder_reads_whole_captions_and_tells_all_words_apart() -> None:
    texts = [caption(w, v) for w in some_words("train", 1500) for v in (0, 1)]
    config = load_experiment(CONFIGS / "study" / "pretrain.yaml").text
    encoder = TrainedTextEncoder(config)
    ids, mask = encoder.tokenize(texts)
    assert mask.sum(1).max() <= config.max_tokens  # BOS included: none was cut
    words = {word for text in texts for word in re.findall(r"\w+|[.,]", text.lower())}
    assert len(ids[mask].unique()) == len(words) + 1


def test_every_attribute_takes_every_value() -> None:
    words = some_words("train", 1500)
    for name, values in ATTRIBUTES.items():
        assert {getattr(w, name) for w in words} == set(values)


def test_what_only_a_pattern_would_show_has_one() -> None:
    for w in some_words("train", 1500):
        if w.motion in ("roll_left", "roll_right") or (w.motion, w.object) == ("spin", "ball"):
            assert w.pattern != "plain"


# Splits


def test_the_splits_share_no_combination_of_object_colour_and_motion() -> None:
    triples = {
        split: {
            (kind, colour, name)
            for name, pairs in combinations(split).items()
            for kind, colour in pairs
        }
        for split in SPLITS
    }
    everything = {
        (kind, colour, name)
        for name, motion in MOTIONS.items()
        for kind in motion.objects
        for colour in COLOURS
    }
    assert sum(map(len, triples.values())) == len(everything) == 1592
    assert set().union(*triples.values()) == everything
    assert len(triples["val"]) > 100
    assert len(triples["test"]) > 100
    # What is held out is a combination, never a part of it.
    for split in ("val", "test"):
        assert {name for _, _, name in triples[split]} == set(MOTIONS)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            pairs = {(t[first], t[second]) for t in triples[split]}
            assert pairs <= {(t[first], t[second]) for t in triples["train"]}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_draws_its_own_combinations(split: str) -> None:
    for w in some_words(split, 300):
        assert split_of(w.object, w.colour, w.motion) == split


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'dev'"):
        make_clip(0, "dev", 0)
    with pytest.raises(ValueError, match="split must be one of"):
        combinations("dev")


# Clips


def test_a_clip_is_a_function_of_seed_split_and_index() -> None:
    first = make_clip(5, "val", 2)
    make_clip(5, "val", 3)
    again = make_clip(5, "val", 2)
    assert first.frames.shape == (32, 64, 64, 3)
    assert first.frames.dtype == np.uint8
    assert np.array_equal(first.frames, again.frames)
    assert first.record == again.record
    assert understood(first.caption).items() <= first.record.items()
    for other in (make_clip(6, "val", 2), make_clip(5, "test", 2)):
        assert not np.array_equal(first.frames, other.frames)


def test_encoding_the_same_pictures_gives_the_same_bytes(moves: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for name in ("still", "bounce", "arc_left"):
        found = set()
        for _ in range(6):
            _used = [rng.bytes(int(size)) for size in rng.integers(1000, 200000, 5)]
            found.add(encode(moves[name].frames))  # x264 must not see what memory held before
        assert len(found) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"object": "cow"}, "object must be one of ball, .*, got 'cow'"),
        ({"motion": "roll_left"}, "roll_left is for ball, .*, not for cube"),
        ({"motion": "hit_left"}, "hit_left needs a second object"),
        ({"other": ("cube", "pink")}, "other must be an object and a colour"),
    ],
)
def test_words_that_cannot_be_said_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_clip(0, "train", 0, replace(PLAIN, **change))


PLAIN = Words("cube", "blue", "plain", "still", "still", "concrete", None)
OBJECT_OF = {"roll": "ball", "bounce": "ball", "topple": "cylinder", "ramp": "cube", "arc": "star"}


@pytest.fixture(scope="module")
def moves() -> dict[str, Any]:
    """A blue object in each motion, before a camera that stands still."""
    found = {}
    for name in MOTIONS:
        kind = OBJECT_OF.get(name.split("_")[0], "cube")
        words = replace(
            PLAIN,
            object=kind,
            motion=name,
            pattern="striped" if name.startswith("roll") else "plain",
            other=("cube", "red") if name in HITS else None,
        )
        words = replace(words, object="brick") if name in HITS else words
        found[name] = make_clip(1, "train", 0, words)
    return found


def blue(frames: NDArray[np.uint8], channel: int = 2) -> NDArray[np.bool_]:
    """Pixels (T, H, W) of a colour, by the picture alone: floors and skies are muted."""
    values = frames.astype(np.int64)
    rest = np.delete(values, channel, axis=-1).max(-1)
    return values[..., channel] > 1.6 * rest + 12


def centres(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(column, row) of the pixels of each frame, (T, 2); NaN where there are none."""
    at = np.arange(64)
    total = mask.sum((1, 2)).astype(np.float64)
    total[total < 8] = np.nan
    return np.stack([(mask.sum(1) * at).sum(1) / total, (mask.sum(2) * at).sum(1) / total], axis=1)


def changed(frames: NDArray[np.uint8]) -> float:
    """Share of the pixels that differ from the first frame's, in the frame where it is largest."""
    values = frames.astype(np.int64)
    return float((np.abs(values - values[0]).max(-1) > 10).mean((1, 2)).max())


def way(clip: Any) -> NDArray[np.float64]:
    """(column, row) from the first to the last frame with blue pixels, in pixels."""
    path = centres(blue(clip.frames))
    path = path[~np.isnan(path[:, 0])]
    assert len(path) > 20
    return path[-1] - path[0]


@pytest.mark.parametrize("name", [n for n, motion in MOTIONS.items() if motion.direction])
def test_what_goes_left_or_right_does_so_in_the_picture(moves: dict[str, Any], name: str) -> None:
    column, row = way(moves[name])
    assert column * MOTIONS[name].direction > 6
    if name.startswith("ramp"):
        assert row > 4
    if name.startswith(("roll", "slide")):
        assert abs(row) < abs(column)


def test_what_stands_still_gives_the_same_picture(moves: dict[str, Any]) -> None:
    assert changed(moves["still"].frames) < 0.005
    assert min(changed(moves[name].frames) for name in MOTIONS if name != "still") > 0.03


def test_what_comes_nearer_grows(moves: dict[str, Any]) -> None:
    for name, sign in (("approach", 1), ("recede", -1)):
        area = blue(moves[name].frames).sum((1, 2))
        assert np.log(area[-3:].mean() / area[:3].mean()) * sign > np.log(1.5)


def test_what_falls_falls_and_only_what_bounces_comes_up_again(moves: dict[str, Any]) -> None:
    heights = {name: -centres(blue(moves[name].frames))[:, 1] for name in ("bounce", "drop")}
    for height in heights.values():
        assert height[0] - height.min() > 8
    assert rebounds(heights["bounce"], least=2.0) >= 2
    assert rebounds(heights["drop"], least=2.0) == 0
    assert np.ptp(heights["drop"][-6:]) < 1.5


def test_what_spins_changes_in_its_place(moves: dict[str, Any]) -> None:
    clip = moves["spin"]
    assert np.abs(way(clip)).max() < 2
    frames = clip.frames.astype(np.int64)
    assert (np.abs(np.diff(frames, axis=0)).max((1, 2, 3)) > 20).mean() > 0.7


def test_what_swings_comes_back(moves: dict[str, Any]) -> None:
    column = centres(blue(moves["swing"].frames))[:, 0]
    low, high = int(np.nanargmin(column)), int(np.nanargmax(column))
    assert column[high] - column[low] > 12
    last = max(low, high)
    assert abs(column[-1] - column[last]) > 4 or abs(column[0] - column[min(low, high)]) > 4


def test_what_topples_lies_down(moves: dict[str, Any]) -> None:
    mask = blue(moves["topple"].frames)
    shapes = [np.ptp(np.argwhere(mask[k]), axis=0) for k in (0, -1)]  # height, width
    assert shapes[0][0] > 1.2 * shapes[0][1]
    assert shapes[1][0] < 0.8 * shapes[0][0]


def test_what_flies_rises_and_falls_and_what_floats_only_rises(moves: dict[str, Any]) -> None:
    for name in ("arc_left", "arc_right"):
        row = centres(blue(moves[name].frames))[:, 1]
        top = int(np.nanargmin(row))
        assert 5 < top < 27
        assert row[0] - row[top] > 5
        assert row[~np.isnan(row)][-1] - row[top] > 3
    row = centres(blue(moves["float_up"].frames))[:, 1]
    assert (np.diff(row[~np.isnan(row)]) < 0.3).all()
    assert row[0] - row[~np.isnan(row)][-1] > 8


@pytest.mark.parametrize("name", HITS)
def test_what_is_hit_stands_until_then(moves: dict[str, Any], name: str) -> None:
    red = centres(blue(moves[name].frames, channel=0))[:, 0]
    assert abs(red[3] - red[0]) < 1
    assert (red[~np.isnan(red)][-1] - red[0]) * MOTIONS[name].direction > 1.5


def test_a_motion_is_never_taken_for_another(moves: dict[str, Any]) -> None:
    """What happened in each clip is refused under every other name."""
    for name, clip in moves.items():
        rollout = simulate(clip.scene)
        assert motion_fault(clip.scene, rollout) == ""
        for wrong in set(MOTIONS) - {name}:
            scene = replace(clip.scene, words=replace(clip.scene.words, motion=wrong))
            assert motion_fault(scene, rollout) != "", f"{name} passes for {wrong}"


@pytest.fixture(scope="module")
def looks() -> dict[str, Any]:
    """A blue cube that stands still, a red one near it, before each camera."""
    words = replace(PLAIN, other=("cube", "red"), floor="tiled")
    return {camera: make_clip(2, "train", 1, replace(words, camera=camera)) for camera in CAMERAS}


def test_the_camera_does_what_the_caption_says(looks: dict[str, Any]) -> None:
    assert way(looks["pan_left"])[0] > 8  # things go the other way
    assert way(looks["pan_right"])[0] < -8
    area = {name: blue(clip.frames).sum((1, 2)) for name, clip in looks.items()}
    assert area["closer"][-1] > 1.8 * area["closer"][0]
    assert area["back"][0] > 1.8 * area["back"][-1]
    for name, sign in (("circle_left", -1), ("circle_right", 1)):
        # The red cube is behind the blue one: seen from further right it is further right.
        red = centres(blue(looks[name].frames, channel=0))[:, 0]
        apart = red - centres(blue(looks[name].frames))[:, 0]
        assert (apart[-1] - apart[0]) * sign > 4
    assert changed(looks["still"].frames) < 0.005
    assert min(changed(clip.frames) for name, clip in looks.items() if name != "still") > 0.3


def test_pictures_are_lit_and_smooth(moves: dict[str, Any]) -> None:
    clip = moves["slide_left"]
    share = clip.rendering.share[:, 0]
    assert ((share > 0) & (share < 4)).sum() > 300  # edges are mixed
    sides = {tuple(c) for c in clip.frames[0][share[0] == 4] // 16}
    assert len(sides) > 2  # faces of one colour differ in light
    unlit = replace(clip.scene, ambient=1.15)  # all light without direction: no shadow
    assert not np.array_equal(render(unlit, simulate(unlit)).frames, clip.frames)


def test_colours_are_named_as_they_look() -> None:
    for name, rgb in COLOURS.items():
        for light in (0.3, 0.7, 1.0):
            assert name_colour(light * np.asarray(rgb)) == name


def test_pictures_of_another_colour_or_of_nothing_are_refused(moves: dict[str, Any]) -> None:
    clip = moves["spin"]
    assert picture_fault(clip.scene, clip.rendering) == ""
    wrong = replace(clip.scene, words=replace(clip.scene.words, colour="green"))
    assert picture_fault(wrong, clip.rendering) == "its colour looks blue"
    empty = replace(clip.rendering, share=np.zeros_like(clip.rendering.share))
    assert "too little seen" in picture_fault(clip.scene, empty)
    clip = moves["roll_left"]
    wrong = replace(clip.scene, words=replace(clip.scene.words, motion="roll_right"))
    assert "camera" in picture_fault(wrong, clip.rendering)


def test_without_mujoco_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(StudyError, match=r"pip install 'sla-reproduction\[study\]'"):
        make_clip(0, "train", 0)


# Shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "set"
    summary = write_study(folder, TINY, workers=2, progress=False)
    assert summary.clips == {"train": 3, "val": 1, "test": 1}
    assert summary.written == summary.shards == 4
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_data_module_reads_the_shards(made: Path) -> None:
    config = replace(
        load_experiment(CONFIGS / "data/study.yaml").data,
        shards=[str(made / "train-*.tar")],
        val_shards=[str(made / "val-*.tar")],
        shard_cache=str(made.parent / "cache"),
        num_workers=0,
        batch_size=3,
        caption_dropout=0.0,
    )
    module = VideoDataModule(config)
    batch = next(iter(module.train_dataloader()))
    records = {record["id"]: record for record in study_records(made, "train")}
    assert set(batch["clip_id"]) == set(records)
    for name, text, video in zip(batch["clip_id"], batch["caption"], batch["video"], strict=True):
        record = records[name]
        assert text == record["caption"]
        assert understood(text).items() <= record.items()
        truth = make_clip(3, "train", record["index"]).frames
        shown = ((video.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round()
        error = np.mean((shown - truth.astype(np.float64)) ** 2)
        assert 10 * np.log10(255**2 / error) > 33
    loader = module.val_dataloader()
    assert not isinstance(loader, list)
    captions = [text for batch in loader for text in batch["caption"]]
    assert captions == [record["caption"] for record in study_records(made, "val")]


def test_the_mixed_config_adds_the_real_clips() -> None:
    both = [load_experiment(CONFIGS / f"data/{n}.yaml").data for n in ("study", "study_mixed")]
    assert both[1].shards == [*both[0].shards, "data/study/real-train-*.tar"]
    assert replace(both[1], shards=both[0].shards) == both[0]


def test_the_number_of_workers_changes_no_byte(made: Path, tmp_path: Path) -> None:
    """`made` is of two processes."""
    write_study(tmp_path / "set", TINY, workers=1, progress=False)
    assert contents(tmp_path / "set") == contents(made)


def test_an_interrupted_run_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    whole, count = shards._make, itertools.count()

    def interrupted(*task: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return whole(*task)

    monkeypatch.setattr(shards, "_make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_study(folder, TINY, workers=1, progress=False)
    assert not (folder / "manifest.json").exists()
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        "train-00000.tar",
        "train-00001.tar",
    ]
    with pytest.raises(StudyError, match="no finished study set"):
        verify_study(folder)
    (folder / "train-00001.json").unlink()  # killed between a shard and its record
    made_now: list[Any] = []
    monkeypatch.setattr(shards, "_make", lambda *task: made_now.append(task) or whole(*task))
    assert write_study(folder, TINY, workers=1, progress=False).written == 3
    assert ("train", 0) not in {(split, start) for _, split, start, _ in made_now}
    assert contents(folder) == contents(made)
    assert write_study(folder, TINY, workers=1, progress=False).written == 0


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in contents(folder).items():
        (target / name).write_bytes(data)
    return target


def test_a_cut_shard_is_made_again_and_a_damaged_one_is_found(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "set")
    path = folder / "test-00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    assert write_study(folder, TINY, workers=1, progress=False).written == 1
    assert path.read_bytes() == data
    path.write_bytes(data[:600] + b"x" + data[601:])
    with pytest.raises(StudyError, match=r"test-00000\.tar is damaged"):
        verify_study(folder)
    path.unlink()
    with pytest.raises(StudyError, match=r"test-00000\.tar is missing"):
        verify_study(folder)


def test_another_set_is_not_mixed_in(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "set")
    with pytest.raises(StudyError, match="holds another set \\(seed 3, not 4\\)"):
        write_study(folder, replace(TINY, seed=4), workers=1, progress=False)
    assert contents(folder) == contents(made)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(StudyError, match="is of version 0"):
        next(study_records(folder, "train"))


def test_the_manifest_says_what_the_set_is(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["attributes"] == {name: list(values) for name, values in ATTRIBUTES.items()}
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 1, 1, 1]
    assert verify_study(made).checksum == manifest["checksum"]
    with pytest.raises(StudyError, match="no clips 'real-train'"):
        next(study_records(made, "real-train"))


def test_a_full_disk_is_named_and_leaves_nothing_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_make", lambda *task: [(b"video", {})] * task[-1])
    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write: No space left") as caught:
        write_study(tmp_path / "set", TINY, workers=1, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.endswith("train-00000.tar")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["plan.json"]


def test_a_process_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def submit(self, *_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool("died"))
            return future

        shutdown: Callable[..., None] = lambda *_, **__: None

    monkeypatch.setattr(shards, "ProcessPoolExecutor", Broken)
    with pytest.raises(StudyError, match="a process that makes clips died"):
        write_study(tmp_path / "set", TINY, workers=2, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": -1}, "train is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shard_clips": 0}, "shard_clips is 0; it must be at least 1"),
        ({"train": 0, "val": 0, "test": 0}, "all 0"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_the_command_makes_completes_and_verifies(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(made, tmp_path / "set")
    numbers = ["--seed=3", "--train=3", "--val=1", "--test=1", "--shard-clips=2", "--workers=1"]
    assert main(["study-data", "--out", str(folder), *numbers]) == 0
    assert "3 train, 1 val, 1 test clips in 4 shards" in capsys.readouterr().out
    assert main(["study-data", "--out", str(folder), "--verify"]) == 0
    assert main(["study-data", "--out", str(folder), *numbers, "--seed=9"]) == 1
    assert "another set" in capsys.readouterr().err
    assert main(["study-data", "--out", str(tmp_path / "new"), "--train=-1"]) == 2
    assert "train is -1" in capsys.readouterr().err


# Real clips


def demo_set(root: Path, stretches: list[tuple[str, str, int, int]]) -> None:
    lines = []
    for scene, split, start, stop in stretches:
        name = f"{scene}-{start}"
        frames = moving_square(stop - start, 96, 128, shade=start)
        write_video(root / f"{name}.mp4", frames, 25)
        lines.append(
            json.dumps(
                {
                    "id": name,
                    "video": f"{name}.mp4",
                    "caption": f"Clip {name}.",
                    "split": split,
                    "frames": stop - start,
                    "scene": scene,
                    "source_start": start,
                    "source_stop": stop,
                }
            )
        )
    (root / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def test_real_clips_are_cut_from_stretches_of_one_scene_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "demo"
    root.mkdir()
    demo_set(
        root,
        [
            ("a", "train", 0, 24),
            ("a", "train", 24, 48),
            ("a", "val", 60, 80),  # too short
            ("b", "train", 0, 20),
            ("b", "train", 30, 50),  # not the next frames
            ("c", "val", 5, 40),
        ],
    )
    monkeypatch.setattr(shards, "_make", lambda *task: [(b"video", {})] * task[-1])
    config = replace(TINY, train=1, val=0, test=0)
    folder = tmp_path / "set"
    summary = write_study(folder, config, workers=1, real=root, progress=False)
    assert summary.clips == {"train": 1, "real-train": 3, "real-val": 1}
    records = list(study_records(folder, "real-train"))
    assert [(r["start"], r["caption"]) for r in records] == [
        (0, "Clip a-0."),
        (8, "Clip a-0."),
        (16, "Clip a-24."),
    ]
    window = shards._real_windows(root)[1]
    parts = [read_frames(root / f"a-{start}.mp4") for start in (0, 24)]
    assert np.array_equal(window._frames(), np.concatenate(parts)[8 : 8 + FRAMES])
    with pytest.raises(StudyError, match="holds another set"):
        write_study(folder, config, workers=1, progress=False)
    with pytest.raises(StudyError, match="run `make data`"):
        write_study(folder, config, workers=1, real=tmp_path, progress=False)
