"""int8 and binary codes: what they hold, and that an index finds with them what it finds without."""

from __future__ import annotations

import math
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from umr_plugins.errors import InputError
from umr_plugins.index.index import Index
from umr_plugins.index.quantize import CodeKind, quantize, scores, width
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import FloatArray

KINDS: tuple[CodeKind, ...] = ("int8", "binary")


def unit(count: int, dim: int = 96, seed: int = 0) -> FloatArray:
    """Random unit vectors around a few centres, `[count, dim]`."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dim))
    vectors = centres[rng.integers(12, size=count)] + 0.8 * rng.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def filled(place: Path | None, vectors: FloatArray, **options: str) -> Index:
    index = Index(place, create=True, **options)  # type: ignore[arg-type]  # codes
    names = [f"n{at}" for at in range(len(vectors))]
    index.add(names, ids=names, metadatas=[{"third": at % 3} for at in range(len(names))], vectors=vectors)
    return index


# --- the codes themselves ---------------------------------------------------------------------------------


def test_int8_codes_byte_for_byte() -> None:
    [code] = quantize("int8", np.array([[1.0, -0.5, 0.0, 0.25]], np.float32))
    assert code[:4].view("<f4")[0] == np.float32(1 / 127)
    assert code[4:].view(np.int8).tolist() == [127, -64, 0, 32]


def test_binary_codes_byte_for_byte() -> None:
    [code] = quantize("binary", np.array([[0.5, -0.5, 0.0, 1e-9, -1, 1, 1, 1, 0.1]], np.float32))
    assert code.tolist() == [0b10010111, 0b10000000]


@pytest.mark.parametrize("dim", [1, 3, 64, 65, 100, 1536])
def test_scores_are_what_the_definition_says(dim: int) -> None:
    rng = np.random.default_rng(dim)
    vectors = rng.normal(size=(50, dim)).astype(np.float32)
    query = rng.normal(size=dim).astype(np.float32)
    for kind in KINDS:
        codes = quantize(kind, vectors)
        assert codes.shape == (50, width(kind, dim))
        found = scores(kind, query, codes)
        for at, vector in enumerate(vectors.astype(np.float64)):
            if kind == "binary":
                signs = np.where(vector > 0, 1, -1) / math.sqrt(dim)
                assert found[at] == pytest.approx(signs @ query, abs=1e-5)
            else:
                scale = np.abs(vector).max() / 127
                assert found[at] == pytest.approx(np.round(vector / scale) * scale @ query, abs=1e-4)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    vectors, query = unit(300), unit(1, seed=9)[0]
    steps = np.abs(vectors).max(1) / 127
    bound = 0.5 * steps * np.abs(query).sum()
    assert (np.abs(scores("int8", query, quantize("int8", vectors)) - vectors @ query) <= bound + 1e-6).all()


def test_blocks_do_not_show() -> None:
    vectors, query = unit(20_000, dim=32), unit(1, dim=32, seed=5)[0]
    for kind in KINDS:
        codes = quantize(kind, vectors)
        parts = [scores(kind, query, codes[start : start + 777]) for start in range(0, len(codes), 777)]
        np.testing.assert_allclose(scores(kind, query, codes), np.concatenate(parts), atol=1e-6)


# --- in an index ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.99), ("binary", 0.75)])
def test_what_codes_find_has_exact_scores(tmp_path: Path, kind: CodeKind, least: float) -> None:
    vectors, queries = unit(3000), unit(20, seed=7)
    with filled(tmp_path / "db", vectors, codes=kind) as index:
        assert index.info()["codes"] == kind
        found = 0
        for query in queries:
            hits = index.search_vector(query, 10)
            exact = vectors @ query
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
            for hit in hits:
                assert hit.score == pytest.approx(exact[int(hit.id[1:])], abs=1e-6)
            found += len({hit.id for hit in hits} & {f"n{at}" for at in np.argsort(-exact)[:10]})
        assert found / 200 >= least
        assert index.verify().ok


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_scanned_and_chroma_is_not_asked(
    tmp_path: Path, kind: CodeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    from umr_plugins.index.chroma import Projection

    with filled(tmp_path / "db", unit(2000), codes=kind) as index:
        monkeypatch.setattr(Projection, "query", lambda *_: pytest.fail("Chroma was asked"))
        assert len(index.search_vector(unit(1)[0], 5)) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_filters_deletions_and_replacements(tmp_path: Path, kind: CodeKind) -> None:
    vectors = unit(2500)
    with filled(tmp_path / "db", vectors, codes=kind) as index:
        target = vectors[1234]
        assert index.search_vector(target, 1)[0].id == "n1234"
        assert {hit.metadata["third"] for hit in index.search_vector(target, 30, {"third": 2})} == {2}
        assert len(index.search_vector(target, 900, {"third": 2})) == 833
        assert len(index.search_vector(target, 5000)) == 2500
        index.delete(["n1234"])
        assert "n1234" not in {hit.id for hit in index.search_vector(target, 10)}
        index.add(["n7"], ids=["n7"], vectors=target[None])
        assert index.search_vector(target, 1)[0].id == "n7"
        assert "n7" not in {hit.id for hit in index.search_vector(vectors[7], 1)}
        assert index.verify().ok


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_codes_can_be_switched_at_any_time(tmp_path: Path, place: str) -> None:
    folder = None if place == "memory" else tmp_path / "db"
    vectors = unit(400)
    with filled(folder, vectors) as index:
        assert index.info()["codes"] is None
        plain = [hit.id for hit in index.search_vector(vectors[3], 5)]
        if folder is None:
            return
        for option, kind in (("binary", "binary"), ("int8", "int8"), (None, "int8"), ("off", None)):
            with Index(folder, codes=option) as again:  # type: ignore[arg-type]  # from a list
                assert again.info()["codes"] == kind
                assert [hit.id for hit in again.search_vector(vectors[3], 5)] == plain
                assert again.verify().ok


def test_codes_are_kept_and_caught_up_on_opening(tmp_path: Path) -> None:
    vectors = unit(1200)
    filled(tmp_path / "db", vectors, codes="int8").close()
    # What a kill before the codes were filled in leaves.
    with sqlite3.connect(tmp_path / "db" / "umr.ledger.sqlite3") as database:
        database.execute("DELETE FROM codes WHERE seq > 1000")
    with Index(tmp_path / "db") as index:
        assert index.search_vector(vectors[1100], 1)[0].id == "n1100"
        assert index.verify().ok


def test_verify_finds_a_wrong_code_and_rebuild_mends_it(tmp_path: Path) -> None:
    filled(tmp_path / "db", unit(50), codes="binary").close()
    with sqlite3.connect(tmp_path / "db" / "umr.ledger.sqlite3") as database:
        database.execute("UPDATE codes SET code = zeroblob(length(code)) WHERE seq = 7")
    with Index(tmp_path / "db") as index:
        report = index.verify()
        assert not report.ok
        assert "1 items have another binary code" in report.problems[0]
        index.rebuild()
        assert index.verify().ok


def test_items_of_a_folder_get_codes(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for at in range(40):
        (tmp_path / "notes" / f"{at}.txt").write_text(f"note {at}")
    with Index(tmp_path / "db", FakeEncoder(), codes="int8") as index:
        index.add_folder(tmp_path / "notes")
        (tmp_path / "notes" / "3.txt").write_text("another note")
        index.add_folder(tmp_path / "notes")
        assert index.search("another note", 1)[0].path == tmp_path / "notes" / "3.txt"
        assert index.verify().ok


def test_searching_while_adding_and_deleting(tmp_path: Path) -> None:
    vectors = unit(2000)
    with filled(tmp_path / "db", vectors[:1000], codes="binary") as index:
        failures: list[BaseException] = []

        def search() -> None:
            try:
                for at in range(0, 1000, 10):
                    assert len(index.search_vector(vectors[at], 3)) == 3
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=search) for _ in range(3)]
        for thread in threads:
            thread.start()
        for start in range(1000, 2000, 100):
            names = [f"n{at}" for at in range(start, start + 100)]
            index.add(names, ids=names, vectors=vectors[start : start + 100])
            index.delete(names[:10])
        for thread in threads:
            thread.join()
        assert not failures
        assert index.count() == 1900
        assert index.search_vector(vectors[1999], 1)[0].id == "n1999"


def test_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='"off", "int8" or "binary", got \'int4\''):
        Index(tmp_path / "db", FakeEncoder(), codes="int4")  # type: ignore[arg-type]
    Index(tmp_path / "db", FakeEncoder()).close()
