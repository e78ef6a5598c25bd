"""Learned perceptual image patch similarity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla_eval.metrics.base import BatchedNetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb, chunks

_SMALLEST = 32  # pixels; below, AlexNet's last layers have none


@register_metric
class LPIPS(BatchedNetworkMetric):
    """Distance from the reference video in the features of AlexNet, frame by frame.

    Formula: sum over layers of the mean over positions of w_l . (f_l - g_l)^2, with f and g the
    features of a frame and its reference, each position's of length 1, and w_l learned.

    Inputs: uint8 video and reference, both (T, 3, H, W), H and W at least 32, at their own size;
    levels are mapped to -1 to 1.
    Range: 0 (identical) to about 1; nothing bounds it. Lower is better.
    Average: over the frames of a video, then over videos.
    Source: Zhang et al. 2018 (arXiv 1801.03924), version 0.1 of the weights, AlexNet; equals
    `torchmetrics.functional.image.learned_perceptual_image_patch_similarity` with net_type="alex".

    Args:
        backbone: takes frames and references (N, 3, H, W), levels -1 to 1, and gives distances
            (N,); None loads AlexNet with torchmetrics' heads.
        weights_dir: see `sla_eval.backbones`.
        batch_size: frames at a time.

    >>> import torch
    >>> metric = LPIPS(backbone=lambda frames, others: (frames - others).abs().mean((1, 2, 3)))
    >>> video = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    >>> metric.update(video, video + 51)
    >>> round(metric.compute().item(), 6)
    0.4
    """

    name = "lpips"
    title = "LPIPS (AlexNet)"
    higher_is_better = False
    value_range = (0.0, math.inf)
    needs_reference = True
    source = "Zhang et al. 2018 (arXiv 1801.03924), AlexNet, heads of torchmetrics"
    backbones = ("lpips_alex",)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        assert reference is not None  # checked by update
        check_rgb(video)
        height, width = video.shape[-2:]
        if min(height, width) < _SMALLEST:
            raise ValueError(
                f"video must be at least {_SMALLEST} pixels high and wide, got {height} x {width}"
            )
        parts = zip(
            chunks(video.to(self.device), self.batch_size),
            chunks(reference.to(self.device), self.batch_size),
            strict=True,
        )
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for frames, others in parts:
            distances = self.backbone(frames / 127.5 - 1, others / 127.5 - 1)
            total += distances.double().sum()
        return total.item() / len(video)
