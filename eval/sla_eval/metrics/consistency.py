"""What subject and background consistency share: features of frames, compared along the video."""

from __future__ import annotations

from abc import abstractmethod

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
        first = previous = None
        total = 0.0
        for frames in chunks(video.to(self.device), self.batch_size):
            features = F.normalize(self.features(frames).float(), dim=-1)
            for feature in features:
                if first is None or previous is None:
                    first = feature
                else:
                    for other in (first, previous):
                        similarity = F.cosine_similarity(other, feature, dim=0).item()
                        total += min(max(0.0, similarity), 1.0) / 2  # rounding alone passes 1
                previous = feature
        return total / (len(video) - 1)
