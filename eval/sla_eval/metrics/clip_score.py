"""CLIP score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_eval.metrics.base import BatchedNetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb, chunks, clip_frames


@register_metric
class ClipScore(BatchedNetworkMetric):
    """How well the frames agree with the prompt, by CLIP.

    Formula: mean over frames of 100 max(0, cos(CLIP(frame), CLIP(prompt))), with CLIP ViT-L/14 of
    OpenAI.

    Inputs: uint8 video (T, 3, H, W), all frames, and its prompt, cut off after CLIP's 77 tokens.
    Frames are resized to a shorter side of 224 pixels (bicubic, antialiased), cropped to the
    middle square, and normalised by CLIP's mean and deviation.
    Range: 0 to 100, in practice 15 to 35. Higher is better.
    Average: over the frames of a video, then over videos.
    Source: Hessel et al. 2021, "CLIPScore" (arXiv 2104.08718), with the factor 100 and the model of
    `torchmetrics.multimodal.CLIPScore`.
    Deviations: torchmetrics bounds the mean over all frames at 0, here each frame is bounded, as
    in its formula and in the paper. Frames are resized on the device, not by Pillow, which differs
    by a level.

    Args:
        backbone: has `encode_image`, normalised frames (N, 3, 224, 224) to (N, D), and
            `encode_text`, texts to (N, D); None loads CLIP ViT-L/14.
        weights_dir: see `sla_eval.backbones`.
        batch_size: frames at a time.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> clip = SimpleNamespace(
    ...     encode_image=lambda frames: torch.tensor([[3.0, 4.0]]).expand(len(frames), 2),
    ...     encode_text=lambda texts: torch.tensor([[1.0, 0.0]]),
    ... )
    >>> metric = ClipScore(backbone=clip)
    >>> metric.update(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), prompt="a cat")
    >>> round(metric.compute().item(), 4)
    60.0
    """

    name = "clip_score"
    title = "CLIP score (ViT-L/14)"
    higher_is_better = True
    value_range = (0.0, 100.0)
    needs_prompt = True
    source = "CLIPScore (arXiv 2104.08718), as torchmetrics; CLIP ViT-L/14 of OpenAI"
    backbones = ("clip_vit_l14",)

    def score(self, video: Tensor, reference: Tensor | None, *, prompt: str) -> float:
        check_rgb(video)
        text = self.backbone.encode_text([prompt]).float()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for frames in chunks(video.to(self.device), self.batch_size):
            features = self.backbone.encode_image(clip_frames(frames)).float()
            cosines = F.cosine_similarity(features, text).clamp(0, 1)
            total += 100 * cosines.double().sum()
        return total.item() / len(video)
