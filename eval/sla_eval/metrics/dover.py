"""DOVER, by its own package."""

from __future__ import annotations

import torch
from torch import Tensor

from sla_eval.metrics.base import NetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb


@register_metric
class DoverScore(NetworkMetric):
    """Quality of a video as people would judge it, technical and aesthetic together.

    Formula: 1 / (1 + exp(-x)), x = 0.6104 (t - 0.1107) / 0.07355 + 0.3896 (a - 0.08285) / 0.03774,
    with t and a the package's technical and aesthetic scores.

    Inputs: uint8 video (T, 3, H, W), all frames; the package samples, cuts and resizes them.
    Range: 0 to 1. Higher is better.
    Average: over videos.
    Source: DOVER (arXiv 2211.04894) and `evaluate_one_video.py --fusion` of GitHub
    VQAssessment/DOVER.
    Deviations: the package cuts fragments at random places; here they are the same in each run.

    Args:
        backbone: uint8 video (T, 3, H, W) to (technical, aesthetic); None loads DOVER.
        weights_dir: see `sla_eval.backbones`.

    >>> import torch
    >>> metric = DoverScore(backbone=lambda video: (0.1107, 0.08285))
    >>> metric.update(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
    >>> metric.compute().item()
    0.5
    """

    name = "dover"
    title = "DOVER"
    higher_is_better = True
    value_range = (0.0, 1.0)
    source = "DOVER (arXiv 2211.04894), evaluate_one_video.py --fusion"
    backbones = ("dover",)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        check_rgb(video)
        technical, aesthetic = self.backbone(video.to(self.device))
        x = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic - 0.08285) / 0.03774
        return torch.sigmoid(torch.tensor(x, dtype=torch.float64)).item()
