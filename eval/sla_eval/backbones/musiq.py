"""MUSIQ trained on SPAQ, of the imaging quality."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone


class Musiq(nn.Module):
    """Scores, about 0 to 100, of one frame (1, 3, H, W) of levels 0 to 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor) -> Tensor:
        return self.model(frame)


def _musiq(**weights: Any) -> nn.Module:
    from pyiqa.archs.musiq_arch import MUSIQ

    return Musiq(MUSIQ(**weights))


def _load_musiq(path: Path) -> nn.Module:
    return _musiq(pretrained_model_path=str(path))


register_backbone(
    Backbone(
        "musiq_spaq",
        "MUSIQ trained on SPAQ",
        (
            Source(
                (
                    WeightFile(
                        "musiq_spaq_ckpt-358bb6af.pth",
                        "GitHub chaofengc/IQA-PyTorch, release v0.1-weights",
                        "358bb6af",
                    ),
                ),
                {"pyiqa": "pip install pyiqa; for non-commercial use"},
                _load_musiq,
            ),
        ),
        random=functools.partial(_musiq, pretrained=False),
    )
)
