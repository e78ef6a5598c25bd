"""Measures of attention's weights against plain definitions and known answers."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sla.analysis.weights import (
    attention_weights,
    drop_errors,
    kept_count,
    split_top,
    stable_rank,
    weight_histogram,
    weight_ranks,
    weight_shares,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_weights(rows: int = 12, tokens: int = 40, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    query = scale * torch.randn(rows, 8, generator=generator)
    return attention_weights(query, torch.randn(tokens, 8, generator=generator))


def test_weights_are_softmax_of_scaled_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 5))
    found = attention_weights(query, key)
    for i in range(3):
        scores = [math.exp(float(query[i] @ key[j]) / 2.0) for j in range(5)]
        expected = torch.tensor([s / sum(scores) for s in scores], dtype=torch.float64)
        torch.testing.assert_close(found[i], expected)
    assert attention_weights(query.bfloat16(), key.bfloat16()).dtype == torch.float32


def test_shares_against_a_loop() -> None:
    weights = random_weights(scale=8.0)
    rows, tokens = weights.shape
    above = [w for row in weights.tolist() for w in row if w > 1 / tokens]
    below = [w for row in weights.tolist() for w in row if w < 1 / (100 * tokens)]
    found = weight_shares(weights)
    assert found.above == pytest.approx(len(above) / weights.numel())
    assert found.below == pytest.approx(len(below) / weights.numel())
    assert 0 < found.below < 1
    assert found.sum_above == pytest.approx(sum(above) / rows, rel=1e-5)
    assert found.sum_below == pytest.approx(sum(below) / rows, rel=1e-5)


def test_shares_of_uniform_and_of_one_hot_attention() -> None:
    uniform = weight_shares(torch.full((4, 64), 1 / 64))
    assert (uniform.above, uniform.below, uniform.sum_above, uniform.sum_below) == (0, 0, 0, 0)
    one_hot = weight_shares(torch.eye(64))
    assert one_hot.above == 1 / 64
    assert one_hot.below == 63 / 64
    assert (one_hot.sum_above, one_hot.sum_below) == (1, 0)


def test_histogram_counts_every_weight_and_all_attention() -> None:
    tokens = 100
    weights = torch.tensor([[0.5, 0.2, *[0.3 / 98] * 98]])
    share, carried = weight_histogram(weights, [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0])
    # N times the weights: 50, 20, and 0.306 for the others.
    torch.testing.assert_close(share * tokens, torch.tensor([0, 0, 98, 0, 2.0]).double())
    torch.testing.assert_close(carried, torch.tensor([0, 0, 0.3, 0, 0.7]).double())
    zero, _ = weight_histogram(torch.eye(4), [-3.0, -1.0, 1.0])
    assert zero.tolist() == [0.75, 0.25], "zero weights are in the first bin"


def test_stable_ranks_that_are_known() -> None:
    assert stable_rank(torch.full((30, 50), 1 / 50)) == pytest.approx(1.0)
    assert stable_rank(torch.eye(20)) == pytest.approx(20.0)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(6 / 4)
    with pytest.raises(ValueError, match="all zeros"):
        stable_rank(torch.zeros(3, 3))


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (300, 400), (400, 300)])
def test_stable_rank_against_singular_values(shape: tuple[int, int]) -> None:
    # The larger ones are beyond what is solved directly.
    generator = torch.Generator().manual_seed(1)
    for matrix in (
        torch.randn(shape, generator=generator),
        torch.softmax(5 * torch.randn(shape, generator=generator), dim=-1),
    ):
        values = torch.linalg.svdvals(matrix.double())
        expected = (values.square().sum() / values[0] ** 2).item()
        assert stable_rank(matrix) == pytest.approx(expected, rel=1e-3)


def test_ranks_put_equal_weights_in_order() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.2, 0.0]])
    assert weight_ranks(weights).tolist() == [[2, 0, 3, 1], [0, 2, 1, 3]]


def test_the_two_parts_are_the_whole() -> None:
    weights = random_weights()
    top, rest = split_top(weights, 0.1)
    torch.testing.assert_close(top + rest, weights)
    for row, kept in zip(weights, top, strict=True):
        assert (kept > 0).sum() == 4
        assert set(kept[kept > 0].tolist()) == set(row.sort(descending=True).values[:4].tolist())
    uniform, _ = split_top(torch.full((2, 10), 0.1), 0.3)
    assert (uniform > 0).sum(-1).tolist() == [3, 3], "ties are no excuse"


@pytest.mark.parametrize(("kept", "count"), [(1.0, 50), (0.5, 25), (0.081, 4), (0.001, 1)])
def test_kept_count(kept: float, count: int) -> None:
    assert kept_count(kept, 50) == count


@pytest.mark.parametrize("kept", [0.0, -0.5, 1.01])
def test_shares_out_of_range_are_named(kept: float) -> None:
    with pytest.raises(ValueError, match=rf"kept is {kept}"):
        kept_count(kept, 50)


def test_drop_errors_against_a_loop() -> None:
    weights = random_weights()
    value = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    exact = weights @ value
    for found in drop_errors(weights, value, [1.0, 0.5, 0.1, 0.025]):
        count = round(found.kept * 40)
        dropped, again, carried = torch.zeros_like(exact), torch.zeros_like(exact), 0.0
        for i, row in enumerate(weights):
            chosen = row.argsort(descending=True)[:count]
            part = sum(row[j] * value[j] for j in chosen)
            dropped[i], again[i] = part, part / row[chosen].sum()
            carried += row[chosen].sum().item() / len(weights)
        assert found.carried == pytest.approx(carried, rel=1e-5)
        for name, output in (("dropped", dropped), ("renormalised", again)):
            expected = ((output - exact).abs().sum() / exact.abs().sum()).item()
            assert getattr(found, name) == pytest.approx(expected, abs=1e-6), (name, found.kept)


def test_drop_errors_that_are_known() -> None:
    value = torch.ones(20, 3)
    uniform = torch.full((5, 20), 1 / 20)
    (half,) = drop_errors(uniform, value, [0.5])
    assert half.dropped == pytest.approx(0.5)
    assert half.renormalised == pytest.approx(0.0, abs=1e-6)
    (one,) = drop_errors(torch.eye(20), torch.randn(20, 3), [0.05])
    assert (one.dropped, one.renormalised, one.carried) == (0, 0, 1)
