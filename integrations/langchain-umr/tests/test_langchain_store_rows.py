"""`UMRVectorStore`: what its own rows are when they come back as `Document`s, and what others are."""

from __future__ import annotations

import base64
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_umr import (
    GMEEmbeddings,
    MLLMReranker,
    RerankingRetriever,
    UMRVectorStore,
    documents_to_content_blocks,
)
from PIL import Image

from umr_plugins.demo import FILES
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker
from umr_plugins.types import Item


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def store(encoder: FakeEncoder) -> Iterator[UMRVectorStore]:
    with UMRVectorStore(encoder) as made:
        yield made


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


def rows(store: UMRVectorStore) -> list[Document]:
    return store.get_by_ids(store.index.ids())


# --- parts of files ---------------------------------------------------------------------------------------


def test_a_page_is_what_was_embedded_without_its_text_layer(
    store: UMRVectorStore, encoder: FakeEncoder
) -> None:
    store.add_files([FILES / "guide.pdf"], pages="image")
    page = rows(store)[0]
    assert page.page_content
    [item] = store.stored_items([page])
    assert item is not None
    assert (item.text, item.modality) == (None, "image")
    judge = FakeReranker()
    retriever = RerankingRetriever(base=store, reranker=MLLMReranker(reranker=judge))
    retriever.invoke(page)  # type: ignore[arg-type]  # a Document
    assert (judge.calls[0][0].text, judge.calls[0][0].image) == (None, item.image)


@pytest.mark.parametrize("pages", ["image", "fused", "text"])
def test_a_part_of_a_file_stays_bound_to_it(store: UMRVectorStore, pages: Any) -> None:
    store.add_files([FILES / "guide.pdf"], pages=pages)
    before, page = rows(store), rows(store)[0]
    changed = Document(page.page_content, id=page.id, metadata={**page.metadata, "tag": "new"})
    with pytest.raises(BatchError, match=f"document '{page.id}': this id belongs to .*guide.pdf.*another id"):
        store.add_documents([changed])
    with pytest.raises(BatchError, match="belongs to"):
        store.add_texts(["kite"], ids=[str(page.id)])
    with pytest.raises(BatchError, match="belongs to"):
        store.add_items(["kite"], ids=[str(page.id)])
    assert store.add_documents([changed, Document("kite", id="k")], on_error="skip") == ["k"]
    store.delete(["k"])
    assert rows(store) == before
    assert store.add_files([FILES / "guide.pdf"], pages=pages).unchanged == 1


@pytest.mark.parametrize("pages", ["image", "fused", "text"])
def test_a_copy_of_a_page_has_its_vector(pages: Any) -> None:
    with UMRVectorStore(GMEEmbeddings(model="umr-tiny")) as store:
        store.add_files([FILES / "guide.pdf"], pages=pages)
        page = rows(store)[0]
        store.add_documents([page], ids=["copy"])
        first, second = store.index.vectors([str(page.id), "copy"])
        assert first @ second == pytest.approx(1, abs=1e-5)
        assert store.get_by_ids(["copy"])[0].metadata == page.metadata, "it still says where it is from"


