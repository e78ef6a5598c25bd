"""Stage 1 of SLA2: training of routers, their files, and the command."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.capture_qkv import QKVSample
from sla.attention import SLA2Attention, SLA2Config, SLAConfig, build_attention
from sla.cli.main import main
from sla.models.dit import VideoDiT
from sla.models.testing import tiny_dit_config
from sla.training.config import RouterConfig
from sla.training.router import load_router, measure, save_router, train_router
from sla.training.run_folder import RunError
from sla.training.testing import write_tiny_experiment

HEADS, HEAD_DIM, BLOCK_Q, BLOCK_KV, BLOCKS, CLASSES = 2, 16, 16, 8, 24, 4
TOKENS = BLOCKS * BLOCK_KV


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hidden_classes(seed: int) -> QKVSample:
    """Blocks of four classes: queries want keys of their class, and pooling alone cannot see it.

    Channels 0-3: where the mass comes from. Keys of class c swing to both sides along channel c:
    half of them score high with its queries, and their mean is nothing. Channels 4-7: a small mark
    of the class in the mean, a hint for who learns to read it. Channels 8-11: an offset of each
    block, which says little in exact attention and most in the pooled scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = (noise(HEADS, TOKENS, HEAD_DIM) for _ in range(3))
    query, key = 0.3 * query, 0.3 * key
    token = torch.arange(TOKENS)
    swing = 4.0 * (1 - 2 * (token % 2))
    for head in range(HEADS):
        wanted = torch.randint(CLASSES, (TOKENS // BLOCK_Q,), generator=generator)
        wanted = wanted.repeat_interleave(BLOCK_Q)
        offered = torch.randperm(BLOCKS, generator=generator) % CLASSES
        offered = offered.repeat_interleave(BLOCK_KV)
        query[head, token, wanted] += 4.0
        key[head, token, offered] += swing
        query[head, token, 4 + wanted] += 0.5
        key[head, token, 4 + offered] += 0.5
        query[head, :, 8:12] += noise(TOKENS // BLOCK_Q, 4).repeat_interleave(BLOCK_Q, 0)
        key[head, :, 8:12] += noise(BLOCKS, 4).repeat_interleave(BLOCK_KV, 0)
        value[head] += noise(CLASSES, HEAD_DIM)[offered]
    return QKVSample(0, 500.0, query, key, value)


def build(**numbers: object) -> SLA2Attention:
    config = SLA2Config(**{"block_q": BLOCK_Q, "block_kv": BLOCK_KV, "critical": 0.25, **numbers})  # type: ignore[arg-type]
    method = build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
    assert isinstance(method, SLA2Attention)
    return method


def numbers(**given: object) -> RouterConfig:
    few = {"critical": [0.25], "steps": 150, "learning_rate": 1e-2, "query_blocks": 6}
    return RouterConfig(**{**few, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("straight_through", [False, True])
def test_stage_1_finds_what_plain_pooling_cannot_see(straight_through: bool) -> None:
    samples = [hidden_classes(seed) for seed in range(4)]
    method = build()
    report = train_router(method, samples, numbers(straight_through=straight_through))
    assert len(report.losses) == 150
    first, last = sum(report.losses[:20]), sum(report.losses[-20:])
    assert last < 0.3 * first
    assert report.before.recall < 0.5
    assert report.after.recall > report.before.recall + 0.15
    assert report.after.error < 0.3 * report.before.error
    assert report.alpha == torch.sigmoid(method.mixing.logit).item()
    # It has learned the layer, not the samples.
    unseen = [hidden_classes(seed) for seed in (10, 11)]
    assert measure(method, unseen, 6).recall > measure(build(), unseen, 6).recall + 0.15


def test_quality_is_the_definition() -> None:
    sample = hidden_classes(0)
    method = build(critical=0.3)
    query, key, value = sample.query[None], sample.key[None], sample.value[None]
    block_map = method.block_map(query, key, sample.context())
    weights = (query @ key.transpose(-1, -2) / 4).softmax(-1)
    recall = (weights * (block_map.token_labels() == 1)).sum(-1).mean()
    exact = scaled_dot_product_attention(query, key, value)
    error = (method(query, key, value, sample.context()) - exact).square().mean()
    quality = measure(method, [sample], 1000)
    assert quality.recall == pytest.approx(recall.item(), rel=1e-4)
    assert quality.error == pytest.approx(error.item(), rel=1e-4)


def test_only_router_and_ratio_are_trained_and_all_is_frozen_after() -> None:
    method = build(feature_map="hedgehog")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    train_router(method, [hidden_classes(0)], numbers(steps=3))
    changed = {n for n, tensor in method.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"router.proj_q", "router.proj_k", "mixing.logit"}
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not any(parameter.requires_grad for parameter in method.router_parameters())
    assert method.mixing.logit.requires_grad


def test_the_same_seed_gives_the_same_router() -> None:
    logits = []
    for seed in (0, 0, 1):
        method = build()
        train_router(method, [hidden_classes(0), hidden_classes(1)], numbers(steps=5), seed=seed)
        logits.append(method.router.proj_q)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_the_critical_fractions_come_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method, seen = build(), []
    soft = method.soft_attend

    def record(*args: object, critical: float, **others: object) -> torch.Tensor:
        seen.append(critical)
        return soft(*args, critical=critical, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(method, "soft_attend", record)
    with caplog.at_level(logging.INFO, logger="sla"):
        train_router(method, [hidden_classes(0)], numbers(critical=[0.5, 0.4, 0.3], steps=7))
    assert seen == [0.5] * 3 + [0.4] * 2 + [0.3] * 2
    assert "layer 0, step 7 of 7, critical 0.3: loss" in caplog.text
    assert "recall" in caplog.text


def test_bad_samples_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="samples of layer 0 is empty"):
        train_router(build(), [], numbers())
    method = build(block_kv=TOKENS)
    with pytest.raises(
        ValueError, match=r"with 1 of them critical at router\.critical 0\.25 there is nothing"
    ):
        train_router(method, [hidden_classes(0)], numbers())
    assert not any(parameter.requires_grad for parameter in method.router_parameters())
    for wrong, message in (
        ({"critical": []}, r"router\.critical is \[\]"),
        ({"critical": [0.1, 1.0]}, r"router\.critical is \[0\.1, 1\.0\]"),
        ({"critical": [0.1, 0.2], "steps": 1}, r"router\.steps is 1"),
        ({"tau": 0.0}, r"router\.tau is 0\.0"),
        ({"clips": 0}, r"router\.clips is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RouterConfig(**wrong)


def network(**numbers: object) -> VideoDiT:
    config = SLA2Config(**{"block_q": 16, "block_kv": 16, "critical": 0.25, **numbers})  # type: ignore[arg-type]
    return VideoDiT(tiny_dit_config(), config)


def test_a_router_file_restores_routers_and_ratios_alone(tmp_path: Path) -> None:
    saved = network()
    with torch.no_grad():
        for method in saved.attention_modules():
            for parameter in method.parameters():
                parameter += torch.randn(parameter.shape)
    save_router(tmp_path / "router.safetensors", saved)
    loaded = network(critical=0.5, precision="fp8")
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    load_router(tmp_path / "router.safetensors", loaded)
    own = [n for n in before if ".router." in n or ".mixing." in n]
    assert len(own) == 2 * 3
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name] if name in own else before[name]), name


def test_router_files_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    path, bad = tmp_path / "router.safetensors", tmp_path / "bad.safetensors"
    save_router(path, network())
    header = {"sla": json.dumps({"format": "sla-router", "version": 1, "attention": {}})}
    tensors = load_file(path)
    model = network()
    before = [p.clone() for p in model.parameters()]
    for found, other, message in (
        (path, network(block_kv=8), r"attention\.block_kv: 16 in the file, 8 in the model"),
        (path, network(tile=(2, 2, 2)), r"attention\.tile: None in the file, \[2, 2, 2\]"),
        (path, network(mixing="head"), r"mixing\.logit: \(1, 1\) in the file, \(2, 1\)"),
        (path, VideoDiT(tiny_dit_config(), SLAConfig()), "attention.name is 'sla'"),
        (tmp_path / "none", model, "which is no file"),
    ):
        with pytest.raises(RunError, match=message):
            load_router(found, other)
    for kept, metadata, message in (
        (tensors, {}, "format None"),
        (dict(list(tensors.items())[1:]), header, "absent in the file"),
        ({**tensors, "x": torch.ones(1)}, header, r"x: \(1,\) in the file, absent in the model"),
    ):
        save_file({n: torch.ones_like(t) for n, t in kept.items()}, bad, metadata=metadata)
        with pytest.raises(RunError, match=message):
            load_router(bad, model)
    bad.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match="not a readable router file"):
        load_router(bad, model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_command_trains_and_fine_tuning_starts_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny_experiment(tmp_path)
    runs = tmp_path / "runs"
    short = ("trainer.max_steps=2", "sampling.num_prompts=0")
    assert main(["pretrain", "--config", str(config), "run.name=full", *short]) == 0
    sla2 = [
        "--config",
        str(config),
        f"run.init_weights={runs / 'full' / 'model.safetensors'}",
        *("attention.name=sla2", "attention.block_q=32", "attention.block_kv=16"),
        "attention.critical=0.25",
    ]
    router = ["router", *sla2, "run.name=router", "router.clips=3", "router.steps=6"]
    assert main([*router, "router.critical=[0.3,0.2]"]) == 0
    path = runs / "router" / "router.safetensors"
    assert f"run.router_weights={path}" in capsys.readouterr().out
    report = json.loads(path.with_suffix(".json").read_text())
    assert [len(layer["losses"]) for layer in report["layers"]] == [6, 6]
    assert all(0 < layer["before"]["recall"] < 1 for layer in report["layers"])
    trained = load_file(path)
    assert not torch.equal(trained["layers.1.router.proj_q"], torch.eye(16))

    tune = ["finetune", *sla2, *short, f"run.router_weights={path}", "run.name=tuned"]
    assert main(tune) == 0
    weights = load_file(runs / "tuned" / "model.safetensors")
    key = "model.blocks.1.self_attention.method."
    assert torch.equal(weights[f"{key}router.proj_q"], trained["layers.1.router.proj_q"])
    assert not torch.equal(weights[f"{key}mixing.logit"], trained["layers.1.mixing.logit"])
    assert (weights[f"{key}mixing.logit"] - trained["layers.1.mixing.logit"]).abs().max() < 0.1

    capsys.readouterr()
    assert main([*tune, "run.name=other", "attention.block_q=16"]) == 1
    assert "attention.block_q: 32 in the file, 16 in the model" in capsys.readouterr().err
    assert main([*router, "attention.name=sla"]) == 1
    assert "stage 1 trains the router of 'sla2'" in capsys.readouterr().err
