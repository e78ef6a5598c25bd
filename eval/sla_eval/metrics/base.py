"""What all metrics of videos share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class MetricUnavailableError(RuntimeError):
    """A metric that cannot run here; the message says what is missing."""


class VideoMetric(Metric):
    """A score per video, averaged over videos with equal weight, whatever their length.

    A subclass sets the class attributes and implements `score`. Values are kept as float64, and
    are gathered over processes by torchmetrics.

    Attributes:
        name: its name in the registry, reports and on the command line.
        higher_is_better: direction.
        value_range: smallest and largest possible value.
        needs_reference: whether `update` needs a reference video.
    """

    name: ClassVar[str]
    higher_is_better: bool | None
    value_range: ClassVar[tuple[float, float]]
    needs_reference: ClassVar[bool] = False
    full_state_update = False  # a video's value does not depend on earlier videos

    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, video: Tensor, reference: Tensor | None) -> float:
        """Value of one video; inputs as in `update`, already checked."""

    def update(self, video: Tensor, reference: Tensor | None = None) -> None:
        """Scores one video.

        Args:
            video: uint8 (T, C, H, W), levels 0 to 255.
            reference: same shape and dtype; only where `needs_reference`, otherwise ignored.

        Raises:
            TypeError: not uint8 tensors.
            ValueError: not four dimensions, an empty one, a reference missing or of another shape.
        """
        _check("video", video)
        if self.needs_reference:
            if reference is None:
                raise ValueError(f"reference must be given: {self.name} compares with it")
            _check("reference", reference)
            if reference.shape != video.shape:
                raise ValueError(
                    f"reference must have the shape of video {tuple(video.shape)}, "
                    f"got {tuple(reference.shape)}"
                )
        else:
            reference = None
        value = self.score(video, reference)
        self.values.append(torch.tensor([value], dtype=torch.float64, device=self.device))

    def compute(self) -> Tensor:
        """Mean over videos, float64 scalar.

        Raises:
            ValueError: no video was scored.
        """
        return self._all_values().mean()

    @property
    def per_video(self) -> list[float]:
        """The values so far, one a video, in the order of the updates."""
        return self._all_values().tolist() if len(self.values) else []

    def _all_values(self) -> Tensor:
        if not len(self.values):  # a list, or one tensor once gathered over processes
            raise ValueError(f"{self.name} has scored no video")
        return dim_zero_cat(self.values)


def _check(argument: str, video: Tensor) -> None:
    if not isinstance(video, Tensor) or video.dtype != torch.uint8:
        got = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"{argument} must be a uint8 tensor, got {got}")
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(
            f"{argument} must have shape (T, C, H, W), none 0, got {tuple(video.shape)}"
        )
