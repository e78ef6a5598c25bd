"""The estimate of a training run's memory: by hand, against autograd, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from sla.attention import FullConfig, LinearPlusSparseConfig, SLA2Config, SLAConfig
from sla.config import load_experiment
from sla.models.diffusers_model import DiffusersVideoModel
from sla.models.wan import WAN_CONFIGS, build_wan
from sla.training.memory import (
    MemoryEstimate,
    MemorySettings,
    ParameterCounts,
    TransformerShape,
    attention_bytes,
    block_table_bytes,
    check_memory,
    check_run,
    estimate_memory,
    estimate_run,
    parameters_of,
)
from sla.training.run_folder import RunError

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
# Wan2.1-1.3B at 480p x 81 frames.
SHAPE = TransformerShape(1536, 8960, 30, 12, 32_760, 512)
COUNTS = ParameterCounts(1_418_996_800, 0, 46_000_000)


def test_a_tiny_model_by_hand() -> None:
    shape = TransformerShape(width=4, mlp_width=8, depth=3, heads=2, tokens=10, text_tokens=5)
    counts = ParameterCounts(trainable=100, frozen=20, block=30)
    found = estimate_memory(shape, counts, MemorySettings(batch=2, attention_bytes=7))
    # a token: (12 x 4 + 10 x 2) x 4 + 2 x 2 x 8 + 8 x 2; a text token: (2 x 4 + 2 x 2) x 4
    block = 2 * (10 * (272 + 32 + 16) + 5 * 48 + 7)
    assert found.phase == "forward"
    assert found.parts == {
        "weights": 480,
        "gradients": 400,
        "optimiser": 800,
        "average of the weights": 0,
        "teacher": 0,
        "copies of weights to compute with": 240,
        "activations": 3 * block + 12 * 4 * 20,
        "working memory": 20 * (2 * 8 + 4 * 4),
        "other": 0,
    }
    assert found.total == sum(found.parts.values())
    one = replace(found.settings, checkpointing=True)
    found = estimate_memory(shape, counts, one)
    assert found.phase == "backward"
    assert (found.gradients, found.copies) == (0, 60)
    assert found.activations == 3 * 2 * 4 * 20 + block
    short = estimate_memory(replace(shape, tokens=1), counts, replace(one, fused_optimizer=True))
    assert (short.phase, short.gradients, short.copies) == ("backward", 400, 60)
    assert short.activations == 2 * (320 + 5 * 48 + 7)
    no_copies = replace(one, compute_bytes=4)
    assert estimate_memory(shape, counts, no_copies).copies == 0


def test_many_weights_and_few_tokens_need_most_in_the_optimisers_step() -> None:
    shape = TransformerShape(4, 8, 3, 2, 10)
    counts = ParameterCounts(10_000, 0, 3_000)
    found = estimate_memory(shape, counts)
    assert (found.phase, found.working, found.activations) == ("optimizer", 40_000, 0)
    assert found.total == 5 * 40_000
    assert estimate_memory(shape, counts, MemorySettings(fused_optimizer=True)).phase != "optimizer"


def test_what_a_run_adds() -> None:
    plain = estimate_memory(SHAPE, COUNTS)

    def added(**changes: Any) -> int:
        return estimate_memory(SHAPE, COUNTS, MemorySettings(**changes)).total - plain.total

    weights = 4 * COUNTS.total
    assert added(average=True) == weights
    assert added(teacher_parameters=1000, teacher_bytes=2) == 2000
    assert added(strategy="ddp", gpus=4) == weights
    assert added(other_bytes=123) == 123
    assert added(keep_gradients=False) == -weights
    assert added(keep_gradients=False, accumulate=2) == 0
    assert added(batch=2) == pytest.approx(plain.activations + plain.working, rel=1e-12)


def test_fsdp_divides_what_is_stored_and_nothing_else() -> None:
    settings = MemorySettings(average=True, teacher_parameters=800, checkpointing=True)
    one = estimate_memory(SHAPE, COUNTS, settings)
    eight = estimate_memory(SHAPE, COUNTS, replace(settings, strategy="fsdp", gpus=8))
    for part in ("weights", "optimizer", "average", "teacher"):
        assert getattr(one, part) == 8 * getattr(eight, part) > 0
    assert eight.phase == "backward"
    full = 4 * COUNTS.trainable
    assert eight.gradients in (0, full // 8)
    blocks = 2 if eight.gradients == 0 else 3
    assert eight.copies == blocks * 2 * COUNTS.block
    more = replace(settings, strategy="fsdp", gpus=16)
    assert estimate_memory(SHAPE, COUNTS, more).activations == eight.activations


def kept_bytes(model: nn.Module, inputs: dict[str, Tensor], bf16: bool) -> int:
    """Bytes of the tensors, other than parameters, that autograd keeps of a forward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())  # alive: no address twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(**inputs)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize(
    ("bf16", "trained", "compiled"),
    [
        *[(bf16, trained, False) for bf16 in (True, False) for trained in ("all", "adapters")],
        pytest.param(True, "all", True, marks=pytest.mark.slow),  # compiles
        pytest.param(True, "adapters", True, marks=pytest.mark.slow),
    ],
)
def test_activations_are_those_that_autograd_keeps(
    bf16: bool, trained: str, compiled: bool
) -> None:
    """Within 5 %, at a width and a length at which the rest is small."""
    config = {**WAN_CONFIGS["tiny"], "attention_head_dim": 128, "ffn_dim": 1024, "num_layers": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer3DModel(**config)
    if trained == "adapters":  # of the linear layers: trained themselves here, which keeps as much
        for name, parameter in model.named_parameters():
            linear = name.startswith("blocks") and name.endswith("weight") and parameter.ndim == 2
            parameter.requires_grad_(linear)
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 24, 24),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.full((2,), 500.0),
    }
    if compiled:  # with the partition of forward and backward that Inductor takes
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager_decomp_partition")
    counts = parameters_of(model)
    if trained == "adapters":
        counts = ParameterCounts(1, counts.total, counts.block)
    settings = MemorySettings(
        batch=2, compute_bytes=2 if bf16 else 4, keep_gradients=False, compiled=compiled
    )
    shape = TransformerShape(256, 1024, 3, 2, tokens=3 * 12 * 12, text_tokens=7)
    found = estimate_memory(shape, counts, settings)
    assert found.phase in ("forward", "backward")
    kept = kept_bytes(model, inputs, bf16)
    assert found.copies + found.activations == pytest.approx(kept, rel=0.05)


