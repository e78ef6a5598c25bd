"""LPIPS on AlexNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla_eval.backbones.registry import (
    EVAL_EXTRA,
    Backbone,
    Source,
    WeightFile,
    register_backbone,
    state_dict,
)


class Lpips(nn.Module):
    """Distances (N,) of frames (N, 3, H, W), levels -1 to 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, references: Tensor) -> Tensor:
        return self.model(frames, references).flatten()


def _lpips() -> Lpips:
    # The heads come with torchmetrics; only the trunk's weights would be downloaded.
    from torchmetrics.functional.image.lpips import _LPIPS

    return Lpips(_LPIPS(pretrained=True, net="alex", pnet_rand=True))


def _load_lpips(path: Path) -> nn.Module:
    network: Any = _lpips()
    trunk = state_dict(path)
    # torchmetrics cuts the trunk into slices and keeps each layer's number: net.slice2.3.weight
    # is the trunk's features.3.weight. The classifier is not used.
    for key, parameter in network.model.net.state_dict(keep_vars=True).items():
        source = trunk["features." + key.split(".", 1)[1]]
        if source.shape != parameter.shape:
            raise ValueError(f"{key} has shape {tuple(source.shape)}")
        with torch.no_grad():
            parameter.copy_(source)
    return network


register_backbone(
    Backbone(
        "lpips_alex",
        "LPIPS on AlexNet",
        (
            Source(
                (
                    WeightFile(
                        "alexnet-owt-7be5be79.pth", "torchvision's AlexNet weights", "7be5be79"
                    ),
                ),
                {"torchvision": EVAL_EXTRA},
                _load_lpips,
            ),
        ),
        random=_lpips,
    )
)
