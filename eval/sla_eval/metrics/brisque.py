"""BRISQUE, by the package of this name."""

from __future__ import annotations

import math

from torch import Tensor

from sla_eval.metrics.base import NetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb


@register_metric
class Brisque(NetworkMetric):
    """Blind quality of the frames, from statistics of natural scenes.

    Formula: mean over frames of the BRISQUE of the package `brisque` with its own support vector
    machine.

    Inputs: uint8 video (T, 3, H, W), all frames, at their own size.
    Range: about 0 to 100; nothing bounds it. Lower is better.
    Average: over the frames of a video, then over videos.
    Source: Mittal et al. 2012, "No-reference image quality assessment in the spatial domain", as
    the package `brisque` 0.2 computes it (from greys of levels 0 to 1, so other packages give other
    numbers). It is another measure than VBench's imaging quality.

    Args:
        backbone: takes a frame, uint8 (H, W, 3), and gives a number; None loads the package's.
        weights_dir: not used, its weights are in the package.

    >>> import torch
    >>> metric = Brisque(backbone=lambda frame: frame.mean())
    >>> metric.update(torch.full((3, 3, 32, 32), 51, dtype=torch.uint8))
    >>> metric.compute().item()
    51.0
    """

    name = "brisque"
    title = "BRISQUE"
    higher_is_better = False
    value_range = (-math.inf, math.inf)
    source = "Mittal et al. 2012, of the package brisque"
    backbones = ("brisque",)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        check_rgb(video)
        frames = (frame.permute(1, 2, 0).cpu().numpy() for frame in video)
        value = sum(float(self.backbone(frame)) for frame in frames) / len(video)
        if not math.isfinite(value):
            raise ValueError(f"BRISQUE is not defined for this video (got {value}): a flat frame?")
        return value
