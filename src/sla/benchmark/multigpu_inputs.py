"""What the multi-GPU benchmark trains on: a config, and a latent cache of made-up clips."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla.benchmark.e2e import LATENTS, TEXT_TOKENS
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment
from sla.data.latents import LatentsConfig, write_cache
from sla.data.testing import moving_square
from sla.data.video import write_video
from sla.models.autoencoders import VideoAutoencoder
from sla.models.testing import tiny_wan_autoencoder, write_tiny_umt5
from sla.models.wan_sizes import WAN_CONFIGS
from sla.training.build import load_autoencoder, load_text_encoder

CONFIG = Path("configs/finetune/wan2.1-1.3b.yaml")
CLIPS = 4
FPS = 16
NEVER = 10**6  # steps; the benchmark ends the runs itself


@dataclass(frozen=True)
class Inputs:
    """A config to run.

    Attributes:
        config: the file.
        runs: folder of the runs.
        tokens: of a sample.
    """

    config: Path
    runs: Path
    tokens: int


class _SyntheticLatents(VideoAutoencoder):
    """Noise in place of the latents of an autoencoder, under its name.

    Args:
        real: the autoencoder that the run's config names.
    """

    def __init__(self, real: VideoAutoencoder, seed: int) -> None:
        super().__init__()
        self.identity = real.identity
        self.channels = real.channels
        self.temporal_factor = real.temporal_factor
        self.spatial_factor = real.spatial_factor
        self._generator = torch.Generator().manual_seed(seed)

    def _encode(self, video: Tensor) -> Tensor:
        shape = self.latent_shape(*video.shape[2:])
        return torch.randn(len(video), *shape, generator=self._generator)

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("these latents are of no video")


def write_inputs(
    folder: Path, size: str, *, changes: dict[str, dict[str, Any]], seed: int
) -> Inputs:
    """Write clips, tiny frozen models, a latent cache and the config of a run from it.

    The models are only compared with the cache: latents and text have the sizes of Wan's.

    Args:
        folder: where; on a disk that holds the runs' checkpoints.
        size: of `LATENTS` and `WAN_CONFIGS`.
        changes: of the paper's experiment, by section.

    Raises:
        ConfigError: not in a checkout, whose configs these are.
    """
    quiet_lightning()
    wan = WAN_CONFIGS[size]
    frames, height, width = LATENTS[size]
    models = folder / "models"
    channels = wan["in_channels"]
    tiny_wan_autoencoder(
        z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels
    ).save_pretrained(models / "vae")
    write_tiny_umt5(models, width=wan["text_dim"])
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "runs"), "init_weights": "random", "seed": seed},
        "data": {
            "source": "manifest",
            "root": str(_write_clips(folder / "clips", 1 + 4 * (frames - 1))),
            "num_frames": 1 + 4 * (frames - 1),
            "height": 8 * height,
            "width": 8 * width,
            "fps": FPS,
            "caption_dropout": 0.0,
            "num_workers": 2,
        },
        "model": {"size": size, "text_tokens": TEXT_TOKENS[size]},
        "autoencoder": {"source": str(models), "revision": ""},
        "text_encoder": {
            "source": str(models),
            "revision": "",
            "max_tokens": TEXT_TOKENS[size],
            "dtype": "float32",
        },
        "sampling": {"num_prompts": 0},
    }
    for section, changed in changes.items():
        values.setdefault(section, {}).update(changed)
    path = _write_config(folder / "clips.yaml", values)
    experiment = load_experiment(path)
    real = load_autoencoder(experiment.autoencoder)
    text = load_text_encoder(experiment.text_encoder, experiment.text)
    write_cache(
        folder / "cache",
        experiment.data,
        _SyntheticLatents(real, seed),
        text,
        LatentsConfig(device="cpu"),
        progress=False,
    )
    values["data"] |= {"source": "latents", "cache": str(folder / "cache")}
    tokens = frames * (height // 2) * (width // 2)
    return Inputs(_write_config(folder / "run.yaml", values), folder / "runs", tokens)


def _write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"include": [str(CONFIG.resolve())], **values}, indent=1))
    return path


def _write_clips(folder: Path, frames: int) -> Path:
    """Small clips, long enough; what they show does not matter."""
    lines = []
    for number in range(CLIPS + 1):
        name = f"clip-{number}.mp4"
        write_video(folder / name, moving_square(frames + 2, 60, 104, shade=40 * number), fps=FPS)
        entry = {
            "id": name,
            "video": name,
            "caption": " ".join(["a red ball rolls"] * (1 + number)),
            "split": "train" if number < CLIPS else "val",
        }
        lines.append(json.dumps(entry))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


__all__ = ["CONFIG", "NEVER", "Inputs", "write_inputs"]
