"""Video autoencoders: the identity, and a tiny Wan with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sla.models.autoencoders import (
    AutoencoderConfig,
    PixelAutoencoder,
    VideoAutoencoder,
    WanAutoencoder,
    build_autoencoder,
)
from sla.models.identity import weights_checksum
from sla.models.testing import tiny_wan_autoencoder

COMMIT = 40 * "a"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as Wan's repositories."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan_autoencoder().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def wan(folder: Path) -> WanAutoencoder:
    return WanAutoencoder.from_pretrained(folder)


def video(batch: int = 2, frames: int = 9, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def test_pixels_are_left_as_they_are() -> None:
    autoencoder = build_autoencoder(AutoencoderConfig())
    assert isinstance(autoencoder, PixelAutoencoder)
    assert autoencoder.latent_shape(7, 10, 12) == (3, 7, 10, 12)
    assert torch.equal(autoencoder.encode(video()), video())
    assert torch.equal(autoencoder.decode(video()), video())


def test_wan_has_the_shapes_it_promises(wan: WanAutoencoder) -> None:
    latents = wan.encode(video())
    assert latents.shape == (2, *wan.latent_shape(9, 16, 24)) == (2, 4, 3, 2, 3)
    assert latents.dtype == torch.float32
    decoded = wan.decode(latents)
    assert decoded.shape == video().shape
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert torch.equal(wan.encode(video()), latents), "the mode is taken, not a sample"


def test_wan_normalises_as_its_pipelines_do(wan: WanAutoencoder) -> None:
    mode = wan.autoencoder.encode(video()).latent_dist.mode()
    mean, std = wan.autoencoder.config.latents_mean, wan.autoencoder.config.latents_std
    latents = wan.encode(video())
    for channel in range(4):
        expected = (mode[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(latents[:, channel], expected)
    # WanPipeline before it decodes: latents / (1 / std) + mean.
    inverse = 1.0 / torch.tensor(std).view(1, -1, 1, 1, 1)
    raw = latents / inverse + torch.tensor(mean).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(wan.decode(latents), wan.autoencoder.decode(raw).sample)


def test_a_video_is_encoded_alone_as_in_a_batch(wan: WanAutoencoder) -> None:
    together = wan.encode(video(3))
    alone = torch.cat([wan.encode(one[None]) for one in video(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_wan_is_frozen(wan: WanAutoencoder) -> None:
    wan.train()
    assert not any(module.training for module in wan.modules())
    assert not any(parameter.requires_grad for parameter in wan.parameters())
    assert not wan.encode(video().requires_grad_()).requires_grad


def test_autocast_does_not_decide_the_precision(wan: WanAutoencoder) -> None:
    expected = wan.encode(video())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wan.encode(video()), expected)
        assert wan.decode(expected).dtype == torch.float32


def test_one_identity_for_the_same_weights_only(folder: Path, wan: WanAutoencoder) -> None:
    assert WanAutoencoder.from_pretrained(folder).identity == wan.identity
    assert wan.identity.startswith("AutoencoderKLWan sha256:")
    others = [tiny_wan_autoencoder(seed=1), tiny_wan_autoencoder(latents_std=[1.0, 1.5, 0.5, 1.0])]
    changed = tiny_wan_autoencoder()
    with torch.no_grad():
        changed.encoder.conv_in.weight.view(-1)[0] += 1e-6
    identities = {WanAutoencoder(other).identity for other in [*others, changed]}
    identities.add(WanAutoencoder.from_pretrained(folder, dtype=torch.bfloat16).identity)
    assert len(identities | {wan.identity, PixelAutoencoder().identity}) == 6


def test_checksums_tell_names_shapes_and_scalars_apart() -> None:
    class Holder(nn.Module):
        def __init__(self, name: str, tensor: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer(name, tensor)

    ones = torch.ones(4)
    modules = [
        *(Holder("a", ones), Holder("b", ones), Holder("a", ones.view(2, 2))),
        *(Holder("a", ones.double()), Holder("a", torch.tensor(1.0))),
    ]
    assert len({weights_checksum(module) for module in modules}) == 5
    assert weights_checksum(modules[0]) == weights_checksum(Holder("a", torch.ones(8)[::2]))
    assert weights_checksum(modules[0], {"x": 1}) != weights_checksum(modules[0])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 16, 24), r"frames is 8; for AutoencoderKLWan .* 1 more than a multiple of 4.*as 9"),
        ((9, 20, 24), r"height is 20; .*multiple of 8, such as 16"),
        ((9, 16, 3), r"width is 3; .*multiple of 8, such as 8"),
    ],
)
def test_sizes_that_do_not_divide(
    wan: WanAutoencoder, size: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wan.encode(video(1, *size))


@pytest.mark.parametrize("make", [PixelAutoencoder, lambda: WanAutoencoder(tiny_wan_autoencoder())])
def test_other_shapes_are_refused(make: type[VideoAutoencoder]) -> None:
    autoencoder = make()
    with pytest.raises(ValueError, match=r"video has shape \(3, 9, 16, 24\)"):
        autoencoder.encode(video()[0])
    with pytest.raises(ValueError, match=r"latents have shape \(1, 7, 2, 2, 2\)"):
        autoencoder.decode(torch.zeros(1, 7, 2, 2, 2))


def test_factors_that_the_network_does_not_have() -> None:
    wrong = WanAutoencoder(tiny_wan_autoencoder(scale_factor_spatial=4))
    with pytest.raises(ValueError, match="its config's factors promise"):
        wrong.encode(video())
    with pytest.raises(ValueError, match="latents_mean of the autoencoder's config has 1 numbers"):
        WanAutoencoder(tiny_wan_autoencoder(latents_mean=[0.0]))


def test_weights_that_are_not_there_say_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/vae must hold config\.json and the weights"):
        WanAutoencoder.from_pretrained(tmp_path, local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r'hf download owner/name --include "vae/\*"'):
        WanAutoencoder.from_pretrained("owner/name", local_files_only=True)


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fill these weights: decoder\.conv_in\.bias"):
        WanAutoencoder.from_pretrained(tmp_path / "copy")


def test_config_builds_what_it_names(folder: Path, wan: WanAutoencoder) -> None:
    config = AutoencoderConfig(name="wan", source=str(folder))
    assert build_autoencoder(config).identity == wan.identity
    # A hub id with its commit is a sound config.
    AutoencoderConfig(name="wan", source="owner/name", revision=COMMIT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "vae"}, "autoencoder.name is 'vae'; it must be one of pixel, wan"),
        ({"name": "wan"}, "autoencoder.source is empty"),
        ({"name": "wan", "source": "owner/name"}, "autoencoder.revision is ''"),
        ({"name": "wan", "source": "o/n", "revision": "main"}, "revision is 'main'.* 40 digits"),
        (
            {"name": "wan", "source": "o/n", "revision": COMMIT, "dtype": "int8"},
            "autoencoder.dtype is 'int8'",
        ),
    ],
)
def test_configs_that_cannot_be_used(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**fields)
