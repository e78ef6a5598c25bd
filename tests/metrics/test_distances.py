"""Distances from reference videos in features: FVD, FID, LPIPS, with small networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sla_eval.metrics import FID, FVD, LPIPS, VideoSetMetric
from sla_eval.metrics.frechet import frechet_distance
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class FrameFeatures(nn.Module):
    """Features of uint8 frames."""

    num_features = 6

    def forward(self, frames: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3 * 16, self.num_features, generator=generator)
        return F.adaptive_avg_pool2d(frames.float() / 255, 4).flatten(1) @ weight


class VideoFeatures(nn.Module):
    """Features of normalised videos, which see the order of the frames."""

    def forward(self, videos: Tensor) -> Tensor:
        assert videos.shape[1] == 3
        assert videos.shape[3:] == (224, 224)
        assert -1 <= videos.min() <= videos.max() <= 1
        steps = videos.diff(dim=2).square().mean(dim=(1, 2, 3, 4))
        return torch.stack([*videos.mean(dim=(2, 3, 4)).unbind(1), steps], dim=1)


def random_video(frames: int, seed: int, size: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(40, 216, (1, 3, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (frames, 3, size, size + 8), generator=generator)
    return (level + noise).to(torch.uint8)


def fid(**kwargs: int) -> FID:
    return FID(backbone=FrameFeatures(), backbone_name="small", **kwargs)


def fvd() -> FVD:
    return FVD(backbone=VideoFeatures(), backbone_name="small", min_frames=2)


def value(metric: VideoSetMetric, videos: list[Tensor], references: list[Tensor]) -> float:
    metric.reset()
    for video in videos:
        metric.update(video)
    for reference in references:
        metric.update(reference=reference)
    return metric.compute().item()


def test_fid_equals_torchmetrics() -> None:
    videos = [random_video(5, seed) for seed in range(6)]
    references = [random_video(4, seed) for seed in range(20, 28)]
    theirs = FrechetInceptionDistance(feature=FrameFeatures())
    for video in videos:
        theirs.update(video, real=False)
    for reference in references:
        theirs.update(reference, real=True)
    ours = value(fid(), videos, references)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert ours > 0.1


@pytest.mark.parametrize(("count", "dim"), [(40, 5), (4, 30), (30, 30)])
def test_frechet_distance_equals_the_formula(count: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(count)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    a = torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix
    b = torch.randn(count + 3, dim, generator=generator, dtype=torch.float64) + 0.5
    first, second = a.T.cov(), b.T.cov()
    # The root of S from its eigenvectors; tr (S S')^(1/2) = tr (S^(1/2) S' S^(1/2))^(1/2).
    levels, vectors = torch.linalg.eigh(first)
    root = vectors @ levels.clamp_min(0).sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    assert frechet_distance(a, b).item() == pytest.approx(expected.item(), rel=1e-5)
    assert frechet_distance(b, a).item() == pytest.approx(expected.item(), rel=1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    assert frechet_distance(line, line).item() == pytest.approx(0, abs=1e-12)
    assert frechet_distance(line, line + 3).item() == pytest.approx(9)
    deviation = line.std().item()
    assert frechet_distance(line, 3 * line).item() == pytest.approx((2 * deviation) ** 2)


@pytest.mark.parametrize("build", [fid, fvd])
def test_a_set_has_no_distance_from_itself(build: type[VideoSetMetric]) -> None:
    videos = [random_video(4, seed) for seed in range(4)]
    # Features are kept in float32.
    assert value(build(), videos, videos[::-1]) == pytest.approx(0, abs=1e-9)
    others = [random_video(4, seed) for seed in range(10, 15)]
    assert value(build(), videos, others) > 1e-3


@pytest.mark.parametrize("build", [fid, fvd])
def test_more_damage_is_farther(build: type[VideoSetMetric]) -> None:
    references = [random_video(6, seed) for seed in range(6)]

    def darker(factor: float) -> list[Tensor]:
        return [(video * factor).to(torch.uint8) for video in references]

    distances = [value(build(), darker(factor), references) for factor in (1.0, 0.9, 0.6, 0.2)]
    assert distances == sorted(distances)
    assert len(set(distances)) == 4


def test_fvd_sees_the_order_of_frames_and_fid_does_not() -> None:
    videos = [random_video(1, seed).repeat(8, 1, 1, 1) for seed in range(5)]
    for video in videos:
        video[4:] = 255 - video[4:]
    shuffled = [video[[0, 4, 1, 5, 2, 6, 3, 7]] for video in videos]
    assert value(fvd(), shuffled, videos) > 1e-3
    assert value(fid(), shuffled, videos) == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # after merge_state
@pytest.mark.parametrize("build", [fid, fvd])
def test_order_of_videos_and_how_they_come_do_not_matter(build: type[VideoSetMetric]) -> None:
    videos = [random_video(4, seed) for seed in range(4)]
    references = [random_video(4, seed) for seed in range(10, 14)]
    expected = value(build(), videos, references)
    assert value(build(), videos[::-1], references[2:] + references[:2]) == pytest.approx(
        expected, rel=1e-6
    )
    pairs = build()
    for video, reference in zip(videos, references, strict=True):
        pairs.update(video, reference)
    assert pairs.compute().item() == pytest.approx(expected, rel=1e-9)
    # One video each in a metric of its own, joined: as processes do.
    joined = build()
    for video, reference in zip(videos, references, strict=True):
        alone = build()
        alone.update(video, reference)
        joined.merge_state(alone.metric_state)
    assert joined.compute().item() == pytest.approx(expected, rel=1e-6)
    assert (int(joined.count), int(joined.reference_count)) == (4, 4)


def test_fid_in_batches() -> None:
    videos = [random_video(7, seed) for seed in range(3)]
    references = [random_video(5, seed) for seed in range(5, 8)]
    expected = value(fid(batch_size=1), videos, references)
    assert value(fid(batch_size=4), videos, references) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("build", [fid, fvd])
def test_sets_refuse(build: type[VideoSetMetric]) -> None:
    metric = build()
    with pytest.raises(ValueError, match="video or reference must be given"):
        metric.update()
    with pytest.raises(TypeError, match="reference must be a uint8 tensor"):
        metric.update(random_video(4, 0), random_video(4, 1).float())
    with pytest.raises(ValueError, match="video must have 3 colours, got 1"):
        metric.update(random_video(4, 0)[:, :1])
    assert int(metric.count) == 0  # a refused pair leaves nothing behind
    metric.update(random_video(4, 0), random_video(4, 1))
    with pytest.raises(ValueError, match="needs at least 2 videos, got 1"):
        metric.compute()
    metric.reset()
    assert int(metric.count) == int(metric.reference_count) == 0


def test_fvd_needs_frames_for_its_network() -> None:
    metric = FVD(backbone=VideoFeatures(), backbone_name="small")
    with pytest.raises(ValueError, match="reference must have at least 10 frames, got 9"):
        metric.update(random_video(10, 0), random_video(9, 1))


def test_the_name_says_which_network_it_was() -> None:
    assert (fvd().name, fid().name, FVD.name, FID.name) == ("fvd_small", "fid_small", "fvd", "fid")
    own = FVD(backbone=VideoFeatures(), backbone_name="i3d_kinetics")
    assert (own.name, own.title) == ("fvd", "FVD")
    with pytest.raises(ValueError, match="backbone and backbone_name must be given together"):
        FVD(backbone=VideoFeatures())
    with pytest.raises(ValueError, match="backbone and backbone_name must be given together"):
        FID(backbone_name="small")


def pixel_distance(frames: Tensor, others: Tensor) -> Tensor:
    assert -1 <= frames.min() <= frames.max() <= 1
    return (frames - others).square().mean(dim=(1, 2, 3))


def test_lpips_is_the_mean_over_frames() -> None:
    reference = random_video(5, 0, size=40)
    video = reference.clone()
    video[1] = 255 - video[1]
    expected = ((video.double() - reference.double()) / 127.5).square().mean().item()
    for size in (1, 2, 50):
        metric = LPIPS(backbone=pixel_distance, batch_size=size)
        metric.update(video, reference)
        assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    metric.reset()
    metric.update(reference, reference)
    assert metric.compute().item() == 0
    with pytest.raises(ValueError, match="at least 32 pixels high and wide, got 24 x 32"):
        metric.update(random_video(2, 0), random_video(2, 1))


def test_lpips_grows_with_blur_and_noise() -> None:
    reference = random_video(3, 0, size=40)
    metric = LPIPS(backbone=pixel_distance)
    distances = []
    for kernel in (1, 3, 9):
        metric.reset()
        blurred = F.avg_pool2d(reference.float(), kernel, 1, kernel // 2).to(torch.uint8)
        metric.update(blurred, reference)
        distances.append(metric.compute().item())
    assert distances == sorted(distances)
    assert len(set(distances)) == 3
