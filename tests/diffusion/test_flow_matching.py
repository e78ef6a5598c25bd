"""The flow-matching objective and its randomness."""

from __future__ import annotations

import math

import pytest
import torch

from sla.diffusion import (
    FlowMatching,
    per_sample_noise,
    per_sample_uniform,
    sample_generator,
    shift_sigma,
)
from sla.diffusion.flow_matching import mix_seed


@pytest.fixture
def flow() -> FlowMatching:
    return FlowMatching(shift=3.0, timesteps="logit_normal")


def test_interpolation_goes_from_data_to_noise(flow):
    x0, noise = torch.randn(2, 3, 3, 2, 4, 4).unbind(0)
    sigma = torch.tensor([0.0, 1.0, 0.25])
    mixed = flow.interpolate(x0, noise, sigma)
    assert torch.equal(mixed[0], x0[0])
    assert torch.equal(mixed[1], noise[1])
    torch.testing.assert_close(mixed[2], 0.75 * x0[2] + 0.25 * noise[2])


def test_target_is_the_derivative_of_the_path(flow):
    x0, noise = torch.randn(2, 2, 5, dtype=torch.float64).unbind(0)
    _, derivative = torch.func.jvp(
        lambda s: flow.interpolate(x0, noise, s),
        (torch.tensor([0.3, 0.9], dtype=torch.float64),),
        (torch.ones(2, dtype=torch.float64),),
    )
    torch.testing.assert_close(flow.target(x0, noise), derivative)


def test_denoised_inverts_the_interpolation(flow):
    x0, noise = torch.randn(2, 3, 5).unbind(0)
    sigma = torch.tensor([0.0, 0.4, 1.0])
    mixed = flow.interpolate(x0, noise, sigma)
    torch.testing.assert_close(flow.denoised(mixed, flow.target(x0, noise), sigma), x0)


def test_timestep_is_a_thousand_sigma(flow):
    assert flow.timestep(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 500.0, 1000.0]


def test_loss_is_per_sample_in_float32(flow):
    prediction = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    target = torch.stack((torch.full((3, 4), 2.0), torch.full((3, 4), 0.5))).bfloat16()
    loss = flow.loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [4.0, 0.25]


def test_shift_keeps_the_ends_and_composes():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigma(sigma, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert shifted[5] == pytest.approx(0.75)
    torch.testing.assert_close(shift_sigma(shifted, 2.0), shift_sigma(sigma, 6.0))
    torch.testing.assert_close(shift_sigma(shifted, 1 / 3), sigma)


@pytest.mark.parametrize("timesteps", ["logit_normal", "uniform"])
def test_sigma_is_monotone_in_u_and_bounded(timesteps):
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = FlowMatching(5.0, timesteps).sample_sigma(u)
    assert sigma.dtype == torch.float32
    assert (sigma.diff() > 0).all()
    assert sigma[0] == 0
    assert sigma[-1] == 1


def test_densities_are_what_they_say():
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    uniform = FlowMatching(1.0, "uniform").sample_sigma(u)
    torch.testing.assert_close(uniform.double(), u)
    normal = torch.logit(FlowMatching(1.0, "logit_normal").sample_sigma(u).double())
    assert normal.mean().item() == pytest.approx(0, abs=1e-3)
    assert normal.std().item() == pytest.approx(1, abs=1e-2)
    # One standard deviation: 68.27 % within sigmoid(-1) .. sigmoid(1).
    assert (normal.abs() < 1).double().mean().item() == pytest.approx(math.erf(2**-0.5), abs=1e-3)


def test_bad_input_is_named(flow):
    x0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="noise has shape"):
        flow.interpolate(x0, torch.zeros(1, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="sigma has shape"):
        flow.interpolate(x0, x0, torch.zeros(1))
    with pytest.raises(ValueError, match="prediction has shape"):
        flow.loss(torch.zeros(2, 1), x0)
    with pytest.raises(ValueError, match=r"shift is 0\.0"):
        FlowMatching(0.0, "uniform")
    with pytest.raises(ValueError, match="timesteps is 'normal'"):
        FlowMatching(1.0, "normal")
    with pytest.raises(ValueError, match="sample_index holds -1"):
        per_sample_noise([0, -1], 0, (2,))


# --- randomness ------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_index():
    noise, u = per_sample_noise(torch.tensor([5, 0, 7]), 3, (3, 2, 4, 4))
    assert noise.shape == (3, 3, 2, 4, 4)
    assert u.shape == (3,)
    other, other_u = per_sample_noise([7, 123, 5], 3, (3, 2, 4, 4))
    assert torch.equal(other[0], noise[2])
    assert torch.equal(other[2], noise[0])
    assert other_u[0] == u[2]
    # Neither the global generator nor the shape matters to the timestep.
    torch.manual_seed(99)
    assert torch.equal(per_sample_noise([5, 0, 7], 3, (1,)).u, u)


def test_noise_differs_between_seeds_indices_and_streams():
    noise = per_sample_noise(range(50), 0, (8,)).noise
    assert len(torch.unique(noise, dim=0)) == 50
    assert not torch.equal(per_sample_noise(range(50), 1, (8,)).noise, noise)
    # Seed and index are not interchangeable, nor does one make up for the other.
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(1, 2) != mix_seed(2, 1 ^ 3)
    draws = [per_sample_uniform([4], 0, stream).item() for stream in range(5)]
    assert len(set(draws)) == 5
    first = torch.rand((), generator=sample_generator(0, 4), dtype=torch.float64)
    assert per_sample_noise([4], 0, (1,)).u.item() == first.item() == draws[0]


def test_no_two_samples_share_a_generator():
    # By chance 200,000 random 32-bit seeds would hold about 4.7 equal pairs.
    assert len({mix_seed(17, index) for index in range(200_000)}) == 200_000
    assert mix_seed(17, 2**32 + 5) != mix_seed(17, 5)
    assert all(0 <= mix_seed(-3, index) < 2**32 for index in (0, 1, 2**40))


def test_torch_reads_32_bits_of_a_seed():
    # Why mix_seed is as it is; if this ever fails, it may be simpler.
    low, high = (torch.Generator().manual_seed(seed) for seed in (1, 1 + 2**32))
    assert torch.equal(torch.rand(4, generator=low), torch.rand(4, generator=high))


def test_draws_are_standard_normal_and_uniform():
    noise, u = per_sample_noise(range(2000), 0, (64,))
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    # Neighbouring samples are uncorrelated.
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.histc(u.float(), bins=10, min=0, max=1)
    assert histogram.min() > 150
    assert histogram.max() < 250


def test_empty_batch_and_dtype():
    empty = per_sample_noise([], 0, (3, 4))
    assert empty.noise.shape == (0, 3, 4)
    assert empty.u.shape == (0,)
    half = per_sample_noise([1], 0, (4,), dtype=torch.bfloat16).noise
    assert torch.equal(half, per_sample_noise([1], 0, (4,)).noise.bfloat16())
