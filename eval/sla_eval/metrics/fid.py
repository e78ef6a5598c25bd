"""Frechet inception distance."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from sla_eval.metrics.frechet import FrechetMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_batch_size, chunks


@register_metric
class FID(FrechetMetric):
    """Distance of a set's frames from the frames of a reference set, in the features of Inception.

    Formula: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), with m, S the mean and covariance of the
    2,048 pool features of Inception-v3 over all frames of all videos of a set; in float64.

    Inputs: uint8 videos (T, 3, H, W) in two sets of at least 2 videos each. The network resizes the
    frames itself (299 x 299, as TensorFlow did).
    Range: 0 (the same features) to infinity. Lower is better.
    Average: none, it is one number a set; a longer video has more frames in it. It is biased: few
    frames give a larger value, and frames of one video count as independent, which they are not.
    Source: Heusel et al. 2017 (arXiv 1706.08500); equals
    `torchmetrics.image.fid.FrechetInceptionDistance` on the same features, whose network it runs
    (torch-fidelity's).
    Deviations: frames of videos in place of single images. It keeps 8 KB a frame.

    Args:
        backbone: takes uint8 frames (N, 3, H, W) and gives (N, D); None loads Inception-v3.
        backbone_name: of a backbone that is given; the metric is then `fid_<backbone_name>`.
        weights_dir: see `sla_eval.backbones`.
        batch_size: frames at a time.

    >>> import torch
    >>> def mean_level(frames):
    ...     return frames.float().mean(dim=(2, 3))
    >>> metric = FID(backbone=mean_level, backbone_name="mean_level")
    >>> for level in (0, 50):
    ...     video = torch.full((4, 3, 16, 16), level, dtype=torch.uint8)
    ...     metric.update(video, video + 10)
    >>> metric.name, round(metric.compute().item(), 4)  # three means that differ by 10
    ('fid_mean_level', 300.0)
    """

    name = "fid"
    title = "FID"
    source = "Heusel et al. 2017 (arXiv 1706.08500), as torchmetrics; over all frames"
    backbones = ("inception_v3",)

    def __init__(
        self,
        backbone: Any = None,
        backbone_name: str | None = None,
        weights_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_name, weights_dir, **kwargs)
        self.batch_size = check_batch_size(batch_size)

    def features(self, video: Tensor) -> Tensor:
        return torch.cat([self.backbone(part) for part in chunks(video, self.batch_size)])
