"""Background consistency of VBench."""

from __future__ import annotations

from torch import Tensor

from sla_eval.metrics.consistency import FeatureConsistency
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import vbench_clip_frames


@register_metric
class BackgroundConsistency(FeatureConsistency):
    """How much the frames' CLIP features stay as they are in the first and the previous frame.

    Formula: mean over t = 2..T of (max(0, cos(f_1, f_t)) + max(0, cos(f_{t-1}, f_t))) / 2, with
    f_t the image feature of CLIP ViT-B/32 for frame t.

    Inputs: uint8 video (T, 3, H, W) with T >= 2, all frames. Each is resized to a shorter side of
    224 pixels (bicubic, no antialiasing), cropped to its middle square, and normalised by CLIP's
    mean and deviation.
    Range: 0 to 1; identical frames have 1, so a still picture scores best. Higher is better.
    Average: over the frames after the first of all videos together, so that a longer video
    counts more, as in VBench.
    Source: VBench (arXiv 2311.17982), "Background Consistency", and `background_consistency.py` of
    its release 0.1.5.
    Deviations: the network computes in float32, on a GPU too, where VBench's is in float16.
    `backbone` has `encode_image`, which takes normalised frames (N, 3, 224, 224) and gives (N, D).

    >>> import torch
    >>> from types import SimpleNamespace
    >>> video = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    >>> clip = SimpleNamespace(encode_image=lambda frames: frames.mean(dim=(2, 3)))
    >>> metric = BackgroundConsistency(backbone=clip)
    >>> metric.update(video)
    >>> round(metric.compute().item(), 6)
    1.0
    """

    name = "background_consistency"
    source = "VBench (arXiv 2311.17982), background_consistency.py; CLIP ViT-B/32"
    backbones = ("clip_vit_b32",)

    def features(self, frames: Tensor) -> Tensor:
        return self.backbone.encode_image(vbench_clip_frames(frames))
