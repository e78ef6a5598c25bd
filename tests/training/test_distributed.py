"""Two processes on a tiny Wan: sharded, or sharing each sample, they train as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sla.cli.main import main
from sla.config import load_experiment, to_dict
from sla.models.testing import tiny_wan_autoencoder
from sla.training.run_folder import open_run
from sla.training.strategy import stored_step
from sla.training.testing import write_tiny_experiment

# Gradients clipped to the size of Adam's epsilon: what it then does depends on the norm.
CHANGES = {
    "run": {"init_weights": "random"},
    "data": {"num_frames": 5, "height": 64, "width": 64, "frame_stride": [1]},
    "text_encoder": {"max_tokens": 24},
    "optim": {"grad_clip": 1e-6},
    "trainer": {"max_steps": 4, "val_every": 3},
    "sampling": {"every": 2},
}
ONE = ("data.batch_size=2", "trainer.devices=1")
SHARDED = ("data.batch_size=1", "trainer.devices=2", "trainer.strategy=fsdp2")
# Both processes work on the two samples of a batch.
TOGETHER = ("data.batch_size=2", "trainer.devices=2", "trainer.sequence_parallel=2")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a cache of latents: 4 channels of 2 x 8 x 8, 32 tokens, SLA."""
    folder = tmp_path_factory.mktemp("distributed")
    values = yaml.safe_load(write_tiny_experiment(folder).with_name("sla.yaml").read_text())
    for section, changes in CHANGES.items():
        values.setdefault(section, {}).update(changes)
    tiny_wan_autoencoder().save_pretrained(folder / "wan" / "vae")
    values["autoencoder"] = {"name": "wan", "source": str(folder / "wan")}
    values["model"] = {"name": "wan", "size": "tiny", "text_tokens": 24}
    path = folder / "videos.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["latents", "--config", str(path), "--out", str(folder / "cache")]) == 0
    values["data"] |= {"source": "latents", "cache": str(folder / "cache")}
    path = folder / "wan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(config: Path, name: str, *overrides: str) -> list[str]:
    return ["finetune", "--config", str(config), f"run.name={name}", *overrides]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "sla", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # with the processes that it starts, to be killed together
    )


def run(config: Path, name: str, *overrides: str) -> Path:
    """A finished run, in processes of its own."""
    process = start(command(config, name, *overrides))
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]
    return config.parent / "runs" / name


@pytest.fixture(scope="module")
def one(config: Path) -> Path:
    """One process."""
    assert main(command(config, "one", *ONE)) == 0
    return config.parent / "runs" / "one"


@pytest.fixture(scope="module")
def longer(config: Path, one: Path) -> Path:
    """The same from step 4 to 6."""
    start = f"run.resume={one / 'checkpoints' / 'last.ckpt'}"
    assert main(command(config, "longer", *ONE, start, "trainer.max_steps=6")) == 0
    return config.parent / "runs" / "longer"


@pytest.fixture(scope="module")
def sharded(config: Path) -> Path:
    """Two processes with FSDP2."""
    return run(config, "sharded", *SHARDED)


