"""What subject and background consistency share: features of frames, compared along the video."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_eval.metrics.base import BatchedNetworkMetric
from sla_eval.preprocessing import check_rgb, chunks


class FeatureConsistency(BatchedNetworkMetric):
    """Mean similarity of each frame's feature with those of the first and the previous frame.

    A subclass names its backbone and implements `features`.

    Args:
        backbone: the network; None loads the one of the definition.
        weights_dir: see `sla_eval.backbones`.
        batch_size: frames at a time.
    """

    higher_is_better = True
    value_range = (0.0, 1.0)

    @abstractmethod
    def features(self, frames: Tensor) -> Tensor:
        """Features (N, D) of uint8 frames (N, 3, H, W)."""

    def weight(self, video: Tensor) -> float:
        """VBench's mean is over the frames of all videos: a longer one counts more."""
        return float(len(video) - 1)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        check_rgb(video)
        if len(video) < 2:
            raise ValueError(f"video must have at least 2 frames, got {len(video)}")
        parts = chunks(video.to(self.device), self.batch_size)
        features = torch.cat([F.normalize(self.features(part).float(), dim=-1) for part in parts])
        total = sum(
            F.cosine_similarity(others, features[1:], dim=-1).clamp(0, 1).double().sum()
            for others in (features[:1], features[:-1])  # rounding alone passes 1
        )
        return float(total) / 2 / (len(video) - 1)
