"""Documents that come in part, at once, or from a reader that knows their file: each once and whole."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MetadataMode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
    TransformComponent,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import png, save
from llama_stores import FlatStore, chroma

from umr_plugins.errors import BatchError
from umr_plugins.testing import FakeEncoder

LONG = Document(id_="long", text=" ".join(f"word{number}." for number in range(300)))
SPLITTER = SentenceSplitter(chunk_size=200, chunk_overlap=0)


class Failing(FakeEncoder):
    """Fails in the calls whose numbers are given."""

    def __init__(self, *calls: int) -> None:
        super().__init__(dim=64)
        self.bad, self.count = calls, 0

    def encode_documents(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        if self.count in self.bad:
            raise RuntimeError("out of memory")
        return super().encode_documents(*args, **options)


def store_of(name: str, folder: Path) -> Any:
    gme = GMEEmbedding(encoder=FakeEncoder(dim=64))
    if name == "flat":
        return FlatStore()
    return UMRVectorStore(gme) if name == "own" else chroma(gme, folder)


def texts(index: MultimodalIndex) -> list[str]:
    found = index.as_retriever(similarity_top_k=99).retrieve("anything")
    return sorted(hit.node.get_content(MetadataMode.NONE) for hit in found)


@pytest.mark.parametrize("name", ["own", "chroma", "flat"])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_document_that_arrived_in_part_is_stored_again(tmp_path: Path, name: str, way: str) -> None:
    def refresh(document: Document) -> list[bool]:
        if way == "sync":
            return index.refresh_ref_docs([document])
        return asyncio.run(index.arefresh_ref_docs([document]))

    index = MultimodalIndex.from_vector_store(
        store_of(name, tmp_path),
        embed_model=GMEEmbedding(encoder=Failing(2, 5)),
        transformations=[SPLITTER],
        insert_batch_size=1,
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        refresh(LONG)
    assert len(texts(index)) == 1
    short = Document(id_="long", text="word0. word1.")
    assert refresh(short) == [True]
    with pytest.raises(RuntimeError, match="out of memory"):
        refresh(LONG)
    assert refresh(short if name == "flat" else LONG) == [
        True
    ]  # the state before, and the one that came half
    assert refresh(LONG) == [name == "flat"]
    assert texts(index) == sorted(node.get_content(MetadataMode.NONE) for node in SPLITTER([LONG]))


class Pages(TransformComponent):
    """Makes a picture of every file that a document names."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        return [
            ImageNode(
                image_path=path, relationships={NodeRelationship.SOURCE: document.as_related_node_info()}
            )
            for document in nodes
            for path in document.metadata["pages"]
        ]


def test_nodes_that_are_left_out_do_not_make_a_document_come_again(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    pages = [str(save(tmp_path, 1)), str(bad), str(save(tmp_path, 2))]
    document = Document(id_="scan", text="", metadata={"pages": pages})
    index = MultimodalIndex(
        embed_model=GMEEmbedding(encoder=FakeEncoder()), transformations=[Pages()], on_error="skip"
    )
    assert index.refresh_ref_docs([document]) == [True]
    assert len(index.vector_store.get_nodes()) == 2
    assert index.refresh_ref_docs([document]) == [False]
    index.delete_nodes([index.vector_store.get_nodes()[0].node_id])
    assert index.refresh_ref_docs([document]) == [True]


@pytest.mark.parametrize("name", ["own", "chroma"])
def test_a_document_that_the_store_refuses_keeps_its_old_nodes(tmp_path: Path, name: str) -> None:
    index = MultimodalIndex.from_vector_store(
        store_of(name, tmp_path), embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64)), on_error="skip"
    )
    index.insert(Document(id_="d", text="old"))
    for bad in (Document(id_="d", text="new", metadata={"x": object}), Document(id_="d", text="")):
        assert index.refresh_ref_docs([bad]) == [False]
    assert texts(index) == ["old"]


