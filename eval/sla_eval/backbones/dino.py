"""DINO ViT-B/16, of the subject consistency."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone, state_dict
from sla_eval.dino import DinoViT


def _load_dino(path: Path) -> nn.Module:
    network = DinoViT()
    network.load_state_dict(state_dict(path))
    return network


register_backbone(
    Backbone(
        "dino_vitb16",
        "DINO ViT-B/16",
        (
            Source(
                (
                    WeightFile(
                        "dino_vitbase16_pretrain.pth",
                        "backbone-only weights of ViT-B/16, GitHub facebookresearch/dino",
                    ),
                ),
                {},
                _load_dino,
            ),
        ),
        random=DinoViT,
    )
)
