"""The networks that metrics run: where their weights are looked for, and how they are loaded.

Nothing is downloaded. Weights lie in one folder: the argument `weights_dir`, or else the
environment variable SLA_EVAL_WEIGHTS, or else `weights/`. Files keep the names they are published
under. Loading is strict: a parameter too few or too many, or a checksum that is not the pinned one,
is an error. `backbone_table` lists all of them.

Every metric also takes its network as an argument, so that any other can be measured or tested
with; these are called as the classes here are.

`random_backbone` builds the same architectures with random weights, to measure speed where no
weights are: what they say about a video means nothing.
"""

from __future__ import annotations

from sla_eval.backbones import (  # noqa: F401  (each registers its networks)
    amt,
    brisque,
    clip,
    dino,
    dover,
    i3d,
    inception,
    laion_aesthetic,
    lpips,
    musiq,
    raft,
    viclip,
    vision_reward,
)
from sla_eval.backbones.clip import ClipBackbone
from sla_eval.backbones.registry import (
    DEFAULT_FOLDER,
    ENVIRONMENT_VARIABLE,
    Backbone,
    BackboneUnavailableError,
    Source,
    WeightFile,
    available_backbones,
    backbone_table,
    comes_with_weights,
    file_sha256,
    get_backbone,
    load_backbone,
    missing_backbone,
    missing_random_backbone,
    random_backbone,
    register_backbone,
    weight_checksums,
    weights_folder,
)

__all__ = [
    "DEFAULT_FOLDER",
    "ENVIRONMENT_VARIABLE",
    "Backbone",
    "BackboneUnavailableError",
    "ClipBackbone",
    "Source",
    "WeightFile",
    "available_backbones",
    "backbone_table",
    "comes_with_weights",
    "file_sha256",
    "get_backbone",
    "load_backbone",
    "missing_backbone",
    "missing_random_backbone",
    "random_backbone",
    "register_backbone",
    "weight_checksums",
    "weights_folder",
]
