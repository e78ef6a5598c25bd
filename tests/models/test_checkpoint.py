"""Model files: exact round trips, and refusals that list everything."""

from __future__ import annotations

import json
import resource
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sla.attention import FullConfig, SLAConfig
from sla.models import (
    CheckpointError,
    TrainedTextEncoder,
    VideoDiT,
    load_model,
    load_weights,
    read_header,
    save_model,
)
from sla.models.testing import open_branches, tiny_dit_config, tiny_text_config

SLA = SLAConfig(critical=0.25, negligible=0.25, block_q=8, block_kv=8)
PROJ = [
    f"model.blocks.{i}.self_attention.method.proj_l.{part}"
    for i in range(2)
    for part in ("weight", "bias")
]


def build(attention=None, seed=0, **changes):
    torch.manual_seed(seed)
    model = VideoDiT(replace(tiny_dit_config(), **changes), attention or FullConfig())
    text = TrainedTextEncoder(tiny_text_config())
    open_branches(model, seed)
    open_branches(text, seed)
    return model, text


def same(module, other):
    theirs = other.state_dict()
    ours = module.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def edit(path, change):
    """Rewrite a model file's tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("attention", [FullConfig(), SLA], ids=lambda c: c.name)
def test_round_trip(tmp_path, attention):
    model, text = build(attention)
    saved = save_model(tmp_path / "run", model, text, metadata={"steps": 7})
    assert saved.path == tmp_path / "run" / "model.safetensors"
    assert saved.num_bytes == saved.path.stat().st_size
    assert saved.num_parameters == sum(p.numel() for m in (model, text) for p in m.parameters())
    loaded = load_model(tmp_path / "run")
    assert same(loaded.model, model)
    assert same(loaded.text_encoder, text)
    assert loaded.initialised == []
    assert loaded.model.attention_config == attention
    assert loaded.header.model == model.config
    assert loaded.header.metadata == {"steps": 7}
    assert read_header(saved.path) == loaded.header
    assert json.loads(saved.header_path.read_text())["attention"]["name"] == attention.name


def test_file_name_and_no_text_encoder(tmp_path):
    model, text = build()
    saved = save_model(tmp_path / "new" / "a.safetensors", model)
    assert saved.path.name == "a.safetensors"
    assert saved.header_path.name == "a.json"
    assert load_model(saved.path).text_encoder is None
    with pytest.raises(CheckpointError, match=r"missing in the file:\n  text_encoder\."):
        load_weights(saved.path, model, text)


def test_bfloat16_halves_the_file_and_keeps_the_methods_precision(tmp_path):
    model, text = build(SLA)
    full = save_model(tmp_path / "fp32", model, text)
    half = save_model(tmp_path / "bf16", model, text, dtype=torch.bfloat16)
    assert half.num_bytes < 0.65 * full.num_bytes
    loaded = load_model(half.path)
    assert loaded.header.dtype == "bfloat16"
    rounded = {k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()}
    for key, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32
        expected = model.state_dict()[key] if "proj_l" in key else rounded[key]
        assert torch.equal(value, expected)


def test_compiled_model_is_saved_under_its_own_names(tmp_path):
    model, text = build()
    save_model(tmp_path, torch.compile(model, backend="eager"), text)
    assert same(load_model(tmp_path).model, model)


def test_full_model_under_another_method(tmp_path):
    model, text = build()
    save_model(tmp_path, model, text)
    loaded = load_model(tmp_path, attention=SLA)
    assert loaded.initialised == PROJ
    assert loaded.model.attention_config == SLA
    assert all(torch.count_nonzero(loaded.model.state_dict()[k[6:]]) == 0 for k in PROJ)
    loaded.model.set_attention(FullConfig())
    assert same(loaded.model, model)


def test_another_method_needs_leave(tmp_path):
    model, text = build()
    save_model(tmp_path, model, text)
    other, other_text = build(SLA, seed=1)
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, other, other_text)
    message = str(caught.value)
    assert all(key in message for key in PROJ)
    assert "FullConfig(name='full'" in message
    assert "SLAConfig(name='sla'" in message
    report = load_weights(tmp_path, other, other_text, new_attention=True)
    assert report.initialised == PROJ


def test_another_method_without_parameters_needs_leave_too(tmp_path):
    from sla.attention import SparseOnlyConfig

    model, text = build()
    save_model(tmp_path, model, text)
    other, other_text = build(SparseOnlyConfig(block_q=8, block_kv=8), seed=1)
    with pytest.raises(CheckpointError, match="new_attention=True"):
        load_weights(tmp_path, other, other_text)


def test_trained_attention_weights_are_never_dropped(tmp_path):
    model, text = build(SLA)
    save_model(tmp_path, model, text)
    with pytest.raises(CheckpointError, match="4 unknown to the model") as caught:
        load_model(tmp_path, attention=FullConfig())
    assert all(key in str(caught.value) for key in PROJ)


def test_another_number_of_the_same_method(tmp_path):
    model, text = build(SLA)
    save_model(tmp_path, model, text)
    loaded = load_model(tmp_path, attention=replace(SLA, critical=0.5))
    assert loaded.initialised == []
    assert same(loaded.model, model)


def test_every_misfit_is_listed_and_nothing_is_changed(tmp_path):
    model, text = build()
    path = save_model(tmp_path, model, text).path

    def spoil(tensors, metadata):
        del tensors["model.head.bias"]
        del tensors["text_encoder.norm.weight"]
        tensors["model.stray"] = torch.zeros(1)
        tensors["model.head.weight"] = torch.zeros(3, 5)

    edit(path, spoil)
    other, other_text = build(seed=1)
    before, before_text = build(seed=1)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, other, other_text)
    message = str(caught.value)
    for part in (
        "2 missing in the file:\n  model.head.bias\n  text_encoder.norm.weight",
        "1 unknown to the model:\n  model.stray",
        "model.head.weight: (3, 5) in the file, (12, 32) in the model",
        str(path),
    ):
        assert part in message
    assert same(other, before)
    assert same(other_text, before_text)


def test_another_architecture_is_named(tmp_path):
    model, text = build()
    save_model(tmp_path, model, text)
    other, other_text = build(depth=3)
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, other, other_text)
    assert "depth=2" in str(caught.value)
    assert "depth=3" in str(caught.value)
    assert "model.blocks.2.mlp.0.weight" in str(caught.value)


def test_same_shapes_of_another_architecture_are_refused(tmp_path):
    # 2 heads of 16 or 1 of 32: every tensor has the same shape, the function differs.
    model, text = build()
    save_model(tmp_path, model, text)
    other, other_text = build(num_heads=1)
    with pytest.raises(CheckpointError, match=r"num_heads=2(.|\n)*num_heads=1"):
        load_weights(tmp_path, other, other_text)


def test_files_that_are_not_ours(tmp_path):
    model, text = build()
    with pytest.raises(FileNotFoundError, match=r"no model file .*model\.safetensors"):
        load_model(tmp_path)
    path = save_model(tmp_path, model, text).path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_model(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_model(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not written by save_model"):
        load_model(path)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "version", 99, "version 99"),
        (None, "format", "other", "format 'other'"),
        ("model", "no_such_field", 1, "bad header.*no_such_field"),
        ("attention", "name", "slaa", "bad header.*slaa.*did you mean 'sla'"),
    ],
)
def test_bad_headers(tmp_path, section, key, value, message):
    path = save_model(tmp_path, *build()).path

    def change(tensors, metadata):
        header = json.loads(metadata["sla"])
        (header if section is None else header[section])[key] = value
        metadata["sla"] = json.dumps(header)

    edit(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_a_file_of_version_1_is_read(tmp_path):
    path = save_model(tmp_path, *build()).path
    config = load_model(path).header.text

    def change(tensors, metadata):
        header = json.loads(metadata["sla"]) | {"version": 1}
        header["text"]["max_bytes"] = header["text"].pop("max_tokens")
        metadata["sla"] = json.dumps(header)

    edit(path, change)
    assert load_model(path).header.text == config


def test_full_disk_leaves_the_old_file(tmp_path):
    model, text = build()
    path = save_model(tmp_path, model, text, metadata={"which": "old"}).path
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*model\.safetensors.*nothing was repl"):
            save_model(tmp_path, *build(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert load_model(path).header.metadata == {"which": "old"}


def test_bad_arguments(tmp_path):
    model, text = build()
    with pytest.raises(TypeError, match="must be a VideoDiT"):
        save_model(tmp_path, text)
    with pytest.raises(TypeError, match="must be a TrainedTextEncoder"):
        save_model(tmp_path, model, model)
    with pytest.raises(TypeError, match="metadata is not JSON"):
        save_model(tmp_path, model, text, metadata={"x": object()})
    with pytest.raises(ValueError, match="must be the model's text_dim, 8"):
        save_model(tmp_path, build(text_dim=8)[0], text)
    assert list(tmp_path.iterdir()) == []
