"""Measures of retrieval as pure functions of ranks and counts. Imports nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def first_hit(ranking: Sequence[T], is_right: Callable[[T], bool]) -> int | None:
    """Rank, from 1, of the first right answer; None if there is none.

    >>> first_hit(["a", "b", "c"], lambda answer: answer in {"b", "c"})
    2
    """
    return next((rank for rank, answer in enumerate(ranking, start=1) if is_right(answer)), None)


def hits_at(ranks: Sequence[int | None], k: int) -> int:
    """How many of the queries have their first right answer among the first `k`.

    >>> hits_at([1, 4, 6, None], 5)
    2
    """
    return sum(rank is not None and rank <= k for rank in ranks)


def wilson_interval(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion; 95 % by default. Right for small `n` and for 0 and 1, too.

    Args:
        hits: successes, 0 to `n`.
        n: trials; without any, the proportion may be anything: (0, 1).
        z: quantile of the normal distribution, 1.96 for 95 %.

    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    """
    if n == 0:
        return (0.0, 1.0)
    p = hits / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0))


def random_hit_at(total: int, relevant: int, k: int) -> float:
    """Probability that `k` answers drawn at random, without repetition, hold a right one.

    Args:
        total: items in the corpus.
        relevant: right ones among them.
        k: answers drawn.

    >>> round(random_hit_at(200, 1, 5), 4)
    0.025
    """
    drawn = min(k, total)
    return 1 - math.comb(total - relevant, drawn) / math.comb(total, drawn)


def macro_average(values: Sequence[float]) -> float:
    """Mean over groups, every group counting the same; nan without any."""
    return sum(values) / len(values) if values else math.nan
