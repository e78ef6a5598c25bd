"""Video autoencoders: pixels to the latents that a model is trained on, and back.

Shapes: B videos, T x H x W pixels with 3 channels in [-1, 1]; latents C x T' x H' x W'.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla.models.identity import DTYPES, require_source, weights_checksum

AUTOENCODERS = ("pixel", "wan")


@dataclass
class AutoencoderConfig:
    """Which autoencoder a model's latents come from.

    Attributes:
        name: `pixel` (none: the model is trained on pixels) or `wan` (diffusers' AutoencoderKLWan).
        source: hub id or local folder of the weights; empty for `pixel`.
        revision: commit of the hub repository, all 40 digits, so that nobody can change the weights
            under a cache; not used for a local folder.
        subfolder: where the autoencoder lies in the repository or folder; empty for its top.
        dtype: of its weights: `float32`, `bfloat16` or `float16`.

    Raises:
        ValueError: a value that cannot be used; names the field and what would do.
    """

    name: str = "pixel"
    source: str = ""
    revision: str = ""
    subfolder: str = "vae"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.name not in AUTOENCODERS:
            raise ValueError(
                f"autoencoder.name is {self.name!r}; it must be one of {', '.join(AUTOENCODERS)}"
            )
        if self.name != "pixel":
            require_source("autoencoder", self.name, self.source, self.revision, self.dtype)


class VideoAutoencoder(nn.Module, ABC):
    """Encodes videos to latents and decodes them.

    Attributes:
        identity: name and checksum: two autoencoders with one identity give the same latents.
        channels: C, of the latents.
        temporal_factor: T = 1 + (T' - 1) * temporal_factor: the first frame has a latent frame of
            its own.
        spatial_factor: H / H' = W / W'.
    """

    identity: str
    channels: int
    temporal_factor: int
    spatial_factor: int

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T', H', W') of a video of T x H x W.

        Raises:
            ValueError: sizes that do not divide; names them and the nearest that would do.
        """
        if frames < 1 or (frames - 1) % self.temporal_factor:
            near = 1 + max(0, round((frames - 1) / self.temporal_factor)) * self.temporal_factor
            raise ValueError(
                f"frames is {frames}; for {self.identity.split()[0]} it must be 1 more than a "
                f"multiple of {self.temporal_factor}, such as {near}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial_factor:
                near = max(1, round(size / self.spatial_factor)) * self.spatial_factor
                raise ValueError(
                    f"{name} is {size}; for {self.identity.split()[0]} it must be a positive "
                    f"multiple of {self.spatial_factor}, such as {near}"
                )
        return (
            self.channels,
            1 + (frames - 1) // self.temporal_factor,
            height // self.spatial_factor,
            width // self.spatial_factor,
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T', H', W') float32, about unit variance.

        Deterministic: where the encoder gives a distribution, its mode is taken.

        Raises:
            ValueError: another shape; see `latent_shape`.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}; it must be (B, 3, T, H, W)")
        wanted = (video.shape[0], *self.latent_shape(*video.shape[2:]))
        latents = self._encode(video)
        if latents.shape != wanted:  # a config whose factors are not those of its network
            raise ValueError(
                f"{self.identity}: latents have shape {tuple(latents.shape)}, its config's factors "
                f"promise {wanted}"
            )
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, 3, T, H, W) float32.

        Raises:
            ValueError: another shape.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; they must be "
                f"(B, {self.channels}, T, H, W)"
            )
        return self._decode(latents)

    @abstractmethod
    def _encode(self, video: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class PixelAutoencoder(VideoAutoencoder):
    """The identity: the demo model is trained on pixels, which it patchifies itself."""

    identity = "pixel"
    channels = 3
    temporal_factor = 1
    spatial_factor = 1

    def _encode(self, video: Tensor) -> Tensor:
        return video.float()

    def _decode(self, latents: Tensor) -> Tensor:
        return latents.float()


class WanAutoencoder(VideoAutoencoder):
    """Wan's causal video autoencoder, frozen, with its normalisation of the latents.

    Latents are (mode - latents_mean) / latents_std, channel by channel, the numbers being those of
    the autoencoder's config, as Wan's pipelines have them.

    Args:
        autoencoder: diffusers' `AutoencoderKLWan`.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        config = autoencoder.config
        self.channels = int(config.z_dim)
        self.temporal_factor = int(config.scale_factor_temporal)
        self.spatial_factor = int(config.scale_factor_spatial)
        for name in ("latents_mean", "latents_std"):
            values = getattr(config, name)
            if len(values) != self.channels:
                raise ValueError(
                    f"{name} of the autoencoder's config has {len(values)} numbers; it must have "
                    f"{self.channels}, one a channel"
                )
        for buffer, values in (("_mean", config.latents_mean), ("_std", config.latents_std)):
            tensor = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)
            self.register_buffer(buffer, tensor, persistent=False)
        # Keys that begin with _ say where it was loaded from and by which diffusers.
        numbers = {key: value for key, value in config.items() if not key.startswith("_")}
        checksum = weights_checksum(autoencoder, numbers)
        self.identity = f"{type(autoencoder).__name__} sha256:{checksum}"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "vae",
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> WanAutoencoder:
        """Load from a hub id or a local folder.

        Args:
            source: hub id (`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`), or folder.
            revision: commit on the hub.
            subfolder: where in `source`; "" for its top.
            dtype: dtype of the weights; the normalisation stays float32.
            local_files_only: never ask the network.

        Raises:
            FileNotFoundError: files are not there and could not be had; says which to fetch.
            ValueError: the weights do not fill the network.
        """
        # Heavy, and only needed here.
        from diffusers import AutoencoderKLWan

        name = os.fspath(source)
        try:
            loaded: Any = AutoencoderKLWan.from_pretrained(
                name,
                subfolder=subfolder or None,
                revision=revision,
                torch_dtype=dtype,
                local_files_only=local_files_only,
                low_cpu_mem_usage=False,  # else what a file lacks stays on the meta device
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(_missing_message(name, subfolder, error)) from error
        autoencoder, report = loaded
        # diffusers fills what a file lacks with random numbers and only logs it.
        lacking = [*report["missing_keys"], *map(str, report.get("mismatched_keys", ()))]
        if lacking:
            listing = ", ".join(sorted(lacking)[:12])
            raise ValueError(f"{name}: the file does not fill these weights: {listing}")
        return cls(autoencoder)

    def train(self, mode: bool = True) -> WanAutoencoder:
        """Does nothing: the autoencoder is frozen and stays in evaluation mode."""
        return super().train(False)

    def _encode(self, video: Tensor) -> Tensor:
        with torch.autocast(video.device.type, enabled=False):  # `dtype` decides
            mode = self.autoencoder.encode(video.to(self.autoencoder.dtype)).latent_dist.mode()
        return (mode.float() - self._mean) / self._std

    def _decode(self, latents: Tensor) -> Tensor:
        raw = latents.float() * self._std + self._mean
        with torch.autocast(latents.device.type, enabled=False):
            return self.autoencoder.decode(raw.to(self.autoencoder.dtype)).sample.float()


def build_autoencoder(config: AutoencoderConfig) -> VideoAutoencoder:
    """The autoencoder of a config, on the CPU.

    Raises:
        FileNotFoundError, ValueError: from `WanAutoencoder.from_pretrained`.
    """
    if config.name == "pixel":
        return PixelAutoencoder()
    return WanAutoencoder.from_pretrained(
        config.source,
        revision=config.revision or None,
        subfolder=config.subfolder,
        dtype=DTYPES[config.dtype],
    )


def build_wan_autoencoder(dtype: torch.dtype, device: torch.device | str, *, seed: int = 0) -> Any:
    """diffusers' `AutoencoderKLWan` as Wan2.1 has it, with random weights, in evaluation mode.

    Args:
        dtype: of the weights.
        device: where to build it.
        seed: of the weights; the global generators are left as they are.
    """
    from diffusers import AutoencoderKLWan

    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        autoencoder: Any = AutoencoderKLWan()  # its defaults are Wan2.1's
    return nn.Module.to(autoencoder.eval(), dtype)  # diffusers' own `to` warns of any dtype


def _missing_message(name: str, subfolder: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    if Path(name).exists() or Path(name).is_absolute() or name.startswith("."):
        where = f"{name}/{subfolder}" if subfolder else name
        fetch = f"the folder {where} must hold config.json and the weights"
    else:
        include = f' --include "{subfolder}/*"' if subfolder else ""
        fetch = (
            f"fetch it once with `hf download {name}{include} --local-dir FOLDER` and give FOLDER "
            "instead of the name, or put it into the hub's cache"
        )
    return f"no AutoencoderKLWan in {name!r}: {fetch} ({first_line})"


__all__ = [
    "AUTOENCODERS",
    "AutoencoderConfig",
    "PixelAutoencoder",
    "VideoAutoencoder",
    "WanAutoencoder",
    "build_autoencoder",
    "build_wan_autoencoder",
]
