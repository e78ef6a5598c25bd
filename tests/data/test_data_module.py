"""The training stream and the validation windows."""

import itertools
import json
import logging

import lightning
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sla.data.decode import frame_window
from sla.data.manifest import DataError
from sla.data.module import (
    DataConfig,
    StreamBatches,
    VideoDataModule,
    draw_sample,
    pass_order,
)
from sla.data.testing import write_clip_set
from sla.data.video import read_frames, resize_crop, to_tensor

TRAIN, VAL = 7, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_clip_set(tmp_path_factory.mktemp("set"), train=TRAIN, val=VAL, frames=20)


def config(root, **changes):
    defaults = {"num_frames": 4, "height": 16, "width": 16, "batch_size": 2, "seed": 5}
    return DataConfig(root=str(root), **{**defaults, **changes})


def train_batches(cfg, count, start=0, rank=0, world_size=1):
    data = VideoDataModule(cfg)
    data._rank = lambda: (rank, world_size)
    data.start_sample = start
    return list(itertools.islice(iter(data.train_dataloader()), count))


def samples_of(batches):
    """{sample index: (clip, caption, video)}"""
    found = {}
    for batch in batches:
        for k, index in enumerate(batch["sample_index"].tolist()):
            assert index not in found
            found[index] = (batch["clip_id"][k], batch["caption"][k], batch["video"][k])
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for index in a:
        assert a[index][:2] == b[index][:2]
        assert torch.equal(a[index][2], b[index][2])


# The contract of a batch


def test_batch(root):
    (batch,) = train_batches(config(root, num_frames=5, height=12, width=20, batch_size=3), 1)
    assert batch["video"].shape == (3, 3, 5, 12, 20)
    assert batch["video"].dtype == torch.float32
    assert -1 <= batch["video"].min() < -0.2
    assert 0.2 < batch["video"].max() <= 1
    assert batch["sample_index"].dtype == torch.int64
    assert batch["sample_index"].tolist() == [0, 1, 2]
    assert batch["weight"].tolist() == [1, 1, 1]
    assert all(isinstance(text, str) for text in batch["caption"] + batch["clip_id"])


# Randomness is a function of (seed, index)


def test_sample_indices_stay_on_the_host(root):
    batch = next(iter(VideoDataModule(config(root)).train_dataloader()))
    moved = VideoDataModule(config(root)).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["video"].is_meta
    assert moved["sample_index"] is batch["sample_index"]
    assert moved.keys() == batch.keys()


def test_every_clip_once_per_pass_in_an_order_that_the_seed_decides(root):
    def order(seed):
        batches = train_batches(config(root, seed=seed, batch_size=1), 3 * TRAIN)
        return [batch["clip_id"][0] for batch in batches]

    first = order(5)
    passes = [first[p * TRAIN : (p + 1) * TRAIN] for p in range(3)]
    for one in passes:
        assert sorted(one) == [f"clip-{k:02d}" for k in range(TRAIN)]
    assert passes[0] != passes[1] != passes[2]
    assert order(5) == first
    assert order(6) != first


