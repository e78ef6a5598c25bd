"""The rest of a transformer, made faster: same numbers, same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from sla_kernels.testing import check_rounding
from torch import Tensor, nn

from sla.attention import AttentionConfig, FullConfig, SLAConfig
from sla.models.diffusers_model import DiffusersVideoModel
from sla.models.fusion import (
    CUDAGraphed,
    FusedGELU,
    compile_blocks,
    fuse_feed_forward,
    linear_gelu,
)
from sla.models.injection import apply_attention
from sla.models.wan import build_wan, rotate
from sla.models.wan_sizes import WAN_CONFIGS


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    latents = torch.randn(2, 4, 3, 8, 12, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    return latents, torch.tensor([900.0, 20.0]), text, mask


def build(**options: Any) -> DiffusersVideoModel:
    return DiffusersVideoModel(build_wan("tiny"), text_tokens=7, **options).eval()


@torch.no_grad()
def test_fusing_changes_neither_outputs_nor_names() -> None:
    model, batch = build(), inputs()
    before, names = model(*batch), list(model.state_dict())
    assert fuse_feed_forward(model) == 2
    assert fuse_feed_forward(model) == 0, "done once"
    torch.testing.assert_close(model(*batch), before)
    assert list(model.state_dict()) == names


def test_gradients_pass_through_the_fused_layer() -> None:
    model, batch = build(), inputs()
    model(*batch).square().mean().backward()
    before = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    fuse_feed_forward(model)
    model(*batch).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], msg=name)


def test_the_operator_is_a_linear_layer_and_the_tanh_gelu() -> None:
    layer = nn.Linear(8, 12)
    x = torch.randn(2, 3, 8)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    expected = nn.functional.gelu(layer(x).detach(), approximate="tanh")
    torch.testing.assert_close(linear_gelu(x, weight, bias), expected)
    torch.library.opcheck(linear_gelu, (x, weight, bias))


@torch.no_grad()
def test_a_layer_that_is_not_plain_is_called() -> None:
    """LoRA puts another module in the linear layer's place."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = Doubled(8, 12)
    x = torch.randn(3, 8)
    expected = nn.functional.gelu(layer(x), approximate="tanh")
    torch.testing.assert_close(FusedGELU(layer)(x), expected)


@torch.no_grad()
def test_compiled_blocks_give_the_same() -> None:
    model, batch = build(), inputs()
    before = model(*batch)
    fuse_feed_forward(model)
    compile_blocks(model.repeated_blocks(), fullgraph=True)
    torch.testing.assert_close(model(*batch), before, atol=1e-5, rtol=1e-5)


CONFIGS = [FullConfig(), SLAConfig(block_q=16, block_kv=16, critical=0.2)]


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", CONFIGS, ids=["full", "sla"])
def test_compiled_blocks_give_the_same_gradients(config: AttentionConfig, recomputed: bool) -> None:
    """Of every parameter: a compiler's mistake in one of them is silent."""

    def gradients(compiled: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()
        model = build(attention_config=config).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # Proj starts at zero
            for name, parameter in model.named_parameters():
                if "processor" in name:
                    parameter.normal_(std=0.1, generator=generator)
        model.activation_checkpointing = recomputed
        if compiled:
            compile_blocks(model.repeated_blocks())
        model(*inputs()).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [FullConfig(), SLAConfig()], ids=["full", "sla"])
def test_compiled_gradients_of_a_real_layer_on_a_gpu(config: AttentionConfig) -> None:
    """Inductor's reductions for tall tensors are others than for the tiny model's."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    sizes = {**WAN_CONFIGS["1.3b"], "num_layers": 2}
    with torch.random.fork_rng(), torch.device("cuda"):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(**sizes)
    latents, text = draw(1, 16, 9, 32, 52), draw(1, 512, sizes["text_dim"])
    mask, target = torch.ones(1, 512, dtype=torch.bool, device="cuda"), draw(*latents.shape)

    def gradients(*, bf16: bool, compiled: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()
        transformer.zero_grad()
        model = DiffusersVideoModel(transformer, text_tokens=512, attention_config=None)
        if compiled:
            compile_blocks(model.repeated_blocks())
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            velocity = model(latents, torch.tensor([500.0], device="cuda"), text, mask)
        (velocity.float() - target).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    apply_attention(transformer, config)
    transformer.to("cuda")
    exact = gradients(bf16=False, compiled=False)
    eager = gradients(bf16=True, compiled=False)
    compiled = gradients(bf16=True, compiled=True)
    assert compiled.keys() == exact.keys()
    large = {name: gradient for name, gradient in exact.items() if gradient.norm() > 1e-6}
    check_rounding({name: compiled[name] for name in large}, eager, large)


def test_rotation_is_that_of_complex_numbers() -> None:
    x = torch.randn(2, 5, 3, 8)
    angle = torch.randn(1, 5, 1, 4)
    cos, sin = (f(angle).repeat_interleave(2, dim=-1) for f in (torch.cos, torch.sin))
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(rotate(x, cos, sin), expected)


def test_on_a_cpu_nothing_is_captured() -> None:
    calls = []
    function = CUDAGraphed(lambda x: calls.append(1) or x + 1)
    x = torch.zeros(2)
    for _ in range(2):
        assert torch.equal(function(x), x + 1)
    assert len(calls) == 2


@torch.no_grad()
def test_text_that_is_padding_has_no_say() -> None:
    """As in Wan's pipeline: zeros after the caption, whatever the encoder left there."""
    model, (latents, timestep, text, mask) = build(attention_config=SLAConfig()), inputs()
    before = model(latents, timestep, text, mask)
    changed = text.masked_fill(~mask.unsqueeze(-1), 9.0)
    assert torch.equal(model(latents, timestep, changed, mask), before)
    short = model(latents[1:], timestep[1:], text[1:, :2], mask[1:, :2])
    torch.testing.assert_close(short, before[1:])


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:, :3], r"latents have shape .*\(B, 4, T, H, W\)"),
        (0, lambda x: x[..., :11], "width of the latents is 11; it must be a positive multiple"),
        (1, lambda t: t[:1], r"timestep has shape \(1,\); it must be \(2,\)"),
        (2, lambda t: t[..., :15], r"text has shape .*it must be \(2, L, 16\)"),
        (2, lambda t: torch.cat((t, t), 1), "text has 10 tokens; it may have at most 7"),
        (3, lambda m: m[:, :4], r"text_mask has shape \(2, 4\)"),
        (3, lambda m: m.float(), "text_mask is torch.float32"),
    ],
)
def test_bad_inputs_are_named(place: int, change: Any, message: str) -> None:
    batch = list(inputs())
    batch[place] = change(batch[place])
    with pytest.raises((ValueError, TypeError), match=message):
        build()(*batch)
