"""Tile order inside the video DiT: another order of the tokens, the same model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sla.attention import (
    AttentionConfig,
    AttentionContext,
    FullConfig,
    LinearOnlyConfig,
    SLAConfig,
    SparseOnlyConfig,
    attention_config_class,
    available_attention,
)
from sla.attention.token_order import tile_order
from sla.config import ConfigError, load_experiment, to_dict
from sla.models.checkpoint import load_model, load_weights, read_header, save_model
from sla.models.dit import VideoDiT, patchify, rotary_embedding
from sla.models.testing import open_branches, tiny_dit_config

TILE = (2, 2, 2)
SIZE = (4, 8, 12)  # a grid of 4 x 4 x 6 tokens
RAGGED = (3, 6, 10)  # of 3 x 3 x 5
SLA = SLAConfig(critical=0.25, negligible=0.25, block_q=8, block_kv=8, proj_init="identity")
SPARSE = SparseOnlyConfig(critical=0.25, block_q=8, block_kv=8)


def build(attention: AttentionConfig, **changes) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(replace(tiny_dit_config(), **changes), attention)
    open_branches(model)
    return model


def inputs(size=SIZE, batch=2):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 3, *size, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    text = torch.randn(batch, 5, 16, generator=generator)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    return latents, timestep, text, mask


def run(model: VideoDiT, batch):
    """Output, gradient of the latents, gradients of the parameters."""
    model.zero_grad()
    latents = batch[0].clone().requires_grad_()
    output = model(latents, *batch[1:])
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), latents.grad, grads


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=1e-4)
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        scale = grad.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(found[2][name], grad, atol=tolerance * scale, rtol=1e-4)


@pytest.mark.parametrize("size", [SIZE, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("tile", [TILE, (4, 4, 4), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("attention", [FullConfig(), LinearOnlyConfig()], ids=lambda c: c.name)
def test_methods_without_blocks_do_not_see_the_order(attention, tile, size):
    batch = inputs(size)
    expected = run(build(attention), batch)
    assert_same(run(build(replace(attention, tile=tile)), batch), expected)


def test_positions_move_with_their_tokens():
    """What is tested above is not void: with positions left behind the model is another."""
    batch, model = inputs(), build(FullConfig(tile=TILE))
    expected = model(*batch)

    def leave_behind(block, args):
        hidden, time, text, mask, _, context = args
        rotary = rotary_embedding(context.grid, model.config.head_dim, model.config.rope_theta)
        return hidden, time, text, mask, rotary, context

    model.blocks[0].register_forward_pre_hook(leave_behind)
    assert (model(*batch) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("attention", [SLA, SPARSE], ids=lambda c: c.name)
def test_block_methods_differ_at_low_density_and_agree_at_full(attention):
    batch = inputs()
    raster = build(attention)(*batch)
    tiled = build(replace(attention, tile=TILE))(*batch)
    assert (tiled - raster).norm() > 1e-2 * raster.norm()

    full = replace(attention, critical=1.0)
    if isinstance(full, SLAConfig):
        full = replace(full, negligible=0.0)
    expected = run(build(full), batch)
    assert_same(run(build(replace(full, tile=TILE)), batch), expected)


def test_blocks_hold_whole_tiles():
    """Query, key, value and hidden states of the methods are those of the raster model, in tile
    order: the first block of eight is the first tile."""
    seen = []
    for tile in (None, TILE):
        model = build(FullConfig(tile=tile))
        method = next(model.attention_modules())
        method.register_forward_pre_hook(lambda _, args: seen.append(args))
        model(*inputs())
    order = tile_order((4, 4, 6), TILE)
    assert order[:8].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    raster, tiled = seen
    for plain, moved in zip(raster[:3], tiled[:3], strict=True):
        torch.testing.assert_close(moved, plain[:, :, order], atol=1e-5, rtol=1e-5)
    contexts: list[AttentionContext] = [raster[3], tiled[3]]
    assert [c.tile for c in contexts] == [None, TILE]
    assert [c.grid for c in contexts] == [(4, 4, 6), (4, 4, 6)]
    torch.testing.assert_close(
        contexts[1].hidden_states, contexts[0].hidden_states[:, order], atol=1e-5, rtol=1e-5
    )


def test_block_sparse_attention_over_tiles_is_that_of_a_permuted_video():
    """Raster order on a video whose tokens were permuted by hand, with their positions."""
    batch = inputs()
    order = tile_order((4, 4, 6), TILE)
    tiled, raster = build(replace(SPARSE, tile=TILE)), build(SPARSE)
    expected = patchify(tiled(*batch), tiled.config.patch_size)[:, order]

    def permute(block, args):
        hidden, time, text, mask, rotary, context = args
        hidden = hidden[:, order] if block is raster.blocks[0] else hidden
        return hidden, time, text, mask, (rotary[0][order], rotary[1][order]), context

    for block in raster.blocks:
        block.register_forward_pre_hook(permute)
    found = patchify(raster(*batch), raster.config.patch_size)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_off_calls_no_reordering(monkeypatch):
    def fail(*_):
        raise AssertionError("reordered")

    batch = inputs()
    model = build(SLA)
    expected = model(*batch)
    monkeypatch.setattr("sla.models.dit.tile_order", fail)
    monkeypatch.setattr("sla.models.dit.raster_order", fail)
    assert torch.equal(model(*batch), expected)
    with pytest.raises(AssertionError, match="reordered"):
        build(replace(SLA, tile=TILE))(*batch)


def test_set_attention_changes_the_order_and_no_weights():
    batch, model = inputs(), build(SPARSE)
    raster = model(*batch)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    model.set_attention(replace(SPARSE, tile=TILE))
    assert not torch.equal(model(*batch), raster)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    model.set_attention(SPARSE)
    assert torch.equal(model(*batch), raster)


def test_checkpointing_changes_nothing():
    model, batch = build(replace(SLA, tile=TILE)), inputs()
    plain = run(model, batch)
    model.activation_checkpointing = True
    recomputed = run(model, batch)
    assert torch.equal(plain[0], recomputed[0])
    assert torch.equal(plain[1], recomputed[1])
    assert all(torch.equal(grad, recomputed[2][name]) for name, grad in plain[2].items())


def test_compiles_with_gradients_and_without_graph_breaks():
    model, batch = build(FullConfig(tile=TILE), depth=1), inputs()
    expected = run(model, batch)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same(run(model, batch), expected)


def test_compiles_for_grids_of_any_size():
    """The second grid makes sizes symbolic; no order of another grid is used."""
    model = build(FullConfig(tile=TILE), depth=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in (SIZE, RAGGED):
        batch = inputs(size)
        torch.testing.assert_close(compiled(*batch), model(*batch), atol=1e-5, rtol=1e-5)


def test_a_model_sampled_in_inference_mode_can_be_trained():
    batch, model = inputs((4, 8, 14)), build(replace(SLA, tile=TILE))
    with torch.inference_mode():
        model(*batch)
    assert all(grad.isfinite().all() for grad in run(model, batch)[2].values())


def test_a_model_file_keeps_the_order(tmp_path):
    batch, model = inputs(), build(replace(SLA, tile=TILE))
    save_model(tmp_path, model)
    assert read_header(tmp_path).attention == model.attention_config
    loaded = load_model(tmp_path).model
    assert loaded.attention_config.tile == TILE
    assert torch.equal(loaded(*batch), model(*batch))
    # Another order is another number of the same method.
    other = build(SLA)
    load_weights(tmp_path, other)
    assert other.attention_config.tile is None


def test_the_option_is_one_word_away():
    path = "configs/finetune/demo.yaml"
    assert load_experiment(path).attention.tile is None
    for name in ("sla", "full", "linear_only"):
        experiment = load_experiment(path, [f"attention.name={name}", "attention.tile=[4,4,4]"])
        assert experiment.attention.tile == (4, 4, 4)
        assert to_dict(experiment)["attention"]["tile"] == [4, 4, 4]
    assert load_experiment(path, ["attention.tile=null"]).attention.tile is None
    for wrong in ("[4,4]", "[4,4,0]", "[4,4.5,4]", "[4,x,4]", "4", "yes"):
        with pytest.raises(ConfigError, match=r"attention\.tile"):
            load_experiment(path, [f"attention.tile={wrong}"])


@pytest.mark.parametrize("name", available_attention())
def test_every_method_takes_the_order(name):
    """At full density the order changes nothing; with cubes and partitions of its own, nothing at
    any density: these are found in either order."""
    numbers: dict[str, dict[str, object]] = {
        "sparge": {"critical": 1.0, "selection": "density", "block_q": 8, "block_kv": 8},
        "vsa": {"cube": (2, 2, 2), "critical": 0.25},
        "vmoba": {"temporal": 1, "spatial": (2, 3), "spatio_temporal": (2, 2, 3)},
        "sla": {"critical": 1.0, "negligible": 0.0},
        "full": {},
        "linear_only": {},
    }
    given = numbers.get(name, {"critical": 1.0, "block_q": 8, "block_kv": 8})
    attention = attention_config_class(name)(**given)
    batch = inputs()
    expected = build(attention)(*batch)
    for tile in (TILE, (2, 3, 5)):
        found = build(replace(attention, tile=tile))(*batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
