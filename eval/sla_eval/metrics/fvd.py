"""Frechet video distance."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from sla_eval.metrics.frechet import FrechetMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import center_crop, chunks, resize_shorter

_CHUNK = 16  # frames resized at a time


@register_metric
class FVD(FrechetMetric):
    """Distance of a set of videos from a reference set, in the features of I3D.

    Formula: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), with m, S the mean and covariance of the
    400 logits of I3D, trained on Kinetics-400, over the videos of a set; in float64.

    Inputs: uint8 videos (T, 3, H, W), T at least 10, in two sets of at least 2 videos each; all
    frames at once. Each is resized to a shorter side of 224 pixels (bilinear, no antialiasing),
    cropped to its middle square, and levels are mapped to -1 to 1.
    Range: 0 (the same features) to infinity. Lower is better.
    Average: none, it is one number a set. It is biased: few videos give a larger value, and with
    fewer than about 2,000 only sets of one size should be compared.
    Source: Unterthiner et al. 2018 (arXiv 1812.01717); I3D as TorchScript and its preprocessing
    as in GitHub universome/fvd-comparison, which agrees with the original in TensorFlow.
    Deviations: the crop keeps the aspect where the original squeezes the frame to a square; square
    videos have the same value.

    Args:
        backbone: takes videos (N, 3, T, 224, 224), levels -1 to 1, and gives (N, D); None loads
            I3D.
        backbone_name: of a backbone that is given; the metric is then `fvd_<backbone_name>`.
        weights_dir: see `sla_eval.backbones`.
        min_frames: of a video; I3D halves time several times.

    >>> import torch
    >>> def mean_level(videos):
    ...     return videos.mean(dim=(2, 3, 4))
    >>> metric = FVD(backbone=mean_level, backbone_name="mean_level", min_frames=1)
    >>> for level in (0, 51):
    ...     video = torch.full((4, 3, 16, 16), level, dtype=torch.uint8)
    ...     metric.update(video, video + 51)
    >>> metric.name, round(metric.compute().item(), 4)  # three means that differ by 0.4
    ('fvd_mean_level', 0.48)
    """

    name = "fvd"
    title = "FVD"
    source = "Unterthiner et al. 2018 (arXiv 1812.01717); I3D of GitHub universome/fvd-comparison"
    backbones = ("i3d_kinetics",)

    def __init__(
        self,
        backbone: Any = None,
        backbone_name: str | None = None,
        weights_dir: str | os.PathLike[str] | None = None,
        min_frames: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, backbone_name, weights_dir, **kwargs)
        self.min_frames = min_frames

    def check(self, argument: str, video: Tensor) -> None:
        super().check(argument, video)
        if len(video) < self.min_frames:
            raise ValueError(
                f"{argument} must have at least {self.min_frames} frames, got {len(video)}"
            )

    def features(self, video: Tensor) -> Tensor:
        frames = torch.cat(
            [
                center_crop(resize_shorter(part, 224, "bilinear"), 224) / 127.5 - 1
                for part in chunks(video, _CHUNK)
            ]
        )
        return self.backbone(frames.transpose(0, 1)[None])
