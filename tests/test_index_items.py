"""Adding, searching, reading and deleting items."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from umr_plugins.errors import BatchError, FingerprintError, InputError, ItemError, StorageError
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item, PageImage


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture(params=["memory", "folder"])
def index(request: pytest.FixtureRequest, tmp_path: Path, encoder: FakeEncoder) -> Iterator[Index]:
    with Index(None if request.param == "memory" else tmp_path / "db", encoder) as opened:
        yield opened


def documents(encoder: FakeEncoder) -> list[Item]:
    """Everything that was embedded as a document."""
    return [item for role, items, _ in encoder.calls if role == "document" for item in items]


def test_an_item_is_found_by_its_own_content(index: Index) -> None:
    texts = [f"text {number}" for number in range(100)]
    ids = index.add(texts)
    assert index.count() == len(index) == len(set(ids)) == 100
    for number in (0, 41, 99):
        best = index.search(texts[number], k=3)
        assert len(best) == 3
        assert (best[0].id, best[0].text, best[0].modality) == (ids[number], texts[number], "text")
        assert best[0].score == pytest.approx(1, abs=1e-6)
        assert best[0].score > best[1].score >= best[2].score


def test_scores_are_exact_cosines_best_first(index: Index) -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    ids = index.add([str(row) for row in range(300)], vectors=vectors)
    query = np.random.default_rng(1).standard_normal(16)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = unit @ (query / np.linalg.norm(query))
    hits = index.search_vector(query, k=10)
    assert [hit.id for hit in hits] == [ids[row] for row in np.argsort(-expected)[:10]]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1][:10], atol=1e-6)


def test_pictures_come_back_as_they_were_given(index: Index, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6), "red")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    path = tmp_path / "p.png"
    image.save(path)
    index.add(
        [
            Item(image=image),
            {"text": "caption", "image": buffer.getvalue()},
            path,
            Item(image=str(path), text="s"),
        ],
        ids=["pil", "bytes", "path", "str"],
    )
    found = {hit.id: hit for hit in index.get(["pil", "bytes", "path", "str"])}
    assert found["bytes"].item == Item(text="caption", image=buffer.getvalue())
    assert found["path"].item.image == found["str"].item.image == path.absolute()
    stored = found["pil"].item.image
    assert isinstance(stored, bytes)
    assert np.asarray(Image.open(io.BytesIO(stored))).tolist() == [[[255, 0, 0]] * 8] * 6
    assert {name: hit.modality for name, hit in found.items()} == {
        **{"pil": "image", "bytes": "fused"},
        **{"path": "image", "str": "fused"},
    }
    assert all(hit.path is None and np.isnan(hit.score) for hit in found.values())


def test_pictures_kept_in_the_ledger_leave_with_their_last_item(tmp_path: Path, encoder: FakeEncoder) -> None:
    picture = Image.new("RGB", (8, 6), "red")
    with Index(tmp_path / "db", encoder) as index:
        index.add([Item(image=picture), Item(image=picture, text="x")], ids=["a", "b"])
        count = lambda: index._store.ledger.read("SELECT count(*) FROM blobs")[0][0]  # noqa: E731
        assert count() == 1
        index.delete(["a"])
        assert count() == 1
        assert isinstance(index.get(["b"])[0].item.image, bytes)
        index.delete(["b"])
        assert count() == 0


def test_upsert_replaces_vector_metadata_and_payload_wholly(index: Index) -> None:
    index.add(["old words"], ids=["a"], metadatas=[{"x": 1, "y": 2}], payloads=["p"])
    index.add(["new words"], ids=["a"], metadatas=[{"x": 3}])
    [hit] = index.get(["a"])
    assert (hit.text, hit.metadata, hit.payload, index.count()) == ("new words", {"x": 3}, None, 1)
    assert index.search("new words", 1)[0].score == pytest.approx(1, abs=1e-6)
    assert index.search("anything", 5, where={"y": 2}) == []
    assert index.verify().ok


def test_default_ids_are_content_hashes(index: Index, encoder: FakeEncoder) -> None:
    first = index.add(["a", "b", "a"])
    assert first[0] == first[2] != first[1]
    assert index.count() == 2
    assert index.add(["b"], ids=[None]) == [first[1]]
    with Index(None, encoder) as other:
        assert other.add(["a"]) == [first[0]]


def test_equal_content_is_embedded_once(index: Index, encoder: FakeEncoder) -> None:
    index.add(["same", "same", "other"], ids=["a", "b", "c"])
    assert len(documents(encoder)) == 2
    index.add(["same"], ids=["d"], metadatas=[{"n": 1}])
    assert len(documents(encoder)) == 2
    np.testing.assert_array_equal(*index.vectors(["a", "d"]))


def test_vectors_that_callers_brought_are_not_reused(index: Index, encoder: FakeEncoder) -> None:
    own = np.eye(16, dtype=np.float32)[:1]
    index.add(["word"], ids=["own"], vectors=own)
    index.add(["word"], ids=["made"])
    assert len(documents(encoder)) == 1
    assert not np.allclose(*index.vectors(["own", "made"]))


def test_brought_vectors_are_normalised(index: Index) -> None:
    index.add(["x"], ids=["x"], vectors=[[3.0] + [0.0] * 15])
    assert index.vectors(["x"]).tolist() == [[1.0] + [0.0] * 15]
    assert index.verify().ok


def test_where_filters_and_metadata_round_trip(index: Index) -> None:
    metadatas = [
        {"n": row, "even": row % 2 == 0, "tags": ["t", str(row)], "deep": {"a": [None]}} for row in range(20)
    ]
    index.add([f"t{row}" for row in range(20)], ids=[str(row) for row in range(20)], metadatas=metadatas)
    ids = lambda where: sorted(int(hit.id) for hit in index.search("t3", 50, where=where))  # noqa: E731
    assert ids({"n": {"$gte": 17}}) == [17, 18, 19]
    assert ids({"even": True, "n": {"$lt": 5}}) == [0, 2, 4]
    assert ids({"n": {"$gt": 16.5}}) == [17, 18, 19]
    assert ids({"n": {"$lt": 2.5}}) == [0, 1, 2]
    assert ids({"n": 2.5}) == []
    assert ids({"$or": [{"n": 1}, {"n": 2}]}) == [1, 2]
    assert ids({"tags": {"$contains": "7"}}) == [7]
    assert ids({}) == ids(None) == list(range(20))
    assert ids({"modality": "text"}) == list(range(20))
    assert ids({"modality": "image"}) == []
    assert index.get(["4"])[0].metadata == metadatas[4]


def test_a_selective_filter_finds_every_match_among_many(tmp_path: Path, encoder: FakeEncoder) -> None:
    vectors = np.random.default_rng(3).standard_normal((3000, 16))
    with Index(tmp_path / "db", encoder) as index:
        index.add(
            [str(row) for row in range(3000)],
            ids=[str(row) for row in range(3000)],
            vectors=vectors,
            metadatas=[{"rare": row % 300 == 0} for row in range(3000)],
        )
        hits = index.search_vector(-vectors[0], 20, {"rare": True})
        assert sorted(int(hit.id) for hit in hits) == list(range(0, 3000, 300))
        assert len(index.search_vector(vectors[0], 2999)) == 2999


def test_delete(index: Index) -> None:
    index.add(["a", "b", "c", "d"], ids=list("abcd"), metadatas=[{"n": row} for row in range(4)])
    assert index.delete(["a", "nobody"]) == 1
    assert index.delete(where={"n": {"$gt": 2}}) == 1
    assert index.ids() == ["b", "c"]
    assert {hit.id for hit in index.search("a", 9)} == {"b", "c"}
    assert index.delete([]) == 0
    for wrong in ({}, {"ids": ["b"], "where": {"n": 1}}, {"where": {}}):
        with pytest.raises(InputError, match="either ids or"):
            index.delete(**wrong)
    assert index.verify().ok


def test_a_bad_item_stores_nothing_or_costs_only_itself(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = ["good", "poison", tmp_path / "absent.png", 7, "fine"]
    with pytest.raises(BatchError) as caught:
        index.add(items, ids=list("abcde"))
    assert [(error.index, error.code, error.name) for error in caught.value.errors] == [
        (1, "model", "b"),
        (2, "unreadable", str(tmp_path / "absent.png")),
        (3, "unsupported", "d"),
    ]
    assert index.count() == 0
    with caplog.at_level(logging.WARNING):
        assert index.add(items, ids=list("abcde"), on_error="skip") == ["a", "e"]
    assert len([line for line in caplog.messages if "not stored" in line]) == 3
    assert index.ids() == ["a", "e"]


def test_an_error_stands_for_an_item_that_could_not_be_read(
    index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    unread = ItemError("unsupported", "no form of item", name="the second")
    items = ["kite", unread, "poison", "boat"]
    with pytest.raises(BatchError) as caught:
        index.add(items)
    assert [error.index for error in caught.value.errors] == [1, 2]
    with caplog.at_level(logging.WARNING):
        assert index.add(items, ids=["a", None, "c", "d"], on_error="skip") == ["a", "d"]
    assert "not stored: item 1: the second: no form of item" in caplog.text
    assert "not stored: item 2: c: " in caplog.text


def test_skip_commits_as_it_goes(index: Index, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encoder.encode_documents

    def fails_late(items: Any, *args: Any, **options: Any) -> Any:
        if any(item.text == "300" for item in items):
            raise RuntimeError("the machine is on fire")
        return real(items, *args, **options)

    monkeypatch.setattr(encoder, "encode_documents", fails_late)
    with pytest.raises(RuntimeError, match="fire"):
        index.add([str(row) for row in range(400)], on_error="skip")
    assert index.count() == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": ["a", "a"]}, "more than once.*'a'"),
        ({"ids": ["a"]}, "1 entries for 2 items"),
        ({"ids": "ab"}, "must be a list"),
        ({"ids": ["a", ""]}, "non-empty strings"),
        ({"ids": ["a", 3]}, "non-empty strings"),
        ({"ids": ["a", "\ud800"]}, "surrogate"),
        ({"metadatas": [{}]}, "1 entries for 2 items"),
        ({"metadatas": [{}, 3]}, "metadata 1 must be a dict"),
        ({"metadatas": [{}, {"x": float("nan")}]}, "finite"),
        ({"metadatas": [{}, {"x": {3: 1}}]}, "keys must be strings"),
        ({"metadatas": [{}, {"x": {1, 2}}]}, "is a set"),
        ({"metadatas": [{}, {"x": np.float32(1)}]}, "numpy"),
        ({"payloads": [1, 2]}, "payloads"),
        ({"vectors": [[1.0, 2.0]]}, "dimensions"),
        ({"vectors": np.ones((3, 16))}, "3 rows for 2 items"),
        ({"vectors": np.zeros((2, 16))}, r"vectors \[0, 1\] are zero"),
        ({"vectors": [[np.nan] * 16, [1.0] * 16]}, r"vectors \[0\]"),
        ({"vectors": "no"}, "array"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_wrong_arguments_are_named(index: Index, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, FingerprintError), match=message):
        index.add(["x", "y"], **arguments)
    assert index.count() == 0


def test_an_encoder_that_returns_nonsense_is_refused_before_the_store(
    index: Index, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_vector", lambda item: np.full(16, np.nan, np.float32))
    with pytest.raises(BatchError, match="zero or not finite"):
        index.add(["x"])
    monkeypatch.setattr(encoder, "_vector", lambda item: np.ones(9, np.float32))
    with pytest.raises(FingerprintError, match="16 dimensions, these have 9"):
        index.add(["x"])
    assert index.count() == 0


@pytest.mark.parametrize("vector", [[np.nan] * 16, [0.0] * 16, [np.inf] * 16, [1e39] * 16, "text", [[[1.0]]]])
def test_a_query_vector_must_be_finite(index: Index, vector: Any) -> None:
    index.add(["x"])
    with pytest.raises(InputError):
        index.search_vector(vector)


def test_a_query_vector_of_another_length_is_a_clear_error(index: Index) -> None:
    index.add(["x"])
    with pytest.raises(FingerprintError, match="16 dimensions, these have 3"):
        index.search_vector([1.0, 0.0, 0.0])


def test_search_arguments(index: Index, encoder: FakeEncoder) -> None:
    assert index.search("x") == []
    index.add(["x", "y"])
    assert index.search("x", 0) == []
    assert len(index.search("x", 100)) == 2
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(InputError, match="k must"):
            index.search("x", wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown operator"):
        index.search("x", where={"n": {"$near": 3}})
    with pytest.raises(ItemError, match="empty"):
        index.search(" ")
    index.search(Item(text="x", image=Image.new("RGB", (4, 4))), instruction="find it")
    role, items, instruction = encoder.calls[-1]
    assert (role, items[0].modality, instruction) == ("query", "fused", "find it")
    assert [hits[0].text for hits in index.search_many(["y", "x"], 1)] == ["y", "x"]


def test_reading_back(index: Index) -> None:
    index.add(["x", "y"], ids=["a", "b"])
    assert [hit.id for hit in index.get(["b", "nobody", "a"])] == ["b", "a"]
    with pytest.raises(InputError, match="nobody"):
        index.vectors(["nobody"])
    assert index.vectors([]).shape == (0, 16)
    with pytest.raises(InputError, match="must be a list"):
        index.get("ab")


def test_page_pictures_and_urls_stay_references(index: Index, tmp_path: Path) -> None:
    page = PageImage(tmp_path / "a.pdf", 3)
    index.add(
        [Item(image=page), Item(image="https://host.example/x.png")],
        ids=["page", "url"],
        vectors=np.eye(16)[:2],
    )
    assert [hit.item.image for hit in index.get(["page", "url"])] == [page, "https://host.example/x.png"]


def test_odd_text_survives(index: Index) -> None:
    odd = ["nul \0 inside", "日本語 🦊", "lone \ud800 half", "x" * 200_000, "'; DROP TABLE items; --"]
    ids = index.add(odd, metadatas=[{"k\0": text[:50].replace("\ud800", "?")} for text in odd])
    assert [hit.text for hit in index.get(ids)] == [text.replace("\ud800", "\ufffd") for text in odd]
    assert index.verify().ok


def test_nothing_to_add(index: Index) -> None:
    assert index.add([]) == []
    assert index.add(iter([]), ids=[], vectors=np.zeros((0, 16))) == []


def test_memory_indexes_share_nothing(encoder: FakeEncoder) -> None:
    with Index(None, encoder) as one, Index(None, encoder) as two:
        one.add(["x"])
        assert (one.count(), two.count(), two.search("x")) == (1, 0, [])
        two.add(["y"])
        assert one.search("y", 5)[0].text == "x"


def test_many_threads_add_and_search(index: Index) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(12):
                text = f"thread {number} step {step}"
                index.add([text], ids=[f"{number}-{step}"])
                assert index.search(text, 1)[0].id == f"{number}-{step}"
                if step % 4 == 3:
                    index.delete([f"{number}-{step}"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert index.count() == 8 * 9
    assert index.verify().ok


def test_a_closed_index_says_so(tmp_path: Path, encoder: FakeEncoder) -> None:
    index = Index(tmp_path / "db", encoder)
    index.close()
    index.close()
    for call in (index.count, lambda: index.search("x"), lambda: index.add(["x"]), index.verify, index.info):
        with pytest.raises(StorageError, match="closed"):
            call()
    assert "closed" in repr(index)
