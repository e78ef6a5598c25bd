"""Manifests and folders at scale: Parquet, other columns, resampling, buckets, decoding."""

import csv
import io
import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from sla.data.decode import Cut, TooShort, Track, VideoFile, read_window, shown_size, time_window
from sla.data.manifest import DataError, load_clips
from sla.data.module import DataConfig, VideoDataModule
from sla.data.testing import moving_square, write_clip_set
from sla.data.video import VideoError, read_frames, resize_crop, write_video

TRAIN, VAL = 6, 2
_MILLISECOND = Fraction(1, 1000)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_clip_set(tmp_path_factory.mktemp("set"), train=TRAIN, val=VAL, frames=20)


def entries(root):
    return [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]


def config(root, **changes):
    defaults = {"num_frames": 4, "height": 16, "width": 16, "batch_size": 2, "seed": 5}
    return DataConfig(root=str(root), **{**defaults, **changes})


def train_batches(cfg, count):
    return list(itertools.islice(iter(VideoDataModule(cfg).train_dataloader()), count))


# Lists


def write_list(root, folder, suffix):
    """The set's manifest in another format, with other names of its columns; returns the file."""
    rows = [
        {"path": str(root / e["video"]), "text": e["caption"], "id": e["id"], "split": e["split"]}
        for e in entries(root)
    ]
    path = folder / f"list{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_stream(root, tmp_path, suffix):
    path = write_list(root, tmp_path, suffix)
    cfg = config(tmp_path, manifest=path.name, video_field="path", caption_field="text")
    for ours, plain in zip(train_batches(cfg, 5), train_batches(config(root), 5), strict=True):
        assert ours["clip_id"] == plain["clip_id"]
        assert ours["caption"] == plain["caption"]
        assert torch.equal(ours["video"], plain["video"])


def test_a_parquet_manifest_is_found_by_its_name(root, tmp_path):
    write_list(root, tmp_path, ".parquet").rename(tmp_path / "manifest.parquet")
    clips = load_clips(tmp_path, video_field="path", caption_field="text")
    assert len(clips.train) == TRAIN


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install .*\[parquet\]"):
        load_clips(tmp_path, "list.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "list.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(DataError, match=r"list\.parquet cannot be read as Parquet"):
        load_clips(tmp_path, "list.parquet")


def test_a_column_that_is_not_there_is_named(root, tmp_path):
    path = write_list(root, tmp_path, ".jsonl")
    with pytest.raises(DataError, match="no field `film`"):
        load_clips(tmp_path, path.name, video_field="film")
    with pytest.raises(DataError, match="no caption"):
        load_clips(tmp_path, path.name, video_field="path", caption_field="words")


def test_folder_ignores_manifests(root, tmp_path):
    video = root / "clip-00.mp4"
    (tmp_path / "only.mp4").write_bytes(video.read_bytes())
    (tmp_path / "only.txt").write_text("the only one")
    (tmp_path / "manifest.jsonl").write_text(
        json.dumps({"video": str(video), "caption": "listed", "split": "train"})
    )
    given = {"val_fraction": 0.0, "caption_dropout": 0.0}
    (batch,) = train_batches(config(tmp_path, source="folder", **given), 1)
    assert batch["caption"] == ["the only one"] * 2
    (batch,) = train_batches(config(tmp_path, **given), 1)
    assert batch["caption"] == ["listed"] * 2


# Decoding


def test_pixels_are_decords(root):
    path = root / "clip-03.mp4"
    whole = read_frames(path)
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        np.testing.assert_array_equal(read_window(source, lambda t: range(t.frames)), whole)
    for wanted in ([19, 3, 3, 7], range(11, 20, 4), [13]):
        np.testing.assert_array_equal(read_window(path, lambda t, w=wanted: w), whole[list(wanted)])


def test_only_the_frames_needed_are_decoded(tmp_path, monkeypatch):
    """Of a video with a key frame every 10 frames, from the one before the window to its end."""
    path = tmp_path / "keys.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.options = {"g": "10", "sc_threshold": "0", "bf": "0"}
        for frame in moving_square(60, 32, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with VideoFile(path) as video:
        decoded = []
        container = video._container

        def decode(*arguments):
            for frame in container.decode(*arguments):
                decoded.append(frame)
                yield frame

        video._container = SimpleNamespace(
            decode=decode, seek=container.seek, close=container.close
        )
        frames = video.read(range(42, 46))
    np.testing.assert_array_equal(frames, read_frames(path, range(42, 46)))
    assert len(decoded) == 6


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (20, 12)])
def test_resizing_on_the_way_shows_what_resizing_afterwards_does(tmp_path, size):
    path = tmp_path / "large.mp4"
    write_video(path, moving_square(4, 192, 256, shade=60), fps=8)
    cut = Cut(*size, scale=0.9, center=(0.3, 0.8))
    after = resize_crop(read_frames(path), *size, scale=0.9, center=(0.3, 0.8))
    on_the_way = read_window(path, lambda t: range(4), cut)
    assert on_the_way.shape == after.shape
    difference = np.abs(on_the_way.astype(int) - after)
    # The place of the crop is rounded to a pixel of the result, so edges differ.
    assert difference.mean() < 4
    assert np.median(difference) <= 2
    mirrored = np.abs(on_the_way[:, :, ::-1].astype(int) - after)
    assert mirrored.mean() > 3 * difference.mean()


