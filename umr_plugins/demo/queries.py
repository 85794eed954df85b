"""The demo's queries and cards, read and checked, and what counts as a right answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umr_plugins.demo import CARDS, FILES, QUERIES, ROOT
from umr_plugins.types import Hit, Item


@dataclass(frozen=True)
class Answer:
    """One right answer: a file (any part of it), one page of a file, or an item by its id."""

    path: str | None = None
    page: int | None = None
    id: str | None = None

    def matches(self, hit: Hit) -> bool:
        """Whether `hit` is this answer."""
        if self.id is not None:
            return hit.id == self.id
        same_file = hit.path is not None and hit.path == FILES / (self.path or "")
        return same_file and (self.page is None or hit.page == self.page)


@dataclass(frozen=True)
class Query:
    """What is asked, and what is right.

    Args:
        id: unique name.
        type: what is asked with and for, such as `text_to_picture`.
        item: the query itself.
        answers: all right answers.
        subset: a part of the type that is also counted on its own, such as `photograph`.
    """

    id: str
    type: str
    item: Item
    answers: tuple[Answer, ...]
    subset: str | None = None

    def is_right(self, hit: Hit) -> bool:
        """Whether `hit` is one of the right answers."""
        return any(answer.matches(hit) for answer in self.answers)


def load_queries(path: Path = QUERIES) -> list[Query]:
    """All queries, in the order of the file."""
    return [_query(row) for row in _rows(path)]


def load_cards(path: Path = CARDS) -> tuple[list[str], list[Item]]:
    """Ids and items of the cards, their pictures in memory, so that the index keeps them itself."""
    rows = list(_rows(path))
    pictures = [(path.parent / row["image"]).read_bytes() for row in rows]
    return [row["id"] for row in rows], [
        Item(row["text"], picture) for row, picture in zip(rows, pictures, strict=True)
    ]


def _query(row: dict[str, Any]) -> Query:
    image = ROOT / row["image"] if row.get("image") else None
    answers = tuple(Answer(**answer) for answer in row["answers"])
    return Query(row["id"], row["type"], Item(row.get("text"), image), answers, row.get("subset"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())
