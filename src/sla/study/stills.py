"""Attributes of single grey frames: what can be told of a clip without its colours and motion.

A held-out combination is one that training has not: a network that sees colour and motion learns
which objects they exclude, so on held-out clips it errs by what it has learnt. One that sees
neither cannot.

Shapes: B clips, T frames of which S are looked at, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla.study.plan import EvaluatorConfig

FRAMES = 8  # looked at of a clip, evenly spaced
_LUMA = (0.299, 0.587, 0.114)


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.convolutions(x))


class Stills(nn.Module):
    """A classifier of grey frames.

    Args:
        config: its sizes.
        classes: {attribute: its values}, of those that it tells.
    """

    def __init__(self, config: EvaluatorConfig, classes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        width = -(-config.width // 2)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(1, width, 3, 2, 1)
        self.stages = nn.Sequential(
            *(_Residual(a, b, 1 + (k > 0)) for k, (a, b) in enumerate(itertools.pairwise(widths)))
        )
        self.dropout = nn.Dropout(0.2)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[-1], len(values)) for name, values in classes.items()}
        )

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] to {attribute: logits (B, S, classes)}.

        In training frames are mirrored, shifted, and changed in brightness and contrast.
        """
        frames = grey_frames(video)
        if self.training:
            frames = _changed(frames)
        clips, stills = frames.shape[:2]
        pooled = self.stages(self.stem(frames.flatten(0, 1).unsqueeze(1))).mean((2, 3))
        pooled = self.dropout(pooled)
        return {
            name: head(pooled).unflatten(0, (clips, stills)) for name, head in self.heads.items()
        }


def grey_frames(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) to the brightness of `FRAMES` of the frames, or of all: (B, S, H, W)."""
    count = video.shape[2]
    chosen = torch.linspace(0, count - 1, min(FRAMES, count)).round().long().to(video.device)
    luma = torch.tensor(_LUMA, dtype=video.dtype, device=video.device)
    return torch.einsum("bcshw,c->bshw", video[:, :, chosen], luma)


def _changed(frames: Tensor) -> Tensor:
    if torch.rand(()) < 0.5:
        frames = frames.flip(-1)
    height, width = frames.shape[-2:]
    most = height // 8
    top, left = torch.randint(0, 2 * most + 1, (2,)).tolist()
    padded = F.pad(frames, (most,) * 4, mode="replicate")
    frames = padded[..., top : top + height, left : left + width]
    contrast, brightness, inverted = torch.rand(3, *frames.shape[:2], 1, 1).to(frames.device)
    frames = frames * (0.6 + 0.8 * contrast) + 0.6 * (brightness - 0.5)
    return torch.where(inverted < 0.3, -frames, frames)


__all__ = ["Stills"]
