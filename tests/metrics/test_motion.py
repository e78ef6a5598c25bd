"""Metrics of motion: optical flow without weights, RAFT and AMT replaced by known functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sla_eval import optical_flow as flows
from sla_eval.metrics import (
    DynamicDegree,
    FlowMagnitude,
    MotionSmoothness,
    VideoMetric,
    VisionRewardScore,
    WarpingError,
)
from sla_eval.metrics.vision_reward import frames_a_second
from torch import Tensor


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth texture at two scales, float (3, height, width), levels 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for cell in (5, 17):
        coarse = torch.rand(1, 3, height // cell + 3, width // cell + 3, generator=generator)
        layers.append(F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False))
    return (sum(layers) / 2)[0].clamp(0, 1) * 255


def moving(frames: int, x: int, y: int = 0, height: int = 96, width: int = 112) -> Tensor:
    """A picture that moves right by x and down by y pixels a frame."""
    margin = frames * max(abs(x), abs(y))
    big = picture(height + 2 * margin, width + 2 * margin)
    crops = [big[:, margin - t * y :, margin - t * x :][:, :height, :width] for t in range(frames)]
    return torch.stack(crops).round().to(torch.uint8)


def noisy(video: Tensor, scale: float) -> Tensor:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    return (video.float() + scale * noise).round().clamp(0, 255).to(torch.uint8)


def value(metric: VideoMetric, video: Tensor, **context: float) -> float:
    metric.reset()
    metric.update(video, **context)  # type: ignore[arg-type]
    return metric.compute().item()


@pytest.mark.parametrize(("x", "y"), [(0, 0), (1, 0), (0, -2), (3, 4), (-8, 6)])
def test_a_picture_moved_by_n_pixels_has_flow_n(x: int, y: int) -> None:
    brightness = flows.luma(moving(2, x, y))
    flow = flows.optical_flow(brightness[:1], brightness[1:])[0]
    inner = flow[:, 16:-16, 16:-16]
    expected = torch.tensor([x, y], dtype=torch.float32).view(2, 1, 1).expand_as(inner)
    torch.testing.assert_close(inner, expected, atol=0.05, rtol=0)
    assert value(FlowMagnitude(), moving(4, x, y)) == pytest.approx((x**2 + y**2) ** 0.5, abs=0.15)


def test_flow_is_in_pixels_of_the_video_whatever_its_size() -> None:
    video = moving(3, 6, 0, height=200, width=240)
    assert flows.VideoFlow(video).factor == 3
    assert value(FlowMagnitude(), video) == pytest.approx(6, abs=0.3)
    twice = video.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert value(FlowMagnitude(), twice) == pytest.approx(12, abs=0.6)


def test_flow_grows_as_frames_are_dropped() -> None:
    video = moving(9, 2)
    lengths = [value(FlowMagnitude(), video[::step]) for step in (1, 2, 4)]
    assert lengths == pytest.approx([2, 4, 8], abs=0.2)


def test_still_pictures_do_not_move() -> None:
    still = moving(1, 0).repeat(4, 1, 1, 1)
    assert value(FlowMagnitude(), still) < 1e-5
    assert value(WarpingError(), still) < 1e-10


def test_both_ways_to_a_window_s_mean_agree() -> None:
    """The one of a CPU and the one of a GPU."""
    images = torch.rand(2, 3, 9, 12)
    shifted, size = flows._shifted_mean(images), 2 * flows._RADIUS + 1
    pooled = F.avg_pool2d(images, size, 1, flows._RADIUS, count_include_pad=False)
    torch.testing.assert_close(shifted, pooled)
    torch.testing.assert_close(flows._window_mean(images), shifted)


def test_warp_undoes_the_flow_and_knows_the_edges() -> None:
    before = torch.arange(20.0).view(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0], flow[:, 1] = 2, -1
    warped, inside = flows.warp(before, flow)
    assert warped[0, 0, 2, 1] == before[0, 0, 1, 3]
    assert inside[0, 0].tolist() == [[False] * 5] + [[True] * 3 + [False] * 2] * 3


def test_motion_is_no_warping_error_but_noise_and_flicker_are() -> None:
    smooth = moving(5, 2, 1)
    errors = [value(WarpingError(), noisy(smooth, scale)) for scale in (0, 10, 30)]
    assert errors[0] < 1e-5
    assert errors == sorted(errors)
    assert len(set(errors)) == 3
    flicker = smooth.clone()
    flicker[1::2] = (flicker[1::2] * 0.7).to(torch.uint8)
    assert value(WarpingError(), flicker) > 10 * errors[0]
    shuffled = smooth[[0, 3, 1, 4, 2]]
    assert value(WarpingError(), shuffled) > errors[0]


def test_flow_of_a_video_is_computed_once_and_again_if_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = flows.optical_flow

    def counting(before: Tensor, after: Tensor) -> Tensor:
        calls.append(len(before))
        return real(before, after)

    monkeypatch.setattr(flows, "optical_flow", counting)
    video = moving(4, 1)
    first = value(FlowMagnitude(), video)
    value(FlowMagnitude(), video)
    assert calls == [3]
    value(WarpingError(), video)
    assert calls == [3, 3]  # backward
    video[2:] = video[:2].clone()
    assert value(FlowMagnitude(), video) != first
    assert calls == [3, 3, 3]
    value(FlowMagnitude(), video.clone())
    assert calls == [3, 3, 3, 3]


@pytest.mark.parametrize("cls", [FlowMagnitude, WarpingError])
def test_flow_metrics_refuse(cls: type[VideoMetric]) -> None:
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        cls().update(moving(1, 0))
    with pytest.raises(ValueError, match="at least 7 pixels high and wide, got 6 x 40"):
        cls().update(torch.zeros(3, 3, 6, 40, dtype=torch.uint8))


def mean_frame(before: Tensor, after: Tensor) -> Tensor:
    assert before.shape == after.shape
    assert before.shape[-2] % 16 == before.shape[-1] % 16 == 0
    assert 0 <= before.min() <= before.max() <= 1
    return (before + after) / 2 + 1e-4  # 1e-4: whole levels are cut down, not rounded


def levels(*values: int, height: int = 20, width: int = 24) -> Tensor:
    column = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return column.expand(-1, 3, height, width)


def test_motion_smoothness_of_a_ramp_and_of_flicker() -> None:
    metric = MotionSmoothness(backbone=mean_frame)
    assert value(metric, levels(10, 20, 30, 40, 50)) == 1.0
    assert value(metric, levels(9, 9, 9)) == 1.0
    # Frame 1 misses by 5, frame 3 by 15; the fourth odd frame has no right neighbour.
    jerky = levels(10, 25, 30, 25, 50, 200)
    assert value(metric, jerky) == pytest.approx(1 - (5 + 15) / 2 / 255, abs=1e-12)
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        metric.update(levels(1, 2))
    undefined = MotionSmoothness(backbone=lambda a, b: a / 0)
    with pytest.raises(ValueError, match="the network gives no frame for 20 x 24 pixels"):
        undefined.update(levels(1, 2, 3))


def test_motion_smoothness_cuts_levels_down_as_vbench() -> None:
    metric = MotionSmoothness(backbone=lambda a, b: torch.full_like(a, 99.9 / 255))
    assert value(metric, levels(0, 99, 0)) == 1.0
    metric = MotionSmoothness(backbone=lambda a, b: torch.full_like(a, 2.0))  # above 1
    assert value(metric, levels(0, 255, 0)) == 1.0


@pytest.mark.parametrize("size", [2, 3, 10])
def test_motion_smoothness_in_batches(size: int) -> None:
    video = noisy(moving(9, 2, height=30, width=50), 10)
    expected = value(MotionSmoothness(backbone=mean_frame), video)
    assert value(MotionSmoothness(backbone=mean_frame, batch_size=size), video) == expected


def test_motion_smoothness_falls_with_noise_and_shuffling() -> None:
    metric = MotionSmoothness(backbone=mean_frame)
    smooth = moving(9, 1, height=32, width=48)
    scores = [value(metric, noisy(smooth, scale)) for scale in (0, 10, 30)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert value(metric, smooth[[0, 5, 1, 7, 2, 8, 3, 6, 4]]) < scores[0]
    dropped = [value(metric, smooth[::step][:3]) for step in (1, 2, 4)]
    assert dropped == sorted(dropped, reverse=True)


class Flow:
    """A flow of one length, in part of the frame; counts the pairs it sees."""

    def __init__(self, length: float, share: float = 1.0) -> None:
        self.length = length
        self.share = share
        self.pairs = 0

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        assert before.shape[-2] % 8 == before.shape[-1] % 8 == 0
        assert before.dtype == torch.float32
        self.pairs += len(before)
        flow = torch.zeros(len(before), 2, *before.shape[-2:])
        flow[..., : round(self.share * before.shape[-1])] = self.length / 2**0.5
        return flow


@pytest.mark.parametrize(
    ("length", "size", "moves"),
    [(6.01, 256, True), (5.99, 256, False), (12.01, 512, True), (11.99, 512, False)],
)
def test_dynamic_degree_has_vbenchs_threshold(length: float, size: int, moves: bool) -> None:
    video = torch.zeros(1, 3, size, size + 40, dtype=torch.uint8).expand(6, -1, -1, -1)
    assert value(DynamicDegree(backbone=Flow(length)), video, fps=8) == float(moves)


def test_dynamic_degree_looks_at_the_longest_twentieth() -> None:
    video = torch.zeros(16, 3, 64, 160, dtype=torch.uint8)
    assert value(DynamicDegree(backbone=Flow(2, share=0.06)), video, fps=8) == 1.0
    assert value(DynamicDegree(backbone=Flow(2, share=0.03)), video, fps=8) == 0.0


@pytest.mark.parametrize(
    ("frames", "fps", "pairs"), [(16, 8, 15), (16, 5, 15), (32, 16, 15), (48, 24, 15), (30, 30, 7)]
)
def test_dynamic_degree_takes_eight_frames_a_second(frames: int, fps: float, pairs: int) -> None:
    still = Flow(0)
    video = torch.zeros(frames, 3, 16, 16, dtype=torch.uint8)
    assert value(DynamicDegree(backbone=still, batch_size=4), video, fps=fps) == 0.0
    assert still.pairs == pairs


@pytest.mark.parametrize("size", [1, 2, 100])
def test_dynamic_degree_needs_a_quarter_of_the_frames(size: int) -> None:
    def jumps(before: Tensor, after: Tensor) -> Tensor:
        return (after - before)[:, :2] * 10

    metric = DynamicDegree(backbone=jumps, batch_size=size)
    for count, moves in ((3, 0.0), (4, 1.0)):
        video = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
        for t in range(count):
            video[3 * t + 1 :] += 20
        assert value(metric, video, fps=8) == moves


def test_dynamic_degree_needs_the_frame_rate() -> None:
    metric = DynamicDegree(backbone=Flow(1))
    for fps in (None, 0.0):
        with pytest.raises(ValueError, match="fps must be a positive number for dynamic_degree"):
            metric.update(levels(1, 2), fps=fps)


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [(8, 8, [0, 7]), (17, 8, [0, 8, 16]), (1, 8, [0]), (49, 16, [0, 16, 32, 48])],
)
def test_vision_reward_takes_a_frame_a_second(count: int, fps: float, expected: list[int]) -> None:
    assert frames_a_second(count, fps) == expected


def test_vision_reward_asks_every_question_about_the_prompt() -> None:
    class Judge:
        questions = ("Does it show [[prompt]]?", "Is it sharp?", "Is it calm?")
        question_weights = (0.5, 0.25, 1.0)

        def __init__(self) -> None:
            self.asked: list[str] = []

        def ask(self, frames: Tensor, question: str) -> bool:
            assert frames.shape == (3, 2, 20, 24)
            assert frames.dtype == torch.uint8
            self.asked.append(question)
            return "calm" not in question

    judge = Judge()
    metric = VisionRewardScore(backbone=judge)
    metric.update(levels(*range(9)), prompt="two dogs", fps=8)
    assert metric.compute().item() == pytest.approx((0.5 + 0.25 - 1.0) / 3)
    assert judge.asked == ["Does it show two dogs?", "Is it sharp?", "Is it calm?"]
    assert frames_a_second(1000, 1) == list(range(24))
