"""Sampling: Euler steps along the predicted velocity, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sla.diffusion.flow_matching import TIMESTEPS, _check_shift, shift_sigma

# (latents (B, ...), timestep (B,), text (B, L, text_dim), text_mask (B, L)) -> velocity (B, ...)
ModelFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def euler_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of a sampler: from 1 to 0, evenly spaced, then shifted.

    Returns:
        (steps + 1,) float32, decreasing.

    Raises:
        ValueError: steps < 1, or shift not positive.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    _check_shift(shift)
    return shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).float()


@torch.no_grad()
def sample(
    model_fn: ModelFunction,
    noise: Tensor,
    text: Tensor,
    text_mask: Tensor,
    null_text: Tensor | None = None,
    null_mask: Tensor | None = None,
    *,
    steps: int,
    shift: float,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate d x / d sigma = velocity from noise (sigma 1) to data (sigma 0).

    With guidance g the velocity is v_null + g (v_text - v_null), both from one forward of a
    doubled batch. The state is kept in float32.

    Args:
        model_fn: see `ModelFunction`; returns the velocity, shape of its latents.
        noise: standard normal, (B, ...).
        text, text_mask: (B, L, text_dim) and (B, L) bool.
        null_text, null_mask: embedding of the empty caption, (1 or B, L', text_dim) and (1 or B,
            L'); needed unless guidance is 1.
        steps: Euler steps; the network runs once a step.
        shift: timestep shift, as in training.
        guidance: scale g; 1 is no guidance and half the cost.
        progress: called after each step with (steps done, steps).

    Returns:
        Samples, shape and dtype of `noise`.

    Raises:
        ValueError: a number out of range, batch sizes that differ, or guidance without the null
            caption; or the model returned another shape.
    """
    sigmas = euler_sigmas(steps, shift).tolist()
    batch = noise.shape[0]
    if not math.isfinite(guidance) or guidance < 0:
        raise ValueError(f"guidance is {guidance}; it must be a number >= 0")
    if text.shape[0] != batch or text_mask.shape != text.shape[:2]:
        raise ValueError(
            f"text {tuple(text.shape)} and text_mask {tuple(text_mask.shape)} must be "
            f"({batch}, L, text_dim) and ({batch}, L), as noise has {batch} samples"
        )
    guided = guidance != 1.0
    if guided:
        if null_text is None or null_mask is None:
            raise ValueError(
                f"guidance is {guidance}; without null_text and null_mask it must be 1"
            )
        text, text_mask = _stack_captions(text, text_mask, null_text, null_mask)

    x = noise.float()
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        latents = torch.cat((x, x)) if guided else x
        timestep = x.new_full((latents.shape[0],), TIMESTEPS * sigma)
        velocity = model_fn(latents.to(noise.dtype), timestep, text, text_mask)
        if velocity.shape != latents.shape:
            raise ValueError(
                f"the model returned shape {tuple(velocity.shape)} for latents "
                f"{tuple(latents.shape)}; they must be equal"
            )
        velocity = velocity.float()
        if guided:
            with_text, without = velocity.chunk(2)
            velocity = without + guidance * (with_text - without)
        x = x + (next_sigma - sigma) * velocity
        if progress is not None:
            progress(step + 1, steps)
    return x.to(noise.dtype)


def _stack_captions(
    text: Tensor, mask: Tensor, null_text: Tensor, null_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Captions, then as many null captions, padded to one length."""
    batch = text.shape[0]
    if null_text.shape[0] not in (1, batch) or null_mask.shape != null_text.shape[:2]:
        raise ValueError(
            f"null_text {tuple(null_text.shape)} and null_mask {tuple(null_mask.shape)} must be "
            f"(1 or {batch}, L, text_dim) and (1 or {batch}, L)"
        )
    null_text = null_text.expand(batch, -1, -1).to(text)
    null_mask = null_mask.expand(batch, -1).to(mask)
    length = max(text.shape[1], null_text.shape[1])

    def pad_text(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, length - t.shape[1]))

    def pad_mask(m: Tensor) -> Tensor:
        return F.pad(m, (0, length - m.shape[1]), value=False)

    return (
        torch.cat((pad_text(text), pad_text(null_text))),
        torch.cat((pad_mask(mask), pad_mask(null_mask))),
    )
