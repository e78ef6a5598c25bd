"""diffusers' samplers for flow matching, as Wan2.1 uses them."""

from __future__ import annotations

import math
from typing import Any

import torch

SCHEDULERS = ("unipc", "euler")


def build_scheduler(
    name: str = "unipc",
    shift: float = 3.0,
    steps: int | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """A scheduler that reads the model's output as the velocity. It serves one batch of samples.

    Args:
        name: `unipc` (Wan2.1's) or `euler`.
        shift: timestep shift; Wan2.1 takes 3 at 480p and 5 at 720p.
        steps: set the timesteps of so many steps; None leaves that to the caller. `euler` goes
            evenly from noise level 1 to 0, then shifted; `unipc` as diffusers' pipeline of Wan2.1,
            whose timesteps are whole numbers.
        device: of the timesteps.

    Raises:
        ValueError: an unknown name, a shift that is not positive and finite, or steps < 1.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}; it must be positive")
    if name not in SCHEDULERS:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(SCHEDULERS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    # Here, as configs read the names above and need no diffusers.
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    scheduler: Any
    if name == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        if steps is not None:
            scheduler.set_timesteps(steps, device=device)
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if steps is not None:
        # Its own default ends at the smallest noise level of training, shifted twice.
        levels = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1]
        scheduler.set_timesteps(sigmas=levels.tolist(), device=device)
    return scheduler


__all__ = ["SCHEDULERS", "build_scheduler"]
