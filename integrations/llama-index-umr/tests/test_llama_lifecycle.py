"""Documents and nodes that come again: replaced, refreshed, deleted; over our store and others."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import StorageContext
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    TextNode,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from llama_nodes import kinds, png, save
from llama_stores import FlatStore, chroma, own

from umr_plugins.errors import BatchError, InputError
from umr_plugins.testing import FakeEncoder

LONG = " ".join(f"word{number}." for number in range(300))
SPLITTER = SentenceSplitter(chunk_size=200, chunk_overlap=0)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder(dim=64)


@pytest.fixture
def gme(encoder: FakeEncoder) -> GMEEmbedding:
    return GMEEmbedding(encoder=encoder)


class Shelf:
    """An index over one of the stores, which can be opened again, used by call or by coroutine."""

    def __init__(self, name: str, way: str, gme: GMEEmbedding, folder: Path) -> None:
        self.name, self.way, self.gme, self.folder = name, way, gme, folder
        self.storage: StorageContext | None = None
        self.index = self.open()

    def open(self) -> MultimodalIndex:
        options: dict[str, Any] = {"embed_model": self.gme, "transformations": [SPLITTER]}
        if self.name == "own":
            return MultimodalIndex.from_vector_store(own(self.gme, self.folder), **options)
        if self.name == "chroma":
            return MultimodalIndex.from_vector_store(chroma(self.gme, self.folder), **options)
        if self.name == "flat":
            return MultimodalIndex.from_vector_store(FlatStore(), **options)
        self.storage = StorageContext.from_defaults()
        return MultimodalIndex(storage_context=self.storage, **options)

    def again(self) -> None:
        if self.name == "simple":
            assert self.storage is not None
            self.storage.persist(str(self.folder / "simple"))
            self.storage = StorageContext.from_defaults(persist_dir=str(self.folder / "simple"))
            struct = self.storage.index_store.get_index_struct(self.index.index_id)
            self.index = MultimodalIndex(
                index_struct=struct,
                storage_context=self.storage,
                embed_model=self.gme,
                transformations=[SPLITTER],
            )
        elif self.name != "flat":
            self.close()
            self.index = self.open()

    def close(self) -> None:
        if self.name == "own":
            self.index.vector_store.close()

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self.way == "sync":
            return getattr(self.index, method)(*arguments, **options)
        return asyncio.run(getattr(self.index, f"a{method}")(*arguments, **options))

    def contents(self) -> list[tuple[str, str]]:
        """(source, text) of everything that a search can find."""
        found = self.index.as_retriever(similarity_top_k=99).retrieve("anything")
        return sorted((hit.node.ref_doc_id or "", hit.node.get_content(MetadataMode.NONE)) for hit in found)

    def best(self, text: str | None = None, image: Any = None) -> tuple[str, float]:
        query = self.gme.as_query(text, image)
        [hit] = self.index.as_retriever(similarity_top_k=1).retrieve(query)
        return hit.node_id, round(float(hit.score or 0), 3)


@pytest.fixture(params=["sync", "async"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["own", "chroma", "simple", "flat"])
def shelf(request: pytest.FixtureRequest, way: str, gme: GMEEmbedding, tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(request.param, way, gme, tmp_path)
    yield made
    made.close()


def changing(folder: Path) -> dict[str, Document]:
    """Documents of every sort that can change."""
    return {
        "text": Document(id_="text", text="one text"),
        "metadata": Document(id_="metadata", text="noted", metadata={"year": 2020}),
        "long": Document(id_="long", text=LONG),
        "file": ImageDocument(id_="file", image_path=str(save(folder, 1))),
        "other-file": ImageDocument(id_="other-file", text="said", image_path=str(save(folder, 2))),
        "bytes": Document(id_="bytes", text="b", image_resource=MediaResource(data=png(3))),
        "same": Document(id_="same", text="never changes"),
        "same-file": ImageDocument(id_="same-file", image_path=str(save(folder, 4))),
    }


def changed(folder: Path) -> dict[str, Document]:
    """The same documents later."""
    later = changing(folder) | {
        "text": Document(id_="text", text="another text"),
        "metadata": Document(id_="metadata", text="noted", metadata={"year": "2020"}),
        "long": Document(id_="long", text=LONG + " And more."),
        "bytes": Document(id_="bytes", text="b", image_resource=MediaResource(data=png(33))),
        "new": Document(id_="new", text="came later"),
    }
    (folder / "1.png").write_bytes(png(11))  # another picture under the same path
    later["other-file"] = ImageDocument(id_="other-file", text="said", image_path=str(save(folder, 22)))
    return later


@pytest.mark.parametrize("reopened", [False, True])
def test_refresh_replaces_what_changed_and_embeds_nothing_else(
    shelf: Shelf, encoder: FakeEncoder, tmp_path: Path, reopened: bool
) -> None:
    first = list(changing(tmp_path).values())
    assert shelf.do("refresh_ref_docs", first) == [True] * 8
    before = shelf.contents()
    if reopened:
        shelf.again()
    encoder.calls.clear()
    assert shelf.do("refresh_ref_docs", list(changing(tmp_path).values())) == [False] * 8
    assert encoder.calls == []
    assert shelf.contents() == before

    later = changed(tmp_path)
    if reopened:
        shelf.again()
    refreshed = shelf.do("refresh_ref_docs", list(later.values()))
    assert dict(zip(later, refreshed, strict=True)) == {
        name: name not in ("same", "same-file") for name in later
    }
    embedded = [item for role, items, _ in encoder.calls if role == "document" for item in items]
    assert "never changes" not in {item.text for item in embedded}
    fresh = MultimodalIndex.from_documents(
        list(later.values()), embed_model=shelf.gme, transformations=[SPLITTER]
    )
    nodes = fresh.vector_store.get_nodes()
    expected = sorted((node.ref_doc_id or "", node.get_content(MetadataMode.NONE)) for node in nodes)
    assert shelf.contents() == expected  # nothing is left of the old ones, nothing is there twice
    for name, picture in (("file", png(11)), ("other-file", png(22)), ("bytes", png(33))):
        text = later[name].text or None
        assert shelf.best(text, picture) == (name, 1.0)


@pytest.mark.parametrize("method", ["insert", "update_ref_doc"])
def test_a_document_that_comes_again_replaces_all_its_nodes(
    shelf: Shelf, tmp_path: Path, method: str
) -> None:
    for document in changing(tmp_path).values():
        shelf.do("insert", document)
    assert sum(source == "long" for source, _ in shelf.contents()) > 3
    shelf.do(method, Document(id_="long", text="now short"))
    picture = ImageDocument(id_="file", image_path=str(save(tmp_path, 9)))
    shelf.do(method, picture)
    found = shelf.contents()
    assert [text for source, text in found if source == "long"] == ["now short"]
    assert [source for source, _ in found].count("file") == 1
    assert shelf.best(image=png(9)) == ("file", 1.0)
    assert shelf.best(image=png(1))[1] < 1


@pytest.mark.parametrize("name", ["own", "chroma", "flat"])
def test_documents_of_a_second_build_replace_those_of_the_first(
    gme: GMEEmbedding, tmp_path: Path, way: str, name: str
) -> None:
    shelf = Shelf(name, way, gme, tmp_path)
    for documents in (changing(tmp_path), changed(tmp_path)):
        MultimodalIndex.from_documents(
            list(documents.values()),
            storage_context=StorageContext.from_defaults(vector_store=shelf.index.vector_store),
            use_async=way == "async",
            embed_model=gme,
            transformations=[SPLITTER],
        )
    found = shelf.contents()
    assert [text for source, text in found if source == "text"] == ["another text"]
    assert [source for source, _ in found].count("file") == 1
    assert shelf.best(image=png(11)) == ("file", 1.0)
    shelf.close()


@pytest.mark.parametrize("name", ["own", "chroma", "simple"])
def test_a_node_of_the_same_id_replaces_the_old_one(
    gme: GMEEmbedding, tmp_path: Path, way: str, name: str
) -> None:
    shelf = Shelf(name, way, gme, tmp_path)
    shelf.do("insert_nodes", [kind.node for kind in kinds(tmp_path)])
    count = len(shelf.contents())
    texts = [TextNode(id_="text", text="another"), TextNode(id_="document-text", text="third")]
    pictures: list[BaseNode] = [
        ImageNode(id_="image-path", image_path=str(save(tmp_path, 50))),
        ImageNode(id_="image-base64", image=base64.b64encode(png(51)).decode()),
        Node(id_="node-bytes", image_resource=MediaResource(data=png(52))),
        ImageDocument(id_="image-document", image_path=str(save(tmp_path, 53))),
    ]
    shelf.do("insert_nodes", [*texts, *pictures])
    shelf.again()
    assert len(shelf.contents()) == count
    assert shelf.best("another") == ("text", 1.0)
    assert shelf.best("third") == ("document-text", 1.0)
    for number, node in enumerate(pictures):
        assert shelf.best(image=png(50 + number)) == (node.node_id, 1.0)
    assert shelf.best("a text")[1] < 1
    assert shelf.best(image=png(1))[1] < 1
    shelf.close()


def test_a_document_and_a_node_are_deleted_with_all_they_have(shelf: Shelf, tmp_path: Path) -> None:
    for document in changing(tmp_path).values():
        shelf.do("insert", document)
    shelf.do("insert_nodes", [ImageNode(id_="bare", image=base64.b64encode(png(60)).decode())])
    for name in ("long", "file", "bytes", "not there"):
        shelf.do("delete_ref_doc", name)
    gone = {"long", "file", "bytes"}
    if shelf.name != "flat":  # which can't delete by id
        shelf.do("delete_ref_doc", "bare")
        gone.add("bare")
    assert not {source for source, _ in shelf.contents()} & gone
    assert {source for source, _ in shelf.contents()} >= {"text", "metadata", "same", "same-file"}
    assert shelf.do("refresh_ref_docs", list(changing(tmp_path).values())) == [
        name in gone for name in changing(tmp_path)
    ]


@pytest.mark.parametrize("name", ["own", "chroma", "simple"])
@pytest.mark.parametrize("from_docstore", [False, True])
def test_nodes_are_deleted_by_id(
    gme: GMEEmbedding, tmp_path: Path, way: str, name: str, from_docstore: bool
) -> None:
    shelf = Shelf(name, way, gme, tmp_path)
    shelf.do("insert_nodes", [kind.node for kind in kinds(tmp_path)])
    count = len(shelf.contents())
    for ids in (["text", "image-path", "not there"], ["text"], []):
        shelf.do("delete_nodes", ids, delete_from_docstore=from_docstore)
    assert len(shelf.contents()) == count - 2
    assert shelf.best("a text")[1] < 1
    copied = shelf.index.docstore.document_exists("text")
    assert copied == (name == "simple" and not from_docstore)
    shelf.close()


def test_a_document_that_can_not_be_embedded_costs_nothing(shelf: Shelf, tmp_path: Path) -> None:
    documents = changing(tmp_path)
    shelf.do("refresh_ref_docs", list(documents.values()))
    before = shelf.contents()
    (tmp_path / "1.png").write_bytes(b"no picture")
    documents["text"] = Document(id_="text", text="another text")
    with pytest.raises(BatchError, match="node file"):
        shelf.do("refresh_ref_docs", list(documents.values()))
    with pytest.raises(BatchError, match="node file"):
        shelf.do("update_ref_doc", documents["file"])
    assert shelf.contents() == before
    shelf.index._on_error = "skip"
    refreshed = shelf.do("refresh_ref_docs", list(documents.values()))
    assert [name for name, one in zip(documents, refreshed, strict=True) if one] == ["text"]
    found = shelf.contents()
    assert ("file", "") in found  # as it was
    assert [text for source, text in found if source == "text"] == ["another text"]


def test_a_call_with_an_id_twice_is_refused(shelf: Shelf) -> None:
    twice = [Document(id_="d", text="one"), Document(id_="d", text="two")]
    for method in ("refresh_ref_docs", "insert_nodes"):
        with pytest.raises(InputError, match="'d'"):
            shelf.do(method, twice)
    with pytest.raises(InputError, match="document ids come twice in one call: 'd'"):
        MultimodalIndex.from_documents(twice, embed_model=shelf.gme)
    with pytest.raises(InputError, match="node ids come twice in one call: 'd'"):
        MultimodalIndex(twice, embed_model=shelf.gme)
    assert shelf.contents() == []


def test_replacing_goes_on_over_several_batches(shelf: Shelf, tmp_path: Path) -> None:
    shelf.index._insert_batch_size = 2
    shelf.do("refresh_ref_docs", list(changing(tmp_path).values()))
    later = changed(tmp_path)
    shelf.do("refresh_ref_docs", list(later.values()))
    assert shelf.do("refresh_ref_docs", list(later.values())) == [False] * len(later)
    sources = [source for source, _ in shelf.contents()]
    assert sources.count("text") == sources.count("file") == sources.count("bytes") == 1
    assert set(sources) == set(later)


def test_a_refresh_that_was_killed_between_new_and_old_nodes_is_mended_by_the_next(
    gme: GMEEmbedding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf("own", "sync", gme, tmp_path)
    shelf.index.insert(Document(id_="long", text=LONG))
    later = Document(id_="long", text="now short")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MultimodalIndex, "_drop", killed)
        with pytest.raises(KeyboardInterrupt):
            shelf.index.update_ref_doc(later)
    assert len(shelf.contents()) > 3  # both states, neither lost
    assert ("long", "now short") in shelf.contents()
    assert shelf.index.refresh_ref_docs([later]) == [True]
    assert shelf.contents() == [("long", "now short")]
    shelf.close()


@pytest.mark.parametrize("name", ["own", "chroma"])
def test_documents_of_a_pipeline_and_a_plain_build_are_known_too(
    gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, name: str
) -> None:
    shelf = Shelf(name, "sync", gme, tmp_path)
    documents = [Document(id_="a", text="one"), Document(id_="b", text="two", metadata={"n": 1})]
    shelf.index.insert_nodes(SPLITTER(documents))  # LlamaIndex's own hash of the document
    encoder.calls.clear()
    assert shelf.index.refresh_ref_docs(documents) == [False, False]
    assert encoder.calls == []
    assert shelf.index.refresh_ref_docs([Document(id_="a", text="changed")]) == [True]
    assert [text for _, text in shelf.contents()] == ["changed", "two"]
    shelf.close()


def test_options_reach_the_store_and_the_transformations(gme: GMEEmbedding) -> None:
    index = MultimodalIndex(embed_model=gme)
    document = Document(text="a")
    for call in (
        lambda: index.insert(document, strange=1),
        lambda: index.update_ref_doc(document, insert_kwargs={"strange": 1}),
        lambda: index.refresh_ref_docs([document], insert_kwargs={"strange": 1}),
        lambda: index.insert_nodes([TextNode(text="a")], strange=1),
        lambda: MultimodalIndex.from_documents([document], embed_model=gme, strange=1),
        lambda: index.delete_ref_doc("a", strange=1),
    ):
        with pytest.raises(InputError, match="strange"):
            call()


@pytest.mark.parametrize("name", ["own", "chroma", "simple"])
def test_the_documents_that_a_store_holds_are_listed(gme: GMEEmbedding, tmp_path: Path, name: str) -> None:
    shelf = Shelf(name, "sync", gme, tmp_path)
    documents = changing(tmp_path)
    shelf.index.refresh_ref_docs(list(documents.values()))
    shelf.index.insert_nodes([TextNode(text="of no document")])
    shelf.again()
    info = shelf.index.ref_doc_info
    assert set(info) == set(documents)
    assert len(info["long"].node_ids) > 3
    assert info["metadata"].metadata == {"year": 2020}
    shelf.close()


def test_a_store_that_can_not_list_its_nodes_says_so(gme: GMEEmbedding) -> None:
    index = MultimodalIndex.from_vector_store(FlatStore(), embed_model=gme)
    with pytest.raises(InputError, match="FlatStore can't list its nodes"):
        _ = index.ref_doc_info
