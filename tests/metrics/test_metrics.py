"""Metrics against known answers, torchmetrics, and what they must rank."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from sla_eval import VideoMetric, available_metrics, build_metric, metric_class, register_metric
from sla_eval.metrics.base import BatchedNetworkMetric
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

# What runs anywhere; metrics that run networks are tested with small ones, in their own files.
WEIGHT_FREE = ["flow_magnitude", "psnr", "ssim", "temporal_flickering", "warping_error"]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_video(generator: torch.Generator, frames: int = 5) -> Tensor:
    return torch.randint(0, 256, (frames, 3, 24, 32), dtype=torch.uint8, generator=generator)


def smooth_video(frames: int = 5) -> Tensor:
    """Moving stripes with structure at several scales."""
    x, y = torch.arange(32.0), torch.arange(24.0)[:, None]
    video = [
        128 + 60 * torch.sin(0.9 * x + 0.3 * t) * torch.cos(0.5 * y) + 30 * torch.sin(1.7 * y + t)
        for t in range(frames)
    ]
    return torch.stack(video).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)


def add_noise(video: Tensor, scale: float) -> Tensor:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    return (video.float() + scale * noise).round().clamp(0, 255).to(torch.uint8)


def blur(video: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(video.float(), [size // 2] * 4, mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, size, stride=1).round().to(torch.uint8)


def value(name: str, video: Tensor, reference: Tensor | None = None) -> float:
    metric = build_metric(name)
    metric.update(video, reference)
    return metric.compute().item()


def test_identical_frames_do_not_flicker(generator: torch.Generator) -> None:
    frame = random_video(generator, frames=1)
    assert value("temporal_flickering", frame.repeat(6, 1, 1, 1)) == 1.0


@pytest.mark.parametrize("step", [1, 7, 60, 255])
@pytest.mark.parametrize("falling", [False, True])
def test_brightness_ramp_flickers_by_its_step(step: int, falling: bool) -> None:
    levels = torch.arange(0, 256, step)
    levels = levels.flip(0) if falling else levels  # uint8 differences must not wrap
    video = levels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    assert value("temporal_flickering", video) == pytest.approx((255 - step) / 255, abs=1e-12)


def test_flicker_equals_vbench_formula(generator: torch.Generator) -> None:
    video = random_video(generator)
    frames = video.double()
    pairs = [(frames[i] - frames[i + 1]).abs().mean() for i in range(len(frames) - 1)]
    expected = (255 - torch.stack(pairs).mean().item()) / 255
    assert value("temporal_flickering", video) == pytest.approx(expected, abs=1e-12)


def test_more_noise_flickers_more() -> None:
    scores = [value("temporal_flickering", add_noise(smooth_video(), s)) for s in (0, 10, 20, 40)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_flicker_needs_two_frames(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        value("temporal_flickering", random_video(generator, frames=1))


def test_psnr_equals_torchmetrics_on_the_whole_clip(generator: torch.Generator) -> None:
    # Frames of unlike quality: the mean of their PSNR would be another number.
    reference = random_video(generator)
    video = torch.stack([add_noise(frame, 5.0 * (t + 1)) for t, frame in enumerate(reference)])
    expected = peak_signal_noise_ratio(video.double(), reference.double(), data_range=255.0)
    assert value("psnr", video, reference) == pytest.approx(expected.item(), abs=1e-6)


def test_psnr_of_identical_and_of_opposite_videos(generator: torch.Generator) -> None:
    video = random_video(generator)
    assert value("psnr", video, video) == math.inf
    assert value("psnr", torch.zeros_like(video), torch.full_like(video, 255)) == 0.0


@pytest.mark.parametrize("frames", [1, 5])
def test_ssim_equals_torchmetrics(generator: torch.Generator, frames: int) -> None:
    reference = random_video(generator, frames)
    video = add_noise(reference, 30)
    expected = structural_similarity_index_measure(
        video.double(), reference.double(), data_range=255.0
    )
    assert isinstance(expected, Tensor)
    assert value("ssim", video, reference) == pytest.approx(expected.item(), abs=1e-9)


def test_ssim_of_an_identical_video() -> None:
    assert value("ssim", smooth_video(), smooth_video()) == pytest.approx(1.0, abs=1e-9)


def test_ssim_refuses_frames_below_its_window() -> None:
    video = torch.zeros(2, 3, 10, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="10 x 40"):
        value("ssim", video, video)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_more_damage_scores_lower(name: str, damage: str) -> None:
    reference = smooth_video()
    if damage == "noise":
        videos = [add_noise(reference, scale) for scale in (4, 12, 36)]
    else:
        videos = [blur(reference, size) for size in (3, 5, 9)]
    scores = [value(name, video, reference) for video in videos]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_weight_free_metrics_are_available() -> None:
    assert set(WEIGHT_FREE) <= set(available_metrics())
    for name in WEIGHT_FREE:
        assert metric_class(name).availability() is None


@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_mean_over_videos_in_any_order(name: str, generator: torch.Generator) -> None:
    # Of unlike length: each video counts once, whatever its frames.
    references = [random_video(generator, frames) for frames in (2, 5, 9)]
    videos = [add_noise(video, 8.0 * (i + 1)) for i, video in enumerate(references)]
    alone = [value(name, *pair) for pair in zip(videos, references, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        metric = build_metric(name)
        for i in order:
            metric.update(videos[i], references[i])
        assert metric.per_video == [alone[i] for i in order]
        assert metric.compute().item() == pytest.approx(sum(alone) / 3, rel=1e-12)
    metric.reset()
    assert metric.per_video == []
    with (
        pytest.raises(ValueError, match=f"{name} has scored no video"),
        pytest.warns(UserWarning, match="before the ``update``"),
    ):
        metric.compute()


@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_values_lie_in_the_range_and_inputs_are_kept(name: str, generator: torch.Generator) -> None:
    video, reference = random_video(generator), random_video(generator)
    before = video.clone(), reference.clone()
    metric = build_metric(name)
    low, high = metric.value_range
    assert low <= value(name, video, reference) <= high
    assert torch.equal(video, before[0])
    assert torch.equal(reference, before[1])


@pytest.mark.parametrize(
    ("video", "error", "text"),
    [
        (torch.zeros(2, 3, 16, 16), TypeError, "video must be a uint8 tensor, got torch.float32"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), ValueError, r"video .*\(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), ValueError, r"none 0, got \(0, "),
    ],
)
def test_bad_video_is_refused(video: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        value("temporal_flickering", video)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_bad_reference_is_refused(name: str, generator: torch.Generator) -> None:
    video = random_video(generator)
    with pytest.raises(ValueError, match=f"reference must be given: {name}"):
        value(name, video)
    with pytest.raises(ValueError, match="reference must have the shape of video"):
        value(name, video, video[:-1])
    with pytest.raises(TypeError, match="reference must be a uint8 tensor"):
        value(name, video, video.float())


def test_registry_is_open_and_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("sla_eval.metrics.registry")
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))

    @register_metric
    class Brightness(VideoMetric):
        name = "brightness"
        higher_is_better = True
        value_range = (0.0, 255.0)

        def score(self, video: Tensor, reference: Tensor | None) -> float:
            return video.double().mean().item()

    assert "brightness" in available_metrics()
    assert value("brightness", torch.full((2, 3, 4, 4), 9, dtype=torch.uint8)) == 9.0
    with pytest.raises(ValueError, match=r"unknown metric 'brightnes'; did you mean 'brightness'"):
        build_metric("brightnes")

    class Other(Brightness):
        pass

    with pytest.raises(ValueError, match="a metric named 'brightness' is registered: Brightness"):
        register_metric(Other)
    assert Brightness.title == "Brightness"
    with pytest.raises(TypeError, match="subclass of VideoMetric"):
        register_metric(int)  # type: ignore[type-var]


@pytest.mark.parametrize("name", available_metrics())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(f"sla_eval.metrics.{name}")
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", available_metrics())
def test_metrics_say_what_they_are(name: str) -> None:
    cls = metric_class(name)
    assert cls.title
    assert cls.source
    low, high = cls.value_range
    assert low < high
    assert isinstance(cls.higher_is_better, bool)
    for word in ("Formula:", "Inputs:", "Range:", "Average:", "Source:"):
        assert word in (cls.__doc__ or ""), f"{name} does not say its {word}"


@pytest.mark.parametrize("name", ["psnr", "ssim", "temporal_flickering", "warping_error"])
def test_many_frames_in_a_call_as_on_a_gpu_score_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = metric_class(name)
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (7, 3, 4, 5), generator=generator).float()
    noise = torch.randint(0, 20, (2, 7, 3, 32, 40), generator=generator)
    smooth = torch.nn.functional.interpolate(levels, (32, 40), mode="bilinear")
    video, reference = (smooth + noise).clamp(0, 255).to(torch.uint8)
    values = []
    for size in (1, 3, 100):
        monkeypatch.setattr(f"{cls.__module__}.frames_at_once", lambda frames, size=size: size)
        metric = cls()
        metric.update(video, reference)
        values.append(float(metric.compute()))
    assert values[0] not in (0.0, 1.0)
    assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_pairs_at_once_on_a_gpu_fit_its_memory() -> None:
    metric = metric_class("dynamic_degree")(backbone=torch.nn.Identity())
    assert isinstance(metric, BatchedNetworkMetric)
    assert metric.pairs_at_once(torch.empty(9, 3, 256, 256)) == 1
    for height, width, pairs in ((256, 256, 16), (480, 832, 6), (2160, 3840, 1)):
        frames = torch.empty(9, 3, height, width, device="meta")  # any that is not the CPU
        assert metric.pairs_at_once(frames) == pairs
    given = metric_class("dynamic_degree")(backbone=torch.nn.Identity(), batch_size=2)
    assert isinstance(given, BatchedNetworkMetric)
    assert given.pairs_at_once(torch.empty(9, 3, 256, 256, device="meta")) == 2
