"""Fine-tuning Wan by config: a tiny one, from diffusers' files to diffusers' files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from sla.attention import FullConfig, SLAConfig, SparseOnlyConfig
from sla.cli.main import main
from sla.config import load_experiment
from sla.data.testing import write_clip_set
from sla.data.video import read_frames
from sla.models.checkpoint import CheckpointError
from sla.models.families import WanConfig, family
from sla.models.testing import tiny_wan_autoencoder, write_tiny_umt5
from sla.models.video_model import VideoModel
from sla.models.wan import build_wan
from sla.training.build import build_module, build_networks
from sla.training.config import OptimConfig
from sla.training.run_folder import RunError
from sla.training.trainable import choose_trainable, merge_lora

TINY = """
run:
  dir: {folder}/runs
  init_weights: {folder}/wan
data:
  source: latents
  cache: {folder}/cache
  root: {folder}/data
  num_frames: 5
  height: 32
  width: 64
  batch_size: 2
model:
  name: wan
  size: tiny
  revision: ""
  text_tokens: 8
autoencoder:
  name: wan
  source: {folder}/wan
text_encoder:
  name: umt5
  source: {folder}/wan
  max_tokens: 6
  dtype: float32
attention:
  name: sla
  critical: 0.3
  block_q: 4
  block_kv: 4
optim:
  learning_rate: 1.0e-3
  ema_decay: 0.5
trainer:
  accelerator: cpu
  max_steps: 3
  val_every: 3
  val_strata: 2
  checkpoint_every: 3
  log_every: 1
  activation_checkpointing: true
  progress_bar: false
sampling:
  num_prompts: 1
  steps: 2
  scheduler: unipc
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a tiny Wan with its repository and its latent cache."""
    folder = tmp_path_factory.mktemp("wan")
    write_clip_set(folder / "data", train=4, val=2, frames=12, height=32, width=64)
    tiny_wan_autoencoder().save_pretrained(folder / "wan" / "vae")
    write_tiny_umt5(folder / "wan", width=16)
    build_wan("tiny").save_pretrained(folder / "wan" / "transformer")
    path = folder / "wan.yaml"
    path.write_text(TINY.format(folder=folder))
    assert main(["latents", "--config", str(path), "data.source=manifest"]) == 0
    return path


def finetune(config: Path, name: str, *overrides: str) -> Path:
    arguments = ["finetune", "--config", str(config), f"run.name={name}", *overrides]
    assert main(arguments) == 0
    return config.parent / "runs" / name


@pytest.fixture(scope="module")
def finetuned(config: Path) -> Path:
    return finetune(config, "sla")


def test_a_run_ends_in_files_that_plain_diffusers_reads(config: Path, finetuned: Path) -> None:
    summary = json.loads((finetuned / "summary.json").read_text())
    assert summary["tokens"] == 2 * 2 * 4
    for name in ("full_val_loss", "sla_val_loss_before", "sla_val_loss_after"):
        assert 0 < summary[name] < 10
    assert summary["sla_val_loss_before"] != summary["full_val_loss"]
    assert (finetuned / "samples" / "side_by_side.mp4").stat().st_size > 0
    start = load_file(config.parent / "wan/transformer/diffusion_pytorch_model.safetensors")
    plain = WanTransformer3DModel.from_pretrained(finetuned / "transformer").state_dict()
    assert plain.keys() == start.keys()
    assert not torch.equal(plain["blocks.0.ffn.net.2.weight"], start["blocks.0.ffn.net.2.weight"])
    methods = load_file(finetuned / "transformer" / "attention.safetensors")
    assert methods["blocks.0.attn1.processor.method.proj_l.weight"].abs().sum() > 0


def test_generate_takes_the_run(config: Path, finetuned: Path) -> None:
    out = config.parent / "video.mp4"
    arguments = ["generate", "--config", str(config), "--prompt", "a red ball", "--out", str(out)]
    assert main([*arguments, "run.name=sla"]) == 0
    assert read_frames(out).shape == (5, 32, 64, 3)
    sidecar = json.loads(out.with_suffix(".json").read_text())
    assert sidecar["attention"]["name"] == "sla"
    assert sidecar["sampling"]["scheduler"] == "unipc"
    # Before there is a run, the pretrained weights with full attention.
    assert main([*arguments, "run.name=none"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["attention"]["name"] == "full"


def test_the_exported_model_is_the_trained_one(config: Path, finetuned: Path) -> None:
    """Restored outputs are those of the last checkpoint's averaged weights."""
    experiment = load_experiment(config, [])
    wan = family("wan")
    restored = wan.restore(experiment.model, finetuned / "transformer", None).model
    stored = torch.load(finetuned / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
    found = {f"model.{key}": value for key, value in restored.state_dict().items()}
    assert found.keys() == stored.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, stored[key], msg=key)