def test_small_videos_are_enlarged(tmp_path):
    path = tmp_path / "small.mp4"
    write_video(path, moving_square(4, 16, 16), fps=8)
    frames = read_window(path, lambda t: range(4), Cut(48, 40))
    np.testing.assert_array_equal(frames, resize_crop(read_frames(path), 48, 40))


def test_decode_to_size_in_the_stream(root):
    plain = train_batches(config(root), 3)
    other = train_batches(config(root, decode_to_size=True), 3)
    for a, b in zip(plain, other, strict=True):
        assert a["clip_id"] == b["clip_id"]
        assert (a["video"] - b["video"]).abs().mean() < 0.05
        assert (a["video"] - b["video"].flip(-1)).abs().mean() > 0.1


def write_timed(path, stamps, size=(32, 64), rotation=0):
    """A video whose frame k, of brightness 8 k, is shown at stamps[k] / 1000 seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = _MILLISECOND
        stream.options = {"crf": "4"}
        if rotation:
            stream.set_display_rotation(rotation)
        for k, stamp in enumerate(stamps):
            picture = np.full((*size, 3), 8 * k, dtype=np.uint8)
            picture[:4, :4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, _MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown(frames):
    return [round(float(frame[8:, 8:].mean()) / 8) for frame in frames]


def test_a_variable_frame_rate_is_resampled_by_time(tmp_path):
    path = tmp_path / "variable.mp4"
    # 10 frames in the first second, then 2, then 10 again.
    stamps = [100 * k for k in range(10)] + [1000, 1500] + [2000 + 100 * k for k in range(10)]
    write_timed(path, stamps)
    with VideoFile(path) as video:
        assert video.track.times == pytest.approx([s / 1000 for s in stamps], abs=2e-3)

    def choose(track: Track):
        return time_window(track, 6, 1, 0.0, 2.0, "v")

    assert shown(read_window(path, choose)) == [0, 5, 10, 11, 12, 17]
    by_number = read_window(path, lambda t: time_window(t, 6, 2, 0.0, 0.0, "v"))
    assert shown(by_number) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_stand_upright(tmp_path, rotation):
    path = tmp_path / "turned.mp4"
    write_timed(path, [0, 40, 80], rotation=rotation)
    size = (64, 32) if rotation % 180 else (32, 64)
    assert shown_size(path) == size
    plain = read_window(path, lambda t: [2])[0]
    corners = {90: (-1, 0), 180: (-1, -1), -90: (0, -1)}  # where the top left one has gone
    assert plain[corners[rotation]].mean() > 200
    half = read_window(path, lambda t: [2], Cut(size[0] // 2, size[1] // 2))[0]
    assert half[corners[rotation]].mean() > 200
    assert half.shape[:2] == (size[0] // 2, size[1] // 2)


@pytest.mark.parametrize(("height", "width"), [(33, 47), (17, 64), (50, 31)])
def test_odd_sizes(tmp_path, height, width):
    """H.264 in yuv444p may have them."""
    path = tmp_path / "odd.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        for frame in moving_square(5, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert shown_size(path) == (height, width)
    assert read_window(path, lambda t: [1, 4], Cut(16, 16)).shape == (2, 16, 16, 3)


def track(times):
    return Track(np.asarray(times, dtype=float), 8, 8)


def test_windows_in_time():
    steady = track(np.arange(30) / 30)
    assert time_window(steady, 4, 1, 0.0, 10.0, "v") == [0, 3, 6, 9]
    assert time_window(steady, 4, 1, 1.0, 10.0, "v")[-1] == 29
    assert time_window(steady, 3, 2, 0.0, 10.0, "v") == [0, 6, 12]
    # A rate above the video's repeats frames.
    assert time_window(track([0, 0.125, 0.25]), 5, 1, 0.0, 16.0, "v") == [0, 0, 1, 1, 2]
    # A stride that does not fit is lowered.
    assert time_window(steady, 4, 9, 0.0, 10.0, "v") == time_window(steady, 4, 3, 0.0, 10.0, "v")
    assert time_window(track([0.0]), 1, 1, 0.7, 8.0, "v") == [0]
    for start in np.linspace(0, 1, 11):
        chosen = time_window(steady, 5, 1, start, 8.0, "v")
        assert np.diff(steady.times[chosen]) == pytest.approx([0.125] * 4, abs=1 / 30)
    with pytest.raises(TooShort, match=r"it lasts 0\.97 s, 3\.00 s are needed"):
        time_window(steady, 31, 1, 0.0, 10.0, "v")
    with pytest.raises(TooShort, match="it has 30 frames, 31 are needed"):
        time_window(steady, 31, 1, 0.0, 0.0, "v")


def test_the_stream_resamples(tmp_path):
    write_timed(tmp_path / "v.mp4", [100 * k for k in range(20)])
    (tmp_path / "v.txt").write_text("getting brighter")
    given = {"val_fraction": 0.0, "frame_stride": [1], "crop_scale": [1.0]}
    for batch in train_batches(config(tmp_path, fps=2.5, **given), 3):
        for video in batch["video"]:
            steps = np.diff(shown((video.permute(1, 2, 3, 0).numpy() + 1) * 127.5))
            assert steps.tolist() == [4, 4, 4]


def test_too_long_a_decoding_is_given_up(root):
    with (
        pytest.raises(VideoError, match=r"more than data\.timeout=-1 seconds"),
        VideoFile(root / "clip-00.mp4", timeout=-1) as video,
    ):
        video.read([5])


# Buckets


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """7 landscape and 4 portrait videos."""
    root = tmp_path_factory.mktemp("shapes")
    for k in range(11):
        height, width = (48, 80) if k < 7 else (80, 48)
        write_video(root / f"{k:02d}.mp4", moving_square(6, height, width), fps=8)
        (root / f"{k:02d}.txt").write_text(f"video {k}")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_of_one_bucket_and_no_clip_is_lost(shapes, workers):
    cfg = config(
        shapes,
        source="folder",
        val_fraction=0.0,
        buckets=["16x32", "32x16"],
        batch_size=3,
        num_workers=workers,
    )
    batches = train_batches(cfg, 11)  # 33 samples are 3 passes
    seen = []
    for batch in batches:
        portrait = {int(name) >= 7 for name in batch["clip_id"]}
        assert len(portrait) == 1
        assert batch["video"].shape[-2:] == ((32, 16) if portrait.pop() else (16, 32))
        seen += batch["clip_id"]
    assert {seen.count(name) for name in seen} == {3}
    assert [b["sample_index"].tolist() for b in batches][1] == [3, 4, 5]
    # From the middle on, as a resumed run does.
    again = VideoDataModule(cfg)
    again.start_sample = 12
    for ours, theirs in zip(again.train_dataloader(), batches[4:9]):  # noqa: B905
        assert ours["clip_id"] == theirs["clip_id"]
        assert torch.equal(ours["video"], theirs["video"])


def test_sizes_of_the_manifest_spare_opening_the_videos(tmp_path):
    lines = [
        {"video": f"{k}.mp4", "caption": "x", "split": "train", "height": 10, "width": 10 + 20 * k}
        for k in range(2)
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for k in range(2):
        Path(tmp_path / f"{k}.mp4").write_bytes(b"not read")
    cfg = config(tmp_path, buckets=["16x16", "8x24"], probe_videos=False)
    data = VideoDataModule(cfg)
    data.setup()
    assert data._order.buckets.tolist() == [0, 1]


def test_a_checkpoint_of_another_order_warns(shapes, caplog):
    given = {"source": "folder", "val_fraction": 0.0, "buckets": ["16x32", "32x16"]}
    state = VideoDataModule(config(shapes, **given)).state_dict()
    with caplog.at_level("WARNING", logger="sla"):  # a command line may have set it lower
        caplog.clear()
        VideoDataModule(config(shapes, **given)).load_state_dict(state)
        assert not caplog.records
        VideoDataModule(config(shapes, **given, batch_size=5)).load_state_dict(state)
    assert "another order" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "files"},
        {"source": "webdataset"},
        {"fps": -1},
        {"buckets": ["16"]},
        {"buckets": ["16x32", "16x32"]},
        {"timeout": 0},
        {"max_failure_share": 1.0},
        {"shard_lanes": 0},
        {"shuffle_window": 0},
    ],
)
def test_config_refuses(wrong):
    name = "shards" if wrong == {"source": "webdataset"} else next(iter(wrong))
    with pytest.raises(ValueError, match=rf"data\.{name} must be"):
        DataConfig(**wrong)
