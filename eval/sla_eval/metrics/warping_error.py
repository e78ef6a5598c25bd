"""Warping error."""

from __future__ import annotations

import torch
from torch import Tensor

from sla_eval.metrics.base import VideoMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.optical_flow import video_flow, warp
from sla_eval.preprocessing import chunks, frames_at_once


@register_metric
class WarpingError(VideoMetric):
    """How much a frame differs from the next one moved back along the flow; needs no weights.

    Formula: mean over visible pixels of (frame_t - warp(frame_{t+1}, flow_t))^2, brightness from 0
    to 1. A pixel is visible where the flow stays in the frame and the flow back, w, returns to it:
    |flow + w|^2 <= 0.01 (|flow|^2 + |w|^2) + 0.5.

    Inputs: uint8 video (T, C, H, W) with T >= 2, H and W at least 7; no reference. The flow is
    that of iterative Lucas-Kanade (`sla_eval.optical_flow`) on the brightness, shrunk to a shorter
    side of 96 pixels at most, and the error is measured there.
    Range: 0 to 1; a still picture has 0, and so has one that moves as a whole, but for
    interpolation. Lower is better: flicker, noise and changing shapes raise it.
    Average: over the visible pixels of a video, then over videos.
    Source: after Lai et al. 2018 (arXiv 1808.00449), "warping error", with the visibility of
    Sundaram et al. 2010. Theirs is the sum over frames of colour frames at full size with
    FlowNet2, which is another number.

    >>> import torch
    >>> row = (128 + 100 * torch.sin(torch.arange(80) * 0.4)).to(torch.uint8)
    >>> frames = [row[8 - 2 * t : 72 - 2 * t].expand(3, 64, 64) for t in range(4)]
    >>> metric = WarpingError()
    >>> metric.update(torch.stack(frames))  # moves, but does not change
    >>> metric.compute().item() < 1e-4
    True
    """

    name = "warping_error"
    higher_is_better = False
    value_range = (0.0, 1.0)
    source = "after Lai et al. 2018 (arXiv 1808.00449), with Lucas-Kanade flow"

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        flow = video_flow(video)
        sums: list[Tensor] = []
        size = frames_at_once(flow.frames)
        parts = (flow.frames[:-1], flow.frames[1:], flow.forward, flow.backward)
        for before, after, there, back in zip(*(chunks(p, size) for p in parts), strict=True):
            moved, inside = warp(torch.cat([after, back], dim=1), there)
            returned = moved[:, 1:]
            gap = (there + returned).square().sum(1, keepdim=True)
            lengths = there.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
            visible = inside & (gap <= 0.01 * lengths + 0.5)
            error = (before - moved[:, :1]).square() * visible
            sums.append(torch.stack([error.double().sum(), visible.sum().double()]))
        total, count = torch.stack(sums).sum(0).tolist()
        if count == 0:
            raise ValueError("video has no pixel that can be followed from a frame to the next")
        return total / count
