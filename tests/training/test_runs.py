"""Whole runs on a tiny model: pretraining, fine-tuning, resuming, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sla.cli.main import main
from sla.config import load_experiment
from sla.seeds import drawing
from sla.training.build import (
    build_data,
    build_module,
    build_networks,
    build_trainer,
)
from sla.training.module import DiffusionModule
from sla.training.strategy import MovingAverage
from sla.training.testing import write_tiny_experiment

SUMMARY = {
    *("full_val_loss", "sla_val_loss_before", "sla_val_loss_after"),
    *("attention_error_before", "attention_error_after", "attention_flops_ratio"),
    *("wall_seconds", "peak_bytes"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pretrained(config: Path) -> Path:
    """An uninterrupted run of 6 steps."""
    assert main(["pretrain", "--config", str(config), "run.name=whole"]) == 0
    return config.parent / "runs" / "whole"


def command(name: str, config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "sla", name, "--config", str(config), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(run: Path, tag: str = "train/loss") -> dict[int, float]:
    """Logged values by step; of steps that were run twice the later ones."""
    values: dict[int, float] = {}
    for file in sorted((run / "tensorboard").glob("events*"), key=lambda path: path.name):
        events = EventAccumulator(str(file))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values


def assert_same_run(run: Path, expected: Path) -> None:
    assert losses(run) == losses(expected)
    assert losses(run, "val/loss") == losses(expected, "val/loss")
    weights, wanted = (load_file(path / "model.safetensors") for path in (run, expected))
    assert weights.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(weights[name], wanted[name]), name


def test_a_run_leaves_what_it_promises(pretrained: Path) -> None:
    summary = json.loads((pretrained / "summary.json").read_text())
    assert summary["steps"] == 6
    assert set(losses(pretrained)) == set(range(6))
    assert set(losses(pretrained, "val/loss")) == {2, 5}
    for tag in ("lr-AdamW/pg1", "throughput/tokens_per_s", "attention/critical"):
        assert losses(pretrained, tag), tag
    for tag in ("gradient_norm/mlp", "train/loss_stratum_0", "throughput/model_tflops_per_s"):
        assert losses(pretrained, tag), tag
    names = {path.name for path in (pretrained / "samples").iterdir()}
    assert {"full-0.mp4", "side_by_side.mp4", "side_by_side.png", "prompts.json"} <= names
    events = EventAccumulator(str(pretrained / "tensorboard"))
    events.Reload()
    assert events.Images("samples")[0].encoded_image_string.startswith(b"GIF8")
    assert (
        b"optim | learning_rate"
        in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    )


def test_a_run_that_goes_on_equals_the_uninterrupted_one(config: Path, pretrained: Path) -> None:
    """Stopped after 4 steps; optimiser, schedule, average, data position and noise go on."""
    name = "run.name=in-two-parts"
    # The cosine schedule must know the whole length from the start.
    process = subprocess.Popen(
        command("pretrain", config, name, "trainer.max_steps=6", "trainer.checkpoint_every=4"),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    run = config.parent / "runs" / "in-two-parts"
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists(), "the run was over before it could be killed"
    assert main(["pretrain", "--config", str(config), name]) == 0
    assert_same_run(run, pretrained)


def test_the_point_of_the_checkpointed_step_is_not_lost(config: Path, pretrained: Path) -> None:
    """A run can be killed after a step's checkpoint and before its point of the curves."""
    run = config.parent / "runs" / "killed"
    shutil.copytree(pretrained, run)
    shutil.rmtree(run / "tensorboard")
    (run / "summary.json").unlink()
    arguments = ["pretrain", "--config", str(config), "run.name=killed"]
    assert main([*arguments, "trainer.max_steps=8"]) == 0
    found = losses(run)
    assert set(found) == {5, 6, 7}
    assert found[5] == losses(pretrained)[5]


def test_resume_from_a_named_checkpoint(config: Path, pretrained: Path) -> None:
    checkpoint = pretrained / "checkpoints" / "last.ckpt"
    arguments = ["pretrain", "--config", str(config), "run.name=longer"]
    assert main([*arguments, f"run.resume={checkpoint}", "trainer.max_steps=8"]) == 0
    assert set(losses(config.parent / "runs" / "longer")) == {6, 7}


def test_two_processes_equal_one(config: Path) -> None:
    runs = {
        "one": ("data.batch_size=2", "trainer.devices=1"),
        "two": ("data.batch_size=1", "trainer.devices=2", "trainer.strategy=ddp"),
    }
    for name, overrides in runs.items():
        done = subprocess.run(
            command("pretrain", config, f"run.name={name}", "trainer.max_steps=3", *overrides),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (config.parent / "runs" / name for name in runs)
    for tag in ("train/loss", "val/loss"):
        wanted = losses(one, tag)
        assert losses(two, tag) == pytest.approx(wanted, rel=1e-5)
        assert wanted
    weights, wanted_weights = (load_file(run / "model.safetensors") for run in (two, one))
    for name, tensor in wanted_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-2)


