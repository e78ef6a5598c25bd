"""Overall consistency of VBench."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sla_eval.metrics.base import NetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb, middle_frames, vbench_clip_frames


@register_metric
class OverallConsistency(NetworkMetric):
    """How well a video agrees with its prompt, by ViCLIP.

    Formula: cos(ViCLIP(video), ViCLIP(prompt)).

    Inputs: uint8 video (T, 3, H, W) and its prompt. Of eight equal parts of the video the middle
    frame each (a shorter video's last frame is repeated), resized to a shorter side of 224 pixels
    (bicubic, no antialiasing, rounded to whole levels), cropped to the middle square, and
    normalised by CLIP's mean and deviation.
    Range: -1 to 1, in practice 0 to about 0.4. Higher is better.
    Average: over videos.
    Source: VBench (arXiv 2311.17982), "Overall Consistency", and `overall_consistency.py` of its
    release 0.1.5; ViCLIP-L/14 (arXiv 2307.06942) trained on InternVid-10M-FLT.
    Deviations: none known. Without ViCLIP's weights the metric is not available; no other network
    takes its place.

    Args:
        backbone: has `encode_video`, normalised videos (N, 8, 3, 224, 224) to (N, D), and
            `encode_text`, texts to (N, D); None loads ViCLIP.
        weights_dir: see `sla_eval.backbones`.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> viclip = SimpleNamespace(
    ...     encode_video=lambda video: torch.tensor([[3.0, 4.0]]),
    ...     encode_text=lambda texts: torch.tensor([[1.0, 0.0]]),
    ... )
    >>> metric = OverallConsistency(backbone=viclip)
    >>> metric.update(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), prompt="a cat")
    >>> round(metric.compute().item(), 6)
    0.6
    """

    name = "overall_consistency"
    higher_is_better = True
    value_range = (-1.0, 1.0)
    needs_prompt = True
    source = "VBench (arXiv 2311.17982), overall_consistency.py; ViCLIP-L/14"
    backbones = ("viclip",)

    def score(self, video: Tensor, reference: Tensor | None, *, prompt: str) -> float:
        check_rgb(video)
        frames = video[middle_frames(len(video), 8)].to(self.device)
        frames = vbench_clip_frames(frames, whole_levels=True)
        video_feature = self.backbone.encode_video(frames[None]).float()
        text_feature = self.backbone.encode_text([prompt]).float()
        return F.cosine_similarity(video_feature, text_feature).clamp(-1, 1).item()
