"""The Euler sampler and classifier-free guidance."""

from __future__ import annotations

import pytest
import torch

from sla.diffusion import euler_sigmas, sample

TEXT = torch.ones(2, 3, 4)
MASK = torch.ones(2, 3, dtype=torch.bool)
NULL = torch.zeros(1, 1, 4)
NULL_MASK = torch.ones(1, 1, dtype=torch.bool)


def run(model_fn, noise, steps=4, shift=3.0, guidance=1.0, **changes):
    arguments = {"null_text": NULL, "null_mask": NULL_MASK, **changes}
    return sample(
        model_fn, noise, TEXT, MASK, steps=steps, shift=shift, guidance=guidance, **arguments
    )


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_exact_on_straight_paths(steps, shift):
    # The velocity of flow matching between two points is constant: any number of steps is exact.
    x0, noise = torch.randn(2, 2, 3, 4, 4).unbind(0)
    result = run(lambda x, t, text, mask: noise - x0, noise, steps, shift)
    torch.testing.assert_close(result, x0)


def test_converges_to_the_exact_flow_of_a_gaussian():
    # Data N(m, s^2): the marginal velocity is known and the flow maps noise z to m + s z.
    mean, std = 0.7, 0.3

    def velocity(x, timestep, text, mask):
        sigma = (timestep / 1000).view(-1, 1)
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / variance
        return slope * (x - (1 - sigma) * mean) - mean

    noise = torch.linspace(-2.5, 2.5, 100).view(2, 50)  # the error grows with the distance
    errors = [
        (run(velocity, noise, steps) - (mean + std * noise)).abs().max().item()
        for steps in (20, 40, 80)
    ]
    assert errors[2] < 0.05
    # First order: half the step, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_is_diffusers_euler_scheduler(shift):
    diffusers = pytest.importorskip("diffusers")
    steps = 7
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # By default that scheduler ends at its own smallest sigma, shifted twice; so sigmas are given.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    torch.testing.assert_close(euler_sigmas(steps, shift), scheduler.sigmas)

    weight = torch.randn(4, 4)
    seen = []

    def velocity(x, timestep, text, mask):
        seen.append(timestep[0].item())
        return torch.tanh(x @ weight) * (1 + timestep.view(-1, 1) / 1000)

    noise = torch.randn(2, 4)
    ours = run(velocity, noise, steps, shift)
    torch.testing.assert_close(torch.tensor(seen), scheduler.timesteps)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep.expand(2), None, None), timestep, x).prev_sample
    torch.testing.assert_close(ours, x)


def test_guidance_formula_in_one_forward():
    calls = []

    def velocity(x, timestep, text, mask):
        calls.append((x.shape[0], text.shape, mask.clone()))
        return x + text.sum(dim=(1, 2)).view(-1, 1)

    noise = torch.randn(2, 5)
    result = run(velocity, noise, steps=1, guidance=3.0)
    with_text, without = noise + 12.0, noise
    torch.testing.assert_close(result, noise - (without + 3.0 * (with_text - without)))
    assert len(calls) == 1
    batch, text_shape, mask = calls[0]
    assert batch == 4
    assert text_shape == (4, 3, 4)
    assert mask.tolist() == [[True] * 3] * 2 + [[True, False, False]] * 2


def test_without_guidance_the_null_caption_is_not_run():
    batches = []

    def velocity(x, timestep, text, mask):
        batches.append(x.shape[0])
        return x

    run(velocity, torch.randn(2, 5), steps=3, null_text=None, null_mask=None)
    assert batches == [2, 2, 2]


def test_zero_guidance_is_unconditional_and_a_longer_null_caption_fits():
    def velocity(x, timestep, text, mask):
        return text.sum(dim=(1, 2)).view(-1, 1).expand_as(x)

    noise = torch.randn(2, 5)
    null, null_mask = torch.full((2, 6, 4), 0.5), torch.ones(2, 6, dtype=torch.bool)
    result = run(velocity, noise, guidance=0.0, null_text=null, null_mask=null_mask)
    torch.testing.assert_close(result, noise - 12.0)


def test_progress_dtype_and_gradients():
    steps_done = []
    weight = torch.ones(1, requires_grad=True)
    noise = torch.randn(2, 5, dtype=torch.bfloat16)
    dtypes = []

    def velocity(x, timestep, text, mask):
        dtypes.append((x.dtype, timestep.dtype))
        return x * weight.bfloat16()

    result = run(velocity, noise, progress=lambda done, total: steps_done.append((done, total)))
    assert steps_done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.dtype == torch.bfloat16
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert not result.requires_grad


def test_bad_input_is_named():
    noise = torch.randn(2, 5)

    def velocity(x, timestep, text, mask):
        return x

    with pytest.raises(ValueError, match="steps is 0"):
        run(velocity, noise, steps=0)
    with pytest.raises(ValueError, match=r"shift is -1\.0"):
        run(velocity, noise, shift=-1.0)
    with pytest.raises(ValueError, match="guidance is nan"):
        run(velocity, noise, guidance=float("nan"))
    with pytest.raises(ValueError, match="without null_text"):
        run(velocity, noise, guidance=2.0, null_text=None)
    with pytest.raises(ValueError, match="as noise has 3 samples"):
        run(velocity, torch.randn(3, 5))
    with pytest.raises(ValueError, match="null_text"):
        run(velocity, noise, guidance=2.0, null_text=torch.zeros(3, 1, 4))
    with pytest.raises(ValueError, match="the model returned shape"):
        run(lambda x, *_: x[:, :2], noise)
