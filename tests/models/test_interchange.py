"""TurboDiffusion's SLA checkpoints, to our files and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from sla.attention import SLAConfig, SparseOnlyConfig
from sla.cli.main import main
from sla.models.checkpoint import CheckpointError
from sla.models.injection import apply_attention, attention_config, attention_modules
from sla.models.interchange import (
    convert_checkpoint,
    from_turbodiffusion,
    key_table,
    to_turbodiffusion,
    turbodiffusion_config,
)
from sla.models.pretrained import load_model, save_model
from sla.models.wan import WAN_CONFIGS, build_wan

DIM, HEAD_DIM, FFN, LAYERS = 32, 16, 64, 2
PROJECTION = "self_attn.attn_op.local_attn.proj_l"


def their_state(linear: bool = True) -> dict[str, Tensor]:
    """Every key of their Wan with SLA, written out, at the sizes of the tiny Wan."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def layer(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = values(out, into), values(out)

    state: dict[str, Tensor] = {}
    layer("patch_embedding", DIM, 4 * 4)
    if not linear:
        weight = state["patch_embedding.weight"]
        state["patch_embedding.weight"] = weight.reshape(DIM, 4, 1, 2, 2)
    layer("text_embedding.0", DIM, 16)
    layer("text_embedding.2", DIM, DIM)
    layer("time_embedding.0", DIM, 32)
    layer("time_embedding.2", DIM, DIM)
    layer("time_projection.1", 6 * DIM, DIM)
    for n in range(LAYERS):
        for attention in ("self_attn", "cross_attn"):
            for letter in "qkvo":
                layer(f"blocks.{n}.{attention}.{letter}", DIM, DIM)
            for letter in "qk":
                state[f"blocks.{n}.{attention}.norm_{letter}.weight"] = values(DIM)
        state[f"blocks.{n}.{PROJECTION}.weight"] = values(HEAD_DIM, HEAD_DIM).float()
        state[f"blocks.{n}.{PROJECTION}.bias"] = values(HEAD_DIM).float()
        state[f"blocks.{n}.norm3.weight"], state[f"blocks.{n}.norm3.bias"] = (
            values(DIM),
            values(DIM),
        )
        layer(f"blocks.{n}.ffn.0", FFN, DIM)
        layer(f"blocks.{n}.ffn.2", DIM, FFN)
        state[f"blocks.{n}.modulation"] = values(1, 6, DIM)
    state["head.modulation"] = values(1, 2, DIM)
    layer("head.head", 4 * 4, DIM)
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_names_are_those_of_wan_and_diffusers() -> None:
    theirs = their_state(linear=False)
    converted = from_turbodiffusion(theirs)
    assert converted.config == WAN_CONFIGS["tiny"] | {"rope_max_seq_len": 1024}
    plain = {key: tensor for key, tensor in theirs.items() if "attn_op" not in key}
    assert_same(converted.base, convert_wan_transformer_to_diffusers(dict(plain)))
    assert set(converted.base) == set(build_wan("tiny").state_dict())
    assert list(converted.attention) == [
        f"blocks.{n}.attn1.processor.method.proj_l.{part}"
        for n in range(LAYERS)
        for part in ("weight", "bias")
    ]
    model = apply_attention(build_wan("tiny"), converted.method)
    assert set(model.state_dict()) == {*converted.base, *converted.attention}


@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_every_key_of_the_real_sizes(size: str) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**WAN_CONFIGS[size])
    table = key_table(WAN_CONFIGS[size]["num_layers"])
    assert len(set(table.values())) == len(table)
    assert {ours for ours in table.values() if "processor" not in ours} == set(model.state_dict())


