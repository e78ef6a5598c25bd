"""DOVER: technical and aesthetic quality of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone, state_dict


class Dover(nn.Module):
    """Raw technical and aesthetic scores of a uint8 video (T, 3, H, W), by the package `dover`.

    The package cuts random fragments of the frames; the random numbers are always the same here.
    """

    # The package's dover.yml.
    _VIEWS: dict[str, dict[str, int]] = {  # noqa: RUF012
        "technical": {
            "fragments_h": 7,
            "fragments_w": 7,
            "fsize_h": 32,
            "fsize_w": 32,
            "aligned": 32,
            "clip_len": 32,
            "frame_interval": 2,
            "num_clips": 3,
        },
        "aesthetic": {
            "size_h": 224,
            "size_w": 224,
            "clip_len": 32,
            "frame_interval": 2,
            "t_frag": 32,
            "num_clips": 1,
        },
    }
    _MEAN = (123.675, 116.28, 103.53)
    _STD = (58.395, 57.12, 57.375)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> tuple[float, float]:
        from dover.datasets import UnifiedFrameSampler
        from dover.datasets.dover_datasets import get_single_view

        samplers = {
            "technical": UnifiedFrameSampler(32, 3, 2),
            "aesthetic": UnifiedFrameSampler(1, 32, 2, 1),
        }
        shape = (3, 1, 1, 1)
        mean = torch.tensor(self._MEAN, device=video.device).view(shape)
        std = torch.tensor(self._STD, device=video.device).view(shape)
        views = {}
        numpy_state = np.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                np.random.seed(0)  # noqa: NPY002
                for key, options in self._VIEWS.items():
                    frames = torch.as_tensor(samplers[key](len(video), False), dtype=torch.long)
                    view = video[frames.to(video.device)].float().transpose(0, 1)
                    view = (get_single_view(view, key, **options) - mean) / std
                    views[key] = view.unflatten(1, (options["num_clips"], -1)).transpose(0, 1)
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
        technical, aesthetic = (float(scores.mean()) for scores in self.model(views))
        return technical, aesthetic


def _dover() -> Dover:
    from dover.models import DOVER

    model = DOVER(
        backbone={
            "technical": {"type": "swin_tiny_grpb", "checkpoint": True, "pretrained": None},
            "aesthetic": {"type": "conv_tiny"},
        },
        backbone_preserve_keys="technical,aesthetic",
        divide_head=True,
        vqa_head={"in_channels": 768, "hidden_channels": 64},
    )
    return Dover(model)


def _load_dover(path: Path) -> nn.Module:
    network = _dover()
    network.model.load_state_dict(state_dict(path))
    return network


register_backbone(
    Backbone(
        "dover",
        "DOVER",
        (
            Source(
                (WeightFile("DOVER.pth", "GitHub VQAssessment/DOVER, release v0.1.0"),),
                # A package of this name in the index is something else.
                {"dover.models": "install from a copy of GitHub VQAssessment/DOVER"},
                _load_dover,
            ),
        ),
        random=_dover,
    )
)
