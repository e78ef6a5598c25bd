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
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:
    """Sample one video a prompt, each from a seed of its own.

    Prompt i starts from noise of seed `config.seed + i`, drawn on the CPU: the same prompt and
    seed give the same noise on every device, in any batch, for every attention method.

    Args:
        model: predicts the velocity; its device and evaluation mode are used as they are.
        shape: (C, T, H, W) of what the model makes.
        progress: called with (steps done, steps in all).
        decode: the autoencoder's, latents (1, C, T, H, W) to pixels (1, 3, T', H', W'); None for a
            model of pixels.

    Returns:
        uint8 (prompts, T, H, W, C), of pixels.
    """
    device = next(model.parameters()).device
    videos: list[np.ndarray] = []

    def step_done(video: int, done: int, steps: int) -> None:
        if progress is not None:
            progress(video * steps + done, len(prompts) * steps)

    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(config.seed + i)
        noise = torch.randn(1, *shape, generator=generator).to(device)
        # A frozen encoder may be on another device.
        text, text_mask = (t.to(device) for t in text_encoder.encode([prompt]))
        null_text, null_mask = (t.to(device) for t in text_encoder.encode([""]))
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
        videos.append(to_frames((video if decode is None else decode(video))[0]))
    if not videos:
        channels, frames, height, width = shape
        return np.empty((0, frames, height, width, channels), dtype=np.uint8)
    return np.stack(videos)