@pytest.mark.parametrize("change", [{"batch_size": 5}, {"cache_mib": 0}, {"num_workers": 2}])
def test_samples_do_not_depend_on_how_they_are_read(root, change):
    plain = samples_of(train_batches(config(root), 10))
    cfg = config(root, **change)
    other = samples_of(train_batches(cfg, 20 // cfg.batch_size))
    assert_same(plain, other)


def test_ranks_together_read_the_single_process_batches(root):
    single = train_batches(config(root, batch_size=6), 4)
    ranks = [train_batches(config(root, batch_size=2), 4, rank=r, world_size=3) for r in range(3)]
    for whole, *shares in zip(single, *ranks, strict=True):
        assert torch.equal(whole["video"], torch.cat([s["video"] for s in shares]))
        assert whole["caption"] == [c for s in shares for c in s["caption"]]
        assert whole["sample_index"].tolist() == [
            i for s in shares for i in s["sample_index"].tolist()
        ]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_where_training_stood_not_where_loading_stood(root, workers):
    whole = samples_of(train_batches(config(root), 9))
    data = VideoDataModule(config(root, num_workers=workers))
    batches = iter(data.train_dataloader())
    before = [next(batches) for _ in range(4)]  # workers have fetched more by now
    data.set_consumed(8)
    state = json.loads(json.dumps(data.state_dict()))  # plain data, safe to load
    del batches
    again = VideoDataModule(config(root, num_workers=workers))
    again.load_state_dict(state)
    assert again.consumed == 8
    after = list(itertools.islice(iter(again.train_dataloader()), 5))
    assert_same(whole, samples_of(before + after))


def test_resume_with_other_data_warns(root, caplog):
    data = VideoDataModule(config(root))
    state = data.state_dict()
    with caplog.at_level(logging.WARNING, logger="sla"):  # a command line may have set it lower
        caplog.clear()
        VideoDataModule(config(root)).load_state_dict(state)
        assert not caplog.records
        VideoDataModule(config(root, seed=6)).load_state_dict(state)
    assert "another seed" in caplog.text


def test_stream_batches_cover_every_index_once():
    indices = []
    iterators = [iter(StreamBatches(11, 3, rank, 4)) for rank in range(4)]
    for _ in range(5):
        for iterator in iterators:
            indices += next(iterator)
    assert indices == list(range(11, 11 + 5 * 12))


def test_draws_have_the_right_ranges_and_rates():
    cfg = DataConfig(
        frame_stride=[1, 3],
        crop_scale=[0.5, 0.9],
        caption_dropout=0.2,
        horizontal_flip=True,
    )
    draws = [draw_sample(cfg, 10, i) for i in range(4000)]
    strides = np.bincount([d.stride for d in draws])
    assert strides[0] == 0
    assert len(strides) == 4
    assert strides[1:].min() > 1200
    scales = [d.scale for d in draws]
    assert 0.5 <= min(scales) < 0.51
    assert 0.89 < max(scales) <= 0.9
    assert abs(np.mean([d.drop_caption for d in draws]) - 0.2) < 0.025  # 4 standard deviations
    assert abs(np.mean([d.flip for d in draws]) - 0.5) < 0.032
    for axis in range(2):
        places = [d.center[axis] for d in draws]
        assert min(places) >= 0
        assert max(places) <= 1
        assert abs(np.mean(places) - 0.5) < 0.02


def test_changing_one_option_leaves_the_other_draws():
    a = [draw_sample(DataConfig(caption_dropout=0.0), 9, i) for i in range(50)]
    b = [draw_sample(DataConfig(caption_dropout=1.0, crop_scale=[1.0]), 9, i) for i in range(50)]
    assert [(d.clip, d.stride, d.start, d.center) for d in a] == [
        (d.clip, d.stride, d.start, d.center) for d in b
    ]
    assert all(d.drop_caption for d in b)
    assert not any(d.drop_caption for d in a)


def test_dropped_captions_are_empty_and_others_belong_to_the_clip(root):
    found = samples_of(train_batches(config(root, caption_dropout=0.5), 40))
    dropped = 0
    for clip, caption, _ in found.values():
        dropped += caption == ""
        assert caption in ("", f"A square moves to the right, take {int(clip[-2:])}.")
    assert 20 <= dropped <= 60


def test_a_sample_is_the_window_and_crop_that_were_drawn(root):
    cfg = config(root, frame_stride=[1, 3], crop_scale=[0.6, 1.0], horizontal_flip=True)
    found = samples_of(train_batches(cfg, 10))
    for index, (clip, _, video) in found.items():
        draw = draw_sample(cfg, TRAIN, index)
        assert clip == f"clip-{draw.clip:02d}"
        frames = read_frames(root / f"{clip}.mp4")
        frames = frames[list(frame_window(20, 4, draw.stride, draw.start))]
        expected = resize_crop(frames, 16, 16, scale=draw.scale, center=draw.center)
        if draw.flip:
            expected = expected[:, :, ::-1].copy()
        assert torch.equal(video, to_tensor(expected))


@pytest.mark.parametrize(("available", "frames", "stride"), [(20, 4, 3), (16, 16, 2), (31, 16, 9)])
def test_frame_windows_stay_inside_and_reach_both_ends(available, frames, stride):
    windows = [frame_window(available, frames, stride, u) for u in np.linspace(0, 1, 201)]
    for window in windows:
        assert len(window) == frames
        assert window[0] >= 0
        assert window[-1] < available
        assert window.step <= stride
    assert windows[0][0] == 0
    assert windows[-1][-1] == available - 1


def test_frame_window_refuses_a_short_clip():
    with pytest.raises(ValueError, match="it has 3 frames, 4 are needed"):
        frame_window(3, 4, 1, 0.0)


# Validation


def val_batches(cfg, rank=0, world_size=1):
    data = VideoDataModule(cfg)
    data._rank = lambda: (rank, world_size)
    return list(data.val_dataloader())


def test_validation_is_the_middle_of_every_clip(root):
    cfg = config(root, num_frames=5, frame_stride=[2, 4], caption_dropout=1.0)
    found = samples_of(val_batches(cfg))
    assert [found[k][0] for k in range(VAL)] == ["clip-07", "clip-08", "clip-09"]
    for clip, caption, video in found.values():
        assert caption  # never dropped
        frames = read_frames(root / f"{clip}.mp4", range(6, 15, 2))
        assert torch.equal(video, to_tensor(resize_crop(frames, 16, 16)))


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_evaluate_every_window_once_in_step(root, world_size, windows):
    cfg = config(root, val_windows=windows)
    whole = samples_of(val_batches(cfg))
    assert len(whole) == VAL * windows
    per_rank = [val_batches(cfg, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1  # collectives stay in step
    counted = {}
    for batches in per_rank:
        for index, sample in samples_of(batches).items():
            weights = {
                i: w
                for batch in batches
                for i, w in zip(batch["sample_index"].tolist(), batch["weight"].tolist())  # noqa: B905
            }
            if weights[index]:
                assert index not in counted
                counted[index] = sample
    assert_same(whole, counted)


def test_val_clips_limits(root):
    assert len(VideoDataModule(config(root, val_clips=2)).val_clips) == 2
    assert len(VideoDataModule(config(root, val_clips=99)).val_clips) == VAL


# Faults


def spoil(root, tmp_path, names):
    """A copy of the set whose named clips are cut off."""
    for path in root.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.stem in names else data)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_met_while_reading_are_replaced_counted_and_named_once(root, tmp_path, workers):
    spoil(root, tmp_path, ["clip-02"])
    cfg = config(tmp_path, probe_videos=False, num_workers=workers, max_bad_fraction=0.2)
    data = VideoDataModule(cfg)
    written = tmp_path / "log.txt"  # loader processes write to it, too
    handler = logging.FileHandler(written)
    logging.getLogger("sla").addHandler(handler)
    try:
        found = samples_of(itertools.islice(iter(data.train_dataloader()), 21))
    finally:
        logging.getLogger("sla").removeHandler(handler)
        handler.close()
    assert data.faults.count == 1
    assert written.read_text().count("clip-02 is left out") == 1
    good = samples_of(train_batches(config(root), 21))
    for index, (clip, _, _) in found.items():
        assert clip != "clip-02"
        if good[index][0] != "clip-02":
            assert clip == good[index][0]
        else:  # replaced by the next clip of the pass
            order = pass_order(cfg.seed, index // TRAIN, TRAIN)
            assert clip == f"clip-{order[(index + 1) % TRAIN]:02d}"


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_clips_stop_the_run_with_a_summary(root, tmp_path, workers):
    spoil(root, tmp_path, ["clip-01", "clip-02", "clip-03"])
    cfg = config(tmp_path, probe_videos=False, num_workers=workers, max_bad_fraction=0.2)
    data = VideoDataModule(cfg)
    with pytest.raises(DataError, match="3 of 10 clips cannot be used"):
        list(itertools.islice(iter(data.train_dataloader()), 20))
    with pytest.raises(DataError, match=r"3 of 10(.|\n)*clip-01"):
        VideoDataModule(config(tmp_path, max_bad_fraction=0.2)).setup()


def test_bad_validation_clip_has_no_weight(root, tmp_path):
    spoil(root, tmp_path, ["clip-08"])
    data = VideoDataModule(config(tmp_path, probe_videos=False, batch_size=3))
    (batch,) = list(data.val_dataloader())
    assert batch["weight"].tolist() == [1, 0, 1]
    assert data.faults.count == 1


def test_partly_damaged_clip_is_bad_as_a_whole_where_clips_are_cached(root, tmp_path):
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = tmp_path / "clip-03.mp4"
    data = bytearray(target.read_bytes())
    end = data.index(b"moov") - 4
    data[end - 60 : end] = bytes(60)  # its last frames
    target.write_bytes(data)
    module = VideoDataModule(config(tmp_path, max_bad_fraction=0.2))
    clips = [b["clip_id"][0] for b in itertools.islice(iter(module.train_dataloader()), 30)]
    assert "clip-03" not in clips
    assert module.faults.count == 1


def test_no_training_clips(root):
    with pytest.raises(
        DataError, match=r"no training clips.*10 are shorter than data.num_frames=99"
    ):
        VideoDataModule(config(root, num_frames=99)).setup()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 0},
        {"batch_size": 0},
        {"frame_stride": []},
        {"frame_stride": [2, 1]},
        {"frame_stride": [0]},
        {"crop_scale": [0.0, 1.0]},
        {"crop_scale": [0.9, 1.1]},
        {"caption_dropout": 1.5},
        {"max_bad_fraction": 1.0},
        {"num_workers": -1},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=f"data.{next(iter(wrong))} must be"):
        DataConfig(**wrong)


def test_config_is_an_omegaconf_schema():
    merged = OmegaConf.merge(
        OmegaConf.structured(DataConfig), OmegaConf.from_dotlist(["frame_stride=[2]", "seed=3"])
    )
    made = OmegaConf.to_object(merged)
    assert isinstance(made, DataConfig)
    assert (made.frame_stride, made.seed, made.height) == ([2], 3, DataConfig().height)


# With Lightning


class Recorder(lightning.LightningModule):
    """Does nothing but remember which samples came."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_index):
        self.seen += batch["sample_index"].tolist()
        self.trainer.datamodule.set_consumed(self.trainer.datamodule.start_sample + len(self.seen))
        return self.layer(batch["video"].mean().reshape(1)).sum()

    def validation_step(self, batch, batch_index):
        self.validated += batch["sample_index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(root, folder, steps, checkpoint=None):
    model = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = VideoDataModule(config(root))
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model


def test_lightning_trains_validates_and_resumes(root, tmp_path):
    first = fit(root, tmp_path, 3)
    assert first.seen == list(range(6))
    assert first.validated == list(range(VAL))
    second = fit(root, tmp_path, 5, checkpoint=tmp_path / "last.ckpt")
    assert second.seen == [6, 7, 8, 9]
