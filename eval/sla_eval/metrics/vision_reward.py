"""VisionReward for videos, by its own model."""

from __future__ import annotations

import math

from torch import Tensor

from sla_eval.metrics.base import NetworkMetric
from sla_eval.metrics.registry import register_metric
from sla_eval.preprocessing import check_rgb

_MOST_FRAMES = 24


@register_metric
class VisionRewardScore(NetworkMetric):
    """What a language model that sees the video answers to a list of questions about it.

    Formula: mean over the questions of weight_q * (1 if the answer is yes else -1).

    Inputs: uint8 video (T, 3, H, W), its prompt and its frame rate. One frame a second, the
    nearest to it, 24 at most.
    Range: nothing bounds it but the weights; about -0.1 to 0.2. Higher is better.
    Average: over videos.
    Source: VisionReward (arXiv 2412.21059) and `inference-video.py` of GitHub THUDM/VisionReward.
    Deviations: none known. Its model runs code that comes with its weights, from a local folder,
    and may need older versions of transformers than ours.

    Args:
        backbone: has `questions`, `question_weights` and `ask(frames, question) -> bool` on uint8
            frames (3, N, H, W); None loads VisionReward-Video.
        weights_dir: see `sla_eval.backbones`.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> judge = SimpleNamespace(
    ...     questions=["Is it [[prompt]]?", "Is it sharp?"],
    ...     question_weights=[0.5, 0.1],
    ...     ask=lambda frames, question: "cat" in question,
    ... )
    >>> metric = VisionRewardScore(backbone=judge)
    >>> metric.update(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), prompt="a cat", fps=8)
    >>> round(metric.compute().item(), 6)
    0.2
    """

    name = "vision_reward"
    title = "VisionReward"
    higher_is_better = True
    value_range = (-math.inf, math.inf)
    needs_prompt = True
    needs_fps = True
    source = "VisionReward (arXiv 2412.21059), inference-video.py"
    backbones = ("vision_reward",)

    def score(self, video: Tensor, reference: Tensor | None, *, prompt: str, fps: float) -> float:
        check_rgb(video)
        frames = video[frames_a_second(len(video), fps)].transpose(0, 1)
        questions, weights = self.backbone.questions, self.backbone.question_weights
        total = 0.0
        for question, weight in zip(questions, weights, strict=True):
            answer = self.backbone.ask(frames, question.replace("[[prompt]]", prompt))
            total += weight if answer else -weight
        return total / len(questions)


def frames_a_second(count: int, fps: float) -> list[int]:
    """The frame nearest to each full second, the earlier of two, 24 at most."""
    seconds = round((count - 1) / fps) + 1
    return [
        min(range(count), key=lambda frame: abs(frame / fps - second))
        for second in range(min(seconds, _MOST_FRAMES))
    ]
