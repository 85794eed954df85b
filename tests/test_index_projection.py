"""What Chroma does that an index must not show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from umr_plugins.index.chroma import Projection
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_dropped_collection_leaves_no_lists_to_the_next(tmp_path: Path, where: str) -> None:
    """Chroma 1.5.9 alone gives the rows of a new collection the lists of a dropped one."""
    place = None if where == "memory" else tmp_path
    vectors = np.eye(3, dtype=np.float32)
    first = Projection(place, "first", create=True)
    first.upsert([1, 2, 3], vectors, [{"tags": ["a", str(n)]} for n in range(3)])
    first.drop()
    second = Projection(place, "second", create=True)
    try:
        second.upsert([1, 2, 3], vectors, [{"n": n} for n in range(3)])
        assert [metadata for _, _, metadata in second.read([1, 2, 3])] == [{"n": n} for n in range(3)]
    finally:
        second.drop()
        second.close()


def test_rebuilding_gives_every_item_its_own_lists(tmp_path: Path) -> None:
    with Index(tmp_path / "db", FakeEncoder()) as index:
        index.add([f"item {n}" for n in range(6)], metadatas=[{"tags": [str(n)]} for n in range(6)])
        index.delete(where={"tags": {"$contains": "0"}})
        index.add(["plain"], metadatas=[{"n": 1}])
        index.rebuild()
        assert index.verify().ok
        (hit,) = index.search("plain", 1)
        assert hit.metadata == {"n": 1}
