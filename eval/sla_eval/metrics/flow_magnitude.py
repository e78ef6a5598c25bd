"""Mean length of the optical flow."""

from __future__ import annotations

import math

from torch import Tensor

from sla_eval.metrics.base import VideoMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.optical_flow import video_flow


@register_metric
class FlowMagnitude(VideoMetric):
    """How far the picture moves from a frame to the next, in pixels; needs no weights.

    Formula: mean over pairs of consecutive frames and over pixels of the length of the flow.

    Inputs: uint8 video (T, C, H, W) with T >= 2, H and W at least 7; no reference. The flow is
    that of iterative Lucas-Kanade (`sla_eval.optical_flow`) on the brightness, shrunk to a shorter
    side of 96 pixels at most; lengths are in pixels of the video.
    Range: 0 to infinity; a still picture has 0, and a frame that moves by n pixels as a whole has
    n, up to about an eighth of its shorter side. Higher is more motion: whether that is better
    depends on the prompt, and flicker counts as motion where it looks like it.
    Average: over pixels and pairs of a video, then over videos.
    Source: our own measure, under its own name. VBench's "Dynamic Degree" asks whether RAFT's
    longest 5 % exceed a threshold, which is another number.

    >>> import torch
    >>> row = (128 + 100 * torch.sin(torch.arange(80) * 0.4)).to(torch.uint8)
    >>> frames = [row[8 - 2 * t : 72 - 2 * t].expand(3, 64, 64) for t in range(4)]
    >>> metric = FlowMagnitude()
    >>> metric.update(torch.stack(frames))  # each moves right by 2 pixels
    >>> abs(metric.compute().item() - 2) < 0.05
    True
    """

    name = "flow_magnitude"
    title = "Flow magnitude (pixels)"
    higher_is_better = True
    value_range = (0.0, math.inf)
    source = "ours: mean length of Lucas-Kanade flow"

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        flow = video_flow(video)
        return flow.forward.norm(dim=1).double().mean().item() * flow.factor
