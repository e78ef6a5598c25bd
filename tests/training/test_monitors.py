"""What is logged beside the losses, against plain definitions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sla.attention import FullConfig, SLAConfig, SpargeConfig, SparseOnlyConfig
from sla.diffusion.flow_matching import FlowMatching
from sla.models.diffusers_model import DiffusersVideoModel
from sla.models.dit import VideoDiT
from sla.models.testing import open_branches, tiny_dit_config, tiny_text_config
from sla.models.text import TrainedTextEncoder
from sla.models.video_model import VideoModel
from sla.models.wan import build_wan
from sla.training.callbacks import _peak_flops
from sla.training.config import OptimConfig
from sla.training.model_flops import forward_flops
from sla.training.module import DiffusionModule
from sla.training.monitors import (
    GradientNorms,
    LossByTimestep,
    RoutingMonitor,
    card,
    total_norm,
)

GRID = (3, 4, 6)
SLA = SLAConfig(critical=0.2, block_q=8, block_kv=8, proj_init="identity")


def dit(attention: Any = None) -> VideoModel:
    model = VideoDiT(tiny_dit_config(), attention or FullConfig())
    open_branches(model)
    return model


def inputs(model: VideoModel, text_tokens: int) -> tuple[Tensor, ...]:
    channels, width, patch = (3, 16, 2) if isinstance(model, VideoDiT) else (4, 16, 2)
    latents = torch.randn(1, channels, GRID[0], patch * GRID[1], patch * GRID[2])
    mask = torch.ones(1, text_tokens, dtype=torch.bool)
    return latents, torch.tensor([500.0]), torch.randn(1, text_tokens, width), mask


def module_of(model: VideoModel) -> DiffusionModule:
    """A module that keeps what it is asked to log."""
    module = DiffusionModule(
        model,
        TrainedTextEncoder(tiny_text_config()),
        FlowMatching(shift=3.0, timesteps="uniform"),
        OptimConfig(),
        seed=0,
        max_steps=1,
        val_strata=2,
    )
    module.logged = {}  # type: ignore[assignment]
    module.log = lambda name, value, **_: module.logged.update({name: float(value)})  # type: ignore
    return module


@pytest.mark.parametrize(
    "model", [dit(), DiffusersVideoModel(build_wan("tiny"), text_tokens=5)], ids=["dit", "wan"]
)
def test_operations_are_those_that_pytorch_counts(model: VideoModel) -> None:
    """PyTorch's counter over the blocks alone: what lies around them is not counted by us."""
    counted = 0.0
    batch = inputs(model, 5)

    def before(*_: Any) -> None:
        counter.__enter__()

    def after(*_: Any) -> None:
        nonlocal counted
        counter.__exit__(None, None, None)
        counted += counter.get_total_flops()

    handles = []
    for block in model.repeated_blocks():
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    counter = FlopCounterMode(display=False)
    # The CPU's fused attention is no product that the counter knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*batch)
    assert forward_flops(model, GRID, 5) == counted


def test_operations_of_a_method_are_its_own() -> None:
    exact, sparse, unknown = (
        dit(c) for c in (FullConfig(), SLA, SpargeConfig(block_q=8, block_kv=8))
    )
    difference = forward_flops(exact, GRID, 5) - forward_flops(sparse, GRID, 5)
    wanted = sum(m.flops(GRID) for m in exact.attention_modules()) - sum(
        m.flops(GRID) for m in sparse.attention_modules()
    )
    assert difference == wanted
    assert forward_flops(unknown, GRID, 5) <= forward_flops(exact, GRID, 5)


def test_the_norms_of_the_parts_are_the_whole_norm() -> None:
    module = module_of(dit(SLA))
    batch = inputs(module.model, 5)
    module.model(*batch).square().mean().backward()
    monitor = GradientNorms(every=2)
    monitor.on_before_optimizer_step(SimpleNamespace(global_step=0), module, None)  # type: ignore
    assert not module.logged, "only every second step"
    monitor.on_before_optimizer_step(SimpleNamespace(global_step=1), module, None)  # type: ignore
    parts = {"attention_method", "self_attention", "cross_attention", "mlp", "rest"}
    assert set(module.logged) == {f"gradient_norm/{part}" for part in parts}
    whole = total_norm([p.grad for p in module.parameters() if p.grad is not None])
    together = sum(value**2 for value in module.logged.values()) ** 0.5
    assert together == pytest.approx(whole.item(), rel=1e-5)
    own = [p.grad for m in module.model.attention_modules() for p in m.parameters()]
    assert module.logged["gradient_norm/attention_method"] == pytest.approx(total_norm(own).item())


