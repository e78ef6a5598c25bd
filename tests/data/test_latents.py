"""The latent cache: written once, whole or not at all, and read as the videos would be."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sla.cli.main import main
from sla.config import load_experiment
from sla.data.latents import (
    CacheError,
    CacheSummary,
    LatentCache,
    LatentsConfig,
    write_cache,
)
from sla.data.module import DataConfig, VideoDataModule, pass_order
from sla.data.testing import moving_square, write_clip_set
from sla.data.video import read_frames, write_video
from sla.models.autoencoders import PixelAutoencoder
from sla.models.testing import (
    open_branches,
    tiny_text_config,
    tiny_wan_autoencoder,
    write_tiny_umt5,
)
from sla.models.text import FrozenTextEncoder, TrainedTextEncoder, UMT5TextEncoder
from sla.training.build import build_data, build_module, build_networks
from sla.training.testing import write_tiny_experiment

TRAIN, VAL = 5, 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 training and 2 validation clips of 12 frames."""
    return write_tiny_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text() -> TrainedTextEncoder:
    return TrainedTextEncoder(tiny_text_config())


@pytest.fixture(scope="module")
def cache(config: Path, text: TrainedTextEncoder) -> Path:
    """Two passes, in shards of three. Not to be changed."""
    folder = config.parent / "cache"
    write(folder, data_of(config), text)
    return folder


def data_of(config: Path, **changes: Any) -> DataConfig:
    return replace(load_experiment(config).data, **changes)


def write(
    folder: Path, data: DataConfig, text: Any, rank: int = 0, world_size: int = 1, **changes: Any
) -> CacheSummary:
    latents = LatentsConfig(**{"passes": 2, "shard_samples": 3, **changes})
    return write_cache(
        folder,
        data,
        PixelAutoencoder(),
        text,
        latents,
        rank=rank,
        world_size=world_size,
        progress=False,
    )


def from_cache(data: DataConfig, folder: Path, **changes: Any) -> DataConfig:
    return replace(data, source="latents", cache=str(folder), **changes)


