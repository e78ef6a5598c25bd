"""Our methods in diffusers' transformers: families of models, removal, files, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sla.attention import (
    AttentionContext,
    FullConfig,
    LinearOnlyConfig,
    SLAConfig,
    SparseOnlyConfig,
    UnsupportedAttentionError,
    VMoBAConfig,
    VSAConfig,
)
from sla.models import pretrained
from sla.models.checkpoint import CheckpointError
from sla.models.injection import (
    adapter_of,
    apply_attention,
    attention_config,
    attention_modules,
    available_adapters,
    register_adapter,
    remove_attention,
)
from sla.models.pretrained import load_attention, load_model, save_attention, save_model
from sla.models.testing import open_branches, tiny_wan_autoencoder
from sla.models.wan import WanAdapter, build_wan

SPARSE = SLAConfig(critical=0.3, negligible=0.3, block_q=8, block_kv=8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cogvideox(rotary: bool = True, patch_t: int | None = None) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=12,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=rotary,
        patch_size_t=patch_t,
    )
    frames = 3 * (patch_t or 1)
    angle = noise(72, 16)
    inputs: dict[str, Any] = {
        "hidden_states": noise(2, frames, 4, 8, 12),
        "encoder_hidden_states": noise(2, 5, 12),
        "timestep": torch.tensor([900, 100]),
    }
    if rotary:
        inputs["image_rotary_emb"] = (angle.cos(), angle.sin())
    return model, inputs


def ltx() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=12,
    )
    return model, {
        "hidden_states": noise(2, 72, 4),
        "encoder_hidden_states": noise(2, 5, 12),
        "timestep": torch.tensor([900, 100]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }


def hunyuan() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    # Padding that would be seen if it were attended to.
    return model, {
        "hidden_states": noise(2, 4, 3, 8, 12),
        "encoder_hidden_states": 3 * noise(2, 8, 12),
        "timestep": torch.tensor([900, 100]),
        "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 3] * 2),
        "pooled_projections": noise(2, 8),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "CogVideoX": cogvideox,
    "CogVideoX without rotary": lambda: cogvideox(rotary=False),
    "CogVideoX 1.5": lambda: cogvideox(patch_t=2),
    "LTX": ltx,
    "HunyuanVideo": hunyuan,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_is_the_original(family: str) -> None:
    model, inputs = FAMILIES[family]()
    expected = model(**inputs).sample
    apply_attention(model, FullConfig())
    torch.testing.assert_close(model(**inputs).sample, expected)
    remove_attention(model)
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_train(family: str) -> None:
    model, inputs = FAMILIES[family]()
    dense = model(**inputs).sample
    apply_attention(model, SPARSE).train()
    assert len(list(attention_modules(model))) == 2
    for method in attention_modules(model):
        open_branches(method)
    model.enable_gradient_checkpointing()
    output = model(**inputs).sample
    assert output.shape == dense.shape
    assert (output - dense).abs().max() > 1e-3
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "processor" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("family", ["CogVideoX", "CogVideoX 1.5", "HunyuanVideo"])
def test_text_tokens_are_always_critical(family: str) -> None:
    model, inputs = FAMILIES[family]()
    apply_attention(model, SparseOnlyConfig(critical=0.01, block_q=1, block_kv=1))
    seen: list[tuple[Tensor, Tensor, AttentionContext]] = []
    for method in attention_modules(model):
        method.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1], args[3])))
    model(**inputs)
    assert len(seen) == 2
    for method, (query, key, context) in zip(attention_modules(model), seen, strict=True):
        assert context.grid == (3, 4, 6)
        assert context.always_critical == 5
        assert query.shape == (2, 2, 77, 16)
        assert context.timestep is not None
        assert context.timestep.tolist() == [900, 100]
        assert context.hidden_states is not None
        assert context.hidden_states.shape == (2, 77, 32)
        block_map = method.block_map(query, key, context)
        assert block_map is not None
        critical = block_map.labels == 1
        assert critical[..., :5].all()
        assert critical[..., :5, :].all()
        assert critical[..., 5:, 5:].float().mean() < 0.1


@pytest.mark.parametrize("config", [VSAConfig(), VMoBAConfig()])
def test_methods_of_the_grid_refuse_text_at_once(config: Any) -> None:
    model, _ = cogvideox()
    with pytest.raises(
        UnsupportedAttentionError, match=f"{config.name}.*CogVideoX.*text tokens.*not in the grid"
    ):
        apply_attention(model, config)
    assert list(attention_modules(model)) == []
    assert not any("processor" in name for name, _ in model.named_parameters())


def test_methods_of_the_grid_refuse_a_call_without_one() -> None:
    model, inputs = ltx()
    apply_attention(model, VSAConfig())
    model(**inputs)
    for name in ("num_frames", "height", "width"):
        inputs.pop(name)
    with pytest.raises(UnsupportedAttentionError, match="no grid"):
        model(**inputs, video_coords=noise(2, 3, 72))
    apply_attention(model, SPARSE)
    model(**inputs, video_coords=noise(2, 3, 72))


@pytest.mark.parametrize("family", ["CogVideoX", "LTX", "HunyuanVideo"])
def test_tile_order_is_refused_where_it_cannot_be(family: str) -> None:
    model, _ = FAMILIES[family]()
    with pytest.raises(UnsupportedAttentionError, match=r"attention.tile is \(2, 2, 2\).*to null"):
        apply_attention(model, FullConfig(tile=(2, 2, 2)))


def test_hunyuan_wants_texts_of_one_length() -> None:
    model, inputs = hunyuan()
    apply_attention(model, FullConfig())
    inputs["encoder_attention_mask"][1, 3:] = 0
    with pytest.raises(UnsupportedAttentionError, match=r"\[5, 3\] text tokens"):
        model(**inputs)


def test_masks_are_refused() -> None:
    model, inputs = cogvideox()
    apply_attention(model, FullConfig())
    with pytest.raises(UnsupportedAttentionError, match="mask"):
        model(**inputs, attention_kwargs={"attention_mask": torch.ones(2, 77)})


def test_cogvideox_fused_before() -> None:
    model, inputs = cogvideox()
    expected = model(**inputs).sample
    model.fuse_qkv_projections()
    fused = type(model.transformer_blocks[0].attn1.processor)
    for layer in (block.attn1 for block in model.transformer_blocks):
        nn.init.zeros_(layer.to_q.weight)  # no longer what counts
    apply_attention(model, FullConfig())
    torch.testing.assert_close(model(**inputs).sample, expected)
    remove_attention(model)
    assert type(model.transformer_blocks[0].attn1.processor) is fused


def test_cogvideox_compiles() -> None:
    model, inputs = cogvideox()
    apply_attention(model, LinearOnlyConfig())
    expected = model(**inputs).sample
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).sample, expected)


def test_adapters_are_open() -> None:
    assert "WanTransformer3DModel" in available_adapters()
    with pytest.raises(TypeError, match=r"no adapter for a Linear; .* WanTransformer3DModel"):
        apply_attention(nn.Linear(1, 1), FullConfig())
    with pytest.raises(ValueError, match="'WanTransformer3DModel' is taken by WanAdapter"):

        @register_adapter("WanTransformer3DModel")
        class Taken(WanAdapter):
            pass

    # What sharding does: a subclass made on the spot.
    model = build_wan("tiny")
    model.__class__ = type("FSDPWanTransformer3DModel", (WanTransformer3DModel,), {})
    assert isinstance(adapter_of(model), WanAdapter)


def test_trained_parameters_are_not_dropped_unasked() -> None:
    model = build_wan("tiny")
    originals = model.attn_processors
    assert remove_attention(model) is model
    apply_attention(model, SLAConfig())
    remove_attention(model)  # as they start, nothing is lost
    apply_attention(model, SLAConfig()).to(torch.bfloat16)
    open_branches(list(attention_modules(model))[1])
    for action in (remove_attention, lambda m: apply_attention(m, FullConfig())):
        with pytest.raises(ValueError, match=r"'sla' has trained parameters in 1 layers.*discard"):
            action(model)
        assert attention_config(model) == SLAConfig()
    apply_attention(model, FullConfig(), discard=True)
    assert attention_config(model) == FullConfig()
    remove_attention(model)
    assert model.attn_processors == originals
    assert not model._forward_pre_hooks
    assert not model.rope._forward_hooks
    assert attention_config(model) is None


def test_weights_come_first() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1)
    with pytest.raises(ValueError, match="meta device; load them first"):
        apply_attention(model, SLAConfig())


def trained() -> Any:
    """A tiny Wan whose methods and base weights are not as they start."""
    model = apply_attention(build_wan("tiny"), SPARSE)
    open_branches(model, std=0.02)
    return model


def run(model: Any) -> Tensor:
    output: Tensor = model(noise(2, 4, 3, 8, 12), torch.tensor([9.0, 1.0]), noise(2, 7, 16)).sample
    return output


def test_attention_round_trip(tmp_path: Path) -> None:
    model = trained()
    header = save_attention(torch.compile(model), tmp_path)
    assert header.attention == SPARSE
    values = json.loads((tmp_path / "attention.json").read_text())
    assert values["format"] == "sla-attention"
    assert values["version"] == 1
    assert values["model_class"] == "WanTransformer3DModel"
    assert values["attention"]["critical"] == 0.3
    assert next(iter(load_file(tmp_path / "attention.safetensors"))) == (
        "blocks.0.attn1.processor.method.proj_l.bias"
    )
    other = build_wan("tiny")
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "processor" not in k})
    load_attention(other, tmp_path)
    assert torch.equal(run(other), run(model))

    # The numbers of a model that has the method already are its own.
    mine = apply_attention(build_wan("tiny"), SLAConfig(critical=0.5))
    load_attention(mine, tmp_path)
    assert attention_config(mine) == SLAConfig(critical=0.5)
    assert all(
        torch.equal(a.proj_l.weight, b.proj_l.weight)  # type: ignore[union-attr, arg-type]
        for a, b in zip(attention_modules(mine), attention_modules(model), strict=True)
    )


def test_a_method_without_parameters_round_trips(tmp_path: Path) -> None:
    config = SparseOnlyConfig(critical=0.25, tile=(2, 2, 2))
    save_attention(apply_attention(build_wan("tiny"), config), tmp_path)
    assert attention_config(load_attention(build_wan("tiny"), tmp_path)) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_round_trip(tmp_path: Path, dtype: torch.dtype, caplog: Any) -> None:
    model = apply_attention(build_wan("tiny", dtype), SPARSE)
    open_branches(model, std=0.02)
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # diffusers' method, shards
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    assert attention_config(model) == SPARSE  # still there

    plain, report = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert list(attention_modules(plain)) == []

    for source in (tmp_path, tmp_path.parent):
        loaded = load_model(source, subfolder=tmp_path.name)
        assert not loaded.training
        expected, found = model.state_dict(), loaded.state_dict()
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert load_model(tmp_path, dtype=torch.bfloat16).proj_out.weight.dtype == torch.bfloat16

    # Removed and saved again: the methods of the earlier save must not come back.
    save_model(remove_attention(model, discard=True), tmp_path)
    assert attention_config(load_model(tmp_path)) is None


def test_pipeline_round_trip(tmp_path: Path) -> None:
    model = trained()
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_wan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
    )
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "transformer" / "attention.json").is_file()
    loaded = WanPipeline.from_pretrained(
        tmp_path, transformer=load_model(tmp_path), text_encoder=None, tokenizer=None
    )
    assert torch.equal(run(loaded.transformer), run(model))


def test_load_model_with_attention_asked_for(tmp_path: Path) -> None:
    model = trained()
    save_model(model, tmp_path / "sla")
    save_model(build_wan("tiny"), tmp_path / "dense")
    more = SLAConfig(critical=0.6)
    loaded = load_model(tmp_path / "sla", attention=more)
    assert attention_config(loaded) == more
    first = next(attention_modules(loaded))
    assert torch.equal(
        first.proj_l.weight,  # type: ignore[union-attr, arg-type]
        next(attention_modules(model)).proj_l.weight,  # type: ignore[union-attr, arg-type]
    )
    assert attention_config(load_model(tmp_path / "dense")) is None
    assert attention_config(load_model(tmp_path / "dense", attention=more)) == more
    both = load_model(tmp_path / "dense", attention=tmp_path / "sla")
    assert attention_config(both) == SPARSE
    with pytest.raises(CheckpointError, match=r"holds attention 'sla', the model has 'vsa'"):
        load_model(tmp_path / "sla", attention=VSAConfig())


def change_header(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "attention.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "attention.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        change_header(sha256=pretrained.file_sha256(path))(folder)

    return apply


KEY = "blocks.1.attn1.processor.method.proj_l.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_header(format="other"), "not of format 'sla-attention' up to version 1"),
        (change_header(version=2), "not of format 'sla-attention' up to version 1"),
        (change_header(attention={"name": "slab"}), "bad header.*'slab'.*'sla'"),
        (change_header(attention={"name": "sla", "critcal": 1}), "critcal.*'critical'"),
        (change_header(surplus=1), "bad header.*surplus"),
        (lambda f: (f / "attention.json").write_text("{"), "bad header"),
        (lambda f: (f / "attention.json").write_text("[]"), "bad header"),
        (change_header(layers=3), "3 layers of 2 heads of 16; the model is .* 2 layers"),
        (change_header(model_class="LTXVideoTransformer3DModel"), "of a LTX.*the model is a Wan"),
        (
            lambda f: save_file({}, f / "attention.safetensors"),
            "attention.safetensors has SHA-256 .* written for",
        ),
        (change_weights(lambda t: t.pop(KEY)), f"1 missing in the file:\n  {KEY}"),
        (change_weights(lambda t: t.update(x=t[KEY] + 1)), "1 unknown to the model:\n  x"),
        (
            change_weights(lambda t: t.update({KEY: torch.zeros(8, 8)})),
            r"1 of another shape:\n  .*\(8, 8\) in the file, \(16, 16\)",
        ),
    ],
)
def test_attention_that_does_not_fit(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    save_attention(trained(), tmp_path)
    damage(tmp_path)
    model = build_wan("tiny")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_attention(model, tmp_path)
    assert attention_config(model) is None, "nothing is changed"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no attention.json in"):
        load_attention(build_wan("tiny"), tmp_path)
    with pytest.raises(ValueError, match="none of our attention methods"):
        save_attention(build_wan("tiny"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold transformer/config.json and"):
        load_model(tmp_path)
    save_model(build_wan("tiny"), tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no complete weights"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder ./models/wan"):
        load_model("./models/wan")
    # Half of what save_attention writes is not silently a dense model.
    save_model(trained(), tmp_path)
    (tmp_path / "attention.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no attention.json in"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("proj_out.bias"), "1 missing in the files:\n  proj_out.bias"),
        (lambda t: t.update({KEY: torch.zeros(16, 16)}), f"1 unknown to the model:\n  {KEY}"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(3)}), "does not fit.*proj_out.bias"),
    ],
)
def test_base_weights_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    save_model(build_wan("tiny"), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_model(tmp_path)


def test_configs_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(CheckpointError, match=r"names a NoSuchModel, which diffusers .* not have"):
        load_model(tmp_path)
    path.write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="not a config of a diffusers model"):
        load_model(tmp_path)


def gated(*_: Any, **__: Any) -> str:
    from huggingface_hub.errors import GatedRepoError

    response: Any = type("Response", (), {"headers": {}, "request": None, "status_code": 403})()
    raise GatedRepoError("Access to model is restricted\nlong text", response=response)


def offline(*_: Any, **__: Any) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")


@pytest.mark.parametrize(
    ("call", "reason"), [(gated, "GatedRepoError: Access"), (offline, "LocalEntryNotFoundError")]
)
def test_a_hub_that_does_not_give(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., str], reason: str
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", call)
    with pytest.raises(FileNotFoundError) as caught:
        load_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", revision="0fad780a")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (
        "transformer/ of Wan-AI/Wan2.1-T2V-1.3B-Diffusers (revision 0fad780a)",
        reason,
        '--revision 0fad780a --include "transformer/*" --local-dir FOLDER',
        "hf auth login",
        "transformer/config.json and transformer/*.safetensors",
    ):
        assert part in message


def test_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    save_model(model, tmp_path / "transformer")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = load_model("someone/wan-sla", revision="abc")
    assert torch.equal(run(loaded), run(model))
    assert asked == [
        ("someone/wan-sla", "abc", ["transformer/*.json", "transformer/*.safetensors"])
    ]
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(FileNotFoundError, match=r"it has no transformer/config.json.*hf download"):
        load_model("someone/wan-sla")
