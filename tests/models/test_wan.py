"""Our methods in a tiny Wan of diffusers: what it computes, and where it can be used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from sla.attention import (
    AttentionContext,
    FullConfig,
    LinearOnlyConfig,
    SLAConfig,
    SparseOnlyConfig,
    UnsupportedAttentionError,
    VSAConfig,
    attention_config_from_dict,
    available_attention,
)
from sla.attention.token_order import tile_order
from sla.models.injection import apply_attention, attention_modules, remove_attention
from sla.models.pretrained import load_model
from sla.models.testing import open_branches, tiny_wan_autoencoder
from sla.models.wan import WAN_CONFIGS, build_wan

GRID = (3, 4, 6)


def inputs(batch: int = 2, frames: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text of the tiny Wan."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, frames, 8, 12, generator=generator)
    timestep = torch.linspace(900, 100, batch)
    return latents, timestep, torch.randn(batch, 7, 16, generator=generator)


def run(model: Any, *arguments: Tensor) -> Tensor:
    output: Tensor = model(*(arguments or inputs())).sample
    return output


def record(model: Any) -> list[AttentionContext]:
    """The contexts that the methods get from here on, layer after layer."""
    seen: list[AttentionContext] = []
    for method in attention_modules(model):
        method.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_full_attention_is_the_original(dtype: torch.dtype, fused: bool) -> None:
    model = build_wan("tiny", dtype)
    if fused:
        model.fuse_qkv_projections()
    batch = [tensor.to(dtype) for tensor in inputs()]
    expected = run(model, *batch)
    cross = model.blocks[0].attn2.processor
    assert apply_attention(model, FullConfig()) is model
    assert torch.equal(run(model, *batch), expected)
    assert model.blocks[0].attn2.processor is cross
    expected.sum().backward()
    # fused ones are of another layer, to_qkv
    layer = model.blocks[1].attn1.to_qkv if fused else model.blocks[1].attn1.to_k
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    run(model, *batch).sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradient)


@pytest.mark.parametrize("name", available_attention())
def test_every_method_goes_through(name: str) -> None:
    model = build_wan("tiny")
    dense = run(model)
    apply_attention(model, attention_config_from_dict({"name": name}))
    methods = list(attention_modules(model))
    assert [method.layer_index for method in methods] == [0, 1]
    for method in methods:
        open_branches(method)
    output = run(model)
    assert output.shape == dense.shape
    assert output.isfinite().all()
    if name not in ("full", "sparge", "vmoba"):  # so few tokens leave those dense
        assert (output - dense).abs().max() > 1e-3
    output.square().sum().backward()
    own = {n: p for n, p in model.named_parameters() if ".processor.method." in n}
    assert len(own) == sum(len(list(method.parameters())) for method in methods)
    for parameter_name, parameter in own.items():
        if parameter.requires_grad:  # SLA2's router has its own stage
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any(), parameter_name


def test_context_of_a_call() -> None:
    model = apply_attention(build_wan("tiny"), FullConfig())
    seen = record(model)
    latents, timestep, text = inputs()
    model(latents, encoder_hidden_states=text, timestep=timestep)  # by name, any order
    assert [context.grid for context in seen] == [GRID, GRID]
    for context in seen:
        assert context.timestep is timestep
        assert context.hidden_states is not None
        assert context.hidden_states.shape == (2, 72, 32)
    # Wan2.2 has a timestep for each token; a conditioned frame has none.
    per_token = torch.full((2, 72), 700.0)
    per_token[:, :24] = 0
    model(latents, per_token, text)
    assert seen[-1].timestep is not None
    assert seen[-1].timestep.tolist() == [700, 700]


@pytest.mark.parametrize("per_token", [False, True])
def test_tile_order_changes_the_blocks_and_nothing_else(per_token: bool) -> None:
    model = build_wan("tiny")
    latents, timestep, text = inputs()
    if per_token:
        timestep = timestep[:, None] * torch.linspace(0, 1, 72)
    dense = run(model, latents, timestep, text)
    tile = (2, 2, 3)
    apply_attention(model, FullConfig(tile=tile))
    seen = record(model)
    torch.testing.assert_close(run(model, latents, timestep, text), dense)
    tuple_output = model(latents, timestep, text, return_dict=False)[0]
    torch.testing.assert_close(tuple_output, dense)
    assert [context.tile for context in seen] == [tile] * 4
    tiled = seen[0].hidden_states

    apply_attention(model, FullConfig())
    seen = record(model)
    run(model, latents, timestep, text)
    raster = seen[0].hidden_states
    assert tiled is not None
    assert raster is not None
    torch.testing.assert_close(tiled, raster[:, tile_order(GRID, tile)])

    apply_attention(model, SparseOnlyConfig(critical=0.3, block_q=8, block_kv=8, tile=tile))
    in_tiles = run(model, latents, timestep, text)
    apply_attention(model, SparseOnlyConfig(critical=0.3, block_q=8, block_kv=8))
    assert (in_tiles - run(model, latents, timestep, text)).abs().max() > 1e-3


def test_batched_guidance_is_two_calls() -> None:
    model = apply_attention(build_wan("tiny"), VSAConfig(critical=0.5, cube=(2, 2, 2)))
    for method in attention_modules(model):
        open_branches(method)
    batch = inputs()
    both = run(model, *batch)
    for index in range(2):
        alone = run(model, *(tensor[index : index + 1] for tensor in batch))
        torch.testing.assert_close(alone, both[index : index + 1])


def test_checkpointed_layers_are_recomputed_in_their_own_context() -> None:
    config = VSAConfig(critical=0.5, cube=(2, 2, 2))
    model = apply_attention(build_wan("tiny"), config).train()
    assert all(method.training for method in attention_modules(model))
    for method in attention_modules(model):
        open_branches(method)
    run(model).square().sum().backward()
    gate = next(attention_modules(model)).to_gate_compress.weight  # type: ignore[union-attr]
    expected = gate.grad.clone()
    model.zero_grad()
    model.enable_gradient_checkpointing()
    loss = run(model).square().sum()
    run(model, *inputs(frames=2))  # another grid before the first call's backward
    loss.backward()
    torch.testing.assert_close(gate.grad, expected)


def one_layer() -> Any:
    return WanTransformer3DModel(**{**WAN_CONFIGS["tiny"], "num_layers": 1})


@pytest.mark.slow  # traces forward and backward of a whole model
def test_compiles_without_graph_breaks() -> None:
    model = apply_attention(one_layer(), LinearOnlyConfig(tile=(2, 2, 3)))
    model.enable_gradient_checkpointing()
    expected = run(model)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    output = run(compiled)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.any()
    assert list(attention_modules(compiled)) == list(attention_modules(model))


@pytest.mark.interpreter
def test_sla_kernels_compile_in_the_model() -> None:
    config = SLAConfig(backend="triton", critical=0.5)
    model = apply_attention(one_layer(), config).requires_grad_(False)
    latents, timestep, text = inputs(batch=1, frames=2)
    expected = run(model, latents, timestep, text)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, latents, timestep, text), expected)


def test_compiled_blocks_share_their_code() -> None:
    model = build_wan("tiny")
    expected = run(model)
    apply_attention(model, FullConfig())
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=count)
    torch.testing.assert_close(run(model), expected)
    assert len(graphs) == 1
    run(model, *inputs(seed=1))
    assert len(graphs) == 1


def test_bfloat16_keeps_the_projection_in_float32() -> None:
    model = apply_attention(build_wan("tiny"), SLAConfig())
    model.to(torch.bfloat16)
    late = apply_attention(build_wan("tiny", torch.bfloat16), SLAConfig())
    for each in (model, late):
        names = [
            n for n, p in each.named_parameters() if "proj_l" in n and p.dtype == torch.float32
        ]
        assert len(names) == 4
        assert names[0] == "blocks.0.attn1.processor.method.proj_l.weight"
    batch = [tensor.bfloat16() for tensor in inputs()]
    assert run(late, *batch).dtype == torch.bfloat16


def test_copies_have_their_own_attention(tmp_path: Path) -> None:
    model = apply_attention(build_wan("tiny"), SLAConfig(tile=(2, 2, 2)))
    other = copy.deepcopy(model)
    expected = run(model)
    for method in attention_modules(other):
        open_branches(method)
    assert not torch.equal(run(other), expected)
    assert torch.equal(run(model), expected)
    other.save_pretrained(tmp_path)
    assert torch.equal(run(load_model(tmp_path)), run(other))
    remove_attention(other, discard=True)
    assert len(list(attention_modules(model))) == 2
    assert torch.equal(run(model), expected)


def test_in_a_pipeline() -> None:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=build_wan("tiny"),
    )
    pipe.set_progress_bar_config(disable=True)

    def generate() -> Tensor:
        _, _, text = inputs()
        video: Tensor = pipe(
            prompt_embeds=text[:1],
            negative_prompt_embeds=text[1:],
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).frames
        return video

    dense = generate()
    apply_attention(pipe.transformer, FullConfig())
    torch.testing.assert_close(generate(), dense)
    apply_attention(pipe.transformer, SLAConfig(critical=0.3, block_q=8, block_kv=8))
    sparse = generate()
    assert sparse.shape == dense.shape
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, dense)


def test_a_split_sequence_is_refused() -> None:
    model = build_wan("tiny")
    # What context parallelism does on two devices.
    model.rope.register_forward_hook(lambda _, args, output: tuple(x[:, :36] for x in output))
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0][:, :36], *args[1:]))
    apply_attention(model, FullConfig())
    with pytest.raises(UnsupportedAttentionError, match=r"36 tokens.*3 x 4 x 6 are 72.*split"):
        run(model)


def test_too_many_arguments_are_refused() -> None:
    model = apply_attention(build_wan("tiny"), FullConfig(tile=(2, 2, 2)))
    with pytest.raises(TypeError, match="7 arguments by position; the transformer takes 6: hidden"):
        model(*inputs(), None, True, None, "surplus")


def test_a_layer_alone_is_refused() -> None:
    model = apply_attention(build_wan("tiny"), FullConfig())
    run(model)  # its context is gone
    rotary = model.rope(inputs()[0])
    with pytest.raises(UnsupportedAttentionError, match="call the transformer"):
        model.blocks[0].attn1(torch.randn(2, 72, 32), None, None, rotary)


def test_sizes_are_those_of_wan() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in WanTransformer3DModel(**WAN_CONFIGS[name]).parameters())
            for name in ("1.3b", "14b")
        }
    # The numbers of parameters in the published files.
    assert sizes == {"1.3b": 1_418_996_800, "14b": 14_288_491_584}


def test_built_models_are_as_if_loaded(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    model = build_wan("tiny", torch.bfloat16, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in loaded.named_parameters()
    }
    assert model.rope.freqs_cos.dtype == loaded.rope.freqs_cos.dtype == torch.float32
    again, other = build_wan("tiny", torch.bfloat16, seed=1), build_wan("tiny", torch.bfloat16)
    assert torch.equal(again.proj_out.weight, model.proj_out.weight)
    assert not torch.equal(other.proj_out.weight, model.proj_out.weight)
    with pytest.raises(ValueError, match=r"size is '2b'; it must be one of 1.3b, 14b, tiny"):
        build_wan("2b")