def test_finetuning_measures_before_and_after(
    config: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sla = config.with_name("sla.yaml")
    start = f"run.init_weights={pretrained / 'model.safetensors'}"
    arguments = ["finetune", "--config", str(sla), "run.name=tuned", start]
    assert main(arguments) == 0
    run = config.parent / "runs" / "tuned"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert losses(run, "val/loss")[0] == pytest.approx(summary["sla_val_loss_before"])
    assert summary["critical_fraction"] == pytest.approx(1 / 16)
    assert summary["attention_error_before"] > 0.01
    assert summary["attention_flops_ratio"] < 1
    assert summary["sla_val_loss_after"] != summary["sla_val_loss_before"]
    names = {path.name for path in (run / "samples").iterdir()}
    assert {"pretrained-0.mp4", "sla-0.mp4", "side_by_side.mp4"} <= names
    proj = [t for n, t in load_file(run / "model.safetensors").items() if "proj_l.weight" in n]
    assert len(proj) == 2
    assert all(t.abs().sum() > 0 for t in proj)
    assert "sla swapped in" in capsys.readouterr().out

    stamp = (run / "model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0, "a finished run says so and is left as it is"
    assert (run / "model.safetensors").stat().st_mtime_ns == stamp

    shorter = ["trainer.max_steps=2", "optim.learning_rate=0.002"]
    assert main([*arguments, *shorter]) == 0, "another config: the finished run is kept aside"
    assert (config.parent / "runs" / "tuned.1" / "model.safetensors").stat().st_mtime_ns == stamp
    finished = json.loads((run / "summary.json").read_text())
    assert finished["steps"] == 2

    (run / "summary.json").unlink()
    assert main([*arguments, "optim.learning_rate=0.5"]) == 1, "unfinished: it may not change"
    assert "optim.learning_rate: 0.002 -> 0.5" in capsys.readouterr().err
    assert main([*arguments, *shorter]) == 0, "interrupted after training: it goes on"
    again = json.loads((run / "summary.json").read_text())
    for name in ("full_val_loss", "sla_val_loss_before", "sla_val_loss_after"):
        assert again[name] == finished[name]
    assert main([*arguments, *shorter, "run.resume=never"]) == 0
    assert (config.parent / "runs" / "tuned.2").is_dir()

    generate = ["generate", "--config", str(sla), "run.name=tuned", start, "--prompt", "A square"]
    out = config.parent / "video.mp4"
    assert main([*generate, "--out", str(out)]) == 0
    assert out.stat().st_size > 0
    assert json.loads(out.with_suffix(".json").read_text())["attention"]["name"] == "sla"

    evaluate = ["eval", "--config", str(sla), "run.name=tuned", start]
    assert main([*evaluate, "--out", str(config.parent / "eval")]) == 0
    report = json.loads((config.parent / "eval" / "report.json").read_text())
    full, tuned = report["methods"]["full (reference)"], report["methods"]["sla"]
    assert full["attention_error"] == 0
    assert tuned["attention_error"] > 0
    assert {"psnr", "temporal_flickering"} <= set(tuned["scores"]["metrics"])


def test_a_checkpoint_of_another_architecture_is_named(
    config: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", str(config), "run.name=other", "model.depth=3"]
    checkpoint = pretrained / "checkpoints" / "last.ckpt"
    assert main([*arguments, f"run.resume={checkpoint}"]) == 1
    error = capsys.readouterr().err
    assert "another architecture" in error
    assert "model.blocks.2" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.init_weights=nowhere.safetensors", "nowhere.safetensors"),
        ('run.init_weights=""', "init_weights is empty"),
        ("run.resume=nowhere.ckpt", "no checkpoint nowhere.ckpt"),
        ("data.root=nowhere", "nowhere"),
    ],
)
def test_what_is_missing_is_named(
    config: Path,
    pretrained: Path,
    override: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = f"run.init_weights={pretrained / 'model.safetensors'}"
    arguments = ["finetune", "--config", str(config.with_name("sla.yaml")), "run.name=missing"]
    assert main([*arguments, start, override]) in (1, 2)
    assert message in capsys.readouterr().err


def test_weights_of_another_size_are_refused(
    config: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", "--config", str(config.with_name("sla.yaml")), "run.name=size"]
    start = f"run.init_weights={pretrained / 'model.safetensors'}"
    assert main([*arguments, start, "model.depth=1"]) == 2
    assert "does not fit the model" in capsys.readouterr().err


def test_a_full_disk_is_an_error_that_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")

    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full)
    assert main(["pretrain", "--config", str(config), "run.name=full-disk"]) == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "run the same command again" in error


@pytest.fixture
def module(config: Path) -> DiffusionModule:
    experiment = load_experiment(config.with_name("sla.yaml"), ["optim.method_lr_scale=10"])
    return build_module(experiment, *build_networks(experiment))


def test_parameter_groups_cover_every_parameter_once(module: DiffusionModule) -> None:
    groups = module.parameter_groups()
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    proj = {id(p) for name, p in module.named_parameters() if "proj_l" in name}
    own = next(group for group in groups if group.get("lr"))
    assert {id(p) for p in own["params"]} == proj
    assert own["weight_decay"] == 0
    assert own["lr"] == pytest.approx(10 * module.optim.learning_rate)


def test_learning_rate_warms_up_and_decays(module: DiffusionModule) -> None:
    factors = [module.learning_rate_factor(step) for step in range(7)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] == pytest.approx(module.optim.final_lr_fraction)


def test_drawing_is_of_its_seed_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    before = torch.rand(2)
    with drawing(5):
        drawn = torch.rand(3)
    with drawing(5):
        assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(torch.cat((before, torch.rand(2))), expected)


def test_the_average_is_the_recurrence() -> None:
    trained = Averaged()
    average = MovingAverage(0.75)
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(trained, torch.utils.data.DataLoader(torch.zeros(4, 1)))
    expected = trained.seen[0]
    for weight in trained.seen[1:]:
        expected = 0.75 * expected + 0.25 * weight
    assert len(set(trained.seen)) == 4
    assert trained.weight.item() == pytest.approx(expected, rel=1e-6), "the trained one at the end"
    assert average.state_key == "EMAWeightAveraging", "as earlier checkpoints have it"


class Averaged(pl.LightningModule):
    """One number, which falls by 1, 2, 3, ... and is kept after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0))
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (batch_idx + 1) * self.weight

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class NoWaits(pl.Callback):
    """Makes waiting for the GPU an error in some of the steps."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx < 6 else "default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config_name", ["full.yaml", "sla.yaml"])
def test_steps_do_not_wait_for_the_gpu(tmp_path: Path, config_name: str) -> None:
    """Of a run with all its callbacks, between two points of its curves."""
    path = write_tiny_experiment(tmp_path).with_name(config_name)
    rarely = [f"trainer.{name}=100" for name in ("log_every", "val_every", "checkpoint_every")]
    hardware = ["trainer.accelerator=gpu", "trainer.devices=1", "trainer.max_steps=8"]
    experiment = load_experiment(path, [*rarely, *hardware])
    module = build_module(experiment, *build_networks(experiment))
    trainer = build_trainer(experiment, tmp_path / "run", [NoWaits()])
    try:
        trainer.fit(module, datamodule=build_data(experiment))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config_name", ["full.yaml", "sla.yaml"])
def test_cuda_graphs_train_the_same(tmp_path: Path, config_name: str) -> None:
    path = write_tiny_experiment(tmp_path).with_name(config_name)
    hardware = ["trainer.accelerator=gpu", "trainer.devices=1", "trainer.compile=true"]
    weights = []
    for graphs in (False, True):
        torch._dynamo.reset()
        experiment = load_experiment(path, [*hardware, f"trainer.cuda_graphs={graphs}"])
        module = build_module(experiment, *build_networks(experiment))
        trainer = build_trainer(experiment, tmp_path / f"run-{graphs}")
        trainer.fit(module, datamodule=build_data(experiment))
        weights.append({name: tensor.cpu() for name, tensor in module.state_dict().items()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-3, msg=name)


def test_losses_do_not_depend_on_the_batch(module: DiffusionModule) -> None:
    def batch(*rows: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(0)
        video = torch.randn(3, 3, 4, 16, 16, generator=generator)
        return {
            "video": video[list(rows)],
            "caption": [f"caption {row}" for row in rows],
            "sample_index": torch.tensor(rows),
            "clip_id": [str(row) for row in rows],
            "weight": torch.ones(len(rows)),
        }

    together = module.validation_losses(batch(0, 1, 2), 1)  # type: ignore[arg-type]
    alone = [module.validation_losses(batch(row), 1) for row in (2, 0, 1)]  # type: ignore[arg-type]
    torch.testing.assert_close(together[[2, 0, 1]], torch.cat(alone))
