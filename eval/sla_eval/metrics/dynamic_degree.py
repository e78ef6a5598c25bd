"""Dynamic degree of VBench."""

from __future__ import annotations

from torch import Tensor

from sla_eval.metrics.base import BatchedNetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb, pad_to_multiple


@register_metric
class DynamicDegree(BatchedNetworkMetric):
    """Whether a video moves: 1 or 0; the mean is the share of videos that do.

    Formula: of each pair of consecutive frames, the mean length of the longest 5 % of RAFT's flow
    vectors; 1 if it exceeds 6 min(H, W) / 256 pixels for at least round(4 n / 16) pairs, n the
    number of frames. (As in VBench, a video of which that is 0 moves if it has a pair.)

    Inputs: uint8 video (T, 3, H, W) at its own size and its frame rate `fps`: every
    max(1, round(fps / 8))-th frame is taken, so about 8 a second. Edges are repeated until both
    sides are multiples of 8, and the flow there counts too.
    Range: 0 or 1 a video. VBench calls higher better; it says nothing of the quality of motion.
    Average: over videos.
    Source: VBench (arXiv 2311.17982), "Dynamic Degree", and `dynamic_degree.py` of its release
    0.1.5; RAFT (arXiv 2003.12039), 20 iterations, trained on FlyingChairs and FlyingThings3D.
    Deviations: torchvision's port of RAFT and of its weights, equal up to rounding. VBench's
    repository also has had a version that multiplies the threshold by max(1, 8 / fps); the two
    differ below 8 frames a second only.

    Args:
        backbone: takes two frames (N, 3, H, W), levels 0 to 255, sides multiples of 8, and gives
            flow (N, 2, H, W) in pixels; None loads RAFT.
        weights_dir: see `sla_eval.backbones`.
        batch_size: pairs of frames at a time; None chooses.

    >>> import torch
    >>> metric = DynamicDegree(backbone=lambda a, b: torch.full_like(a[:, :2], 5.0))
    >>> metric.update(torch.zeros(16, 3, 256, 256, dtype=torch.uint8), fps=8)  # length 7.07 > 6
    >>> metric.update(torch.zeros(16, 3, 512, 512, dtype=torch.uint8), fps=8)  # not above 12
    >>> metric.per_video
    [1.0, 0.0]
    """

    name = "dynamic_degree"
    higher_is_better = True
    value_range = (0.0, 1.0)
    needs_fps = True
    source = "VBench (arXiv 2311.17982), dynamic_degree.py; RAFT"
    default_batch_size = 1
    backbones = ("raft",)

    def score(self, video: Tensor, reference: Tensor | None, *, fps: float) -> float:
        check_rgb(video)
        frames = video[:: max(1, round(fps / 8))].to(self.device)
        threshold = 6.0 * min(video.shape[-2:]) / 256.0
        needed = round(4 * (len(frames) / 16.0))
        moving = 0
        size = self.pairs_at_once(frames)
        for start in range(0, len(frames) - 1, size):
            part, _ = pad_to_multiple(frames[start : start + size + 1].float(), 8)
            length = self.backbone(part[:-1], part[1:]).norm(dim=1).flatten(1)
            longest = length.topk(max(1, int(length.shape[1] * 0.05)), dim=1).values
            moving += int((longest.mean(dim=1) > threshold).sum())
            if moving >= needed:
                return 1.0
        return 0.0
