"""Peak signal-to-noise ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla_eval.metrics.base import VideoMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import chunks, frames_at_once


@register_metric
class PSNR(VideoMetric):
    """Peak signal-to-noise ratio against the reference video, in dB.

    Formula: 10 log10(255^2 / MSE), with MSE over all frames, channels and pixels of the video.

    Inputs: uint8 video and reference, both (T, C, H, W).
    Range: 0 (every pixel off by 255) to infinity: an identical video has infinity, which is
    reported and makes the mean over videos infinite. It is not capped, as any cap would be an
    arbitrary number in the mean.
    Direction: higher is better.
    Average: one MSE a video (not the mean of its frames' PSNR, which one identical frame would
    make infinite), then the mean of the PSNR over videos.
    Source: the usual definition; equals
    `torchmetrics.functional.image.peak_signal_noise_ratio(video, reference, data_range=255)`.

    >>> import torch
    >>> video = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    >>> metric = PSNR()
    >>> metric.update(video, video + 1)
    >>> round(metric.compute().item(), 4)
    48.1308
    >>> metric.reset()
    >>> metric.update(video, video)
    >>> metric.compute().item()
    inf
    """

    name = "psnr"
    title = "PSNR (dB)"
    higher_is_better = True
    value_range = (0.0, math.inf)
    needs_reference = True
    source = "torchmetrics peak_signal_noise_ratio, one MSE a video"

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        assert reference is not None  # checked by update
        # Integers, a few frames at a time: exact, and a long video is never held in a wider type.
        size = frames_at_once(video)
        pairs = zip(chunks(video, size), chunks(reference, size), strict=True)
        total = int(sum((a.to(torch.int32) - b.to(torch.int32)).square().sum() for a, b in pairs))
        if total == 0:
            return math.inf
        return 10.0 * math.log10(255.0**2 * video.numel() / total)
