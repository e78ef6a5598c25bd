"""BRISQUE, whose weights come with its package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from sla_eval.backbones.registry import Backbone, Source, register_backbone


class Brisque(nn.Module):
    """The package's score of a frame, uint8 (H, W, 3)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        scale = model.scale_features

        # The package makes arrays of one number where it means a number, which numpy 2.4 refuses.
        def scale_numbers(features: Sequence[Any]) -> Any:
            return scale([np.asarray(feature, dtype=np.float64).item() for feature in features])

        model.scale_features = scale_numbers

    def forward(self, frame: np.ndarray) -> float:
        return float(self.model.score(frame))


def _load_brisque() -> nn.Module:
    from brisque import BRISQUE

    return Brisque(BRISQUE(url=False))


register_backbone(
    Backbone(
        "brisque",
        "BRISQUE",
        (
            Source(
                (),
                {
                    "brisque": "pip install brisque",
                    "cv2": "pip install opencv-python-headless",
                },
                _load_brisque,
            ),
        ),
    )
)
