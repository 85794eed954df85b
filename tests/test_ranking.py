"""Interpolation, ties, scaling and places, as pure arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest

from umr_plugins.errors import InputError, ItemError
from umr_plugins.ranking import DEFAULT_WEIGHT, order
from umr_plugins.types import Item

PICTURE = "a.png"
LOST = ItemError("corrupt", "broken")


def texts(count: int) -> list[Item]:
    return [Item(str(number)) for number in range(count)]


def test_without_a_first_stage_by_relevance_and_ties_by_place() -> None:
    ranked = order(texts(4), [0.2, 0.9, 0.2, 0.9], query="text")
    assert [each.index for each in ranked] == [1, 3, 0, 2]
    assert [each.score for each in ranked] == [0.9, 0.9, 0.2, 0.2]


def test_with_a_first_stage_ties_keep_its_order() -> None:
    ranked = order(texts(3), [0.5, 0.5, 0.5], query="text", first_stage=[0.1, 0.3, 0.2])
    assert [each.index for each in ranked] == [1, 2, 0]
    assert [each.score for each in ranked] == pytest.approx([0.8, 0.7, 0.6])
    assert [each.index for each in order(texts(3), [0.5] * 3, query="text", first_stage=[0.1, 0.3, 0.2],
            weight="pure")] == [1, 2, 0]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "documents", "weight"),
    [
        ("text", texts(1), DEFAULT_WEIGHT),
        ("text", [Item(image=PICTURE)], 0.5),
        ("image", texts(1), 0.3),
        ("image", [Item(image=PICTURE)], DEFAULT_WEIGHT),
        ("fused", [Item(image=PICTURE)], DEFAULT_WEIGHT),
        ("text", [Item("a"), Item(image=PICTURE)], DEFAULT_WEIGHT),
    ],
)
def test_the_weight_of_a_task(query: str, documents: list[Item], weight: float) -> None:
    ranked = order(documents, [1.0] * len(documents), query=query, first_stage=[0.25] * len(documents))  # type: ignore[arg-type]
    assert [each.score for each in ranked] == pytest.approx([0.25 + weight] * len(documents))


def test_only_documents_that_were_judged_decide_the_weight() -> None:
    ranked = order([Item(image=PICTURE), Item("x")], [1.0, LOST], query="text", first_stage=[0.25, 0.25])
    assert ranked[0].score == pytest.approx(0.75)


def test_numbers_of_numpy_are_numbers() -> None:
    ranked = order(texts(2), [0.1, 0.2], query="text", top_n=np.int64(1), weight=np.float32(0.5),
                   first_stage=np.array([0.1, 0.2], np.float32))  # type: ignore[arg-type]  # fmt: skip
    assert [each.index for each in ranked] == [1]


@pytest.mark.parametrize(
    ("name", "value"), [("top_n", True), ("top_n", 1.5), ("weight", True), ("first_stage", ["a"])]
)
def test_other_things_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        order(texts(1), [0.1], query="text", **{name: value})  # type: ignore[arg-type]


def test_scores_beyond_one_are_scaled() -> None:
    ranked = order(texts(3), [0.0, 0.0, 0.0], query="text", first_stage=[20, 5, 12.5])
    assert [(each.index, each.score) for each in ranked] == [(0, 1.0), (2, 0.5), (1, 0.0)]
    same = order(texts(2), [0.0, 1.0], query="text", first_stage=[7, 7])
    assert [(each.index, each.score) for each in same] == [(1, 1.0), (0, 0.0)]


def test_a_missing_score_leaves_relevance_alone() -> None:
    ranked = order(texts(2), [0.1, 0.2], query="text", first_stage=[0.9, None])
    assert [(each.index, each.score) for each in ranked] == [(1, 0.2), (0, 0.1)]


@pytest.mark.parametrize("seed", range(50))
def test_whoever_cant_be_judged_keeps_its_first_stage_rank(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 12)
    first = [rng.random() for _ in range(count)]
    outcomes: list[float | ItemError] = [
        LOST if rng.random() < 0.4 else round(rng.random(), 1) for _ in range(count)
    ]
    ranked = order(texts(count), outcomes, query="text", first_stage=first, weight=rng.random() * 2)
    assert sorted(each.index for each in ranked) == list(range(count))
    by_first = sorted(range(count), key=lambda index: -first[index])
    for place, each in enumerate(ranked):
        if each.error is not None:
            assert by_first[place] == each.index
            assert each.score == first[each.index]
    judged = [each.score for each in ranked if each.error is None]
    assert judged == sorted(judged, reverse=True)
    cut = order(texts(count), outcomes, query="text", first_stage=first, weight=1.0, top_n=2)
    assert len(cut) == min(2, count)


def test_no_documents() -> None:
    assert order([], [], query="text", first_stage=[]) == []
    with pytest.raises(InputError, match="0 documents, 1"):
        order([], [], query="text", first_stage=[0.5])
