"""Aesthetic quality of VBench."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_eval.metrics.base import BatchedNetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb, chunks, vbench_clip_frames


@register_metric
class AestheticQuality(BatchedNetworkMetric):
    """LAION's aesthetic score of the frames.

    Formula: mean over frames of (w . f_t / |f_t| + b) / 10, with f_t the image feature of CLIP
    ViT-L/14 and w, b LAION's linear head.

    Inputs: uint8 video (T, 3, H, W), all frames. Each is resized to a shorter side of 224 pixels
    (bicubic, no antialiasing), cropped to its middle square, and normalised by CLIP's mean and
    deviation.
    Range: the head is trained on marks from 1 to 10, so about 0.1 to 1, but nothing bounds it.
    Higher is better.
    Average: over the frames of a video, then over videos.
    Source: VBench (arXiv 2311.17982), "Aesthetic Quality", and `aesthetic_quality.py` of its
    release 0.1.5; the head `sa_0_4_vit_l_14_linear` of LAION's aesthetic predictor.
    Deviations: the network computes in float32, on a GPU too, where VBench's is in float16.

    Args:
        backbone: has `encode_image`, which takes normalised frames (N, 3, 224, 224) and gives
            (N, D); None loads CLIP ViT-L/14.
        head: features (N, D) of length 1 to scores (N, 1); None loads LAION's.
        weights_dir: see `sla_eval.backbones`.
        batch_size: frames at a time.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> clip = SimpleNamespace(encode_image=lambda frames: torch.ones(len(frames), 4))
    >>> metric = AestheticQuality(backbone=clip, head=lambda f: 3 * f.sum(1, keepdim=True))
    >>> metric.update(torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    >>> round(metric.compute().item(), 6)  # 3 * 4 * 0.5 / 10
    0.6
    """

    name = "aesthetic_quality"
    higher_is_better = True
    value_range = (-math.inf, math.inf)
    source = "VBench (arXiv 2311.17982), aesthetic_quality.py; LAION's head on CLIP ViT-L/14"
    backbones = ("clip_vit_l14", "laion_aesthetic")

    def __init__(
        self,
        backbone: Any = None,
        head: Callable[[Tensor], Tensor] | None = None,
        weights_dir: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, weights_dir, batch_size, **kwargs)
        self.head: Any = self._load("laion_aesthetic") if head is None else head

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        check_rgb(video)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for frames in chunks(video.to(self.device), self.batch_size):
            features = self.backbone.encode_image(vbench_clip_frames(frames)).float()
            total += self.head(F.normalize(features, dim=-1)).double().sum()
        return total.item() / len(video) / 10
