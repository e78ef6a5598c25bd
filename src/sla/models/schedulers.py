"""diffusers' samplers for flow matching, as Wan2.1 uses them."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

SCHEDULERS = ("unipc", "euler")


def build_scheduler(name: str = "unipc", shift: float = 3.0) -> Any:
    """A scheduler that reads the model's output as the velocity.

    Args:
        name: `unipc` (Wan2.1's) or `euler`.
        shift: timestep shift; Wan2.1 takes 3 at 480p and 5 at 720p.

    Raises:
        ValueError: an unknown name, or a shift that is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive")
    if name == "unipc":
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    raise ValueError(f"name is {name!r}; it must be one of {', '.join(SCHEDULERS)}")


__all__ = ["SCHEDULERS", "build_scheduler"]