def test_a_killed_run_goes_on_as_if_nothing_had_been(config: Path, finetuned: Path) -> None:
    part = finetune(config, "parts", "trainer.max_steps=1", "trainer.checkpoint_every=1")
    (part / "summary.json").unlink()
    finetune(config, "parts")
    one, two = (load_file(f / "transformer/attention.safetensors") for f in (finetuned, part))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def test_with_a_teacher_the_velocity_is_learned_from_it(config: Path, finetuned: Path) -> None:
    run = finetune(config, "taught", "flow.target=teacher")
    # The student starts at the pretrained weights under another attention: far nearer to the
    # teacher than to the data, and validation is against the data all the same.
    summary = json.loads((run / "summary.json").read_text())
    other = json.loads((finetuned / "summary.json").read_text())
    assert summary["sla_val_loss_before"] == other["sla_val_loss_before"]
    assert summary["sla_val_loss_after"] != other["sla_val_loss_after"]
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert not [key for key in stored if "teacher" in key]

    experiment = load_experiment(config, ["flow.target=teacher"])
    teacher, text_encoder = build_networks(experiment, weights=experiment.run.init_weights)
    student, _ = build_networks(experiment, weights=experiment.run.init_weights)
    module = build_module(experiment, student, text_encoder, teacher)
    batch: Any = {
        "video": torch.randn(2, 4, 2, 4, 8),
        "text": torch.randn(2, 3, 16),
        "text_mask": torch.ones(2, 3, dtype=torch.bool),
    }
    inputs = (batch, torch.tensor([0.3, 0.8]), torch.randn(2, 4, 2, 4, 8))
    assert module.losses(*inputs, training=True).abs().max() < 1e-10  # equal networks
    assert module.losses(*inputs).min() > 0.1


@pytest.mark.parametrize("trainable", ["methods", "lora"])
def test_little_is_trained_and_all_is_exported(config: Path, trainable: str) -> None:
    run = finetune(config, trainable, f"optim.trainable={trainable}", "optim.lora_rank=2")
    start = load_file(config.parent / "wan/transformer/diffusion_pytorch_model.safetensors")
    end = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    assert start.keys() == end.keys(), "a model without LoRA, which plain diffusers reads"
    changed = {key for key, value in start.items() if not torch.equal(value, end[key])}
    assert load_file(run / "transformer/attention.safetensors")[
        "blocks.1.attn1.processor.method.proj_l.weight"
    ].any()
    if trainable == "methods":
        assert not changed
    else:
        assert "blocks.0.attn1.to_q.weight" in changed
        assert "blocks.0.attn2.to_k.weight" in changed
        assert "blocks.0.norm2.weight" not in changed


def model_of(config: Path) -> VideoModel:
    return build_networks(load_experiment(config, []))[0]


def test_merging_lora_changes_no_output(config: Path) -> None:
    model = model_of(config).eval()
    inputs = (
        torch.randn(1, 4, 2, 4, 8),
        torch.tensor([300.0]),
        torch.randn(1, 3, 16),
        torch.ones(1, 3, dtype=torch.bool),
    )
    before = dict(model.named_parameters())
    with torch.no_grad():
        choose_trainable(model, None, OptimConfig(trainable="lora", lora_rank=2))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted = model(*inputs)
        assert merge_lora(model) == 2 * (4 + 4 + 2)
        torch.testing.assert_close(model(*inputs), adapted, atol=1e-5, rtol=1e-5)
    assert dict(model.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize(
    ("optim", "attention", "message"),
    [
        (OptimConfig(trainable="lora", lora_targets=["to_z"]), "sla", "'to_z' ends the name of no"),
        (OptimConfig(trainable="methods"), "full", "attention 'full' has no parameters"),
    ],
)
def test_what_cannot_be_trained_is_named(
    config: Path, optim: OptimConfig, attention: str, message: str
) -> None:
    model = build_networks(load_experiment(config, [f"attention.name={attention}"]))[0]
    with pytest.raises(RunError, match=message):
        choose_trainable(model, None, optim)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.init_weights=nowhere"], "no folder nowhere"),
        (["model.size=1.3b"], "model.in_channels is 16; latents in .* have 4 channels"),
        (["model.size=2b"], "model.size is '2b'; it must be one of 1.3b, 14b, tiny"),
        (
            ["model.text_tokens=2"],
            "text_encoder.max_tokens is 6; it may be at most model.text_tokens, which is 2",
        ),
        (["model.dtype=int8"], "model.dtype is 'int8'"),
    ],
)
def test_bad_configs_are_named(
    config: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "--config", str(config), "run.name=bad", *overrides]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


def test_weights_of_another_size_or_method_are_refused(config: Path, finetuned: Path) -> None:
    wan, source = family("wan"), str(config.parent / "wan")
    with pytest.raises(CheckpointError, match="num_layers: 2 in the files, 30 for this size"):
        wan.create(WanConfig(size="1.3b"), FullConfig(), source)
    sla, sparse = SLAConfig(block_q=4, block_kv=4), SparseOnlyConfig(block_q=4, block_kv=4)
    trained = str(finetuned / "transformer")
    assert wan.create(WanConfig(size="tiny"), sla, trained).attention_config == sla
    with pytest.raises(CheckpointError, match="holds attention 'sla', the model has 'sparse_only'"):
        wan.create(WanConfig(size="tiny"), sparse, trained)


def test_random_weights_need_no_files(config: Path) -> None:
    one, two = (
        build_networks(load_experiment(config, ["run.init_weights=random"]))[0] for _ in range(2)
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
