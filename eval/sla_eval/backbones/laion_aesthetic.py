"""LAION's aesthetic head for CLIP."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sla_eval.backbones.registry import Backbone, Source, WeightFile, register_backbone, state_dict


def _aesthetic_head() -> nn.Module:
    return nn.Linear(768, 1)


def _load_aesthetic_head(path: Path) -> nn.Module:
    head = _aesthetic_head()
    head.load_state_dict(state_dict(path))
    return head


register_backbone(
    Backbone(
        "laion_aesthetic",
        "LAION's linear aesthetic head for CLIP ViT-L/14",
        (
            Source(
                (WeightFile("sa_0_4_vit_l_14_linear.pth", "GitHub LAION-AI/aesthetic-predictor"),),
                {},
                _load_aesthetic_head,
            ),
        ),
        random=_aesthetic_head,
    )
)
