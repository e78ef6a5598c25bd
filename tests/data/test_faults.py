"""Whatever is wrong with a sample: it is counted, named once and skipped, and nothing dies."""

import io
import itertools
import json
import logging
import tarfile
import time

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sla.data.decode import Cut, VideoFile, read_window
from sla.data.faults import FailureCount
from sla.data.manifest import DataError
from sla.data.module import DataConfig, VideoDataModule
from sla.data.shards import ShardError, index_tar
from sla.data.testing import moving_square, write_shards
from sla.data.video import VideoError, write_video


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_video(path, moving_square(10, 32, 48), fps=8)
    return path.read_bytes()


# Files that cannot be read, and files that only look so


def container_of(frames=10, *, size=(32, 48), suffix="mp4", codec="libx264", pixels="yuv420p"):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        for frame in moving_square(frames, *size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def audio_only():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def picture():
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(moving_square(1, 32, 48)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def zeroed(good):
    """Sound from outside, but the coded pictures are zeros."""
    data = bytearray(good)
    begin = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[begin:end] = bytes(end - begin)
    return bytes(data)


BAD = {
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "audio-only": lambda good: audio_only(),
    "text": lambda good: b"not a video at all, whatever the ending says\n" * 20,
    "picture": lambda good: picture(),
    "playlist": lambda good: b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    "concat": lambda good: b"ffconcat version 1.0\nfile /etc/hostname\n",
    "zeros": lambda good: bytes(5000),
    "zeroed": zeroed,
    "header-alone": lambda good: good[:40],
    # Found by fuzzing: such a stream has no codec context in PyAV.
    "unknown-codec": lambda good: good.replace(b"avc1", b"zzzz"),
}
SOUND = {
    "mp4": lambda good: good,
    "odd": lambda good: container_of(size=(31, 45), pixels="yuv444p"),
    "narrow": lambda good: container_of(size=(16, 16)),
    "matroska-by-another-name": lambda good: container_of(suffix="matroska"),
    "mpeg4-in-avi": lambda good: container_of(suffix="avi", codec="mpeg4"),
}


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def config(tmp_path, *shards, **changes):
    defaults = {"num_frames": 4, "height": 16, "width": 16, "batch_size": 1, "val_fraction": 0.0}
    return DataConfig(
        source="webdataset",
        shards=[str(shard) for shard in shards],
        shard_cache=str(tmp_path / "cache"),
        **{**defaults, "shuffle_window": 8, "max_failure_share": 0.9, **changes},
    )


def names_of(data, count):
    return [b["clip_id"][0] for b in itertools.islice(iter(data.train_dataloader()), count)]


class LogFile:
    """The log's lines of all processes."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.handler = logging.FileHandler(self.path)
        self.logger = logging.getLogger("sla")
        self.level = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self.handler)
        return self

    def __exit__(self, *exception):
        self.logger.removeHandler(self.handler)
        self.logger.setLevel(self.level)
        self.handler.close()

    def count(self, text):
        return self.path.read_text().count(text)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_counted_named_once_and_skipped(good, tmp_path, workers):
    members = []
    for name, make in (BAD | SOUND).items():
        members += [(f"{name}.mp4", make(good)), (f"{name}.txt", b"a caption")]
    members += [
        ("no-caption.mp4", good),
        *(("empty-caption.mp4", good), ("empty-caption.txt", b" \n")),
        *(("latin.mp4", good), ("latin.txt", "caf\xe9".encode("latin-1"))),
        *(("not-json.mp4", good), ("not-json.json", b"{")),
        *(("no-field.mp4", good), ("no-field.json", b'{"text": "x"}')),
        *(("deep-json.mp4", good), ("deep-json.json", b"[" * 100_000)),
        *(("long-caption.mp4", good), ("long-caption.txt", b"x" * (2**20 + 1))),
        ("no-video.txt", b"a caption"),
        *(("huge.mp4", bytes(3 * 2**20)), ("huge.txt", b"a caption")),
    ]
    bad = [*BAD, "no-caption", "empty-caption", "latin", "not-json", "no-field", "deep-json"]
    bad += ["long-caption", "no-video", "huge"]
    shard = tar_of(tmp_path / "all.tar", members)
    data = VideoDataModule(config(tmp_path, shard, num_workers=workers, max_file_mib=2))
    with LogFile(tmp_path / "log") as log:
        found = names_of(data, 3 * (len(bad) + len(SOUND)))
    assert {name.removeprefix("all/") for name in found} == set(SOUND)
    assert data.faults.count == len(bad)
    assert data.faults.tried == len(bad) + len(SOUND)
    for name in bad:
        assert log.count(f"sample all/{name} is left out") == 1, name
    text = log.path.read_text()
    for reason in (
        *("the file is empty", "no video stream", "not a video container", "no caption"),
        *("the caption is empty", "not UTF-8", "is not JSON", "no text in field 'caption'"),
        *("no video\n", "3 MiB are more than data.max_file_mib", "damaged"),
    ):
        assert reason in text, reason


@pytest.mark.parametrize("name", BAD)
def test_files_of_a_list_are_refused_too(good, tmp_path, name):
    """The same through the reader of folders and manifests; and the error names the file."""
    path = tmp_path / f"{name}.mp4"
    path.write_bytes(BAD[name](good))
    with pytest.raises(VideoError, match=rf"cannot read video .*{name}\.mp4"):
        read_window(path, lambda track: range(track.frames))
    (tmp_path / f"{name}.txt").write_text("a caption")
    (tmp_path / "good.mp4").write_bytes(good)
    (tmp_path / "good.txt").write_text("the good one")
    for how in ({}, {"decode_to_size": True}, {"probe_videos": False}):
        data = VideoDataModule(
            DataConfig(
                root=str(tmp_path),
                source="folder",
                num_frames=4,
                batch_size=1,
                **{"val_fraction": 0.0, "max_bad_fraction": 0.5, **how},
            )
        )
        assert set(names_of(data, 4)) == {"good"}
        assert data.faults.count == 1


def test_no_playlist_makes_us_open_a_network_connection(good, tmp_path, monkeypatch):
    """A file may name others, also far ones: whoever writes a shard could have us fetch them."""
    import socket

    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.3)
    port = server.getsockname()[1]
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n",
        f"ffconcat version 1.0\nfile http://127.0.0.1:{port}/a.mp4\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
    ):
        with pytest.raises(VideoError):
            VideoFile(io.BytesIO(text.encode()))
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


def test_short_videos_are_skipped_but_no_fault(good, tmp_path):
    members = [("long.mp4", good), ("long.txt", b"x")]
    for k in range(5):
        members += [(f"short-{k}.mp4", container_of(2)), (f"short-{k}.txt", b"x")]
    shard = tar_of(tmp_path / "s.tar", members)
    data = VideoDataModule(config(tmp_path, shard, max_failure_share=0.0))
    with LogFile(tmp_path / "log") as log:
        assert set(names_of(data, 12)) == {"s/long"}
    assert (data.faults.count, data.faults.short, data.faults.tried) == (0, 5, 6)
    assert log.count("it has 2 frames, 4 are needed") == 5


def test_nothing_readable_is_an_error(good, tmp_path):
    shard = tar_of(tmp_path / "s.tar", [("a.mp4", container_of(2)), ("a.txt", b"x")])
    data = VideoDataModule(config(tmp_path, shard))
    with pytest.raises(DataError, match="none of the 1 training samples can be read"):
        names_of(data, 1)


# Shards


def test_a_shard_that_ends_in_mid_file(tmp_path):
    first, second = write_shards(tmp_path / "s", [8, 8], frames=6, height=16, width=24)
    whole = index_tar(second)
    offset, size = whole.places[5, 0].tolist()
    second.write_bytes(second.read_bytes()[: offset + size // 2])
    data = VideoDataModule(config(tmp_path, first, second, num_workers=2))
    with LogFile(tmp_path / "log") as log:
        found = names_of(data, 3 * 14)
    assert len(set(found)) == 13
    assert data.faults.count == 1
    assert log.count("it ends in mid-file") == 1
    assert log.count("is left out") == 1


def test_shards_that_are_none_are_counted_at_the_start(tmp_path):
    (good,) = write_shards(tmp_path / "s", [4], frames=6, height=16, width=24)
    (tmp_path / "text.tar").write_text("no tar file" * 200)
    wrong = [tmp_path / "text.tar", tmp_path / "absent.tar"]
    data = VideoDataModule(config(tmp_path, good, *wrong))
    with LogFile(tmp_path / "log") as log:
        assert len(set(names_of(data, 4))) == 4
    assert log.count("shard text is left out") == log.count("shard absent is left out") == 1
    with pytest.raises(DataError, match=r"2 of 3 shards cannot be read(.|\n)*not a tar file"):
        VideoDataModule(config(tmp_path, good, *wrong, max_failure_share=0.5)).setup()


def test_a_shard_that_goes_away_during_training(tmp_path):
    paths = write_shards(tmp_path / "s", [6, 6], frames=6, height=16, width=24)
    data = VideoDataModule(config(tmp_path, *paths))
    data.setup()
    paths[1].unlink()
    found = names_of(data, 24)
    assert {name.split("/")[0] for name in found} == {"00000"}
    assert data.faults.count == 6


def test_a_shard_that_shrinks_during_training(tmp_path):
    (path,) = write_shards(tmp_path / "s", [9], frames=6, height=16, width=24)
    data = VideoDataModule(config(tmp_path, path, shuffle_window=1, shard_lanes=1))
    batches = iter(data.train_dataloader())
    first = next(batches)["clip_id"][0]
    with path.open("r+b") as file:
        file.truncate(int(index_tar(path).places[4, 0, 0]))
    rest = [next(batches)["clip_id"][0] for _ in range(12)]
    assert first == "00000/000000000"
    assert set(rest) == {f"00000/{k:09d}" for k in range(4)}
    assert data.faults.count == 5


# The share of failures


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_failures_stop_the_run_with_a_summary(good, tmp_path, workers):
    members = []
    for k in range(40):
        bad = k % 4 == 0
        members += [(f"{k:02d}.mp4", good[:300] if bad else good), (f"{k:02d}.txt", b"x")]
    shard = tar_of(tmp_path / "s.tar", members)
    data = VideoDataModule(config(tmp_path, shard, num_workers=workers, max_failure_share=0.1))
    message = (
        r"5 of \d+ samples tried \(\d+ %\) cannot be read; data\.max_failure_share allows 0\.1"
        r"(.|\n)*s/\d\d: not a video container"
    )
    with pytest.raises(DataError, match=message):
        names_of(data, 200)
    tolerant = VideoDataModule(config(tmp_path, shard, num_workers=workers, max_failure_share=0.3))
    assert len(set(names_of(tolerant, 80))) == 30
    assert tolerant.faults.count == 10


def test_counting(caplog):
    faults = FailureCount(1000, 0.1, {"shard x": "gone"})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            faults.report(7, "seven", "cut off")
        for k in range(100, 160):
            faults.succeeded(k)
        for k in range(5):
            faults.report(k, f"n{k}", "cut off")
    assert (faults.tried, faults.count) == (66, 6)
    assert len(caplog.records) == 6
    with pytest.raises(DataError, match=r"7 of 67 samples tried \(10 %\)(.|\n)*shard x: gone"):
        faults.report(5, "n5", "cut off")
    many = FailureCount(100_000, 0.0)
    many.too_short(3, "three", "it has 1 frame")
    with pytest.raises(DataError, match="1 of 2 samples"):
        many.report(4, "four", "cut off")


def test_a_validation_sample_that_fails_has_no_weight(good, tmp_path):
    train = tar_of(tmp_path / "t.tar", [("a.mp4", good), ("a.txt", b"x")])
    members = []
    for name, data in (("a", good), ("b", good[:100]), ("c", container_of(2)), ("d", good)):
        members += [(f"{name}.mp4", data), (f"{name}.txt", name.encode())]
    val = tar_of(tmp_path / "v.tar", members)
    data = VideoDataModule(config(tmp_path, train, val_shards=[str(val)], batch_size=5))
    (batch,) = data.val_dataloader()
    assert batch["weight"].tolist() == [1, 0, 0, 1]
    assert batch["clip_id"] == ["v/a", "v/b", "v/c", "v/d"]
    assert (data.faults.count, data.faults.short) == (1, 1)


# Fuzzing: ten minutes of it with SLA_FUZZ_EXAMPLES, a taste of it in every run


_SEED = container_of(12)
_TAR = io.BytesIO()
with tarfile.open(fileobj=_TAR, mode="w") as _tar:
    for _name in ("a.mp4", "a.txt", "b.mp4", "b.json"):
        _info = tarfile.TarInfo(_name)
        _info.size = 700
        _tar.addfile(_info, io.BytesIO(bytes(700)))

changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=24),
        st.integers(1, 400),
    ),
    min_size=1,
    max_size=8,
)


def spoil(data, changes):
    """Bytes set, put in, taken out or repeated, each at a share of the length."""
    result = bytearray(data)
    for how, place, piece, count in changes:
        at = int(place * len(result))
        if how == "set":
            result[at : at + len(piece)] = piece
        elif how == "insert":
            result[at:at] = piece
        elif how == "delete":
            del result[at : at + count]
        else:
            result[at:at] = result[at : at + count]
    return bytes(result)


def read_whatever(data):
    """Reads bytes as a video: frames of the right shape, or VideoError, within seconds."""
    start = time.monotonic()
    try:
        frames = read_window(
            io.BytesIO(data), lambda t: range(min(t.frames, 12)), Cut(16, 16), timeout=5
        )
        assert frames.shape[1:] == (16, 16, 3)
    except VideoError:
        pass
    assert time.monotonic() - start < 10


def index_whatever(folder, data):
    """Reads bytes as a shard: samples that lie within the file, or ShardError."""
    path = folder / "fuzzed.tar"
    path.write_bytes(data)
    try:
        index = index_tar(path)
    except ShardError:
        return
    places = index.places[index.places[:, :, 1] >= 0]
    assert len(index.keys) == len(index.places)
    cut = index.damage != ""
    inside = places.sum(-1) <= len(data)
    assert inside.all() or (cut and inside[:-3].all())


@settings(max_examples=150, deadline=None)
@example([("delete", 0.5, b"x", 400)] * 8)
@given(changes)
def test_any_damage_to_a_video_is_an_error_at_most(changes):
    read_whatever(spoil(_SEED, changes))


@settings(max_examples=150, deadline=None)
@given(changes)
def test_any_damage_to_a_shard_is_an_error_at_most(tmp_path_factory, changes):
    index_whatever(tmp_path_factory.getbasetemp(), spoil(_TAR.getvalue(), changes))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=4096))
def test_any_bytes_at_all(tmp_path_factory, data):
    read_whatever(data)
    index_whatever(tmp_path_factory.getbasetemp(), data)


def test_json_that_is_no_object(tmp_path, good):
    """JSON may be a number or a list as well."""
    members = []
    for k, text in enumerate(["3", "[]", '"text"', "null", "NaN", '{"caption": 3}']):
        members += [(f"{k}.mp4", good), (f"{k}.json", text.encode())]
    members += [("good.mp4", good), ("good.json", json.dumps({"caption": "x"}).encode())]
    shard = tar_of(tmp_path / "s.tar", members)
    data = VideoDataModule(config(tmp_path, shard))
    assert set(names_of(data, 7)) == {"s/good"}
    assert data.faults.count == 6