def test_counts_of_a_module() -> None:
    model = build_wan("tiny")
    counts = parameters_of(model)
    assert counts.trainable == counts.total == sum(p.numel() for p in model.parameters())
    assert counts.block == sum(p.numel() for p in model.blocks[0].parameters())
    assert not counts.are_adapters
    model.blocks.requires_grad_(False)
    frozen = parameters_of(model)
    assert (frozen.frozen, frozen.total) == (2 * counts.block, counts.total)
    shared = nn.Linear(3, 4, bias=False)
    assert parameters_of(nn.Sequential(shared, shared)) == ParameterCounts(12)


def test_tables_of_the_kernels() -> None:
    # 4 x 8 blocks, 2 critical in each row of 8: labels, two numbers of blocks and a count
    assert block_table_bytes(3, 256, 64, 32, 0.25) == 3 * 4 * (8 + 2 * 4 + 4)


def test_methods_of_two_branches_keep_both_outputs() -> None:
    blocks = {"block_q": 64, "block_kv": 32, "critical": 0.25}
    tables = block_table_bytes(3, 256, 64, 32, 0.25)
    for config, outputs in (
        (SLAConfig(**blocks), 0),
        (SLA2Config(**blocks), 2),
        (LinearPlusSparseConfig(**blocks), 2),
    ):
        assert attention_bytes(config, 3, 16, 256, 2) == tables + outputs * 3 * 16 * 256 * 2
    assert attention_bytes(FullConfig(), 3, 16, 256, 2) == 0