@pytest.mark.parametrize("name", ["own", "chroma"])
def test_a_document_with_a_source_of_its_own_is_known_by_its_own_id(tmp_path: Path, name: str) -> None:
    file = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="report.pdf")}
    documents = [
        Document(id_="page", text=LONG.text, relationships=file),
        ImageDocument(id_="picture", image_path=str(save(tmp_path, 1)), relationships=file),
    ]
    index = MultimodalIndex.from_vector_store(
        store_of(name, tmp_path),
        embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64)),
        transformations=[SPLITTER],
    )
    assert index.refresh_ref_docs(documents) == [True, True]
    assert index.refresh_ref_docs(documents) == [False, False]
    count = len(texts(index))
    for document in documents:
        index.insert(document)
    assert len(texts(index)) == count
    assert set(index.ref_doc_info) == {"page", "picture"}
    for document in documents:
        index.delete_ref_doc(document.node_id)
    assert texts(index) == []
    assert documents[0].ref_doc_id == "report.pdf"  # the caller's own is not touched


@pytest.mark.parametrize("name", ["own", "chroma"])
@pytest.mark.parametrize("way", ["threads", "coroutines"])
def test_a_document_that_comes_many_times_at_once_is_there_once(tmp_path: Path, name: str, way: str) -> None:
    index = MultimodalIndex.from_vector_store(
        store_of(name, tmp_path), embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64))
    )
    versions = [Document(id_="d", text=f"version {n}") for n in range(12)]

    async def all_at_once() -> None:
        await asyncio.gather(*(index.ainsert(version) for version in versions))

    if way == "coroutines":
        asyncio.run(all_at_once())
    else:
        threads = [threading.Thread(target=index.insert, args=(version,)) for version in versions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(texts(index)) == 1


def test_a_call_that_fails_lets_the_next_one_in() -> None:
    index = MultimodalIndex(embed_model=GMEEmbedding(encoder=Failing(1, 2)))
    with pytest.raises(RuntimeError):
        index.insert(Document(text="a"))
    with pytest.raises(RuntimeError):
        asyncio.run(index.ainsert(Document(text="a")))
    index.insert(Document(text="a"))
    assert texts(index) == ["a"]


def test_old_nodes_stay_until_the_last_of_the_new_ones_has_come() -> None:
    index = MultimodalIndex(
        embed_model=GMEEmbedding(encoder=Failing(3)), transformations=[SPLITTER], insert_batch_size=1
    )
    index.insert(Document(id_="long", text="the old text"))
    with pytest.raises(RuntimeError):
        index.insert(LONG)
    assert "the old text" in texts(index)


def test_a_changed_picture_under_llama_indexs_own_hash_is_embedded_again(tmp_path: Path) -> None:
    document = ImageDocument(id_="d", image_path=str(save(tmp_path, 1)))
    node = ImageNode(
        id_="n",
        image_path=str(tmp_path / "1.png"),
        relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
    )
    index = MultimodalIndex([node], embed_model=GMEEmbedding(encoder=FakeEncoder()))
    (tmp_path / "1.png").write_bytes(png(2))
    assert index.refresh_ref_docs([document]) == [True]


def test_errors_name_every_bad_node_and_its_document(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    nodes = [
        TextNode(id_="empty", text=""),
        ImageNode(id_="broken", image_path=str(tmp_path / "bad.png")),
        TextNode(id_="unkept", text="a", metadata={"x": object()}),
        TextNode(id_="good", text="a"),
    ]
    gme = GMEEmbedding(encoder=FakeEncoder())
    with pytest.raises(BatchError) as embedding:
        gme.embed_nodes(nodes)
    assert [error.index for error in embedding.value.errors] == [0, 1]
    with pytest.raises(BatchError) as building:
        MultimodalIndex(nodes, embed_model=gme)
    assert [error.name for error in building.value.errors] == ["node empty", "node broken", "node unkept"]
    with pytest.raises(BatchError, match="of document 'mine': its metadata, key 'x'"):
        MultimodalIndex.from_documents(
            [Document(id_="mine", text="a", metadata={"x": object()})], embed_model=gme
        )


def test_nodes_left_out_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [TextNode(id_="empty", text=""), TextNode(id_="good", text="a")]
    with caplog.at_level(logging.WARNING):
        index = MultimodalIndex(nodes, embed_model=GMEEmbedding(encoder=FakeEncoder()), on_error="skip")
    assert [node.node_id for node in index.vector_store.get_nodes()] == ["good"]
    assert caplog.text.count("node empty") == 1
