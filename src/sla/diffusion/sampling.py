"""Sampling: a scheduler's steps along the predicted velocity, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# (latents (B, ...), timestep (B,), text (B, L, text_dim), text_mask (B, L)) -> velocity (B, ...)
ModelFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Scheduler(Protocol):
    """What `sample` needs of a diffusers scheduler.

    Attributes:
        timesteps: what the network is told, (steps,), decreasing.
        step_index: steps taken; None before the first.
    """

    timesteps: Tensor

    @property
    def step_index(self) -> int | None: ...

    def set_begin_index(self, begin_index: int = 0) -> None: ...

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *, return_dict: bool
    ) -> Any:
        """With `return_dict=False` a tuple whose first value is the next sample."""
        ...


@torch.no_grad()
def sample(
    model_fn: ModelFunction,
    noise: Tensor,
    text: Tensor,
    text_mask: Tensor,
    null_text: Tensor | None = None,
    null_mask: Tensor | None = None,
    *,
    scheduler: Scheduler,
    guidance: float = 1.0,
    batched_guidance: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate d x / d sigma = velocity from noise (sigma 1) to data (sigma 0).

    With guidance g the velocity is v_null + g (v_text - v_null). State and steps are in float32,
    under autocast too.

    Args:
        model_fn: see `ModelFunction`; returns the velocity, shape of its latents.
        noise: standard normal, (B, ...).
        text, text_mask: (B, L, text_dim) and (B, L) bool.
        null_text, null_mask: embedding of the empty caption, (1 or B, L', text_dim) and (1 or B,
            L'); needed unless guidance is 1.
        scheduler: gives timesteps and steps; its timesteps are set, and no step is taken yet.
        guidance: scale g; 1 is no guidance and half the cost.
        batched_guidance: take both velocities from one forward of the doubled batch; False takes
            two forwards, which need half the memory for activations. The same up to rounding.
        progress: called after each step with (steps done, steps).

    Returns:
        Samples, shape and dtype of `noise`.

    Raises:
        ValueError: a number out of range, batch sizes that differ, guidance without the null
            caption, or a scheduler that was used before; or the model returned another shape.
    """
    if scheduler.step_index is not None:
        raise ValueError(
            f"scheduler has taken {scheduler.step_index} steps; each call needs a fresh one"
        )
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
        null_text, null_mask = _null_captions(text, text_mask, null_text, null_mask)
        if batched_guidance:
            text, text_mask = _stack_captions(text, text_mask, null_text, null_mask)

    def predict(x: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        times = timestep.to(x.device, torch.float32).repeat(x.shape[0])
        velocity = model_fn(x.to(noise.dtype), times, text, text_mask)
        if velocity.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(velocity.shape)} for latents "
                f"{tuple(x.shape)}; they must be equal"
            )
        return velocity.float()

    # Not found by its timestep: where there are many steps, whole timesteps come twice.
    scheduler.set_begin_index(0)
    x = noise.float()
    steps = len(scheduler.timesteps)
    for done, timestep in enumerate(scheduler.timesteps, start=1):
        if not guided:
            velocity = predict(x, timestep, text, text_mask)
        else:
            if batched_guidance:
                both = predict(torch.cat((x, x)), timestep, text, text_mask)
                with_text, without = both.chunk(2)
            else:
                assert null_text is not None
                assert null_mask is not None
                with_text = predict(x, timestep, text, text_mask)
                without = predict(x, timestep, null_text, null_mask)
            velocity = without + guidance * (with_text - without)
        with torch.autocast(x.device.type, enabled=False):  # it would step in bf16
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        if progress is not None:
            progress(done, steps)
    return x.to(noise.dtype)


def _null_captions(
    text: Tensor, mask: Tensor, null_text: Tensor, null_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """As many null captions as captions, of their dtype and on their device."""
    batch = text.shape[0]
    if null_text.shape[0] not in (1, batch) or null_mask.shape != null_text.shape[:2]:
        raise ValueError(
            f"null_text {tuple(null_text.shape)} and null_mask {tuple(null_mask.shape)} must be "
            f"(1 or {batch}, L, text_dim) and (1 or {batch}, L)"
        )
    return null_text.expand(batch, -1, -1).to(text), null_mask.expand(batch, -1).to(mask)


def _stack_captions(
    text: Tensor, mask: Tensor, null_text: Tensor, null_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Captions, then the null captions, padded to one length."""
    length = max(text.shape[1], null_text.shape[1])

    def pad_text(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0, 0, length - t.shape[1]))

    def pad_mask(m: Tensor) -> Tensor:
        return F.pad(m, (0, length - m.shape[1]), value=False)

    return (
        torch.cat((pad_text(text), pad_text(null_text))),
        torch.cat((pad_mask(mask), pad_mask(null_mask))),
    )
