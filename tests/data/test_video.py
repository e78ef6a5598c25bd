"""Decoding, encoding, resizing and pictures, on synthetic videos."""

import errno
import io
import pickle
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sla.data import video
from sla.data.testing import moving_square


@pytest.fixture(scope="module")
def frames():
    return moving_square(24, 48, 64, shade=90)


@pytest.fixture(scope="module")
def path(frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    video.write_video(path, frames, fps=30000 / 1001)
    return path


def test_round_trip_within_codec_tolerance(path, frames):
    back = video.read_frames(path)
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    # Colour planes have half the resolution, so edges differ; most of the picture must not.
    difference = np.abs(back.astype(int) - frames)
    assert difference.mean() < 3
    assert np.median(difference) <= 2


def test_probe(path):
    assert video.count_frames(path) == 24
    info = video.probe(path)
    assert (info.frames, info.height, info.width) == (24, 48, 64)
    assert info.fps == pytest.approx(30000 / 1001, abs=1e-6)


@pytest.mark.parametrize(
    "wanted",
    [range(3, 20, 4), [5], [7, 2, 2, 23], lambda info: [info.height - 26]],
    ids=["every_fourth", "one", "again_and_back", "by_height"],
)
def test_frames_by_index_are_those_of_the_whole_video(path, wanted):
    whole = video.read_frames(path)
    indices = [22] if callable(wanted) else wanted
    np.testing.assert_array_equal(video.read_frames(path, wanted), whole[list(indices)])


def test_bytes_in_memory_equal_the_file(path):
    source = io.BytesIO(path.read_bytes())
    source.seek(7)  # wherever it was left
    np.testing.assert_array_equal(video.read_frames(source), video.read_frames(path))


@pytest.mark.parametrize("wrong", [range(20, 25), [-1], [24]])
def test_frames_out_of_range(path, wrong):
    with pytest.raises(video.VideoError, match=r"square\.mp4.*frames 0 to 23"):
        video.read_frames(path, wrong)


def test_no_frames_asked_for(path):
    with pytest.raises(ValueError, match="at least one frame"):
        video.read_frames(path, [])


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(10):
            silence = np.zeros((1, 1024), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def bad_files(folder, good):
    data = good.read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "folder.mp4").mkdir()
    audio_only(folder / "audio.mp4")
    torn = bytearray(data)
    start = data.index(b"mdat") + 40
    torn[start : start + 1500] = bytes(1500)
    (folder / "torn.mp4").write_bytes(torn)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.mp4", "no such file"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "not a video container"),
        ("cut.mp4", "not a video container|no video stream"),
        ("audio.mp4", "no video stream"),
        ("folder.mp4", "it is a folder"),
        ("torn.mp4", "damaged"),
        ("nul\0.mp4", "null"),
    ],
)
def test_unreadable_files_say_which_and_why(path, tmp_path, name, why):
    bad_files(tmp_path, path)
    with pytest.raises(video.VideoError, match=why) as caught:
        video.read_frames(tmp_path / name)
    assert name in caught.value.source
    again = pickle.loads(pickle.dumps(caught.value))  # survives the way out of a loader process
    assert str(again) == str(caught.value)


def test_truncated_streamable_file_is_an_error_and_never_hangs(tmp_path, frames):
    path = tmp_path / "streamable.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "4", "bf": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert len(video.read_frames(path)) == 24
    data = path.read_bytes()
    for share in (0.5, 0.7, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        for wanted in (None, range(20, 24)):
            with pytest.raises(video.VideoError):
                video.read_frames(path, wanted)


@pytest.mark.parametrize("width", [16, 24, 32, 48, 54, 72, 96, 100, 126, 128])
def test_narrow_videos(tmp_path, width):
    """decord alone gives most of these four channels and more."""
    frames = moving_square(5, 32, width)
    video.write_video(tmp_path / "narrow.mp4", frames, fps=10)
    assert video.probe(tmp_path / "narrow.mp4") == video.VideoInfo(5, 10.0, 32, width)
    for source in (tmp_path / "narrow.mp4", io.BytesIO((tmp_path / "narrow.mp4").read_bytes())):
        back = video.read_frames(source, [4, 0, 4])
        assert np.abs(back.astype(int) - frames[[4, 0, 4]]).mean() < 4


def test_odd_sizes_grow_by_one(tmp_path):
    frames = moving_square(4, 33, 47)
    video.write_video(tmp_path / "odd.mp4", frames, fps=10)
    back = video.read_frames(tmp_path / "odd.mp4")
    assert back.shape == (4, 34, 48, 3)
    assert np.abs(back[:, :33, :47].astype(int) - frames).mean() < 4


@pytest.mark.parametrize(
    ("frames", "fps", "error"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 10, TypeError),
        (np.zeros((2, 8, 8), np.uint8), 10, ValueError),
        (np.zeros((0, 8, 8, 3), np.uint8), 10, ValueError),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, ValueError),
        (np.zeros((2, 8, 8, 3), np.uint8), float("nan"), ValueError),
    ],
)
def test_write_video_refuses(tmp_path, frames, fps, error):
    with pytest.raises(error):
        video.write_video(tmp_path / "x.mp4", frames, fps)
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
import numpy as np
from sla.data.video import write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
try:
    write_video(sys.argv[1], noise, 10)
except OSError as error:
    print("OSError:", error)
