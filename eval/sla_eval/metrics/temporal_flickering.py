"""Temporal flickering of VBench."""

from __future__ import annotations

import torch
from torch import Tensor

from sla_eval.metrics.base import VideoMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import chunks, frames_at_once


@register_metric
class TemporalFlickering(VideoMetric):
    """How little consecutive frames differ, pixel by pixel.

    Formula: (255 - mean_t mean_{c,h,w} |frame_{t+1} - frame_t|) / 255.

    Inputs: uint8 video (T, C, H, W) with T >= 2; no reference.
    Range: 0 to 1 (VBench's published percentages are 100 times this). Higher is better, but a
    still picture has 1: motion lowers it as flicker does. VBench therefore leaves out static
    videos first and uses prompts of still scenes; neither is done here.
    Average: over the pairs of a video, then over videos.
    Source: VBench (arXiv 2311.17982), section 3.1, "Temporal Flickering", and its
    `temporal_flickering.py`.
    Deviations: sums are exact, where VBench's are of float32 (they differ by about 1e-9).

    >>> import torch
    >>> video = torch.tensor([0, 51, 102], dtype=torch.uint8).view(3, 1, 1, 1)
    >>> metric = TemporalFlickering()
    >>> metric.update(video.expand(3, 3, 8, 8))
    >>> round(metric.compute().item(), 6)
    0.8
    """

    name = "temporal_flickering"
    higher_is_better = True
    value_range = (0.0, 1.0)
    needs_reference = False
    source = "VBench (arXiv 2311.17982), temporal_flickering.py"

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        if len(video) < 2:
            raise ValueError(f"video must have at least 2 frames, got {len(video)}")
        # Integers, a few pairs at a time: exact, and a long video is never held in a wider type.
        size = frames_at_once(video)
        pairs = zip(chunks(video[:-1], size), chunks(video[1:], size), strict=True)
        total = int(
            sum(
                (after.to(torch.int16) - before.to(torch.int16)).abs().sum()
                for before, after in pairs
            )
        )
        return 1.0 - total / (video[1:].numel() * 255.0)
