"""ViCLIP, of the overall consistency."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sla_eval.backbones.registry import (
    EVAL_EXTRA,
    Backbone,
    Source,
    WeightFile,
    register_backbone,
    state_dict,
)
from sla_eval.viclip import ViCLIP


def _viclip() -> nn.Module:
    from open_clip.tokenizer import SimpleTokenizer

    return ViCLIP(SimpleTokenizer(context_length=32))


def _load_viclip(path: Path) -> nn.Module:
    network = _viclip()
    network.load_state_dict(state_dict(path, "model"))
    return network


register_backbone(
    Backbone(
        "viclip",
        "ViCLIP-L/14 (InternVid-10M-FLT)",
        (
            Source(
                (WeightFile("ViClip-InternVid-10M-FLT.pth", "hub: OpenGVLab/VBench_Used_Models"),),
                {"open_clip": EVAL_EXTRA, "torchvision": EVAL_EXTRA},
                _load_viclip,
            ),
        ),
        random=_viclip,
    )
)
