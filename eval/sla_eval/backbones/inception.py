"""Inception-v3 of the Frechet inception distance."""

from __future__ import annotations

import io
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


class Inception(nn.Module):
    """Pool features (N, 2048) of uint8 frames (N, 3, H, W), resized by the network itself."""

    num_features = 2048

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        return self.model(frames)


def _inception() -> Inception:
    """The network as its constructor draws it: the package's loads weights in the constructor."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    class Unloaded(NoTrainInceptionV3):
        loading = False

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(*args, **kwargs) if self.loading else None

    empty: Any = io.BytesIO()  # typed as a path, and given to `torch.load`
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    network.loading = True
    return Inception(network)


def _load_inception(path: Path) -> nn.Module:
    network = _inception()
    network.model.load_state_dict(state_dict(path))
    return network


register_backbone(
    Backbone(
        "inception_v3",
        "Inception-v3 of the TensorFlow FID",
        (
            Source(
                (
                    WeightFile(
                        "weights-inception-2015-12-05-6726825d.pth",
                        "GitHub toshas/torch-fidelity, releases",
                        "6726825d",
                    ),
                ),
                {"torch_fidelity": EVAL_EXTRA},
                _load_inception,
            ),
        ),
        random=_inception,
    )
)