def losses(run: Path, tag: str) -> dict[int, float]:
    """Logged values by step; of steps that were run twice the later ones."""
    values: dict[int, float] = {}
    for file in sorted((run / "tensorboard").glob("events*"), key=lambda path: path.name):
        events = EventAccumulator(str(file))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}: {name}": tensor
        for path in sorted((folder / "transformer").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_run(run: Path, expected: Path, *, exactly: bool = False) -> None:
    for tag in ("train/loss", "val/loss"):
        wanted = losses(expected, tag)
        assert wanted
        assert losses(run, tag) == (wanted if exactly else pytest.approx(wanted, rel=1e-5))
    found, stored = weights(run), weights(expected)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        close = 0.0 if exactly else 1e-5
        torch.testing.assert_close(found[name], tensor, atol=close, rtol=close, msg=name)
    configs = [(folder / "transformer" / "config.json").read_text() for folder in (run, expected)]
    assert configs[0] == configs[1]


def test_sharded_processes_equal_one(one: Path, sharded: Path) -> None:
    """Also the norm that gradients are clipped to, the average, and what was measured before."""
    assert set(losses(one, "train/loss")) == set(range(4))
    assert len(weights(one)) > 20
    assert_same_run(sharded, one)
    for name in ("baseline.json", "summary.json"):
        found, wanted = (json.loads((run / name).read_text()) for run in (sharded, one))
        assert found.keys() == wanted.keys()
        for key in ("full_val_loss", "sla_val_loss_before", "sla_val_loss_after"):
            if key in wanted:
                assert found[key] == pytest.approx(wanted[key], rel=1e-5)
    names = {path.name for path in (sharded / "samples").iterdir()}
    assert {"pretrained-0.mp4", "sla-0.mp4", "side_by_side.mp4"} <= names
    # Each process wrote its part.
    parts = sorted((sharded / "checkpoints" / "last.ckpt").glob("*.distcp"))
    assert len(parts) == 2
    assert min(part.stat().st_size for part in parts) > 0.3 * max(p.stat().st_size for p in parts)
    left = {path.name for path in (sharded / "checkpoints").iterdir()}
    assert left == {"last.ckpt", "best.ckpt"}


def test_sharded_processes_go_on_exactly(config: Path, sharded: Path) -> None:
    """Killed after 2 steps."""
    process = start(command(config, "killed", *SHARDED))
    killed = config.parent / "runs" / "killed"
    last = killed / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    try:
        while not last.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert stored_step(last) == 2
    assert not (killed / "summary.json").exists(), "the run was over before it could be killed"
    assert_same_run(run(config, "killed", *SHARDED), sharded, exactly=True)


def test_sharded_checkpoints_are_read_by_fewer_processes(
    config: Path, sharded: Path, longer: Path
) -> None:
    resume = f"run.resume={sharded / 'checkpoints' / 'last.ckpt'}"
    fewer = (*ONE, "trainer.strategy=fsdp2", "trainer.max_steps=6", resume)
    assert_same_run(run(config, "fewer", *fewer), longer)


def test_a_consolidated_checkpoint_needs_no_processes(
    config: Path, sharded: Path, longer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = sharded / "checkpoints" / "last.ckpt"
    whole = config.parent / "whole.ckpt"
    arguments = [*command(config, "whole", *ONE), "trainer.max_steps=6"]
    assert main([*arguments, f"run.resume={last}"]) == 1
    assert f"sla consolidate {last}" in capsys.readouterr().err
    assert main(["consolidate", str(last), str(whole)]) == 0
    assert main([*arguments, f"run.resume={whole}"]) == 0
    assert_same_run(config.parent / "runs" / "whole", longer)


def test_a_checkpoint_that_is_a_file_is_read_too(config: Path, one: Path, longer: Path) -> None:
    """Optimiser states are stored by number there, counted through the groups of parameters."""
    resume = f"run.resume={one / 'checkpoints' / 'last.ckpt'}"
    more = (*ONE, "trainer.strategy=fsdp2", "trainer.max_steps=6", resume)
    assert_same_run(run(config, "more", *more), longer)


def test_steps_are_whole_where_more_batches_make_one(config: Path, one: Path) -> None:
    """As on fewer processes: the four batches before are no multiple of three."""
    start = f"run.resume={one / 'checkpoints' / 'last.ckpt'}"
    overrides = (*ONE, "optim.accumulate=3", "trainer.max_steps=6", start)
    assert main(command(config, "accumulating", *overrides)) == 0
    last = config.parent / "runs" / "accumulating" / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=False)
    assert stored["global_step"] == 6
    assert stored["VideoDataModule"]["consumed_samples"] == (4 + 2 * 3) * 2


def test_a_checkpoint_becomes_a_model(config: Path, sharded: Path) -> None:
    out = config.parent / "model"
    assert main(["consolidate", str(sharded / "checkpoints" / "last.ckpt"), str(out)]) == 0
    found, wanted = weights(out), weights(sharded)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_processes_that_share_samples_equal_one(config: Path, one: Path) -> None:
    together = run(config, "together", *TOGETHER, "trainer.strategy=ddp")
    assert_same_run(together, one)
    for key in ("critical_fraction", "marginal_fraction", "negligible_fraction"):
        found, wanted = (json.loads((r / "summary.json").read_text())[key] for r in (together, one))
        assert found == pytest.approx(wanted)
    consumed = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["VideoDataModule"]
        for run in (together, one)
    ]
    assert consumed[0] == consumed[1], "a sample counts once"


@pytest.mark.slow  # two more runs each
@pytest.mark.parametrize(
    ("overrides", "close"),
    [
        pytest.param(
            (
                "optim.trainable=lora",
                "flow.target=teacher",
                "trainer.activation_checkpointing=true",
            ),
            1e-5,
            id="lora-teacher-checkpointing",
        ),
        # Norms of queries and keys have their weights in bf16 too, unlike in one process.
        pytest.param(("trainer.precision=bf16-mixed",), 1e-3, id="bf16"),
    ],
)
def test_whatever_is_trained_may_be_sharded(
    config: Path, overrides: tuple[str, ...], close: float
) -> None:
    name = overrides[0].split("=")[1]
    assert main(command(config, f"{name}-one", *ONE, *overrides)) == 0
    expected = config.parent / "runs" / f"{name}-one"
    found = run(config, f"{name}-two", *SHARDED, *overrides)
    for tag in ("train/loss", "val/loss"):
        assert losses(found, tag) == pytest.approx(losses(expected, tag), rel=close)
    stored, wanted = weights(found), weights(expected)
    assert {n: t.dtype for n, t in stored.items()} == {n: t.dtype for n, t in wanted.items()}


@pytest.mark.slow  # the two are tested one by one above
def test_processes_that_share_samples_are_sharded_too(config: Path, one: Path) -> None:
    assert_same_run(run(config, "both", *TOGETHER, "trainer.strategy=fsdp2"), one)


def test_a_run_killed_while_it_replaced_its_checkpoint_goes_on(
    config: Path, sharded: Path, tmp_path: Path
) -> None:
    experiment = load_experiment(config, [f"run.dir={tmp_path}", "run.name=torn"])
    last = tmp_path / "torn" / "checkpoints" / "last.ckpt"
    last.with_name("last.ckpt.previous").mkdir(parents=True)
    assert open_run(experiment.run, to_dict(experiment)).checkpoint == last
    assert last.is_dir()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.sequence_parallel=2"], "sequence_parallel is 2, which does not divide the 1"),
        (
            ["model.name=dit", "trainer.sequence_parallel=2"],
            "sequence_parallel is 2, but ranks cannot share the tokens of model.name=dit",
        ),
    ],
)
def test_ranks_that_cannot_share_are_refused(
    config: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config if "model.name=dit" not in overrides else config.with_name("sla.yaml")
    assert main(command(path, "refused", *ONE, "run.init_weights=random", *overrides)) == 1
    assert message in capsys.readouterr().err


def test_only_sharded_checkpoints_are_consolidated(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = one / "checkpoints" / "last.ckpt"
    assert main(["consolidate", str(last), str(tmp_path / "out.ckpt")]) == 1
    assert f"{last} is not a sharded checkpoint" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path / "last.ckpt"), str(tmp_path / "out.ckpt")]) == 1
    assert "no checkpoint" in capsys.readouterr().err
