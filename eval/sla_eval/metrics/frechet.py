"""What FVD and FID share: the Frechet distance of two sets of features."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from sla_eval.metrics.base import VideoSetMetric


def frechet_distance(features: Tensor, others: Tensor) -> Tensor:
    """Squared Frechet distance of the Gaussians that two sets of features would be drawn from.

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), with means m and covariances S (divided by n - 1).

    Args:
        features: (n, D), n >= 2.
        others: (n', D), n' >= 2.

    Returns:
        float64 scalar, 0 or more.
    """
    means, roots = [], []
    trace = features.new_zeros((), dtype=torch.float64)
    for values in (features.double(), others.double()):
        mean = values.mean(dim=0)
        root = (values - mean) / (len(values) - 1) ** 0.5  # S = root^T root
        trace = trace + root.square().sum()
        if root.shape[0] > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R  # as good a root, with D rows
        means.append(mean)
        roots.append(root)
    # The eigenvalues of S S' are the squared singular values of root root'^T. That is exact where
    # there are fewer videos than features, and needs no root of a nearly singular matrix.
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((means[0] - means[1]).square().sum() + trace - 2 * cross).clamp_min(0)


class FrechetMetric(VideoSetMetric):
    """Frechet distance of features; a subclass implements `features`.

    The features are kept, in float32, not their sums: a video's are far fewer numbers than a
    covariance, and processes exchange them.

    Args:
        backbone: the network; None loads the one of the definition.
        backbone_name: of a network that is given; the metric's name then ends with it.
        weights_dir: see `sla_eval.backbones`.
        batch_size: as the subclass says.

    Raises:
        ValueError: a backbone without its name, or the reverse.
        MetricUnavailableError: no backbone was given, and that of the definition is missing.
    """

    higher_is_better = False
    value_range = (0.0, float("inf"))

    features_list: list[Tensor]
    reference_features_list: list[Tensor]

    def __init__(
        self,
        backbone: Any = None,
        backbone_name: str | None = None,
        weights_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(weights_dir, **kwargs)
        if (backbone is None) != (backbone_name is None):
            raise ValueError(
                "backbone and backbone_name must be given together: the name of the metric says "
                f"which network it used; got {backbone!r} and {backbone_name!r}"
            )
        self.backbone: Any = self._load(self.backbones[0]) if backbone is None else backbone
        if backbone_name is not None and backbone_name != self.backbones[0]:
            self.name = f"{type(self).name}_{backbone_name}"  # type: ignore[misc]
            self.title = f"{type(self).title} ({backbone_name})"  # type: ignore[misc]
        self.add_state("features_list", default=[], dist_reduce_fx="cat")
        self.add_state("reference_features_list", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def features(self, video: Tensor) -> Tensor:
        """Features (n, D) of a uint8 video (T, 3, H, W)."""

    def add(self, video: Tensor, is_reference: bool) -> None:
        features = self.features(video.to(self.device)).float()
        kept = self.reference_features_list if is_reference else self.features_list
        kept.append(features)

    def check(self, argument: str, video: Tensor) -> None:
        if video.shape[1] != 3:
            raise ValueError(f"{argument} must have 3 colours, got {video.shape[1]}")

    def distance(self) -> Tensor:
        features = dim_zero_cat(self.features_list)
        return frechet_distance(features, dim_zero_cat(self.reference_features_list))
