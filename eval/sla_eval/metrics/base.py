"""What all metrics of videos share."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sla_eval.backbones import BackboneUnavailableError, load_backbone, missing_backbone
from sla_eval.preprocessing import check_batch_size


class MetricUnavailableError(RuntimeError):
    """A metric that cannot run here; the message says what is missing."""


class EvalMetric(Metric):
    """What `VideoMetric` (a score a video) and `VideoSetMetric` (a score a set) have in common.

    Attributes:
        name: its name in the registry, reports and on the command line.
        title: its name in tables; `register_metric` makes one of `name` where there is none.
        higher_is_better: direction.
        value_range: smallest and largest possible value.
        needs_reference: whether it compares with reference videos.
        needs_prompt: whether `update` needs the text that the video was made from.
        needs_fps: whether `update` needs the video's frame rate.
        source: the paper or code that defines it, one line.
        backbones: names in `sla_eval.backbones` of the networks that it runs.

    Args:
        weights_dir: folder of their weights (`sla_eval.backbones`).
        load: gives a network by its name, in place of `load_backbone` from that folder.
        kwargs: of `torchmetrics.Metric`.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    higher_is_better: bool | None
    value_range: ClassVar[tuple[float, float]]
    needs_reference: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False
    needs_fps: ClassVar[bool] = False
    source: ClassVar[str] = ""
    backbones: ClassVar[tuple[str, ...]] = ()
    full_state_update = False  # a video's value does not depend on earlier videos

    def __init__(
        self,
        weights_dir: str | os.PathLike[str] | None = None,
        *,
        load: Callable[[str], torch.nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._loader = load
        self._weights_dir = weights_dir

    @classmethod
    def availability(cls, weights_dir: str | os.PathLike[str] | None = None) -> str | None:
        """None if the metric can run, else one line: what is missing and how to get it.

        Looks for packages and files; nothing is imported or loaded.

        Args:
            weights_dir: folder of weights (see `sla_eval.backbones.weights_folder`).
        """
        for name in cls.backbones:
            missing = missing_backbone(name, weights_dir)
            if missing is not None:
                return missing
        return None

    def _load(self, backbone: str) -> torch.nn.Module:
        """A backbone by name, from `load` or else the folder of weights.

        Raises:
            MetricUnavailableError: a package or a file is missing, or is not what it should be.
        """
        try:
            if self._loader is not None:
                return self._loader(backbone)
            return load_backbone(backbone, self._weights_dir)
        except BackboneUnavailableError as error:
            raise MetricUnavailableError(str(error)) from error

    def _context(self, prompt: str | None, fps: float | None) -> dict[str, Any]:
        """What `score` or `add` gets beside the videos, checked."""
        context: dict[str, Any] = {}
        if self.needs_prompt:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt must be given: {self.name} compares with it")
            context["prompt"] = prompt
        if self.needs_fps:
            if fps is None or not fps > 0:
                raise ValueError(f"fps must be a positive number for {self.name}, got {fps}")
            context["fps"] = float(fps)
        return context


class VideoMetric(EvalMetric):
    """A score per video, averaged over videos, each with equal weight unless `weight` says else.

    A subclass sets the class attributes and implements `score`. Values are kept as float64, and
    are gathered over processes by torchmetrics.
    """

    values: list[Tensor]
    video_weights: list[Tensor]

    def __init__(self, weights_dir: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(weights_dir, **kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("video_weights", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, *args: Any, **kwargs: Any) -> float:
        """`score(video, reference)`: value of one video; inputs as in `update`, already checked.

        With `needs_prompt` and `needs_fps` it also gets `prompt` and `fps`, by keyword.
        """

    def weight(self, video: Tensor) -> float:
        """How much a video counts in the mean over videos."""
        return 1.0

    def update(
        self,
        video: Tensor,
        reference: Tensor | None = None,
        prompt: str | None = None,
        fps: float | None = None,
    ) -> None:
        """Scores one video.

        Args:
            video: uint8 (T, C, H, W), levels 0 to 255.
            reference: same shape and dtype; only where `needs_reference`, otherwise ignored.
            prompt: the text; only where `needs_prompt`, otherwise ignored.
            fps: frames a second; only where `needs_fps`, otherwise ignored.

        Raises:
            TypeError: not uint8 tensors.
            ValueError: not four dimensions, an empty one, a reference missing or of another shape,
                no prompt or no frame rate where one is needed, or a video that this metric does
                not take.
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
        value = self.score(video, reference, **self._context(prompt, fps))
        self.values.append(torch.tensor([value], dtype=torch.float64, device=self.device))
        weight = torch.tensor([self.weight(video)], dtype=torch.float64, device=self.device)
        self.video_weights.append(weight)

    def compute(self) -> Tensor:
        """Mean over videos, float64 scalar.

        Raises:
            ValueError: no video was scored.
        """
        values, weights = self._all_values(), dim_zero_cat(self.video_weights)
        return (values * weights).sum() / weights.sum()

    @property
    def per_video(self) -> list[float]:
        """The values so far, one a video, in the order of the updates."""
        return self._all_values().tolist() if len(self.values) else []

    def _all_values(self) -> Tensor:
        if not len(self.values):  # a list, or one tensor once gathered over processes
            raise ValueError(f"{self.name} has scored no video")
        return dim_zero_cat(self.values)


class NetworkMetric(VideoMetric):
    """A `VideoMetric` that runs a network, the first of its `backbones`.

    Args:
        backbone: the network; None loads the one of the definition.
        weights_dir: see `sla_eval.backbones`.

    Raises:
        MetricUnavailableError: the network cannot be loaded.
    """

    def __init__(
        self,
        backbone: Any = None,
        weights_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(weights_dir, **kwargs)
        self.backbone: Any = self._load(self.backbones[0]) if backbone is None else backbone


class BatchedNetworkMetric(NetworkMetric):
    """A `NetworkMetric` whose network takes several frames, or pairs of frames, at a time.

    Args:
        batch_size: how many; no score depends on it but by rounding.
    """

    default_batch_size: ClassVar[int] = 16

    def __init__(
        self,
        backbone: Any = None,
        weights_dir: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        size = check_batch_size(self.default_batch_size if batch_size is None else batch_size)
        super().__init__(backbone, weights_dir, **kwargs)
        self.batch_size = size
        self._given_batch_size = batch_size is not None

    def pairs_at_once(self, frames: Tensor) -> int:
        """Pairs of frames (T, C, H, W) for a network that correlates all positions of both.

        `batch_size`, or on a GPU, if none was given, as many as have a GiB of correlations
        (float32, at an eighth of the size), 16 at most: one at a time leaves a GPU waiting for
        Python.
        """
        if self._given_batch_size or frames.device.type == "cpu":
            return self.batch_size
        positions = -(-frames.shape[-2] // 8) * -(-frames.shape[-1] // 8)
        return max(self.batch_size, min(16, 2**28 // positions**2))


class VideoSetMetric(EvalMetric):
    """One number for a set of videos against a set of reference videos.

    The sets need not match in number, length or size. A subclass sets the class attributes and
    implements `add` and `distance`. `count` and `reference_count` are the videos so far.
    """

    needs_reference = True

    count: Tensor
    reference_count: Tensor

    def __init__(self, weights_dir: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(weights_dir, **kwargs)
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("reference_count", default=torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def add(self, *args: Any, **kwargs: Any) -> None:
        """`add(video, is_reference)` puts one video, already checked, into one of the sets."""

    @abstractmethod
    def distance(self) -> Tensor:
        """Value of the sets so far, float64 scalar; both have two videos or more."""

    def update(
        self,
        video: Tensor | None = None,
        reference: Tensor | None = None,
        prompt: str | None = None,
        fps: float | None = None,
    ) -> None:
        """Adds a video to the set, a reference to its set, or both.

        Args:
            video: uint8 (T, C, H, W), levels 0 to 255; None to add a reference alone.
            reference: the same, of any length and size; None to add a video alone.
            prompt: the text; only where `needs_prompt`, otherwise ignored.
            fps: frames a second; only where `needs_fps`, otherwise ignored.

        Raises:
            TypeError: not uint8 tensors.
            ValueError: both None, not four dimensions, an empty one, or a video that this metric
                does not take. Nothing is then added.
        """
        if video is None and reference is None:
            raise ValueError("video or reference must be given, got neither")
        context = self._context(prompt, fps)
        for argument, tensor in (("video", video), ("reference", reference)):
            if tensor is not None:
                _check(argument, tensor)
                self.check(argument, tensor)
        if video is not None:
            self.add(video, False, **context)
            self.count += 1
        if reference is not None:
            self.add(reference, True, **context)
            self.reference_count += 1

    def check(self, argument: str, video: Tensor) -> None:
        """Raises ValueError, naming `argument`, for a video that this metric does not take."""

    def compute(self) -> Tensor:
        """Value of the two sets, float64 scalar.

        Raises:
            ValueError: a set has fewer than two videos.
        """
        for what, number in (("videos", self.count), ("references", self.reference_count)):
            if number < 2:
                raise ValueError(f"{self.name} needs at least 2 {what}, got {int(number)}")
        return self.distance()


def _check(argument: str, video: Tensor) -> None:
    if not isinstance(video, Tensor) or video.dtype != torch.uint8:
        got = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"{argument} must be a uint8 tensor, got {got}")
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(
            f"{argument} must have shape (T, C, H, W), none 0, got {tuple(video.shape)}"
        )