def samples(data: DataConfig, count: int) -> dict[int, dict[str, Any]]:
    """The first samples of the training stream, by index."""
    found: dict[int, dict[str, Any]] = {}
    loader = VideoDataModule(data).train_dataloader()
    for batch in itertools.islice(iter(loader), -(-count // data.batch_size)):
        for k, index in enumerate(batch["sample_index"].tolist()):
            found[index] = {name: values[k] for name, values in batch.items()}
    return found


def assert_same_samples(found: dict[int, Any], wanted: dict[int, Any]) -> None:
    assert found.keys() == wanted.keys()
    for index, sample in wanted.items():
        for name, value in sample.items():
            other = found[index][name]
            same = torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
            assert same, (index, name)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(folder: Path, pattern: str = "*") -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


# Reading is as reading the videos


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_passes_are_those_of_the_videos(
    config: Path, cache: Path, text: TrainedTextEncoder, workers: int
) -> None:
    data = data_of(config, caption_dropout=0.5, batch_size=5)
    wanted = samples(data, 2 * TRAIN)
    found = samples(from_cache(data, cache, num_workers=workers), 2 * TRAIN)
    assert any(sample["caption"] == "" for sample in wanted.values())
    for sample in found.values():
        ids, mask = text.tokenize([sample["caption"]])
        assert torch.equal(sample.pop("token_ids"), ids[0])
        assert torch.equal(sample.pop("text_mask"), mask[0])
    assert_same_samples(found, wanted)


def test_later_passes_show_the_same_samples_in_new_orders(config: Path, cache: Path) -> None:
    data = data_of(config, batch_size=5)
    found = samples(from_cache(data, cache), 4 * TRAIN)
    shown = [[found[p * TRAIN + k]["clip_id"] for k in range(TRAIN)] for p in range(4)]
    for pass_index, ids in enumerate(shown):
        order = pass_order(data.seed, pass_index, TRAIN)
        assert ids == [f"clip-{k:02d}" for k in order]
    assert shown[2] != shown[0]
    for p in (2, 3):
        for k, clip in enumerate(shown[p]):
            before = found[(p - 2) * TRAIN + shown[p - 2].index(clip)]
            assert torch.equal(found[p * TRAIN + k]["video"], before["video"])


def test_another_seed_has_its_own_order_of_the_cached_crops(config: Path, cache: Path) -> None:
    data = data_of(config, batch_size=5, seed=9)
    found = samples(from_cache(data, cache), TRAIN)
    assert [s["clip_id"] for s in found.values()] == [
        f"clip-{k:02d}" for k in pass_order(9, 0, TRAIN)
    ]


def test_validation_windows_are_those_of_the_videos(
    config: Path, text: Any, tmp_path: Path
) -> None:
    data = data_of(config, val_windows=3, batch_size=4)
    write(tmp_path / "cache", data, text)
    loaders = [
        VideoDataModule(which).val_dataloader()
        for which in (data, from_cache(data, tmp_path / "cache"))
    ]
    for wanted, found in zip(*loaders, strict=True):  # type: ignore[arg-type]
        for name, values in wanted.items():
            if isinstance(values, torch.Tensor):
                assert torch.equal(found[name], values), name
            else:
                assert found[name] == values
    cached = VideoDataModule(from_cache(data, tmp_path / "cache"))
    assert cached.val_clips[1].caption == "A square moves to the right, take 6."
    cached._rank = lambda: (1, 4)  # type: ignore[method-assign]
    (batch,) = list(cached.val_dataloader())
    assert batch["weight"].tolist() == [1, 1]
    cached._rank = lambda: (3, 4)  # type: ignore[method-assign]
    (batch,) = list(cached.val_dataloader())
    assert batch["weight"].tolist() == [1, 0]


def test_a_run_may_go_on_from_the_cache(config: Path, cache: Path) -> None:
    data = data_of(config)
    state = VideoDataModule(data).state_dict()
    assert VideoDataModule(from_cache(data, cache)).state_dict() == state


def test_buckets(tmp_path: Path, text: TrainedTextEncoder) -> None:
    for k in range(7):
        size = (32, 32) if k % 3 else (32, 64)
        write_video(tmp_path / f"{k}.mp4", moving_square(8, *size, shade=30 * k), fps=8)
        (tmp_path / f"{k}.txt").write_text(f"Video {k}.")
    data = DataConfig(
        root=str(tmp_path),
        num_frames=4,
        height=16,
        width=16,
        batch_size=2,
        buckets=["16x16", "16x32"],
        val_fraction=0.0,
    )
    write(tmp_path / "cache", data, text, batch_size=4, shard_samples=4)
    wanted = samples(data, 12)
    assert {tuple(sample["video"].shape) for sample in wanted.values()} == {
        (3, 4, 16, 16),
        (3, 4, 16, 32),
    }
    found = samples(from_cache(data, tmp_path / "cache"), 12)
    for sample in found.values():
        del sample["token_ids"], sample["text_mask"]
    assert_same_samples(found, wanted)


def test_clips_that_cannot_be_read_are_replaced_as_in_training(
    config: Path, text: TrainedTextEncoder, tmp_path: Path
) -> None:
    shutil.copytree(config.parent / "data", tmp_path / "data")
    broken = tmp_path / "data" / "clip-02.mp4"
    broken.write_bytes(broken.read_bytes()[:400])
    lost = tmp_path / "data" / "clip-06.mp4"  # validates
    lost.write_bytes(b"")
    data = data_of(config, root=str(tmp_path / "data"), probe_videos=False, max_bad_fraction=0.5)
    write(tmp_path / "cache", data, text)
    wanted = samples(data, 2 * TRAIN)
    assert "clip-02" not in {sample["clip_id"] for sample in wanted.values()}
    found = samples(from_cache(data, tmp_path / "cache"), 2 * TRAIN)
    for sample in found.values():
        del sample["token_ids"], sample["text_mask"]
    assert_same_samples(found, wanted)
    (batch,) = list(VideoDataModule(from_cache(data, tmp_path / "cache")).val_dataloader())
    assert batch["weight"].tolist() == [1, 0]


def test_shards_of_videos_are_cached_too(
    config: Path, text: TrainedTextEncoder, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for k in range(TRAIN):
            tar.add(config.parent / "data" / f"clip-{k:02d}.mp4", f"{k}.mp4")
            (tmp_path / "caption").write_text(f"Take {k}.")
            tar.add(tmp_path / "caption", f"{k}.txt")
    data = data_of(
        config,
        source="webdataset",
        shards=[str(tmp_path / "0.tar")],
        shard_cache=str(tmp_path / "index"),
        val_fraction=0.0,
        batch_size=5,
        caption_dropout=0.0,
    )
    write(tmp_path / "cache", data, text)
    wanted = {sample["clip_id"]: sample for sample in samples(data, TRAIN).values()}
    found = samples(from_cache(data, tmp_path / "cache"), TRAIN).values()
    assert {sample["clip_id"] for sample in found} == {f"0/{k}" for k in range(TRAIN)}
    for sample in found:
        assert torch.equal(sample["video"], wanted[sample["clip_id"]]["video"])
        assert sample["caption"] == wanted[sample["clip_id"]]["caption"]


# Training


def command(config: Path, name: str, *overrides: object) -> int:
    return main([name, "--config", str(config), *map(str, overrides)])


def losses(run: Path, tag: str = "train/loss") -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_training_from_a_cache_is_training_from_the_videos_bit_for_bit(
    config: Path, cache: Path
) -> None:
    """As long as the cache has passes: 5 steps of 2 samples are its two passes of 5."""
    steps = "trainer.max_steps=5"
    assert command(config, "pretrain", "run.name=videos", steps) == 0
    latents = ["data.source=latents", f"data.cache={cache}"]
    assert command(config, "pretrain", "run.name=cached", steps, *latents) == 0
    videos, cached = (config.parent / "runs" / name for name in ("videos", "cached"))
    assert losses(cached) == losses(videos)
    assert len(losses(videos)) == 5
    assert losses(cached, "val/loss") == losses(videos, "val/loss")
    weights, wanted = (load_file(run / "model.safetensors") for run in (cached, videos))
    for name, tensor in wanted.items():
        assert torch.equal(weights[name], tensor), name


def test_the_text_encoder_is_trained_from_token_ids(config: Path, cache: Path) -> None:
    """Its outputs are not in the cache: gradients reach its weights."""
    experiment = load_experiment(config, ["data.source=latents", f"data.cache={cache}"])
    module = build_module(experiment, *build_networks(experiment))
    open_branches(module.model)  # what starts at zero lets no gradient pass
    batch = next(iter(build_data(experiment).train_dataloader()))
    noise = torch.zeros_like(batch["video"])
    module.losses(batch, torch.full((2,), 0.5), noise).mean().backward()
    assert isinstance(module.text_encoder, TrainedTextEncoder)
    assert module.text_encoder.token_embedding.weight.grad is not None
    assert module.text_encoder.token_embedding.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan_autoencoder().save_pretrained(folder / "vae")
    tiny_wan_autoencoder(seed=1).save_pretrained(folder / "other" / "vae")
    write_tiny_umt5(folder)
    return folder


WAN = ["autoencoder.name=wan", "model.in_channels=4", "data.num_frames=5", "data.width=32"]
SMALL = ["trainer.max_steps=2", "trainer.val_every=2", "model.patch_size=[1,1,1]"]


def test_a_model_of_wans_latents_and_umt5s_embeddings(
    config: Path, wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoded, trained, sampled and decoded; and refused where the run's models are others."""
    folder = config.parent / "wan-cache"
    models = [*WAN, f"autoencoder.source={wan}", "text_encoder.name=umt5", "model.text_dim=24"]
    models += [f"text_encoder.source={wan}", "text_encoder.max_tokens=6"]
    models += ["text_encoder.dtype=float32"]
    assert command(config, "latents", f"data.cache={folder}", *models) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["latent_shapes"] == {"16x32": [4, 2, 2, 4]}
    assert manifest["autoencoder"].startswith("AutoencoderKLWan sha256:")
    assert manifest["text_encoder"].startswith("UMT5EncoderModel max_tokens=6 sha256:")
    assert manifest["notes"]["autoencoder"]["source"] == str(wan)

    latents = ["data.source=latents", f"data.cache={folder}", *SMALL]
    assert command(config, "pretrain", "run.name=wan", *models, *latents) == 0
    run = config.parent / "runs" / "wan"
    assert all(np.isfinite(value) for value in losses(run).values())
    assert not [name for name in load_file(run / "model.safetensors") if "text_encoder" in name]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    assert not [name for name in checkpoint["state_dict"] if "text_encoder" in name]
    out = config.parent / "wan.mp4"
    arguments = ["generate", "--config", str(config), "--prompt", "a red ball", "--out", str(out)]
    assert main([*arguments, "run.name=wan", *models]) == 0
    assert read_frames(out).shape == (5, 16, 32, 3)

    capsys.readouterr()
    other = [item.replace(f"source={wan}", f"source={wan / 'other'}", 1) for item in models[:5]]
    assert command(config, "pretrain", "run.name=no", *models, *latents, *other[4:5]) == 1
    error = capsys.readouterr().err
    assert "was made by another autoencoder" in error
    assert error.count("AutoencoderKLWan sha256:") == 2
    assert manifest["autoencoder"] in error
    assert command(config, "pretrain", "run.name=no", *models, *SMALL) == 1
    assert "is trained from a latent cache" in capsys.readouterr().err


def test_frozen_text_is_cached_as_it_is_encoded(config: Path, wan: Path, tmp_path: Path) -> None:
    encoder = UMT5TextEncoder.from_pretrained(wan, max_tokens=6, dtype=torch.float32)
    identity = encoder.identity
    data = data_of(config)
    write(tmp_path, data, FrozenTextEncoder(encoder))
    assert encoder.identity == identity, "encoding does not change it"
    for sample in samples(from_cache(data, tmp_path, caption_dropout=0.5), 10).values():
        embeddings, mask = encoder.encode([sample["caption"]])
        assert torch.equal(sample["text_mask"], mask[0])
        torch.testing.assert_close(sample["text"], embeddings[0], atol=1e-5, rtol=1e-5)


def test_half_precision(config: Path, text: TrainedTextEncoder, tmp_path: Path) -> None:
    data = data_of(config)
    write(tmp_path, data, text, dtype="bfloat16")
    tensors = load_file(tmp_path / "train-00000.safetensors")
    assert tensors["video.0"].dtype == torch.bfloat16
    assert tensors["text.0"].dtype == torch.int32
    wanted, found = samples(data, TRAIN), samples(from_cache(data, tmp_path), TRAIN)
    for index in wanted:
        assert found[index]["video"].dtype == torch.float32
        torch.testing.assert_close(found[index]["video"], wanted[index]["video"], atol=4e-3, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.max_tokens=30"], r"another text encoder:\n.*max_tokens=23\n.*max_tokens=30"),
        (["model.in_channels=4"], r"model.in_channels is 4; latents in .* have 3 channels"),
        (["data.crop_scale=[0.5]"], r"data.crop_scale: \[0.85, 1.0\] in the cache, \[0.5\]"),
        (["data.num_frames=3"], r"data.num_frames: 4 in the cache, 3 in the run"),
    ],
)
def test_a_cache_that_is_not_the_runs_is_refused(
    config: Path,
    cache: Path,
    overrides: list[str],
    message: str,
) -> None:
    experiment = load_experiment(config, ["data.source=latents", f"data.cache={cache}", *overrides])
    with pytest.raises(CacheError, match=message):
        build_data(experiment)


# Writing: several processes, interruptions


def test_ranks_write_every_shard_once(
    config: Path, cache: Path, text: TrainedTextEncoder, tmp_path: Path
) -> None:
    """In any order, at any time; the last one completes the cache."""
    data = data_of(config)
    first = write(tmp_path, data, text, rank=1, world_size=2)
    assert (first.written, first.missing) == (2, 3)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(CacheError, match=r"not finished.*: run the same `make latents` again"):
        LatentCache(tmp_path)
    kept = stamps(tmp_path)
    second = write(tmp_path, data, text, rank=0, world_size=2)
    assert (second.written, second.missing) == (3, 0)
    assert kept.items() <= stamps(tmp_path).items()
    assert contents(tmp_path) == contents(cache)
    again = write(tmp_path, data, text, rank=2, world_size=3)
    assert (again.written, again.missing) == (0, 0)


def test_ranks_from_the_environment(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    sizes = ["latents.shard_samples=2", f"data.cache={tmp_path}"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command(config, "latents", *sizes) == 0
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "train-00001.safetensors",
        "val-00000.safetensors",
    ]
    assert "2 left to other ranks" in capsys.readouterr().out
    assert command(config, "latents", *sizes, "--rank", "0") == 0
    assert "complete" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "2")
    assert command(config, "latents", *sizes) == 2
    assert "rank is 2" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(
    config: Path, text: TrainedTextEncoder, tmp_path: Path
) -> None:
    """SIGKILL in the middle; finished shards stay, and the result is that of one run."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    size = {"passes": 40, "shard_samples": 1}
    arguments = [f"latents.{name}={value}" for name, value in size.items()]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sla", "latents", "--config", str(config)),
            *("--out", str(killed), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "train-00020.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists(), "the run was over before it could be killed"
    finished = stamps(killed, "*.json")
    shards = {Path(name).with_suffix(".safetensors").name for name in finished} - {
        "plan.safetensors"
    }
    kept = {name: stamp for name, stamp in stamps(killed).items() if name in shards} | finished
    (killed / ".train-00099.1.part.safetensors").write_bytes(b"half of a shard")

    data = data_of(config)
    summary = write(killed, data, text, **size)
    assert summary.missing == 0
    assert 0 < summary.written <= 202 - len(shards)
    after = stamps(killed)
    assert kept.items() <= after.items(), "a finished shard was written again"
    assert not list(killed.glob(".*.part*"))
    write(whole, data, text, **size)
    one, other = contents(killed), contents(whole)
    for manifest in (one, other):
        values = json.loads(manifest["manifest.json"])
        values.pop("notes")
        manifest["manifest.json"] = json.dumps(values).encode()
    assert one == other


def test_a_shard_without_its_record_is_taken_as_it_is(
    config: Path, cache: Path, text: TrainedTextEncoder, tmp_path: Path
) -> None:
    """Killed between the two."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / "manifest.json").unlink()
    (folder / "train-00001.json").unlink()
    kept = stamps(folder, "*.safetensors")
    assert write(folder, data_of(config), text).written == 0
    assert stamps(folder, "*.safetensors") == kept
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize("damage", ["cut", "gone", "record", "both"])
def test_what_is_not_whole_is_written_again(
    config: Path, cache: Path, text: TrainedTextEncoder, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    shard, record = folder / "train-00001.safetensors", folder / "train-00001.json"
    if damage in ("cut", "both"):
        shard.write_bytes(shard.read_bytes()[:-100])
    if damage == "gone":
        shard.unlink()
    if damage == "record":
        record.write_text('{"plan": ')
    if damage == "both":
        record.unlink()
    assert write(folder, data_of(config), text).written == 1
    assert contents(folder) == contents(cache)


def test_a_full_disk_leaves_what_was_whole(
    config: Path,
    cache: Path,
    text: TrainedTextEncoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    calls = []
    sync = os.fsync

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    sizes = ["latents.passes=2", "latents.shard_samples=3", f"data.cache={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr("sla.data.latents.os.fsync", full)
        assert command(config, "latents", *sizes) == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "train-00002.safetensors" in error
    assert "run the same command again" in error
    assert sorted(stamps(tmp_path)) == sorted(
        ["plan.json", *(f"train-0000{k}.{s}" for k in (0, 1) for s in ("json", "safetensors"))]
    )
    assert write(tmp_path, data_of(config), text).written == 3
    assert contents(tmp_path) == contents(cache)


def test_another_cache_in_the_folder_is_refused(
    config: Path, cache: Path, text: TrainedTextEncoder, tmp_path: Path
) -> None:
    before = contents(cache)
    with pytest.raises(CacheError, match=r"another latent cache:\n  passes: 2 -> 3"):
        write(cache, data_of(config), text, passes=3)
    with pytest.raises(CacheError, match="  seed: 0 -> 4"):
        write(cache, data_of(config, seed=4), text)
    other = write_clip_set(tmp_path / "data", train=5, val=2, frames=12, height=32, width=32)
    manifest = other / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("take 3", "take three"))
    with pytest.raises(CacheError, match="captions_sha256"):
        write(cache, data_of(config, root=str(other)), text)
    assert contents(cache) == before
    (tmp_path / "foreign").mkdir()
    shutil.copy(cache / "val-00000.safetensors", tmp_path / "foreign")
    with pytest.raises(CacheError, match=r"holds safetensors files and no plan\.json"):
        write(tmp_path / "foreign", data_of(config), text)


# Damage


@pytest.fixture
def damaged(config: Path, cache: Path, tmp_path: Path) -> DataConfig:
    """One byte of a latent is another."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    path = folder / "train-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    return from_cache(data_of(config, batch_size=5), folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_with_both_checksums(
    damaged: DataConfig, config: Path, text: TrainedTextEncoder, workers: int
) -> None:
    folder = Path(damaged.cache)
    expected = json.loads((folder / "train-00001.json").read_text())["sha256"]
    with pytest.raises(CacheError) as caught:
        samples(replace(damaged, num_workers=workers), TRAIN)
    message = str(caught.value)
    assert "train-00001.safetensors is damaged" in message
    assert expected in message
    assert "delete it and run the same `make latents` again" in message
    (folder / "train-00001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"train-00001\.safetensors is missing"):
        samples(damaged, TRAIN)
    write(folder, data_of(config), text)
    assert len(samples(damaged, TRAIN)) == TRAIN


def test_checksums_can_be_skipped(damaged: DataConfig) -> None:
    assert len(samples(replace(damaged, verify_cache=False), TRAIN)) == TRAIN
    path = Path(damaged.cache) / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"train-00001\.safetensors is damaged: .*"):
        samples(replace(damaged, verify_cache=False), TRAIN)


def test_a_shard_is_checked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    from sla.data import latents

    original = latents.file_sha256
    monkeypatch.setattr(latents, "file_sha256", lambda p: checked.append(p.name) or original(p))
    reader = LatentCache(cache)
    assert checked == [], "nothing is read before it is needed"
    monkeypatch.setattr(latents, "_OPEN_SHARDS", 1)
    for _ in range(2):
        for position in range(2 * TRAIN):
            reader.read("train", position)
    assert sorted(checked) == [f"train-0000{k}.safetensors" for k in range(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this code reads version 1"),
        ({"format": "other"}, "is not of a latent cache"),
        ({"shards": None}, "is damaged"),
        ({"shards": []}, "is damaged"),
        ({"passes": "two"}, "is damaged"),
        ("{", "cannot be read"),
    ],
)
def test_manifests_that_cannot_be_used(
    cache: Path, tmp_path: Path, change: dict[str, Any] | str, message: str
) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    text = change if isinstance(change, str) else json.dumps({**manifest, **change})
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=message):
        LatentCache(tmp_path)


def test_mistakes_in_the_call_are_named(
    config: Path, cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for overrides, status, message in (
        (["data.source=latents", f"data.cache={cache}"], 2, "data.source is 'latents'"),
        (["latents.passes=0", "data.cache=x"], 2, "latents.passes is 0"),
        (["latents.dtype=int8", "data.cache=x"], 2, "latents.dtype is 'int8'"),
        (["data.root=nowhere", f"data.cache={tmp_path / 'a'}"], 1, "no folder nowhere"),
        (["data.source=latents"], 2, "data.cache"),
        (["autoencoder.name=wan", "data.cache=x"], 2, "autoencoder.source is empty"),
    ):
        assert command(config, "latents", *overrides) == status
        assert message in capsys.readouterr().err
    assert command(config, "pretrain", "data.source=latents", "data.cache=nowhere") == 1
    assert "no latent cache in nowhere: run `make latents`" in capsys.readouterr().err
