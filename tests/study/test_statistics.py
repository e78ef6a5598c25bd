"""Means and intervals against answers that are known."""

import math

import numpy as np
import pytest

from sla.study.statistics import mean_over_clips, over_seeds, paired_difference

RNG = np.random.default_rng(0)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_clips() -> None:
    values = RNG.normal(3.0, 2.0, (1, 400))
    found = mean_over_clips(values)
    error = values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (found.seeds, found.n) == (1, 400)
    assert math.isnan(found.spread)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for k in range(300):
        found = mean_over_clips(np.random.default_rng([7, k]).normal(0, 1, (1, 60)), resamples=300)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_pairs_show_what_means_hide() -> None:
    """Clips differ by far more than the arms do."""
    reference = RNG.normal(1.0, 0.5, (3, 100, 4))
    ours = reference * 1.01
    found = paired_difference(ours, reference, relative=True)
    assert found.value == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01)
    assert found.high == pytest.approx(0.01)
    assert found.spread == pytest.approx(0, abs=1e-12)
    alone = mean_over_clips(ours)
    assert alone.high - alone.low > 0.05


def test_a_difference_over_seeds() -> None:
    reference = np.ones((2, 5))
    ours = np.stack([np.full(5, 1.1), np.full(5, 1.3)])
    found = paired_difference(ours, reference)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.2))  # clips agree
    assert found.spread == pytest.approx(0.2 / math.sqrt(2))
    assert found.seeds == 2


def test_clips_are_drawn_whole() -> None:
    """The strata of a clip are not independent: four copies of each say no more than one."""
    values = RNG.normal(0, 1, (1, 50))
    copied = np.repeat(values[..., None], 4, axis=-1)
    once, four = mean_over_clips(values), mean_over_clips(copied)
    assert once.low == pytest.approx(four.low)
    assert once.high == pytest.approx(four.high)


def test_results_follow_from_the_seed() -> None:
    values = RNG.normal(0, 1, (2, 30))
    assert mean_over_clips(values, seed=1) == mean_over_clips(values, seed=1)
    assert mean_over_clips(values, seed=1).low != mean_over_clips(values, seed=2).low


def test_infinite_values_stay() -> None:
    found = mean_over_clips([[math.inf, math.inf, math.inf]])
    assert found.value == found.low == found.high == math.inf


def test_over_seeds_is_students_interval() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.303 / math.sqrt(3))
    assert found.spread == 1
    assert math.isnan(over_seeds([1.0]).low)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        mean_over_clips([[1.0, math.nan]])
    with pytest.raises(ValueError, match="seeds, clips"):
        mean_over_clips([1.0, 2.0])
    with pytest.raises(ValueError, match="need the same"):
        paired_difference(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="resamples"):
        mean_over_clips([[1.0, 2.0]], resamples=0)
    with pytest.raises(ValueError, match="one number a seed"):
        over_seeds([])
    assert math.isnan(mean_over_clips([[1.0]]).low)  # one clip says nothing of others
