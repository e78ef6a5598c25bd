"""Videos from a model: schedulers, guidance, seeds and the time of each stage."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sla.attention import FullConfig
from sla.diffusion import FlowMatching
from sla.models.dit import VideoDiT
from sla.models.testing import open_branches, tiny_dit_config, tiny_text_config
from sla.models.text import TrainedTextEncoder
from sla.training.config import SamplingConfig
from sla.training.generation import StageSeconds, generate_videos

CONFIG = SamplingConfig(steps=4, guidance=3.0, seed=5)
SHAPE = (3, 2, 4, 4)


@pytest.fixture(scope="module")
def networks() -> tuple[VideoDiT, TrainedTextEncoder]:
    torch.manual_seed(0)
    model = VideoDiT(tiny_dit_config(), FullConfig()).eval()
    encoder = TrainedTextEncoder(tiny_text_config()).eval()
    open_branches(model)
    open_branches(encoder)
    return model, encoder


def videos(
    networks: tuple[Any, Any], prompts: tuple[str, ...] = ("a cat",), **changes: Any
) -> np.ndarray:
    given = {
        name: changes.pop(name) for name in ("progress", "decode", "timings") if name in changes
    }
    flow = FlowMatching(shift=3.0, timesteps="uniform")
    return generate_videos(*networks, flow, replace(CONFIG, **changes), prompts, SHAPE, **given)


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_two_forwards_make_the_same_video(
    networks: tuple[VideoDiT, TrainedTextEncoder], scheduler: str
) -> None:
    batched = videos(networks, scheduler=scheduler)
    apart = videos(networks, scheduler=scheduler, batched_guidance=False)
    assert np.abs(batched.astype(int) - apart).max() <= 1, "up to the rounding to uint8"
    assert np.abs(batched.astype(int) - videos(networks, guidance=1.0)).max() > 10


def test_unipc_needs_fewer_steps_to_the_same_end(
    networks: tuple[VideoDiT, TrainedTextEncoder],
) -> None:
    end = videos(networks, steps=128, guidance=1.0).astype(float)
    errors = {
        name: np.abs(videos(networks, scheduler=name, guidance=1.0) - end).mean()
        for name in ("euler", "unipc")
    }
    assert 0 < errors["unipc"] < 0.8 * errors["euler"], "levels of 255, mean"


def test_a_prompt_has_the_seed_of_its_place(networks: tuple[VideoDiT, TrainedTextEncoder]) -> None:
    together = videos(networks, ("a cat", "a dog"))
    np.testing.assert_array_equal(together[:1], videos(networks, ("a cat",)))
    np.testing.assert_array_equal(together[1:], videos(networks, ("a dog",), seed=6))
    assert together.shape == (2, 2, 4, 4, 3)
    assert videos(networks, ()).shape == (0, 2, 4, 4, 3)


def test_videos_sampled_together_are_those_sampled_alone(
    networks: tuple[VideoDiT, TrainedTextEncoder],
) -> None:
    prompts, stages, calls = ("a cat", "a dog", "a bird"), [], []
    alone = videos(networks, prompts)
    together = videos(
        networks,
        prompts,
        batch_size=2,
        timings=stages.append,
        progress=lambda *done: calls.append(done),
    )
    assert np.abs(together.astype(int) - alone).max() <= 1, "up to the rounding to uint8"
    assert np.abs(alone[0].astype(int) - alone[2]).max() > 10
    assert len(stages) == 3
    assert calls == [*((2 * i, 12) for i in range(1, 5)), *((8 + i, 12) for i in range(1, 5))]


class SlowEncoder:
    text_dim = 16

    def __init__(self) -> None:
        self.captions: list[str] = []

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        time.sleep(0.02)
        self.captions += captions
        return torch.zeros(1, 1, 16), torch.ones(1, 1, dtype=torch.bool)


class SlowModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, latents: Tensor, *_: Tensor) -> Tensor:
        time.sleep(0.03)
        return latents * self.weight


def test_each_stage_has_its_own_time() -> None:
    stages: list[StageSeconds] = []
    calls: list[tuple[int, int]] = []
    encoder = SlowEncoder()

    def decode(latents: Tensor) -> Tensor:
        time.sleep(0.1)
        return latents

    networks = (SlowModel(), encoder)
    more = {
        "decode": decode,
        "timings": stages.append,
        "progress": lambda *done: calls.append(done),
    }
    videos(networks, ("a", "b"), **more)
    assert encoder.captions == ["a", "", "b", ""]
    assert calls == [(i, 8) for i in range(1, 9)]
    assert len(stages) == 2
    for stage in stages:
        # What was slept is a bound below; a busy machine only adds.
        assert stage.text_encoding >= 0.04
        assert len(stage.steps) == 4
        assert min(stage.steps) >= 0.03
        assert stage.denoising == sum(stage.steps)
        assert stage.decoding >= 0.1

    encoder.captions.clear()
    videos(networks, ("a",), guidance=1.0)
    assert encoder.captions == ["a"], "without guidance nothing needs the empty caption"


def test_an_unknown_scheduler_is_named() -> None:
    with pytest.raises(ValueError, match=r"sampling\.scheduler is 'ddim'; it must be one of"):
        SamplingConfig(scheduler="ddim")
