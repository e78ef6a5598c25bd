"""Motion smoothness of VBench."""

from __future__ import annotations

import torch
from torch import Tensor

from sla_eval.metrics.base import BatchedNetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb, pad_to_multiple


@register_metric
class MotionSmoothness(BatchedNetworkMetric):
    """How well each second frame is predicted from its neighbours by frame interpolation.

    Formula: (255 - mean |frame_{2k+1} - interpolated_{2k+1}|) / 255 over pixels, colours and k,
    where AMT-S makes the interpolated frame from frames 2k and 2k + 2 (counted from 0). It is cut
    down to whole levels, as VBench does, not rounded.

    Inputs: uint8 video (T, 3, H, W) with T >= 3, at its own size; edges are repeated until both
    sides are multiples of 16, and cut off again. Of an even number of frames the last is not
    predicted.
    Range: 0 to 1; identical frames have 1 if the network repeats them. Higher is better.
    Average: over the predicted frames of a video, then over videos.
    Source: VBench (arXiv 2311.17982), "Motion Smoothness", and `motion_smoothness.py` of its
    release 0.1.5; AMT (arXiv 2304.09790).
    Deviations: frames are never made smaller to fit a GPU's memory, as VBench does where frames
    are larger than about half a million pixels times a factor that grows with the memory.

    Args:
        backbone: takes two frames (N, 3, H, W), levels 0 to 1, and gives the one between them;
            None loads AMT-S.
        weights_dir: see `sla_eval.backbones`.
        batch_size: pairs of frames at a time; None chooses.

    >>> import torch
    >>> levels = torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8)
    >>> metric = MotionSmoothness(backbone=lambda before, after: (before + after) / 2 + 1e-4)
    >>> metric.update(levels.view(5, 1, 1, 1).expand(5, 3, 16, 16))
    >>> metric.compute().item()
    1.0
    """

    name = "motion_smoothness"
    higher_is_better = True
    value_range = (0.0, 1.0)
    source = "VBench (arXiv 2311.17982), motion_smoothness.py; AMT-S"
    default_batch_size = 1
    backbones = ("amt_s",)

    def score(self, video: Tensor, reference: Tensor | None) -> float:
        check_rgb(video)
        if len(video) < 3:
            raise ValueError(f"video must have at least 3 frames, got {len(video)}")
        video = video.to(self.device)
        kept, dropped = video[::2], video[1::2]
        count = len(kept) - 1
        height, width = video.shape[-2:]
        total = 0
        size = self.pairs_at_once(video)
        for start in range(0, count, size):
            stop = min(start + size, count)
            # One more frame than pairs: the last of one pair is the first of the next.
            frames, (top, left) = pad_to_multiple(kept[start : stop + 1].float() / 255, 16)
            middle = self.backbone(frames[:-1], frames[1:])
            middle = middle[..., top : top + height, left : left + width]
            if not torch.isfinite(middle).all():
                raise ValueError(
                    f"the network gives no frame for {height} x {width} pixels "
                    "(AMT needs about 128 a side)"
                )
            levels = (middle * 255).clamp(0, 255).to(torch.uint8)
            difference = levels.to(torch.int16) - dropped[start:stop].to(torch.int16)
            total += int(difference.abs().sum())
        return 1.0 - total / (count * video[0].numel() * 255.0)
