"""The video DiT: shapes, symmetries, initial state, gradients, swapping the attention method."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla.attention import (
    AttentionContext,
    AttentionMethod,
    FullConfig,
    SLAConfig,
    attention_config_class,
    available_attention,
)
from sla.diffusion import FlowMatching, sample
from sla.models.dit import (
    DiTConfig,
    VideoDiT,
    patchify,
    position_embedding,
    rotary_embedding,
    rotate,
    timestep_embedding,
    unpatchify,
)
from sla.models.schedulers import build_scheduler
from sla.models.testing import open_branches, tiny_dit_config
from sla.models.text import TrainedTextEncoder, TrainedTextEncoderConfig

SLA = SLAConfig(critical=0.25, negligible=0.25, block_q=8, block_kv=8)


def build(attention=None, **changes) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(replace(tiny_dit_config(), **changes), attention or FullConfig())
    open_branches(model)
    return model


def inputs(batch=2, size=(2, 8, 8), text_tokens=5, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, channels, *size, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    text = torch.randn(batch, text_tokens, 16, generator=generator)
    mask = torch.ones(batch, text_tokens, dtype=torch.bool)
    mask[-1, 3:] = False
    return latents, timestep, text, mask


# --- patches and positions -------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(1, 4, 4), (1, 2, 2), (2, 2, 4), (1, 1, 1)])
def test_unpatchify_inverts_patchify(patch):
    latents = torch.randn(2, 3, 4, 8, 12)
    tokens = patchify(latents, patch)
    grid = (4 // patch[0], 8 // patch[1], 12 // patch[2])
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], 3 * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(tokens, grid, patch), latents)


def test_patch_embedding_is_a_strided_conv3d():
    latents, patch = torch.randn(2, 3, 4, 8, 12), (2, 2, 4)
    conv = nn.Conv3d(3, 10, patch, stride=patch)
    linear = F.linear(patchify(latents, patch), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(linear, conv(latents).flatten(2).transpose(1, 2))


def test_rotary_embedding_is_wans():
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    cos, sin = wan.WanRotaryPosEmbed(64, (1, 2, 2), 128)(torch.empty(1, 16, 3, 8, 12))
    ours = rotary_embedding((3, 4, 6), 64, 10000.0)
    torch.testing.assert_close(ours[0][:, 0], cos[0, :, 0, 0::2].float())
    torch.testing.assert_close(ours[1][:, 0], sin[0, :, 0, 1::2].float())


def test_timestep_embedding_is_wans():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timestep = torch.tensor([0.0, 0.5, 999.0])
    expected = embeddings.get_timestep_embedding(
        timestep, 32, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(timestep_embedding(timestep, 32), expected)


def test_scores_depend_on_relative_positions_only():
    grid = (3, 4, 5)
    query, key = torch.randn(2, 1, 60, 2, 24, dtype=torch.float64).unbind(0)

    def scores(origin):
        rotary = rotary_embedding(grid, 24, 10000.0, origin=origin)
        q, k = rotate(query, rotary), rotate(key, rotary)
        return torch.einsum("bnhd,bmhd->bhnm", q, k)

    here = scores((0, 0, 0))
    torch.testing.assert_close(scores((7, 2, 11)), here, atol=1e-5, rtol=1e-5)
    # And they do depend on them.
    plain = torch.einsum("bnhd,bmhd->bhnm", query, key)
    assert (here - plain).abs().max() > 0.1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_has_positions(axis):
    grid = [1, 1, 1]
    grid[axis] = 5
    cos, sin = rotary_embedding((grid[0], grid[1], grid[2]), 16, 10000.0)
    assert len(torch.unique(torch.cat((cos, sin), -1), dim=0)) == 5


@pytest.mark.parametrize("dim", [18, 32, 64])
def test_absolute_positions_differ_everywhere(dim):
    positions = position_embedding((3, 4, 5), dim)
    assert positions.shape == (60, dim)
    assert torch.cdist(positions, positions).fill_diagonal_(9.0).min() > 0.1
    # A larger grid extends a smaller one.
    larger = position_embedding((3, 6, 8), dim).unflatten(0, (3, 6, 8))
    assert torch.equal(larger[:, :4, :5].flatten(0, 2), positions)


# --- shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 4, 4), (2, 8, 8), (3, 6, 10), (5, 2, 14)])
@pytest.mark.parametrize("attention", [FullConfig(), SLA], ids=lambda c: c.name)
def test_any_size_that_the_patch_divides(size, attention):
    latents, *rest = inputs(size=size)
    output = build(attention)(latents, *rest)
    assert output.shape == latents.shape
    assert output.dtype == latents.dtype
    assert output.isfinite().all()


def test_patches_over_frames():
    latents, *rest = inputs(size=(4, 8, 12))
    assert build(patch_size=(2, 4, 4))(latents, *rest).shape == latents.shape


@pytest.mark.parametrize(
    ("size", "name"), [((2, 7, 8), "height"), ((2, 8, 9), "width"), ((3, 8, 8), "frames")]
)
def test_size_that_the_patch_does_not_divide(size, name):
    latents, *rest = inputs(size=size)
    with pytest.raises(ValueError, match=rf"{name} of the latents is \d+; .*multiple of 2"):
        build(patch_size=(2, 2, 2))(latents, *rest)


def test_bad_inputs_are_named():
    model = build()
    latents, timestep, text, mask = inputs()
    with pytest.raises(ValueError, match="latents have shape"):
        model(latents[:, :2], timestep, text, mask)
    with pytest.raises(ValueError, match="timestep has shape"):
        model(latents, timestep[:1], text, mask)
    with pytest.raises(ValueError, match="text has shape"):
        model(latents, timestep, text[..., :8], mask)
    with pytest.raises(ValueError, match="text_mask has shape"):
        model(latents, timestep, text, mask[:, :2])
    with pytest.raises(TypeError, match=r"text_mask is torch\.float32"):
        model(latents, timestep, text, mask.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 190}, "hidden_size is 190; it must be a multiple of num_heads"),
        ({"hidden_size": 8, "num_heads": 2}, "hidden_size / num_heads is 4"),
        ({"patch_size": (4, 4)}, "patch_size is"),
        ({"patch_size": (1, 0, 4)}, "patch_size is"),
        ({"depth": 0}, "depth is 0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio is 0\.0"),
        ({"time_frequencies": 31}, "time_frequencies is 31"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**changes)


def test_default_fits_the_weights_budget():
    with torch.device("meta"):
        modules = (
            VideoDiT(DiTConfig(), FullConfig()),
            TrainedTextEncoder(TrainedTextEncoderConfig()),
        )
    assert sum(p.numel() for m in modules for p in m.parameters()) <= 4_150_000


# --- symmetries ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [FullConfig(), SLA], ids=lambda c: c.name)
def test_samples_do_not_see_each_other(attention):
    model, batch = build(attention), inputs(batch=3)
    together = model(*batch)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(*(t[order] for t in batch)), together[order])
    alone = torch.cat([model(*(t[i : i + 1] for t in batch)) for i in range(3)])
    torch.testing.assert_close(alone, together)


def test_masked_text_changes_nothing():
    model = build()
    latents, timestep, text, mask = inputs()
    expected = model(latents, timestep, text, mask)
    longer = torch.cat((text, torch.full((2, 3, 16), 50.0)), dim=1)
    longer_mask = F.pad(mask, (0, 3), value=False)
    torch.testing.assert_close(model(latents, timestep, longer, longer_mask), expected)
    # Text that is not masked does change it.
    assert (model(latents, timestep, text + 1.0, mask) - expected).abs().max() > 1e-3


def test_output_depends_on_timestep_and_distant_tokens():
    model = build()
    latents, timestep, text, mask = inputs()
    expected = model(latents, timestep, text, mask)
    assert (model(latents, timestep * 0.5, text, mask) - expected).abs().max() > 1e-3
    moved = latents.clone()
    moved[:, :, -1, -2:, -2:] += 3.0
    change = model(moved, timestep, text, mask) - expected
    assert change[:, :, 0, :2, :2].abs().max() > 1e-4


# --- initial state and gradients -------------------------------------------------------------


def test_starts_at_zero_and_every_parameter_learns():
    torch.manual_seed(0)
    model = VideoDiT(tiny_dit_config(), FullConfig())
    batch = inputs()
    assert torch.count_nonzero(model(*batch)) == 0
    # Closed branches open one after the other: the head, then the gates, then what they gate.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.randn_like(batch[0])
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(*batch), target).backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert without == []


@pytest.mark.parametrize("attention", [FullConfig(), SLA], ids=lambda c: c.name)
def test_checkpointing_changes_nothing(attention):
    model = build(attention)
    batch = inputs()
    results = []
    for enabled in (False, True):
        model.activation_checkpointing = enabled
        model.zero_grad()
        output = model(*batch)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_checkpointing_recomputes_blocks():
    model = build()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing = True
    model(*inputs()).sum().backward()
    assert len(calls) == 2


def test_overfits_one_clip():
    torch.manual_seed(0)
    model = VideoDiT(tiny_dit_config(), FullConfig())
    flow = FlowMatching(shift=1.0, timesteps="uniform")
    _, _, text, mask = inputs(batch=8)
    # A square that moves over a dark ground.
    clip = torch.full((1, 3, 4, 8, 8), -1.0)
    for frame in range(4):
        clip[:, :, frame, 2:5, frame : frame + 3] = 1.0
    clip = clip.expand(8, -1, -1, -1, -1)
    text, mask = text[:1].expand(8, -1, -1), mask[:1].expand(8, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=400)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(400):
        noise = torch.randn(clip.shape, generator=generator)
        sigma = flow.sample_sigma((torch.arange(8) + torch.rand(8, generator=generator)) / 8)
        noisy = flow.interpolate(clip, noise, sigma)
        velocity = model(noisy, flow.timestep(sigma), text, mask)
        loss = flow.loss(velocity, flow.target(clip, noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert sum(losses[-10:]) / 10 < 0.15
    noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    scheduler = build_scheduler("euler", shift=1.0, steps=8)
    video = sample(model, noise, text[:2], mask[:2], scheduler=scheduler)
    # The dark ground alone would be 0.28 away.
    assert (video - clip[:2]).abs().mean() < 0.1
    assert torch.equal(video.sign(), clip[:2].sign())


def test_compiles_without_graph_breaks():
    model, batch = build(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), model(*batch))
    model.activation_checkpointing = True
    torch.testing.assert_close(compiled(*batch), model(*batch))


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_bfloat16(mode):
    model, batch = build(), inputs()
    expected = model(*batch)
    if mode == "cast":
        model.to(torch.bfloat16)
        output = model(*batch)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(*batch)
    assert output.dtype == torch.float32  # that of the latents
    error = (output - expected).norm() / expected.norm()
    assert 0 < error < 0.05


# --- attention methods -----------------------------------------------------------------------


def test_set_attention_round_trip_restores_every_bit():
    model, batch = build(), inputs()
    before = model(*batch)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    model.set_attention(SLA)
    assert [m.config.name for m in model.attention_modules()] == ["sla", "sla"]
    assert [m.layer_index for m in model.attention_modules()] == [0, 1]
    assert model.attention_config == SLA
    assert (model(*batch) - before).abs().max() > 1e-4
    new = {name for name in model.state_dict() if name not in weights}
    assert new == {
        f"blocks.{i}.self_attention.method.proj_l.{part}"
        for i in range(2)
        for part in ("weight", "bias")
    }
    model.set_attention(FullConfig())
    assert torch.equal(model(*batch), before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("name", available_attention())
def test_full_attention_comes_back_from_any_method(name):
    model, batch = build(), inputs()
    before = model(*batch)
    small = {"block_q": 8, "block_kv": 8, "critical": 0.25, "cube": (2, 2, 2)}
    config_class = attention_config_class(name)
    fields = {field.name for field in dataclasses.fields(config_class)}
    model.set_attention(config_class(**{k: v for k, v in small.items() if k in fields}))
    assert model(*batch).isfinite().all()
    assert {m.config.name for m in model.attention_modules()} == {name}
    model.set_attention(FullConfig())
    assert torch.equal(model(*batch), before)


def test_set_attention_follows_mode_and_leaves_a_failed_swap_undone():
    model = build().eval()
    model.set_attention(SLA)
    assert not any(m.training for m in model.attention_modules())
    methods = list(model.attention_modules())
    with pytest.raises(ValueError, match="no_such"):
        model.set_attention(replace(FullConfig(), name="no_such"))
    assert list(model.attention_modules()) == methods
    assert model.attention_config == SLA


def test_full_density_sla_is_full_attention():
    model, batch = build(), inputs()
    expected = model(*batch)
    model.set_attention(replace(SLA, critical=1.0, negligible=0.0))
    torch.testing.assert_close(model(*batch), expected, atol=1e-5, rtol=1e-5)


def test_methods_get_views_and_context():
    model = build()
    seen: list[tuple[Tensor, AttentionContext]] = []
    for method in model.attention_modules():
        assert isinstance(method, AttentionMethod)
        method.register_forward_pre_hook(lambda _, args: seen.append((args[2], args[3])))
    latents, timestep, text, mask = inputs(size=(3, 4, 8))
    model(latents, timestep, text, mask)
    assert len(seen) == 2
    for value, context in seen:
        assert value.shape == (2, 2, 24, 16)
        assert value.transpose(1, 2).is_contiguous()
        assert context.grid == (3, 2, 4)
        assert context.timestep is timestep
        assert context.hidden_states.shape == (2, 24, 32)
        assert context.always_critical == 0
    assert not torch.equal(seen[0][1].hidden_states, seen[1][1].hidden_states)