def test_a_run_that_fits_passes_and_one_that_may_is_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    estimate = estimate_memory(SHAPE, COUNTS, MemorySettings(checkpointing=True))
    with caplog.at_level(logging.WARNING):
        check_memory(estimate, estimate.total)
        assert not caplog.records
        check_memory(estimate, round(0.91 * estimate.total))
    (record,) = caplog.records
    assert "It may fit" in record.getMessage()


def test_a_run_that_cannot_fit_is_refused_with_what_would_help() -> None:
    settings = MemorySettings(batch=2, average=True)
    estimate = estimate_memory(SHAPE, COUNTS, settings)
    with pytest.raises(RunError) as refused:
        check_memory(estimate, round(0.89 * estimate.total))
    message = str(refused.value)
    assert message.startswith("GPU too small: training needs about")
    assert f"  activations: {estimate.activations / GIB:.1f} GiB" in message
    lighter = estimate_memory(SHAPE, COUNTS, replace(settings, checkpointing=True))
    wanted = f"  trainer.activation_checkpointing=true: {lighter.total / GIB:.1f} GiB"
    assert wanted in message
    changes = ("LoRA", "FSDP over 8 GPUs and", "optim.ema_decay=0", "data.batch_size=1")
    for change in (*changes, "data.num_frames"):
        assert change in message
    with pytest.raises(RunError) as refused:
        check_memory(replace(estimate, settings=replace(settings, checkpointing=True)), GIB)
    assert "activation_checkpointing" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransformerShape(0, 1, 1, 1, 1), "width is 0; it must be 1 or more"),
        (lambda: ParameterCounts(-1), "trainable is -1"),
        (lambda: MemorySettings(strategy="zero"), "strategy is 'zero'; it must be one of single"),
        (lambda: MemorySettings(gpus=0), "gpus is 0"),
    ],
)
def test_values_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


WAN = ROOT / "configs/finetune/wan2.1-1.3b.yaml"


@pytest.fixture(scope="module")
def wan() -> DiffusersVideoModel:
    # Sizes come from the config and counts from the model, which need not be the large one.
    return DiffusersVideoModel(build_wan("tiny"), attention_config=SLAConfig())


def estimated(wan: DiffusersVideoModel, *overrides: str, gpus: int = 1) -> MemoryEstimate:
    found = estimate_run(load_experiment(WAN, overrides), wan, (21, 30, 52), gpus)
    assert found is not None
    return found


def test_a_config_is_what_is_estimated(wan: DiffusersVideoModel) -> None:
    usual = estimated(wan)
    assert usual.shape.tokens == 32_760
    assert usual.shape.width == 1536
    assert usual.average > 0
    assert usual.teacher == 0
    assert usual.settings.attention_bytes == block_table_bytes(12, 32_760, 64, 64, 0.05)
    assert estimated(wan, "flow.target=teacher").teacher == usual.weights
    assert estimated(wan, "optim.ema_decay=0").average == 0
    kept = estimated(wan, "trainer.activation_checkpointing=false")
    assert kept.activations > 10 * usual.activations
    shared = estimated(wan, "trainer.sequence_parallel=4", gpus=4)
    assert shared.shape.tokens == 8_190
    assert shared.activations < usual.activations / 3
    assert estimated(wan, "trainer.strategy=fsdp2", gpus=8).weights < usual.weights / 7


def test_only_wans_blocks_are_estimated(wan: DiffusersVideoModel) -> None:
    demo = load_experiment(ROOT / "configs/finetune/demo.yaml")
    assert estimate_run(demo, wan, (16, 16, 16)) is None


def test_a_run_on_a_small_gpu_is_refused_before_it_starts(
    wan: DiffusersVideoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment(WAN, ["trainer.activation_checkpointing=false"])
    check_run(experiment, wan, (21, 30, 52), 1)  # no GPU, nothing to say
    card = SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    with pytest.raises(RunError, match="GPU too small"):
        check_run(experiment, wan, (21, 30, 52), 1)
    card.total_memory = 200 * 2**30
    check_run(experiment, wan, (21, 30, 52), 1)
