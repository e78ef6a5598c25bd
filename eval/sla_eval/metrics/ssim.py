"""Structural similarity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_eval.metrics.base import VideoMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import chunks, frames_at_once

_WINDOW = 11  # pixels
_SIGMA = 1.5  # pixels
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2


@register_metric
class SSIM(VideoMetric):
    """Structural similarity with the reference video, frame by frame.

    Formula: (2 mu_x mu_y + c1)(2 s_xy + c2) / ((mu_x^2 + mu_y^2 + c1)(s_x^2 + s_y^2 + c2)), with
    c1 = (0.01 * 255)^2, c2 = (0.03 * 255)^2, and moments under a Gaussian window (11 x 11, sigma
    1.5) of each colour channel, one window a pixel: frames are mirrored at their edges.

    Inputs: uint8 video and reference, both (T, C, H, W), H and W at least 11.
    Range: -1 to 1; an identical video has 1. Higher is better.
    Average: over pixels and channels of a frame, over frames, then over videos.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural
    similarity"; equals `torchmetrics.functional.image.structural_similarity_index_measure` of
    float64 frames with data_range=255.

    >>> import torch
    >>> video = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    >>> metric = SSIM()
    >>> metric.update(video, video)
    >>> round(metric.compute().item(), 4)
    1.0
    """

    name = "ssim"
    title = "SSIM"
    higher_is_better = True
    value_range = (-1.0, 1.0)
    needs_reference = True
    source = "Wang et al. 2004, as torchmetrics"

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        assert reference is not None  # checked by update
        height, width = video.shape[-2:]
        if min(height, width) < _WINDOW:
            raise ValueError(
                f"video must be at least {_WINDOW} pixels high and wide, got {height} x {width}"
            )
        colours, others = video.flatten(0, 1), reference.flatten(0, 1)
        size = frames_at_once(colours)
        pairs = zip(chunks(colours, size), chunks(others, size), strict=True)
        found = torch.cat([_channel_ssim(a.double(), b.double()) for a, b in pairs])
        return sum(found.tolist()) / len(found)


def _channel_ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (N,) of single colours of pairs of frames, float64 (N, H, W), levels 0 to 255."""
    # float64: a variance is the difference of two nearly equal moments, and in float32 the SSIM of
    # a flat frame with itself misses 1 by 4e-5. A Gaussian window is the product of a column and a
    # row, 22 taps in place of 121: torchmetrics' own function takes seconds for a float64 frame.
    # One colour at a time stays in a core's cache, and only the sum of the variances is needed.
    moments = torch.stack([x, y, x * x + y * y, x * y])
    for dim in (-2, -1):
        moments = _blur(moments, dim)
    mean_x, mean_y, squares, product = moments
    mean_product, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    luminance = (2 * mean_product + _C1) / (mean_squares + _C1)
    structure = (2 * (product - mean_product) + _C2) / (squares - mean_squares + _C2)
    return (luminance * structure).mean(dim=(-2, -1))


def _blur(moments: Tensor, dim: int) -> Tensor:
    """Gaussian window along one of the last two dimensions, the frame mirrored at its edges."""
    half = _WINDOW // 2
    weights = [math.exp(-((i - half) ** 2) / (2 * _SIGMA**2)) for i in range(_WINDOW)]
    padding = (half, half, 0, 0) if dim == -1 else (0, 0, half, half)
    padded = F.pad(moments, padding, mode="reflect")
    blurred = torch.zeros_like(moments)
    for start, weight in enumerate(weights):
        shifted = padded.narrow(dim, start, moments.shape[dim])
        blurred.add_(shifted, alpha=weight / sum(weights))
    return blurred
