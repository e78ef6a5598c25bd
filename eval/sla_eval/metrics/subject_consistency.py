"""Subject consistency of VBench."""

from __future__ import annotations

from torch import Tensor

from sla_eval.metrics.consistency import FeatureConsistency
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import vbench_dino_frames


@register_metric
class SubjectConsistency(FeatureConsistency):
    """How much the frames' DINO features stay as they are in the first and the previous frame.

    Formula: mean over t = 2..T of (max(0, cos(f_1, f_t)) + max(0, cos(f_{t-1}, f_t))) / 2, with
    f_t the class token of DINO ViT-B/16 for frame t.

    Inputs: uint8 video (T, 3, H, W) with T >= 2, all frames. Each is resized to a shorter side of
    224 pixels (bilinear, no antialiasing), not cropped, and normalised by ImageNet's mean and
    deviation.
    Range: 0 to 1; identical frames have 1, so a still picture scores best. Higher is better.
    Average: over the frames after the first of all videos together, so that a longer video
    counts more, as in VBench.
    Source: VBench (arXiv 2311.17982), "Subject Consistency", and `subject_consistency.py` of its
    release 0.1.5.
    Deviations: none known. `backbone` is called with normalised frames (N, 3, h, w) and gives
    (N, D).

    >>> import torch
    >>> video = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    >>> metric = SubjectConsistency(backbone=lambda frames: frames.mean(dim=(2, 3)))
    >>> metric.update(video)
    >>> round(metric.compute().item(), 6)
    1.0
    """

    name = "subject_consistency"
    source = "VBench (arXiv 2311.17982), subject_consistency.py; DINO ViT-B/16"
    backbones = ("dino_vitb16",)

    def features(self, frames: Tensor) -> Tensor:
        return self.backbone(vbench_dino_frames(frames))
