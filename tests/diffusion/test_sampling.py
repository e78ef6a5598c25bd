"""Sampling by diffusers' schedulers, and classifier-free guidance."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from sla.diffusion import sample, shift_sigma
from sla.models.schedulers import SCHEDULERS, build_scheduler

TEXT = torch.ones(2, 3, 4)
MASK = torch.ones(2, 3, dtype=torch.bool)
NULL = torch.zeros(1, 1, 4)
NULL_MASK = torch.ones(1, 1, dtype=torch.bool)


def run(model_fn, noise, steps=4, shift=3.0, guidance=1.0, name="euler", **changes):
    arguments = {"null_text": NULL, "null_mask": NULL_MASK, **changes}
    scheduler = build_scheduler(name, shift, steps)
    return sample(model_fn, noise, TEXT, MASK, scheduler=scheduler, guidance=guidance, **arguments)


def gaussian_velocity(mean, std):
    """Of data N(mean, std^2): the marginal velocity is known, the flow maps z to mean + std z."""

    def velocity(x, timestep, text, mask):
        sigma = (timestep / 1000).view(-1, 1)
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / variance
        return slope * (x - (1 - sigma) * mean) - mean

    return velocity


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_exact_on_straight_paths(steps, shift, name):
    # The velocity of flow matching between two points is constant: any number of steps is exact.
    x0, noise = torch.randn(2, 2, 3, 4, 4).unbind(0)
    result = run(lambda x, t, text, mask: noise - x0, noise, steps, shift, name=name)
    torch.testing.assert_close(result, x0)


def test_converges_to_the_exact_flow_of_a_gaussian():
    mean, std = 0.7, 0.3
    velocity = gaussian_velocity(mean, std)
    noise = torch.linspace(-2.5, 2.5, 100).view(2, 50)  # the error grows with the distance
    errors = [
        (run(velocity, noise, steps) - (mean + std * noise)).abs().max().item()
        for steps in (20, 40, 80)
    ]
    assert errors[2] < 0.05
    # First order: half the step, half the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.25)


def test_unipc_is_nearer_to_the_exact_flow_than_euler():
    mean, std = 0.7, 0.3
    noise = torch.linspace(-1.5, 1.5, 100).view(2, 50)

    def error(name, steps=40):
        velocity = gaussian_velocity(mean, std)
        return (run(velocity, noise, steps, name=name) - (mean + std * noise)).abs().max().item()

    assert error("unipc") < 0.25 * error("euler")
    assert error("unipc") < error("euler", steps=80)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_euler_goes_evenly_from_one_to_zero_then_shifted(shift):
    steps = 7
    seen = []
    weight = torch.randn(4, 4)

    def velocity(x, timestep, text, mask):
        seen.append(timestep[0].item())
        return torch.tanh(x @ weight) * (1 + timestep.view(-1, 1) / 1000)

    noise = torch.randn(2, 4)
    result = run(velocity, noise, steps, shift)
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()
    torch.testing.assert_close(torch.tensor(seen), 1000 * sigmas[:-1])
    x = noise
    for sigma, after in pairwise(sigmas):
        x = x + (after - sigma) * velocity(x, (1000 * sigma).expand(2), None, None)
    torch.testing.assert_close(result, x)


@pytest.mark.parametrize("batched", [True, False])
def test_unipc_samples_as_diffusers_pipeline_of_wan(batched):
    generator = torch.Generator().manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=6,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
    )
    noise = torch.randn(1, 4, 2, 4, 4, generator=generator)
    text, null = torch.randn(2, 1, 3, 6, generator=generator).unbind(0)
    scheduler = build_scheduler("unipc", 5.0)
    pipeline = WanPipeline(None, None, vae=None, scheduler=scheduler, transformer=model)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=6,
        guidance_scale=4.0,
        latents=noise,
        prompt_embeds=text,
        negative_prompt_embeds=null,
        output_type="latent",
    ).frames

    def velocity(x, timestep, text, mask):
        return model(x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]

    result = sample(
        velocity,
        noise,
        text,
        MASK[:1],
        null,
        MASK[:1],
        scheduler=build_scheduler("unipc", 5.0, 6),
        guidance=4.0,
        batched_guidance=batched,
    )
    torch.testing.assert_close(result, wanted)


def test_steps_stay_in_float32_under_autocast():
    def result():
        # Of the third order: its steps are matrix products.
        scheduler = UniPCMultistepScheduler.from_config(
            build_scheduler("unipc", 3.0).config, solver_order=3
        )
        scheduler.set_timesteps(6)
        return sample(gaussian_velocity(0.7, 0.3), noise, TEXT, MASK, scheduler=scheduler)

    noise = torch.randn(2, 50)
    plain = result()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(result(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_more_steps_than_whole_timesteps(name):
    x0, noise = torch.randn(2, 2, 5).unbind(0)
    result = run(lambda x, t, text, mask: noise - x0, noise, 600, 5.0, name=name)
    torch.testing.assert_close(result, x0, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_two_forwards_give_what_the_doubled_batch_gives(name):
    batches = []
    weight = torch.randn(5, 5)

    def velocity(x, timestep, text, mask):
        batches.append(tuple(text.shape))
        words = (text * mask[..., None]).sum(dim=(1, 2)).view(-1, 1)
        return torch.tanh(x @ weight + words) * (1 + timestep.view(-1, 1) / 1000)

    noise = torch.randn(2, 5)
    batched = run(velocity, noise, guidance=3.0, name=name)
    assert batches == [(4, 3, 4)] * 4
    batches.clear()
    apart = run(velocity, noise, guidance=3.0, name=name, batched_guidance=False)
    assert batches == [(2, 3, 4), (2, 1, 4)] * 4
    torch.testing.assert_close(apart, batched)
    assert not torch.allclose(apart, run(velocity, noise, name=name), atol=0.01)


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
    with pytest.raises(ValueError, match="shift is inf"):
        run(velocity, noise, shift=float("inf"))
    used = build_scheduler("euler", 3.0, 4)
    sample(velocity, noise, TEXT, MASK, scheduler=used)
    with pytest.raises(ValueError, match="scheduler has taken 4 steps"):
        sample(velocity, noise, TEXT, MASK, scheduler=used)
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
