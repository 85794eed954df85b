"""LangChain's `index()` and `aindex()` into `UMRVectorStore`, pictures included."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_umr import GMEEmbeddings, UMRVectorStore, document_key
from PIL import Image

from umr_plugins.errors import BatchError, InputError
from umr_plugins.testing import FakeEncoder


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


class Bench:
    """A store with the records of what was indexed into it."""

    def __init__(self) -> None:
        self.encoder = FakeEncoder()
        self.store = UMRVectorStore(GMEEmbeddings.from_encoder(self.encoder))
        self.records = InMemoryRecordManager(namespace="test")
        self.records.create_schema()

    def arguments(self, cleanup: str | None, **options: Any) -> dict[str, Any]:
        return {
            **{"cleanup": cleanup, "source_id_key": "source", "key_encoder": document_key},
            **options,
        }

    def run(self, documents: list[Document], cleanup: str | None = "full", **options: Any) -> dict[str, int]:
        """Numbers that are not 0, and how many documents were embedded."""
        self.encoder.calls.clear()
        done = index(documents, self.records, self.store, **self.arguments(cleanup, **options))
        return self.numbers(dict(done))

    def numbers(self, done: dict[str, int]) -> dict[str, int]:
        found = {name.removeprefix("num_"): count for name, count in done.items() if count}
        embedded = sum(len(items) for _, items, _ in self.encoder.calls)
        return found | ({"embedded": embedded} if embedded else {})

    def texts(self) -> list[str]:
        return sorted(one.page_content for one in self.store.get_by_ids(self.store.index.ids()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.store.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return path


@pytest.fixture
def documents(photo: Path) -> list[Document]:
    return [
        Document("kite", metadata={"source": "a", "image": str(photo)}),
        Document("boat", metadata={"source": "a"}),
        Document("", metadata={"source": "b", "image_uri": str(photo), "tags": ["x", "y"]}),
    ]


CLEANUPS = ["incremental", "full", "scoped_full"]


@pytest.mark.parametrize("cleanup", CLEANUPS)
def test_what_is_unchanged_is_skipped_and_not_embedded(
    bench: Bench, documents: list[Document], cleanup: str
) -> None:
    assert bench.run(documents, cleanup) == {"added": 3, "embedded": 3}
    assert bench.run(documents, cleanup) == {"skipped": 3}
    assert bench.texts() == ["", "boat", "kite"]


@pytest.mark.parametrize("cleanup", CLEANUPS)
def test_a_picture_that_changed_under_its_name_is_embedded_again_and_its_old_row_goes(
    bench: Bench, documents: list[Document], photo: Path, cleanup: str
) -> None:
    bench.run(documents, cleanup)
    photo.write_bytes(png("blue"))
    assert bench.run(documents, cleanup) == {"added": 2, "skipped": 1, "deleted": 2, "embedded": 2}
    assert bench.texts() == ["", "boat", "kite"]
    [(best, score)] = bench.store.similarity_search_with_score({"text": "kite", "image": png("blue")}, k=1)
    assert (best.page_content, score) == ("kite", pytest.approx(1, abs=1e-5))
    [(_, score)] = bench.store.similarity_search_with_score({"text": "kite", "image": png("red")}, k=1)
    assert score < 0.99, "the old picture can still be found"
    assert bench.run(documents, cleanup) == {"skipped": 3}


def test_langchains_own_keys_would_skip_it(bench: Bench, documents: list[Document], photo: Path) -> None:
    bench.run(documents, key_encoder="sha256")
    photo.write_bytes(png("blue"))
    assert bench.run(documents, key_encoder="sha256") == {"skipped": 3}
    assert bench.run(documents, key_encoder="sha256", force_update=True) == {"updated": 3, "embedded": 2}
    assert len(bench.texts()) == 3


@pytest.mark.parametrize("cleanup", CLEANUPS)
def test_changed_text_and_metadata_replace_the_row(
    bench: Bench, documents: list[Document], cleanup: str
) -> None:
    bench.run(documents, cleanup)
    changed = [
        documents[0].model_copy(update={"page_content": "red kite"}),
        documents[1].model_copy(update={"metadata": {"source": "a", "lang": "en"}}),
        documents[2],
    ]
    # New metadata alone cost no embedding: the content is known to the store.
    assert bench.run(changed, cleanup) == {"added": 2, "skipped": 1, "deleted": 2, "embedded": 1}
    assert bench.texts() == ["", "boat", "red kite"]
    [found] = bench.store.similarity_search("boat", filter={"lang": "en"})
    assert found.metadata == {"source": "a", "lang": "en"}


def test_what_is_no_longer_given_is_deleted_as_the_cleanup_says(documents: list[Document]) -> None:
    left = {}
    for cleanup in (None, *CLEANUPS):
        bench = Bench()
        bench.run(documents, cleanup)
        bench.run(documents[:1], cleanup)
        left[cleanup] = bench.texts()
        bench.store.close()
    assert left == {
        None: ["", "boat", "kite"],
        "incremental": ["", "kite"],
        "full": ["kite"],
        "scoped_full": ["", "kite"],
    }


async def test_async_gives_the_same(bench: Bench, documents: list[Document], photo: Path) -> None:
    async def run() -> dict[str, int]:
        bench.encoder.calls.clear()
        done = await aindex(documents, bench.records, bench.store, **bench.arguments("incremental"))
        return bench.numbers(dict(done))

    assert await run() == {"added": 3, "embedded": 3}
    assert await run() == {"skipped": 3}
    photo.write_bytes(png("blue"))
    assert await run() == {"added": 2, "skipped": 1, "deleted": 2, "embedded": 2}


def test_many_batches_and_documents_given_twice(bench: Bench) -> None:
    documents = [Document(f"text {n % 250}", metadata={"source": str(n % 7)}) for n in range(250)]
    again = [*documents, *documents[:20]]
    assert bench.run(again, batch_size=40) == {"added": 250, "skipped": 20, "embedded": 250}
    assert bench.run(documents[:200], batch_size=40) == {"skipped": 200, "deleted": 50}
    assert len(bench.texts()) == 200


def test_a_picture_that_is_gone_names_its_document_or_is_left_out_until_it_is_back(
    bench: Bench, documents: list[Document], photo: Path
) -> None:
    photo.unlink()
    with pytest.raises(BatchError, match=r"photo\.png.*can't be read"):
        bench.run(documents)
    assert bench.texts() == []
    skipping = {"upsert_kwargs": {"on_error": "skip"}}
    bench.run(documents, **skipping)
    assert bench.texts() == ["boat"]
    photo.write_bytes(png())
    bench.run(documents, **skipping)
    assert bench.texts() == ["", "boat", "kite"]


def test_keys_cover_text_metadata_and_pictures(photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(png())
    base = Document("kite", metadata={"image": str(photo), "b": 1, "a": [1, None]})
    key = document_key(base)
    assert len(key) == 64
    assert document_key(Document("kite", id="x", metadata=dict(reversed(base.metadata.items())))) == key
    different = [
        Document("kites", metadata=base.metadata),
        Document("kite", metadata={**base.metadata, "b": 2}),
        Document("kite", metadata={**base.metadata, "image": str(other)}),
        Document("kite", metadata={**base.metadata, "image": [str(photo), str(other)]}),
        Document("kite", metadata={"image": str(photo)}),
        Document("kite\ud800", metadata=base.metadata),
    ]
    assert len({key, *map(document_key, different)}) == 7
    scan = partial(document_key, image_keys="scan")
    scanned = Document("kite", metadata={"scan": str(photo)})
    before = document_key(base), scan(scanned), document_key(scanned)
    photo.write_bytes(png("blue"))
    after = document_key(base), scan(scanned), document_key(scanned)
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True]


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object()])
def test_metadata_that_is_no_json_names_the_document(bench: Bench, value: Any) -> None:
    with pytest.raises(InputError, match="document 'kite': its metadata must be JSON"):
        bench.run([Document("kite", metadata={"source": "a", "x": value})])