def test_nothing_of_a_file_is_left_when_it_goes(store: UMRVectorStore, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    shutil.copy(next((FILES / "notes").glob("*.md")), folder / "a.md")
    store.add_folder(folder)
    found = rows(store)[0]
    store.add_documents([Document("x", id=found.id, metadata=found.metadata)], on_error="skip")
    (folder / "a.md").unlink()
    store.add_folder(folder)
    assert store.index.count() == 0


# --- rows of pictures -------------------------------------------------------------------------------------


def test_a_row_that_comes_back_is_itself_wherever_the_program_runs(
    store: UMRVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    store.add_documents([Document("kite", id="a", metadata={"image": "photo.png"})])
    monkeypatch.chdir("/")
    [found] = store.get_by_ids(["a"])
    assert store.similarity_search_with_score(found, k=1)[0][1] == pytest.approx(1, abs=1e-5)
    found.metadata["tag"] = "seen"
    store.add_documents([found])
    assert store.get_by_ids(["a"]) == [found]
    assert store.index.get(["a"])[0].embedded.image == tmp_path / "photo.png"


def test_a_key_of_the_users_own_does_not_hide_the_picture(store: UMRVectorStore) -> None:
    store.add_items([png_item()], [{"modality": "text", "page": 3}], ids=["a"])
    [found] = store.get_by_ids(["a"])
    assert store.similarity_search_with_score(found, k=1)[0][1] == pytest.approx(1, abs=1e-5)
    found.metadata["page"] = 4
    store.add_documents([found])
    assert store.get_by_ids(["a"])[0].metadata == {"modality": "text", "page": 4}
    assert store.index.get(["a"])[0].modality == "image"


def png_item() -> Item:
    return Item(image=png())


def test_what_a_row_was_given_when_it_was_read_is_not_kept(store: UMRVectorStore, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    store.add_images([tmp_path / "photo.png"], [{"n": 1}], ids=["a"], captions=["kite"])
    [found] = store.get_by_ids(["a"])
    found.page_content = "boat"
    store.add_documents([found])
    assert store.index.get(["a"])[0].metadata == {"n": 1}
    assert store.get_by_ids(["a"]) == [found]


def test_what_was_the_users_own_is_kept(store: UMRVectorStore) -> None:
    own = {"path": "shelf 3", "modality": "image"}
    store.add_items([png_item()], [own], ids=["a"])
    store.add_documents(store.get_by_ids(["a"]))
    assert store.index.get(["a"])[0].metadata == own


def test_a_new_document_with_the_id_of_a_picture_replaces_it(store: UMRVectorStore) -> None:
    for metadata in ({}, {"modality": "own"}):
        store.add_items([png_item()], [metadata], ids=["a"])
        store.add_documents([Document("boat", id="a")])
        assert store.get_by_ids(["a"]) == [Document("boat", id="a")]
    encoded = base64.b64encode(png("blue")).decode()
    store.add_documents([Document(encoded, id="a")])
    assert store.get_by_ids(["a"]) == [Document("", id="a", metadata={"modality": "image"})]


# --- documents of elsewhere -------------------------------------------------------------------------------


def test_a_document_of_elsewhere_opens_no_file_as_a_query(store: UMRVectorStore, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    named = str(tmp_path / "secret.png")
    store.add_items([png_item(), "kite"], ids=["a", "kite"])
    for metadata in ({"image": named}, {"image_uri": [named]}, {"image": named, "modality": "image"}):
        for row_id in (None, "a", "elsewhere"):
            query: Any = Document("kite", id=row_id, metadata=metadata)
            with pytest.raises(ItemError, match=r"no row of this store.*\"image\": path"):
                store.similarity_search(query)
            with pytest.raises(ItemError, match="no row of this store"):
                store.max_marginal_relevance_search(query)
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert store.similarity_search(Document("", metadata={"image": uri}), k=1)[0].id == "a"
    assert store.similarity_search(Document("kite"), k=1)[0].id == "kite"


def test_a_document_with_the_id_of_another_stores_row_is_not_that_row(
    store: UMRVectorStore, tmp_path: Path
) -> None:
    store.add_items([{"text": "kite", "image": png()}], ids=["1"])
    [own] = store.get_by_ids(["1"])
    other = Document("boat", id="1", metadata=own.metadata)
    assert store.stored_items([own, other, Document("kite", id="1")]) == [
        Item("kite", image=png()),
        None,
        None,
    ]
    blocks = documents_to_content_blocks([Document("boat", id="1")], store=store)
    assert [block["type"] for block in blocks] == ["text"]


# --- what was left out ------------------------------------------------------------------------------------


def test_skipped_documents_are_logged_by_name_and_number(
    store: UMRVectorStore, caplog: pytest.LogCaptureFixture
) -> None:
    documents = [
        Document("a", id="1"),
        Document("", id="2"),
        Document("b", metadata={"image": 7}),
        Document("", id="4", metadata={"image": "gone.png"}),
        Document("c", id="5"),
    ]
    with caplog.at_level(logging.WARNING):
        assert store.add_documents(documents, on_error="skip") == ["1", "5"]
    logged = [record.getMessage() for record in caplog.records]
    assert [one.partition(":")[2].strip().partition(":")[0] for one in logged] == [
        "item 1",
        "item 2",
        "item 3",
    ]
    for one, name in zip(logged, ("document '2'", "document 'b'", "gone.png"), strict=True):
        assert name in one
    caplog.clear()
    assert store.add_documents(documents[1:2], on_error="skip") == []
    assert "document '2'" in caplog.text


def test_items_that_cannot_be_read_are_skipped_too(
    store: UMRVectorStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        added = store.add_items(["a", 5, {"image": "gone.png"}, "d"], ids=list("adgj"), on_error="skip")  # type: ignore[list-item]
    assert added == ["a", "j"]
    assert [word in caplog.text for word in ("item 1: d: an item is", "item 2: ", "gone.png")] == [True] * 3
    with pytest.raises(BatchError, match="1 of 2"):
        store.add_items(["b", 5])
    with pytest.raises(InputError, match="on_error"):
        store.add_items(["b"], on_error="ignore")  # type: ignore[arg-type]  # that is the mistake
    assert store.index.ids() == ["a", "j"]


# --- mistakes in calls ------------------------------------------------------------------------------------


def test_mistakes_in_calls_are_said_in_our_words(store: UMRVectorStore) -> None:
    mistakes: list[tuple[Any, str]] = [
        (lambda: store.add_documents(["abc"]), "list of Documents, got str"),  # type: ignore[list-item]
        (lambda: store.add_documents(Document("a")), "list of Documents, got Document"),  # type: ignore[arg-type]
        (lambda: store.add_texts(["a"], [["x"]]), "metadata 0 must be a dict, got list"),  # type: ignore[list-item]
        (
            lambda: store.add_texts(["a", "b"], ids="xy"),
            "ids is a list with one entry per document, got one str",
        ),
        (lambda: documents_to_content_blocks([], store=FakeEncoder()), "got FakeEncoder"),  # type: ignore[arg-type]
        (lambda: store.delete(filter={}), "empty filter"),
        (lambda: store.delete(["kept"], filter={}), "empty filter"),
    ]
    store.add_texts(["kept"], ids=["kept"])
    for call, message in mistakes:
        with pytest.raises(InputError, match=message):
            call()
    assert store.index.ids() == ["kept"]
