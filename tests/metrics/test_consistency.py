"""Metrics of frames' features (DINO, CLIP, MUSIQ), with small networks in their place."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sla_eval import MetricUnavailableError, build_metric
from sla_eval.dino import DinoViT
from sla_eval.metrics import (
    AestheticQuality,
    BackgroundConsistency,
    Brisque,
    DoverScore,
    ImagingQuality,
    SubjectConsistency,
    VideoMetric,
)
from sla_eval.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    middle_frames,
    resize_shorter,
    vbench_clip_frames,
    vbench_dino_frames,
)
from torch import Tensor, nn


class Encoder(nn.Module):
    """A random image encoder that sees structure, not only colours."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(24, 3, 16, 16, generator=generator) / 16

    def forward(self, frames: Tensor) -> Tensor:
        return F.conv2d(frames, self.weight, stride=16).tanh().flatten(1)

    encode_image = forward


def random_video(frames: int, seed: int = 0, height: int = 40, width: int = 56) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def textured_video(frames: int = 6, noise: float = 0.0) -> Tensor:
    """A picture that moves by a pixel a frame, with noise that differs from frame to frame."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 10, 12, generator=generator)
    picture = F.interpolate(coarse, (80, 96), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    video = torch.stack([picture[:, 8 : 8 + 64, t : t + 64] for t in range(frames)]) * 255
    video = video + noise * torch.randn(video.shape, generator=generator)
    return video.round().clamp(0, 255).to(torch.uint8)


CONSISTENCY = [SubjectConsistency, BackgroundConsistency]


def value(metric: VideoMetric, *videos: Tensor) -> float:
    metric.reset()
    for video in videos:
        metric.update(video)
    return metric.compute().item()


@pytest.mark.parametrize("cls", CONSISTENCY)
def test_identical_frames_are_consistent(cls: type[VideoMetric]) -> None:
    video = random_video(1).repeat(5, 1, 1, 1)
    assert value(cls(backbone=Encoder()), video) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("cls", CONSISTENCY)
def test_each_frame_is_compared_with_the_first_and_the_previous(cls: type[VideoMetric]) -> None:
    # Features at known angles, told apart by the frames' brightness.
    angles = [0.0, 0.3, 1.1, 2.9]
    levels = [10, 60, 110, 160]
    levels_seen = []

    def encode(frames: Tensor) -> Tensor:
        # The mean level, back from whatever normalisation.
        mean, std = (
            (CLIP_MEAN, CLIP_STD)
            if cls is BackgroundConsistency
            else (
                IMAGENET_MEAN,
                IMAGENET_STD,
            )
        )
        level = (frames[:, 0].mean(dim=(1, 2)) * std[0] + mean[0]) * 255
        levels_seen.extend(level.round().int().tolist())
        chosen = torch.tensor([angles[levels.index(round(x))] for x in level.tolist()])
        return 7 * torch.stack([chosen.cos(), chosen.sin()], dim=1)  # length must not matter

    encoder = Encoder()
    encoder.forward = encoder.encode_image = encode  # type: ignore[method-assign,assignment]
    video = torch.tensor(levels, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    expected = 0.0
    for t in range(1, 4):
        first = max(0.0, math.cos(angles[t] - angles[0]))
        previous = max(0.0, math.cos(angles[t] - angles[t - 1]))
        expected += (first + previous) / 2 / 3
    assert value(cls(backbone=encoder), video) == pytest.approx(expected, abs=1e-6)
    assert levels_seen == levels


@pytest.mark.parametrize("cls", CONSISTENCY)
def test_noise_and_shuffling_and_dropped_frames_lower_consistency(cls: type[VideoMetric]) -> None:
    metric = cls(backbone=Encoder())
    noisy = [value(metric, textured_video(noise=noise)) for noise in (0, 20, 60)]
    assert noisy == sorted(noisy, reverse=True)
    assert len(set(noisy)) == 3
    smooth = textured_video(frames=12)
    shuffled = smooth[[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]
    assert value(metric, shuffled) < value(metric, smooth)
    kept = [value(metric, smooth[::step][:4]) for step in (1, 2, 3)]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("cls", CONSISTENCY)
def test_a_longer_video_counts_more_as_in_vbench(cls: type[VideoMetric]) -> None:
    metric = cls(backbone=Encoder())
    short, long = random_video(2, seed=1), textured_video(frames=9)
    alone = value(metric, short), value(metric, long)
    both = value(metric, short, long)
    assert both == pytest.approx((1 * alone[0] + 8 * alone[1]) / 9, rel=1e-9)
    assert both != pytest.approx(sum(alone) / 2, rel=1e-3)
    assert value(metric, long, short) == pytest.approx(both, rel=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda size: SubjectConsistency(backbone=Encoder(), batch_size=size),
        lambda size: BackgroundConsistency(backbone=Encoder(), batch_size=size),
        lambda size: AestheticQuality(
            backbone=Encoder(), head=lambda f: f.sum(1, keepdim=True), batch_size=size
        ),
    ],
)
def test_batch_size_does_not_change_the_score(build: Callable[[int], VideoMetric]) -> None:
    video = random_video(7)
    expected = value(build(1), video)
    for size in (2, 3, 7, 50):
        assert value(build(size), video) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        build(0)


@pytest.mark.parametrize("cls", CONSISTENCY)
def test_consistency_refuses(cls: type[VideoMetric]) -> None:
    metric = cls(backbone=Encoder())
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        metric.update(random_video(1))
    with pytest.raises(ValueError, match="3 colours, got 1"):
        metric.update(random_video(3)[:, :1])


def test_aesthetic_quality_is_the_mean_of_the_heads_marks() -> None:
    head = nn.Linear(4, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0, 0.0, 1.0]]))
        head.bias.fill_(5.0)
    features = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 9.0], [0, 3.0, 0, 0]])  # lengths go
    encoder = Encoder()
    encoder.encode_image = lambda frames: features  # type: ignore[method-assign,assignment]
    metric = AestheticQuality(backbone=encoder, head=head)
    assert value(metric, random_video(3)) == pytest.approx((8 + 6 + 5) / 3 / 10, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 200), (300, 200)), ((512, 100), (512, 100)), ((600, 401), (512, 342))],
)
def test_imaging_quality_shrinks_frames_to_512(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    seen = []

    def score(frame: Tensor) -> Tensor:
        seen.append(tuple(frame.shape))
        assert 0 <= frame.min() <= frame.max() <= 1
        return 80 * frame.mean()

    video = torch.full((2, 3, *size), 51, dtype=torch.uint8)
    assert value(ImagingQuality(backbone=score), video) == pytest.approx(0.16, abs=1e-6)
    assert seen == [(1, 3, *expected)] * 2


def test_imaging_quality_falls_with_blur() -> None:
    def sharpness(frame: Tensor) -> Tensor:
        return 1000 * frame.diff(dim=-1).abs().mean()

    frames = random_video(2).float()
    blurred = [F.avg_pool2d(frames, k, 1, k // 2).to(torch.uint8) for k in (1, 3, 7)]
    scores = [value(ImagingQuality(backbone=sharpness), video) for video in blurred]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3


def test_brisque_gets_frames_as_pictures_and_refuses_what_is_undefined() -> None:
    video = random_video(3)
    seen = []

    def score(frame: object) -> float:
        seen.append(frame)
        return 10.0 * len(seen)

    assert value(Brisque(backbone=score), video) == 20.0
    assert all((a == b.permute(1, 2, 0).numpy()).all() for a, b in zip(seen, video, strict=True))
    with pytest.raises(ValueError, match="not defined for this video"):
        Brisque(backbone=lambda frame: math.nan).update(video)


def test_dover_fuses_its_scores() -> None:
    video = random_video(2)
    low, high = (value(DoverScore(backbone=lambda v, t=t: (t, 0.08285)), video) for t in (0.0, 0.2))
    assert low == pytest.approx(1 / (1 + math.exp(0.6104 * 0.1107 / 0.07355)))
    assert 0 < low < 0.5 < high < 1


def test_frames_are_resized_as_vbench_does() -> None:
    video = random_video(2, height=60, width=100)
    frames = vbench_clip_frames(video)
    assert frames.shape == (2, 3, 224, 224)
    whole = F.interpolate(video.float(), (224, 373), mode="bicubic", align_corners=False)
    expected = (whole[..., 74:298] / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(
        CLIP_STD
    ).view(3, 1, 1)
    torch.testing.assert_close(frames, expected)
    rounded = vbench_clip_frames(video, whole_levels=True)
    levels = (rounded * torch.tensor(CLIP_STD).view(3, 1, 1)).add(
        torch.tensor(CLIP_MEAN).view(3, 1, 1)
    ) * 255
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), atol=1e-3, rtol=0)
    assert vbench_dino_frames(video).shape == (2, 3, 224, 373)
    assert resize_shorter(video, 60, "bilinear").equal(video.float())


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, [0, 2, 4, 6, 8, 10, 12, 14]),
        (3, [0, 1, 2, 2, 2, 2, 2, 2]),
        (49, [2, 8, 14, 20, 26, 32, 38, 45]),
    ],
)
def test_middle_frames(count: int, expected: list[int]) -> None:
    assert middle_frames(count, 8) == expected


def small_dino() -> DinoViT:
    torch.manual_seed(0)
    network = DinoViT(dim=32, depth=2, heads=4, patch=16, image=64).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


@torch.no_grad()
def test_dino_equals_the_same_transformer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    network = small_dino()
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    other = transformers.ViTModel(config, add_pooling_layer=False).eval()
    ours = network.state_dict()
    theirs = {}
    for key in other.state_dict():
        # Names differ between versions of transformers; what they hold does not.
        layer = next((part for part in key.split(".") if part.isdigit()), None)
        kind = key.rsplit(".", 1)[1]
        qkv = next(
            (
                i
                for i, n in enumerate("qkv")
                if f"{['query', 'key', 'value'][i]}." in key or f".{n}_proj." in key
            ),
            None,
        )
        if key.endswith("cls_token"):
            theirs[key] = ours["cls_token"]
        elif key.endswith("position_embeddings"):
            theirs[key] = ours["pos_embed"]
        elif "projection" in key:
            theirs[key] = ours[f"patch_embed.proj.{kind}"]
        elif layer is None:
            theirs[key] = ours[f"norm.{kind}"]
        elif qkv is not None:
            theirs[key] = ours[f"blocks.{layer}.attn.qkv.{kind}"].chunk(3)[qkv]
        elif "layernorm_before" in key:
            theirs[key] = ours[f"blocks.{layer}.norm1.{kind}"]
        elif "layernorm_after" in key:
            theirs[key] = ours[f"blocks.{layer}.norm2.{kind}"]
        elif "intermediate" in key or ".fc1." in key:
            theirs[key] = ours[f"blocks.{layer}.mlp.fc1.{kind}"]
        elif "attention" in key:
            theirs[key] = ours[f"blocks.{layer}.attn.proj.{kind}"]
        else:
            theirs[key] = ours[f"blocks.{layer}.mlp.fc2.{kind}"]
    other.load_state_dict(theirs)
    images = torch.randn(2, 3, 64, 64)
    expected = other(pixel_values=images).last_hidden_state[:, 0]
    torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dino_takes_frames_that_are_not_square() -> None:
    network = small_dino()
    images = torch.randn(1, 3, 64, 120)  # 4 x 7 patches, 8 pixels left over
    grid = network.pos_embed[:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(4.1 / 4, 7.1 / 4), mode="bicubic")
    positions = network._positions(64, 120)
    torch.testing.assert_close(positions[:, 1:], expected.flatten(2).transpose(1, 2))
    # What is cut off by the patches does not count; what is in them does.
    changed = images.clone()
    changed[..., 112:] += 1
    assert network(changed).equal(network(images))
    changed[..., 100:] += 1
    assert not network(changed).equal(network(images))


@pytest.mark.parametrize(
    "name", ["subject_consistency", "background_consistency", "aesthetic_quality"]
)
def test_without_weights_a_metric_says_what_is_missing(
    name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLA_EVAL_WEIGHTS", str(tmp_path))
    with pytest.raises(MetricUnavailableError, match=r"is missing: needs .* SLA_EVAL_WEIGHTS"):
        build_metric(name)