@pytest.mark.parametrize("linear", [True, False])
def test_state_dict_round_trip(linear: bool) -> None:
    theirs = their_state(linear)
    converted = from_turbodiffusion(theirs)
    back = to_turbodiffusion(converted.base, converted.attention, linear_patches=linear)
    assert_same(back, theirs)
    prefixed = {f"net.{key}": tensor for key, tensor in theirs.items()}
    assert_same(from_turbodiffusion(prefixed).base, converted.base)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_file_round_trip(tmp_path: Path, ending: str) -> None:
    theirs = their_state()
    source, folder, back = tmp_path / f"a.{ending}", tmp_path / "ours", tmp_path / f"b.{ending}"
    (save_file if ending == "safetensors" else torch.save)(theirs, source)  # type: ignore[operator]
    written = convert_checkpoint(source, folder, critical=0.15)
    assert [path.name for path in written] == [
        "attention.json",
        "attention.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert convert_checkpoint(folder, back) == [back]
    read = load_file(back) if ending == "safetensors" else torch.load(back)
    assert_same(read, theirs)

    model = load_model(folder)
    assert attention_config(model) == turbodiffusion_config(0.15)
    assert attention_config(model) == SLAConfig(
        critical=0.15, negligible=0.0, block_q=128, block_kv=64, linear_scope="all"
    )
    second: Any = list(attention_modules(model))[1]
    assert torch.equal(second.proj_l.weight, theirs[f"blocks.1.{PROJECTION}.weight"])
    assert second.proj_l.weight.dtype == torch.float32
    assert torch.equal(model.blocks[1].attn1.to_k.weight, theirs["blocks.1.self_attn.k.weight"])
    latents = torch.randn(1, 4, 2, 4, 4).bfloat16()
    output = model(latents, torch.tensor([500.0]), torch.randn(1, 3, 16).bfloat16()).sample
    assert output.isfinite().all()


KEY = f"blocks.1.{PROJECTION}.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(KEY), f"1 missing:\n  {KEY}"),
        (
            lambda s: s.update({"blocks.0.self_attn.q.scale": s[KEY], "extra": s[KEY]}),
            "2 unknown:\n  blocks.0.self_attn.q.scale\n  extra",
        ),
        (
            lambda s: s.update({"blocks.2.modulation": s["blocks.1.modulation"]}),
            r"\d+ missing:\n.*  blocks.2.self_attn.q.weight",
        ),
        (
            lambda s: s.update({KEY: torch.zeros(8)}),
            r"1 of another shape:\n  blocks.1.attn1.processor.method.proj_l.bias: "
            r"\(8,\) in the file, \(16,\)",
        ),
        (
            lambda s: s.update({"blocks.1.ffn.2.weight": torch.zeros(32, 63)}),
            r"1 of another shape:\n  blocks.1.ffn.net.2.weight: \(32, 63\) in the file, \(32, 64\)",
        ),
        (
            lambda s: s.update({"patch_embedding.weight": torch.zeros(32, 4, 2, 2, 2)}),
            r"patch_embedding.weight has shape \(32, 4, 2, 2, 2\)",
        ),
        (lambda s: s.clear(), r"no key of the form blocks.N.*begin with nothing"),
    ],
)
def test_what_does_not_fit_is_listed(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    state = their_state()
    change(state)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        from_turbodiffusion(state)


def test_a_model_of_ours_that_is_not_theirs(tmp_path: Path) -> None:
    out = tmp_path / "theirs.safetensors"
    for config, message in (
        (SLAConfig(), "linear_scope is 'marginal'; .* over all keys"),
        (SparseOnlyConfig(), "holds attention 'sparse_only' of a Wan"),
        (SLAConfig(feature_map="hedgehog", linear_scope="all"), "unknown:\n.*feature_map"),
    ):
        folder = tmp_path / config.name / str(getattr(config, "feature_map", ""))
        save_model(apply_attention(build_wan("tiny"), config), folder)
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            convert_checkpoint(folder, out)
    save_model(build_wan("tiny"), tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match=r"no attention.json"):
        convert_checkpoint(tmp_path / "dense", out)
    assert not out.exists()


def test_files_that_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        convert_checkpoint(tmp_path / "none.pth", tmp_path / "out")
    (tmp_path / "a.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "out")
    with pytest.raises(CheckpointError, match="it must be a folder"):
        convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "out.pth")
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"IN is .*a.ckpt; a file must end in"):
        convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "out")
    torch.save({"a": 1}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="is no state dict"):
        convert_checkpoint(tmp_path / "b.pth", tmp_path / "out")
    torch.save({"a": Path("x")}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = tmp_path / "theirs.safetensors", tmp_path / "ours"
    save_file(their_state(), source)
    assert main(["convert-checkpoint", str(source), str(folder), "--critical", "0.2"]) == 0
    assert str(folder / "attention.json") in capsys.readouterr().out
    assert attention_config(load_model(folder)) == turbodiffusion_config(0.2)
    assert main(["convert-checkpoint", str(source), str(tmp_path / "x"), "--critical", "10"]) == 2
    assert "critical is 10.0; it must be in (0, 1]" in capsys.readouterr().err
    state = their_state()
    state.pop(KEY)
    save_file(state, source)
    assert main(["convert-checkpoint", str(source), str(tmp_path / "again")]) == 2
    assert KEY in capsys.readouterr().err
