"""Videos from a trained model: prompts and seeds in, uint8 frames out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from sla.data.video import to_frames
from sla.diffusion.flow_matching import FlowMatching
from sla.diffusion.sampling import sample
from sla.models.schedulers import build_scheduler
from sla.models.text import TextEncoder
from sla.models.video_model import VideoModel
from sla.training.config import SamplingConfig


@dataclass(frozen=True)
class StageSeconds:
    """Wall time of a video's stages in seconds, each until the device was done with it; of videos
    that were sampled together an equal share.

    Attributes:
        text_encoding: of the prompt, and of the empty caption where guidance needs it.
        steps: of each denoising step, guidance and the scheduler's own work included.
        decoding: of the autoencoder (if there is one), and of the way to uint8 on the CPU.
    """

    text_encoding: float
    steps: tuple[float, ...]
    decoding: float

    @property
    def denoising(self) -> float:
        """All denoising steps."""
        return sum(self.steps)


@torch.no_grad()
def generate_videos(
    model: VideoModel,
    text_encoder: TextEncoder,
    flow: FlowMatching,
    config: SamplingConfig,
    prompts: Sequence[str],
    shape: tuple[int, int, int, int],
    progress: Callable[[int, int], None] | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    timings: Callable[[StageSeconds], None] | None = None,
) -> np.ndarray:
    """Sample one video a prompt, each from a seed of its own, `config.batch_size` at a time.

    Prompt i starts from noise of seed `config.seed + i`, drawn on the CPU: the same prompt and
    seed give the same noise on every device, in any batch, for every attention method.

    Args:
        model: predicts the velocity; its device and evaluation mode are used as they are.
        shape: (C, T, H, W) of what the model makes.
        progress: called with (steps done, steps in all).
        decode: the autoencoder's, latents (1, C, T, H, W) to pixels (1, 3, T', H', W'); None for a
            model of pixels.
        timings: called after each video, in order.

    Returns:
        uint8 (prompts, T, H, W, C), of pixels.
    """
    device = next(model.parameters()).device
    # As it is: compiling for these shapes would take longer than sampling. A sharded model is put
    # together by its hooks.
    network = model if isinstance(model, FSDPModule) else model.forward
    clock = _Clock(device)

    def generate(first: int) -> np.ndarray:
        together = list(prompts[first : first + config.batch_size])
        noise = torch.stack(
            [
                torch.randn(*shape, generator=torch.Generator().manual_seed(config.seed + i))
                for i in range(first, first + len(together))
            ]
        ).to(device)
        scheduler = build_scheduler(config.scheduler, flow.shift, config.steps, device)
        clock.lap()
        # A frozen encoder may be on another device.
        text, text_mask = (t.to(device) for t in text_encoder.encode(together))
        null_text, null_mask = None, None
        if config.guidance != 1.0:
            null_text, null_mask = (t.to(device) for t in text_encoder.encode([""]))
        text_encoding = clock.lap() / len(together)
        steps: list[float] = []

        def step_done(done: int, total: int) -> None:
            steps.append(clock.lap() / len(together))
            if progress is not None:
                progress(first * total + done * len(together), len(prompts) * total)

        video = sample(
            network,
            noise,
            text,
            text_mask,
            null_text,
            null_mask,
            scheduler=scheduler,
            guidance=config.guidance,
            batched_guidance=config.batched_guidance,
            progress=step_done,
        )
        # A decoder holds far more than the network: it is given one video after the other.
        decoded = [one if decode is None else decode(one) for one in video.split(1)]
        frames = np.stack([to_frames(one[0]) for one in decoded])
        decoding = clock.lap() / len(together)
        if timings is not None:
            for _ in together:
                timings(StageSeconds(text_encoding, tuple(steps), decoding))
        return frames

    videos = [generate(first) for first in range(0, len(prompts), config.batch_size)]
    if not videos:
        channels, frames, height, width = shape
        return np.empty((0, frames, height, width, channels), dtype=np.uint8)
    return np.concatenate(videos)


class _Clock:
    """Seconds between laps; on a GPU a lap ends when the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last, self._last = self._last, time.perf_counter()
        return self._last - last
