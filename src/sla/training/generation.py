"""Videos from a trained model: prompts and seeds in, uint8 frames out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from sla.data.video import to_frames
from sla.diffusion.flow_matching import FlowMatching
from sla.diffusion.sampling import sample
from sla.models.dit import VideoDiT
from sla.models.text import TextEncoder
from sla.training.config import SamplingConfig


@torch.no_grad()
def generate_videos(
    model: VideoDiT,
    text_encoder: TextEncoder,
    flow: FlowMatching,
    config: SamplingConfig,
    prompts: Sequence[str],
    shape: tuple[int, int, int, int],
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Sample one video a prompt, each from a seed of its own.

    Prompt i starts from noise of seed `config.seed + i`, drawn on the CPU: the same prompt and
    seed give the same noise on every device, in any batch, for every attention method.

    Args:
        model: predicts the velocity; its device and evaluation mode are used as they are.
        shape: (C, T, H, W) of a video.
        progress: called with (steps done, steps in all).

    Returns:
        uint8 (prompts, T, H, W, C).
    """
    device = next(model.parameters()).device
    videos: list[np.ndarray] = []

    def step_done(video: int, done: int, steps: int) -> None:
        if progress is not None:
            progress(video * steps + done, len(prompts) * steps)

    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(config.seed + i)
        noise = torch.randn(1, *shape, generator=generator).to(device)
        text, text_mask = text_encoder.encode([prompt])
        null_text, null_mask = text_encoder.encode([""])
        video = sample(
            model.forward,  # as it is: compiling for these shapes would take longer than sampling
            noise,
            text,
            text_mask,
            null_text,
            null_mask,
            steps=config.steps,
            shift=flow.shift,
            guidance=config.guidance,
            progress=partial(step_done, i),
        )
        videos.append(to_frames(video[0]))
    channels, frames, height, width = shape
    return np.array(videos, dtype=np.uint8).reshape(-1, frames, height, width, channels)