def test_losses_go_to_the_stratum_of_their_timestep() -> None:
    module, monitor = module_of(dit()), LossByTimestep(strata=2, every=2)
    first = {"u": torch.tensor([0.1, 0.9]), "losses": torch.tensor([1.0, 2.0])}
    second = {"u": torch.tensor([0.4, 0.3]), "losses": torch.tensor([3.0, 5.0])}
    monitor.on_train_batch_end(None, module, first, None, 0)  # type: ignore[arg-type]
    assert not module.logged
    monitor.on_train_batch_end(None, module, second, None, 1)  # type: ignore[arg-type]
    assert module.logged == {"train/loss_stratum_0": 3.0, "train/loss_stratum_1": 2.0}
    module.logged.clear()
    for index in (2, 3):  # sums start anew, and a stratum without samples has no point
        monitor.on_train_batch_end(None, module, second, None, index)  # type: ignore[arg-type]
    assert module.logged == {"train/loss_stratum_0": 4.0}


def validate(monitor: RoutingMonitor, module: DiffusionModule, batch: tuple[Tensor, ...]) -> None:
    trainer: Any = SimpleNamespace(sanity_checking=False)
    monitor.on_validation_batch_start(trainer, module, None, 0)
    with torch.no_grad():
        module.model(*batch)
    monitor.on_validation_batch_end(trainer, module, None, None, 0)


def test_overlap_is_of_critical_blocks_between_validations() -> None:
    module, monitor = module_of(dit(SLA)), RoutingMonitor()
    batch = inputs(module.model, 5)
    validate(monitor, module, batch)
    assert set(module.logged) == {"branches/linear_over_sparse"}, "nothing to compare with yet"
    validate(monitor, module, batch)
    assert module.logged["routing/overlap"] == 1.0
    with torch.no_grad():
        for block in module.model.repeated_blocks():
            block.self_attention.query.weight.neg_()  # type: ignore[union-attr]
    validate(monitor, module, batch)
    assert 0.0 <= module.logged["routing/overlap"] < 1.0


def test_the_linear_branch_is_measured_against_the_sparse_one() -> None:
    module, monitor = module_of(dit(SLA)), RoutingMonitor()
    batch = inputs(module.model, 5)
    validate(monitor, module, batch)
    ratio = module.logged["branches/linear_over_sparse"]
    assert ratio > 0.01
    with torch.no_grad():
        for method in module.model.attention_modules():
            method.proj_l.weight.mul_(2.0)  # type: ignore[union-attr]
            method.proj_l.bias.mul_(2.0)  # type: ignore[union-attr]
    validate(monitor, module, batch)
    assert module.logged["branches/linear_over_sparse"] > 1.5 * ratio
    # Sparse attention alone has no second branch.
    module.model.set_attention(SparseOnlyConfig(critical=0.2, block_q=8, block_kv=8))
    validate(RoutingMonitor(), module, batch)
    assert module.logged["branches/linear_over_sparse"] < 1e-6


def test_hooks_go_with_the_batch_and_after_an_error() -> None:
    module, monitor = module_of(dit(SLA)), RoutingMonitor()
    trainer: Any = SimpleNamespace(sanity_checking=False)
    monitor.on_validation_batch_start(trainer, module, None, 0)
    monitor.on_exception(trainer, module, RuntimeError())
    assert not any(m._forward_hooks for m in module.model.attention_modules())


def test_the_card_holds_every_value() -> None:
    text = card({"optim": {"learning_rate": 0.1, "schedule": "cosine"}, "run": {"name": "x"}})
    assert text.splitlines()[2:] == [
        "| optim | learning_rate | `0.1` |",
        "| optim | schedule | `cosine` |",
        "| run | name | `x` |",
    ]


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H200", "32-true", 66.9e12),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
    ],
)
def test_peak_of_a_gpu(
    name: str, precision: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    trainer: Any = SimpleNamespace(precision=precision)
    assert _peak_flops(trainer, torch.device("cuda", 0)) == expected
    assert _peak_flops(trainer, torch.device("cpu")) is None
