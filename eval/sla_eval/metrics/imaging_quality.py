"""Imaging quality of VBench."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_eval.metrics.base import NetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb

_LONGEST = 512  # pixels


@register_metric
class ImagingQuality(NetworkMetric):
    """MUSIQ's judgement of the frames: noise, blur, exposure.

    Formula: mean over frames of MUSIQ(frame) / 100.

    Inputs: uint8 video (T, 3, H, W), all frames, one at a time. Where the longer side exceeds 512
    pixels, both are multiplied by 512 / longer and rounded down (bilinear, no antialiasing);
    levels are divided by 255.
    Range: MUSIQ is trained on marks from 0 to 100, so about 0 to 1. Higher is better.
    Average: over the frames of a video, then over videos. (VBench divides its final mean by 100;
    here each video's value is divided.)
    Source: VBench (arXiv 2311.17982), "Imaging Quality", and `imaging_quality.py` of its release
    0.1.5, mode `longer`; MUSIQ (arXiv 2108.05997) trained on SPAQ, of pyiqa.
    Deviations: none known.

    Args:
        backbone: takes a frame (1, 3, h, w), levels 0 to 1, and gives its score as one number;
            None loads MUSIQ.
        weights_dir: see `sla_eval.backbones`.

    >>> import torch
    >>> metric = ImagingQuality(backbone=lambda frame: 100 * frame.mean())
    >>> metric.update(torch.full((3, 3, 32, 32), 51, dtype=torch.uint8))
    >>> round(metric.compute().item(), 6)
    0.2
    """

    name = "imaging_quality"
    higher_is_better = True
    value_range = (0.0, 1.0)
    source = "VBench (arXiv 2311.17982), imaging_quality.py; MUSIQ-SPAQ of pyiqa"
    backbones = ("musiq_spaq",)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        check_rgb(video)
        height, width = video.shape[-2:]
        longer = max(height, width)
        scores = []
        for frame in video.split(1):
            frame = frame.to(self.device).float()
            if longer > _LONGEST:
                scale = _LONGEST / longer
                size = (int(scale * height), int(scale * width))
                frame = F.interpolate(frame, size, mode="bilinear", align_corners=False)
            scores.append(torch.as_tensor(self.backbone(frame / 255)).double().reshape(()))
        return sum(torch.stack(scores).tolist()) / len(video) / 100  # read once: the GPU goes on
