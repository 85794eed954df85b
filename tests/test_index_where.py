"""Metadata filters: what is refused, and that Python and Chroma agree on every answer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from umr_plugins.errors import InputError
from umr_plugins.index.chroma import Projection
from umr_plugins.index.where import check_where, matches, superset

VALUES: list[Any] = ["a", "b", 1, 2, -3, 1.0, 2.5, -2.5, True, False]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("x", "must be a dict"),
        ({1: 2}, "keys"),
        ({"": 2}, "keys"),
        ({"$not": []}, r"unknown operator \$not"),
        ({"$and": []}, "non-empty list"),
        ({"$and": [{}]}, "empty filter"),
        ({"a": {}}, "empty condition"),
        ({"a": {"$like": 1}}, "unknown operator"),
        ({"a": {"$gt": "x"}}, "numbers"),
        ({"a": {"$in": []}}, "non-empty list"),
        ({"a": {"$in": [1, "x"]}}, "mixes types"),
        ({"a": None}, "NoneType"),
        ({"a": [1]}, "list"),
        ({"a": float("nan")}, "finite"),
        ({"a": 2**63}, "64 bits"),
    ],
)
def test_what_is_no_filter_is_explained(where: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_where(where)


def test_no_filter_and_joined_keys() -> None:
    assert check_where(None) is check_where({}) is None
    assert check_where({"a": 1, "b": {"$gt": 2, "$lt": 5}}) == {
        "$and": [{"a": {"$eq": 1}}, {"$and": [{"b": {"$gt": 2}}, {"b": {"$lt": 5}}]}]
    }
    assert check_where({"$and": [{"a": 1}]}) == {"a": {"$eq": 1}}


def any_metadata(chance: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {"always": 1}
    for key in "xyz":
        kind = chance.random()
        if kind < 0.6:
            row[key] = chance.choice(VALUES)
        elif kind < 0.75:
            row[key] = chance.choice([["a", "b"], [1, 2], [2.5], [True]])
    return row


def any_where(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    if depth and chance.random() < 0.3:
        return {chance.choice(["$and", "$or"]): [any_where(chance, depth - 1) for _ in range(2)]}
    key, kind = chance.choice("xyz"), chance.random()
    if kind < 0.4:
        return {key: {chance.choice(["$eq", "$ne"]): chance.choice(VALUES)}}
    if kind < 0.6:
        return {
            key: {chance.choice(["$gt", "$gte", "$lt", "$lte"]): chance.choice([1, 2, -3, 1.0, 2.5, -2.5])}
        }
    if kind < 0.8:
        some = chance.choice([["a", "b"], [1, -3], [2.5, 1.0], [True]])
        return {key: {chance.choice(["$in", "$nin"]): some}}
    return {key: {chance.choice(["$contains", "$not_contains"]): chance.choice(["a", 1, 2.5, True])}}


@pytest.mark.parametrize(
    ("stored", "condition", "expected"),
    [
        (2, {"$lt": 2.5}, True),
        (2, {"$eq": 2.5}, False),
        (2, {"$ne": 2.5}, True),
        (2, {"$nin": [2.5]}, True),
        (-2, {"$lte": -2.5}, False),
        (1, {"$eq": 1.0}, True),
        (1, {"$eq": True}, False),
        ("1", {"$eq": 1}, False),
        (None, {"$ne": 1}, True),
        (None, {"$eq": 1}, False),
        (None, {"$gt": 0}, False),
        ("a", {"$gt": 0}, False),
        (True, {"$gt": 0}, False),
        (["a"], {"$contains": "a"}, True),
        ("abc", {"$contains": "a"}, False),
        (["a"], {"$eq": "a"}, False),
    ],
)
def test_what_matches(stored: Any, condition: dict[str, Any], expected: bool) -> None:
    row = {} if stored is None else {"x": stored}
    assert matches(row, check_where({"x": condition})) is expected


def cuts(where: dict[str, Any]) -> bool:
    """Whether Chroma would cut a decimal number in it."""
    return "2.5" in str(where)


def test_python_and_chroma_agree() -> None:
    chance = random.Random(7)
    rows = [any_metadata(chance) for _ in range(200)]
    projection = Projection(None, "agreement", create=True)
    try:
        projection.upsert(range(200), np.eye(200, 8, dtype=np.float32) + 0.1, rows)
        counts = set()
        for _ in range(400):
            where = check_where(any_where(chance))
            expected = [number for number, row in enumerate(rows) if matches(row, where)]
            found = sorted(projection.matching(superset(where)))
            if cuts(where):
                assert set(expected) <= set(found), where
            else:
                assert expected == found, where
            counts.add(len(expected))
        assert len(counts) > 30  # the filters really do tell rows apart
    finally:
        projection.close()
