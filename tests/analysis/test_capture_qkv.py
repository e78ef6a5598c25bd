"""Capturing queries, keys and values of a model's attention, and their files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sla.analysis.capture_qkv import CaptureError, QKVSample, capture_qkv, load_qkv, save_qkv
from sla.attention import AttentionMethod, FullConfig
from sla.models.dit import VideoDiT
from sla.models.testing import open_branches, tiny_dit_config

GRID = (2, 4, 3)
TIMESTEPS = [10.0, 500.0, 990.0]


def model(tile: tuple[int, int, int] | None = None) -> VideoDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = VideoDiT(tiny_dit_config(), FullConfig(tile=tile))
    open_branches(network)
    return network.eval()


def forward(network: VideoDiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 3, 2, 8, 6, generator=generator)
    text = torch.randn(3, 4, 16, generator=generator)
    with torch.no_grad():
        output: Tensor = network(
            latents, torch.tensor(TIMESTEPS), text, torch.ones(3, 4, dtype=torch.bool)
        )
    return output


def capture(network: VideoDiT, **limits: object) -> list[QKVSample]:
    with capture_qkv(network, **{"per_layer": 8, **limits}) as samples:  # type: ignore[arg-type]
        forward(network)
    return samples


def test_samples_are_what_attention_was_given() -> None:
    network = model()
    given: list[tuple[Tensor, ...]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: given.append(args[:3]))
        for module in network.attention_modules()
    ]
    samples = capture(network)
    for hook in hooks:
        hook.remove()
    assert [(s.layer, s.timestep) for s in samples] == [(n, t) for n in (0, 1) for t in TIMESTEPS]
    for index, sample in enumerate(samples):
        layer, place = divmod(index, 3)
        for found, expected in zip(
            (sample.query, sample.key, sample.value), given[layer], strict=True
        ):
            assert found.shape == (2, 24, 16)
            assert found.is_contiguous()
            assert torch.equal(found, expected[place])
        assert (sample.grid, sample.tile, sample.always_critical) == (GRID, None, 0)


def test_the_model_is_left_as_it_was() -> None:
    network = model()
    expected = forward(network)
    with capture_qkv(network, per_layer=1) as samples:
        assert torch.equal(forward(network), expected)
    assert len(samples) == 2
    forward(network)
    assert len(samples) == 2, "captured after the block"
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_samples_give_the_layer_output_back() -> None:
    network = model(tile=(1, 2, 2))
    outputs: list[Tensor] = []
    first: AttentionMethod = next(iter(network.attention_modules()))
    hook = first.register_forward_hook(lambda module, args, output: outputs.append(output))
    samples = capture(network)
    hook.remove()
    context = samples[1].context()
    assert (context.grid, context.tile) == (GRID, (1, 2, 2))
    assert context.timestep is not None
    assert context.timestep.tolist() == [500.0]
    parts = (samples[1].query[None], samples[1].key[None], samples[1].value[None])
    torch.testing.assert_close(first(*parts, context)[0], outputs[0][1], atol=1e-6, rtol=1e-5)


def test_what_is_kept_is_bounded() -> None:
    kept = capture(model(), per_layer=2)
    assert [(s.layer, s.timestep) for s in kept] == [(n, t) for n in (0, 1) for t in TIMESTEPS[:2]]
    assert {s.layer for s in capture(model(), layers=[1])} == {1}
    size = 3 * 2 * 24 * 16 * 4
    assert kept[0].num_bytes == size
    assert len(capture(model(), max_bytes=6 * size)) == 6
    network = model()
    with pytest.raises(CaptureError, match="sample 6 makes"):
        capture(network, max_bytes=6 * size - 1)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_bad_arguments_are_named() -> None:
    with (
        pytest.raises(ValueError, match="Linear holds no attention method"),
        capture_qkv(nn.Linear(2, 2), per_layer=1),
    ):
        pass
    with pytest.raises(ValueError, match=r"layers holds \[7\]; the model has layers \[0, 1\]"):
        capture(model(), layers=[0, 7])
    with pytest.raises(ValueError, match="per_layer is 0"):
        capture(model(), per_layer=0)
    with pytest.raises(CaptureError, match="no samples"):
        save_qkv("nowhere.safetensors", [])


def test_a_file_gives_the_samples_back(tmp_path: Path) -> None:
    samples = capture(model(tile=(1, 2, 2)))
    bare = QKVSample(5, None, *(torch.ones(1, 4, 2, dtype=torch.bfloat16) for _ in range(3)))
    samples.append(bare)
    path = tmp_path / "new" / "qkv.safetensors"
    save_qkv(path, samples)
    loaded = load_qkv(path)
    assert len(loaded) == len(samples)
    for found, expected in zip(loaded, samples, strict=True):
        for name in ("layer", "timestep", "grid", "tile", "always_critical"):
            assert getattr(found, name) == getattr(expected, name)
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert [s.timestep for s in load_qkv(path, layers=[1])] == TIMESTEPS
    assert [p.name for p in path.parent.iterdir()] == ["qkv.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path, bad = tmp_path / "qkv.safetensors", tmp_path / "bad.safetensors"
    save_qkv(path, capture(model(), per_layer=1))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sla"])

    def written(change: dict[str, object], drop: str = "", **other: Tensor) -> Path:
        kept = {name: tensor for name, tensor in tensors.items() if name != drop}
        text = json.dumps({**header, **change})
        save_file({**kept, **other}, bad, metadata={"sla": text})
        return bad

    assert len(load_qkv(written({}))) == 2
    for change, message in (
        ({"version": 2}, "version 2; this code reads"),
        ({"format": "x"}, "format 'x'"),
        ({"samples": header["samples"][:1]}, "describes 1 samples; tensors missing or unknown"),
        ({"samples": [{"layer": 0}]}, "each sample must be described by layer, timestep"),
        ({"samples": 3}, "header that cannot be read"),
    ):
        with pytest.raises(CaptureError, match=message):
            load_qkv(written(change))
    with pytest.raises(CaptureError, match=r"missing or unknown: 00001\.key"):
        load_qkv(written({}, drop="00001.key"))
    with pytest.raises(CaptureError, match="missing or unknown: extra"):
        load_qkv(written({}, extra=torch.ones(1)))
    with pytest.raises(CaptureError, match="sample 1 has shapes"):
        load_qkv(written({}, drop="00001.key", **{"00001.key": torch.ones(2, 3, 16)}))
    save_file(tensors, bad)
    with pytest.raises(CaptureError, match="has no 'sla' header"):
        load_qkv(bad)
    bad.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CaptureError, match="damaged or cut short"):
        load_qkv(bad)
    with pytest.raises(FileNotFoundError, match=r"no file of captured samples .*none"):
        load_qkv(tmp_path / "none.safetensors")
