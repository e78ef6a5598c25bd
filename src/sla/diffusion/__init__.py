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
from sla.diffusion.sampling import ModelFunction, Scheduler, sample

__all__ = [
    "TIMESTEPS",
    "FlowMatching",
    "ModelFunction",
    "SampleNoise",
    "Scheduler",
    "per_sample_noise",
    "per_sample_uniform",
    "sample",
    "sample_generator",
    "shift_sigma",
]
