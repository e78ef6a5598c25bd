"""Flow matching and sampling; knows tensors and functions, nothing of models."""

from sla.diffusion.flow_matching import (
    TIMESTEPS,
    FlowMatching,
    SampleNoise,
    per_sample_noise,
    per_sample_uniform,
    sample_generator,
    shift_sigma,
)
from sla.diffusion.sampling import ModelFunction, euler_sigmas, sample

__all__ = [
    "TIMESTEPS",
    "FlowMatching",
    "ModelFunction",
    "SampleNoise",
    "euler_sigmas",
    "per_sample_noise",
    "per_sample_uniform",
    "sample",
    "sample_generator",
    "shift_sigma",
]