"""


def test_file_system_that_refuses_more_bytes(tmp_path):
    """The real thing, in a process that may not write files over 4 KiB."""
    target = tmp_path / "noise.mp4"
    run = [sys.executable, "-c", LIMITED, str(target)]
    output = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert output.startswith("OSError:")
    assert str(target) in output
    assert list(tmp_path.iterdir()) == []


def test_no_space_left(tmp_path, frames, monkeypatch):
    old = tmp_path / "clip.mp4"
    old.write_bytes(b"the finished file of an earlier run")
    original = av.open

    def full(name, *args, **kwargs):
        container = original(name, *args, **kwargs)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                container.close()

            def mux(self, packets):
                raise OSError(errno.ENOSPC, "No space left on device", str(name))

            def __getattr__(self, attribute):
                return getattr(container, attribute)

        return Full()

    monkeypatch.setattr(av, "open", full)
    with pytest.raises(OSError, match=r"cannot write: No space left.*clip\.mp4") as caught:
        video.write_video(old, frames, fps=10)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert old.read_bytes() == b"the finished file of an earlier run"


# Resizing


def test_resize_matches_a_float_reference(frames):
    ours = video.resize_crop(frames, 24, 24)
    window = torch.from_numpy(frames[:, :, 8:56]).permute(0, 3, 1, 2).float()
    plain = torch.nn.functional.interpolate(
        window, size=(24, 24), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    assert np.abs(ours - plain.numpy()).max() <= 1.01


@pytest.mark.parametrize(
    ("source", "target"), [((48, 64), (30, 30)), ((64, 48), (16, 40)), ((20, 20), (40, 64))]
)
def test_resize_keeps_the_aspect_ratio(source, target):
    """A centred disc stays a disc."""
    rows, columns = np.mgrid[: source[0], : source[1]]
    middle = (source[0] - 1) / 2, (source[1] - 1) / 2
    disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (0.2 * min(source)) ** 2
    frames = np.repeat((255 * disc).astype(np.uint8)[None, :, :, None], 3, axis=3)
    mask = video.resize_crop(frames, *target)[0, :, :, 0] > 127
    tall, wide = mask.any(1).sum(), mask.any(0).sum()
    assert tall > 2
    assert abs(int(tall) - int(wide)) <= 2


@pytest.mark.parametrize("center", [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)])
def test_crop_lies_where_it_should(center):
    """A frame that holds its own coordinates shows which window was cut."""
    height, width = 40, 60
    frames = np.zeros((1, height, width, 3), np.uint8)
    frames[0, :, :, 0], frames[0, :, :, 1] = np.mgrid[:height, :width]
    crop = video.resize_crop(frames, 20, 20, scale=0.5, center=center)  # 20 x 20: no resizing
    top, left = round(center[0] * 20), round(center[1] * 40)
    np.testing.assert_array_equal(crop, frames[:, top : top + 20, left : left + 20])


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": 1.1}, {"center": (0.5, 1.2)}, {"height": 0}]
)
def test_resize_refuses(frames, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        video.resize_crop(frames, **{"height": 8, "width": 8, **wrong})


def test_tensor_and_back(frames):
    tensor = video.to_tensor(frames)
    assert tensor.shape == (3, 24, 48, 64)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    np.testing.assert_array_equal(video.to_frames(tensor), frames)
    assert video.to_frames(torch.full((3, 1, 2, 2), 5.0)).min() == 255  # clamped


# Pictures


def test_gif(tmp_path):
    frames = moving_square(6, 20, 30)
    video.write_gif(tmp_path / "a.gif", frames, fps=10)
    assert (tmp_path / "a.gif").read_bytes() == video.gif_bytes(frames, 10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (6, (30, 20), 100)
        gif.seek(5)
        shown = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(shown - frames[5]).mean() < 12  # 256 colours


def test_picture_strip(frames, tmp_path):
    strip = video.picture_strip(frames, 3, gap=2)
    assert strip.shape == (48, 3 * 64 + 2 * 2, 3)
    np.testing.assert_array_equal(strip[:, :64], frames[0])
    np.testing.assert_array_equal(strip[:, -64:], frames[-1])
    video.write_picture(tmp_path / "strip.png", strip)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "strip.png")), strip)


def test_grid_and_side_by_side(frames):
    other = frames[:, ::-1]
    plain = video.grid([frames, other, frames], columns=2, gap=3)
    assert plain.shape == (24, 2 * 48 + 3, 2 * 64 + 3, 3)
    np.testing.assert_array_equal(plain[:, :48, 67:], other)
    np.testing.assert_array_equal(plain[:, 51:, :64], frames)
    assert (plain[:, 51:, 67:] == 255).all()
    row = video.side_by_side({"full attention": frames, "SLA, a label too long to fit": other})
    assert row.shape[2] == 2 * 64 + 2
    bar = row.shape[1] - 48
    np.testing.assert_array_equal(row[:, bar:, :64], frames)
    assert (row[:, :bar] < 128).any()  # there is text
    with pytest.raises(ValueError, match="share one shape"):
        video.grid([frames, frames[:3]])
    with pytest.raises(ValueError, match="as many"):
        video.grid([frames], ["a", "b"])


def test_imports_are_lazy():
    """Pictures and the list of clips work where decord, av and lightning are not installed."""
    code = (
        "import sys; sys.modules.update(decord=None, av=None, lightning=None);"
        "import sla.data, sla.data.video; print('fine')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "fine"
