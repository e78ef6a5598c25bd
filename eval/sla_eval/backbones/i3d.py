"""I3D, of the Frechet video distance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone


class I3D(nn.Module):
    """Logits (N, 400) of videos (N, 3, T, 224, 224), levels -1 to 1."""

    num_features = 400

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, videos: Tensor) -> Tensor:
        return self.model(videos, rescale=False, resize=False, return_features=True)


def _load_i3d(path: Path) -> nn.Module:
    return I3D(torch.jit.load(path, map_location="cpu"))


register_backbone(
    Backbone(
        "i3d_kinetics",
        "I3D trained on Kinetics-400",
        (
            Source(
                (
                    WeightFile(
                        "i3d_torchscript.pt",
                        "I3D as TorchScript, linked in GitHub universome/fvd-comparison",
                    ),
                ),
                {},
                _load_i3d,
            ),
        ),
        why_not_random="its architecture is in its TorchScript file alone",
    )
)
