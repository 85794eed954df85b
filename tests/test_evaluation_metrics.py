"""Measures against hand-worked cases and closed forms."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest

from umr_plugins.evaluation import metrics


def test_docstring_examples() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize(("ranking", "rank"), [("xya", 3), ("axx", 1), ("xyz", None), ("", None), ("aa", 1)])
def test_first_hit(ranking: str, rank: int | None) -> None:
    assert metrics.first_hit(ranking, lambda answer: answer == "a") == rank


def test_hits_at_counts_the_kth_rank_and_not_the_next() -> None:
    assert metrics.hits_at([5, 6, 1, None], 5) == 2
    assert metrics.hits_at([5, 6, 1, None], 6) == 3
    assert metrics.hits_at([], 5) == 0


def test_wilson_ends_solve_its_quadratic() -> None:
    z = 1.959963984540054
    for hits, n in [(0, 5), (3, 7), (24, 24), (17, 30)]:
        for end in metrics.wilson_interval(hits, n):
            assert (hits / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)


def test_wilson_at_the_ends_and_for_no_trials() -> None:
    z2 = 1.959963984540054**2
    assert metrics.wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-12)
    assert metrics.wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0))
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("total", "relevant", "k"), [(6, 1, 2), (6, 2, 3), (5, 5, 1), (4, 0, 2), (3, 1, 5)])
def test_random_hit_equals_counting_every_draw(total: int, relevant: int, k: int) -> None:
    draws = list(itertools.combinations(range(total), min(k, total)))
    share = sum(any(item < relevant for item in draw) for draw in draws) / len(draws)
    assert metrics.random_hit_at(total, relevant, k) == pytest.approx(share)


def test_macro_average_gives_every_group_the_same_weight() -> None:
    assert metrics.macro_average([1.0, 0.0, 0.5]) == 0.5
    assert math.isnan(metrics.macro_average([]))
