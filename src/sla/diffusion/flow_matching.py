"""Flow matching as Wan2.1 trains it.

sigma in [0, 1] is the noise level: x_sigma = (1 - sigma) x0 + sigma noise; the network sees the
timestep 1000 sigma and learns the velocity d x_sigma / d sigma = noise - x0.

All randomness comes in as tensors, made by `per_sample_noise` from (seed, sample index) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TIMESTEPS = 1000.0  # timestep = TIMESTEPS * sigma
DENSITIES = ("logit_normal", "uniform")


@dataclass(frozen=True)
class FlowMatching:
    """The objective.

    Attributes:
        shift: timestep shift s > 0; s > 1 spends more of training and sampling at high noise.
        timesteps: density of sigma before the shift: `logit_normal` (sigmoid of a standard
            normal) or `uniform`.

    Raises:
        ValueError: shift not positive and finite, or unknown density.
    """

    shift: float
    timesteps: str

    def __post_init__(self) -> None:
        _check_shift(self.shift)
        if self.timesteps not in DENSITIES:
            raise ValueError(f"timesteps is {self.timesteps!r}; it must be one of {DENSITIES}")

    def sample_sigma(self, u: Tensor) -> Tensor:
        """Noise levels from uniform draws, by the inverse of their distribution function.

        Monotone: strata of u become strata of sigma, for either density.

        Args:
            u: any shape, in [0, 1].

        Returns:
            sigma, shape of `u`, float32 in [0, 1].
        """
        u = u.double()  # erfinv near 0 and 1 needs the digits
        if self.timesteps == "logit_normal":
            u = torch.sigmoid(math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0))
        return shift_sigma(u, self.shift).float()

    def interpolate(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_sigma = (1 - sigma) x0 + sigma noise.

        Args:
            x0, noise: (B, ...).
            sigma: (B,).

        Raises:
            ValueError: shapes that do not fit.
        """
        _check_same_shape("noise", noise, "x0", x0)
        sigma = _per_sample(sigma, x0)
        return ((1.0 - sigma) * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity noise - x0, shape of `x0`."""
        _check_same_shape("noise", noise, "x0", x0)
        return noise - x0

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told: 1000 sigma."""
        return TIMESTEPS * sigma

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each sample, (B, ...) -> (B,) float32.

        Per sample, so that callers can bucket by timestep; the training loss is its mean.

        Raises:
            ValueError: shapes differ.
        """
        _check_same_shape("prediction", prediction, "target", target)
        return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)

    def denoised(self, x_sigma: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
        """The x0 that a predicted velocity implies: x_sigma - sigma velocity."""
        _check_same_shape("velocity", velocity, "x_sigma", x_sigma)
        return (x_sigma - _per_sample(sigma, x_sigma) * velocity).to(x_sigma.dtype)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma), which keeps 0 and 1."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


class SampleNoise(NamedTuple):
    """Randomness of a batch.

    Attributes:
        noise: standard normal, (B, *shape).
        u: uniform in [0, 1), (B,) float32 or better, for `FlowMatching.sample_sigma`.
    """

    noise: Tensor
    u: Tensor


def per_sample_noise(
    sample_index: Tensor | Sequence[int],
    seed: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    draw_on: torch.device | str = "cpu",
) -> SampleNoise:
    """Noise and timestep draw of each sample, a pure function of (seed, sample index).

    The same for a sample whatever its batch, its rank, or the arm of a comparison: drawn in
    float32 by a generator of its own.

    Args:
        sample_index: (B,) int64 or integers, non-negative.
        seed: seed of the run.
        shape: shape of one sample's noise.
        device, dtype: of the noise returned.
        draw_on: device whose generator makes the noise. The CPU's gives the same noise for every
            `device`, but is slow: two million numbers take as long as a small network's step. `u`
            is the same for all.

    Returns:
        `SampleNoise`; `u` is float64 on `device`.

    Raises:
        ValueError: a negative sample index.
    """
    indices = _indices(sample_index)
    noise = torch.empty(len(indices), *shape, device=draw_on)
    u = torch.empty(len(indices), dtype=torch.float64)
    generator = torch.Generator()
    on_device = generator if noise.device.type == "cpu" else torch.Generator(noise.device)
    for row, index in enumerate(indices):
        own = mix_seed(seed, index)
        generator.manual_seed(own)
        # u first: then it does not depend on the shape of the noise, nor on `draw_on`.
        torch.rand((), generator=generator, out=u[row])
        if on_device is not generator:
            on_device.manual_seed(own)
        torch.randn(tuple(shape), generator=on_device, out=noise[row])
    # From the host without waiting for the device, to which a plain copy would.
    on_host = noise.device.type == "cpu"
    return SampleNoise(
        noise.to(device=device, dtype=dtype, non_blocking=on_host),
        u.to(device=device, non_blocking=True),
    )


def per_sample_uniform(sample_index: Tensor | Sequence[int], seed: int, stream: int) -> Tensor:
    """One more uniform draw of each sample, for instance to drop its caption.

    Args:
        sample_index: (B,) int64 or integers, non-negative.
        seed: seed of the run.
        stream: which draw; 0 is the stream of `per_sample_noise`, use others.

    Returns:
        (B,) float64 in [0, 1), on the CPU.
    """
    draws = [
        torch.rand((), generator=sample_generator(seed, index, stream), dtype=torch.float64)
        for index in _indices(sample_index)
    ]
    return torch.stack(draws) if draws else torch.empty(0, dtype=torch.float64)


def sample_generator(seed: int, sample_index: int, stream: int = 0) -> torch.Generator:
    """CPU generator of one sample.

    Args:
        seed: any integer; its low 64 bits count.
        sample_index: non-negative. Below 2^32 no two samples of a seed share a generator.
        stream: independent generators for the same sample.
    """
    return torch.Generator().manual_seed(mix_seed(seed, sample_index, stream))


def mix_seed(seed: int, sample_index: int, stream: int = 0) -> int:
    """32-bit seed of a sample's generator.

    PyTorch's CPU generator reads only the low 32 bits of its seed, so a 64-bit hash of the pair
    would collide by chance within 100,000 samples. Here the map from index to seed is one to one
    on 32 bits, keyed by a 64-bit hash of seed and stream.
    """
    key = _splitmix64(_splitmix64(seed & _MASK64) ^ (stream & _MASK64))
    key ^= _splitmix64(sample_index >> 32) if sample_index >> 32 else 0
    return _mix32(_mix32((sample_index ^ key) & _MASK32) ^ (key >> 32))


_MASK32 = 2**32 - 1
_MASK64 = 2**64 - 1


def _splitmix64(x: int) -> int:
    """Steele, Lea and Flood's SplitMix64: one step and its finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    """MurmurHash3's 32-bit finaliser, a bijection."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def _indices(sample_index: Tensor | Sequence[int]) -> list[int]:
    values = sample_index.tolist() if isinstance(sample_index, Tensor) else list(sample_index)
    indices = [int(value) for value in values]
    if any(index < 0 for index in indices):
        raise ValueError(f"sample_index holds {min(indices)}; it must be non-negative")
    return indices


def _per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    if sigma.shape != x.shape[:1]:
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}; it must be ({x.shape[0]},), one a sample"
        )
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    # Broadcasting would hide the mistake.
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(other.shape)}, "
            f"as {other_name}"
        )


def _check_shift(shift: float) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}; it must be positive")
