"""Means and intervals of the study's measurements. Needs no torch.

Two sources of chance are kept apart: which clips (or prompts) are measured, by a bootstrap over
them, and which seed trained the model, by the spread over seeds. All arms are measured on the same
clips, noise and timesteps, so differences are taken pair by pair before anything is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
# 97.5 % points of Student's t by degrees of freedom: seeds are few, and the table needs no scipy.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: the estimate.
        low, high: its 95 % interval; nan where there is none.
        spread: standard deviation over seeds; nan for one seed.
        seeds: how many.
        n: clips or prompts behind each seed's number; 0 where the interval is over seeds.
    """

    value: float
    low: float
    high: float
    spread: float
    seeds: int
    n: int


def mean_over_clips(values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean, with a bootstrap interval over clips.

    Args:
        values: (seeds, clips, ...), with any further axes of a clip's own (timestep strata).
        seed: of the resampling.
        resamples: bootstrap samples.

    Raises:
        ValueError: no values, a nan, or fewer than two axes.
    """
    by_clip = _per_clip(values)
    means = _bootstrap(by_clip.mean(0), seed, resamples)
    return _estimate(by_clip, float(by_clip.mean()), means)


def paired_difference(
    values: ArrayLike,
    reference: ArrayLike,
    *,
    relative: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean difference to a reference measured on the same clips, with a bootstrap over the clips.

    All values of a clip are drawn together: its strata and seeds are not independent.

    Args:
        values, reference: (seeds, clips, ...), of the same shape, seeds and clips in one order.
        relative: over the reference's mean, of the same bootstrap sample.

    Raises:
        ValueError: as `mean_over_clips`, or shapes that differ.
    """
    ours, theirs = _per_clip(values), _per_clip(reference)
    if np.shape(values) != np.shape(reference):
        raise ValueError(
            f"values have shape {np.shape(values)} and reference {np.shape(reference)}; pairs need "
            "the same"
        )
    difference = ours - theirs
    both = np.stack([difference.mean(0), theirs.mean(0)], axis=1)
    means = _bootstrap(both, seed, resamples)
    per_seed = difference.mean(1, keepdims=True)
    if relative:
        per_seed = per_seed / theirs.mean(1, keepdims=True)
        value = float(difference.mean() / theirs.mean())
        draws = means[:, 0] / means[:, 1]
    else:
        value, draws = float(difference.mean()), means[:, 0]
    return _estimate(per_seed, value, draws, n=ours.shape[1])


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number a seed, with Student's interval over the seeds.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values must be one number a seed, got {values!r}")
    mean, spread = float(array.mean()), _spread(array)
    if len(array) == 1:
        return Estimate(mean, math.nan, math.nan, spread, 1, 0)
    free = len(array) - 1
    t = _STUDENT[free - 1] if free <= len(_STUDENT) else 1.96 + 2.5 / free
    half = t * spread / math.sqrt(len(array))
    return Estimate(mean, mean - half, mean + half, spread, len(array), 0)


def _per_clip(values: ArrayLike) -> NDArray[np.float64]:
    """(seeds, clips): the mean of each clip's own values."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 2 or not array.size:
        raise ValueError(f"values have shape {array.shape}; they must be (seeds, clips, ...)")
    if np.isnan(array).any():
        raise ValueError("values hold a nan")
    return array.reshape(*array.shape[:2], -1).mean(2)


def _bootstrap(values: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Means over clips, the first axis, of `resamples` draws of them."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    random = np.random.default_rng(seed)
    count = len(values)
    drawn = random.integers(0, count, (resamples, count))
    # How often each clip is drawn, so that no copy of the values is made.
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]) / count
    if not np.isfinite(values).all():  # an identical video has an infinite PSNR
        return np.asarray([values[row].mean(0) for row in drawn])
    return np.asarray(weights @ values)


def _estimate(
    by_clip: NDArray[np.float64], value: float, draws: NDArray[np.float64], n: int | None = None
) -> Estimate:
    clips = by_clip.shape[1] if n is None else n
    ordered = np.sort(draws)
    last = len(ordered) - 1
    # The nearest rank: between infinities there is nothing to interpolate.
    low, high = (float(ordered[round(q * last)]) for q in (0.025, 0.975))
    if clips == 1:
        low = high = math.nan
    with np.errstate(invalid="ignore"):
        spread = _spread(by_clip.mean(1))
    return Estimate(value, low, high, spread, len(by_clip), clips)


def _spread(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
