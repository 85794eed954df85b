"""`MultimodalIndex` over the stock `ChromaVectorStore`: every kind of node, its limits, what it refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.nodes import node_picture
from llama_index.indices.umr import MultimodalIndex
from llama_nodes import Kind, kinds
from llama_stores import chroma

from umr_plugins.errors import BatchError, FingerprintError
from umr_plugins.media.images import content_key
from umr_plugins.testing import FakeEncoder

LIMIT = 5461  # what Chroma takes in one call


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder(dim=64)


@pytest.fixture
def gme(encoder: FakeEncoder) -> GMEEmbedding:
    return GMEEmbedding(encoder=encoder)


def storage(store: BasePydanticVectorStore) -> StorageContext:
    return StorageContext.from_defaults(vector_store=store)


Way = Callable[[list[BaseNode], BasePydanticVectorStore, GMEEmbedding], Any]


def constructor(nodes: list[BaseNode], store: BasePydanticVectorStore, gme: GMEEmbedding) -> None:
    MultimodalIndex(nodes, embed_model=gme, storage_context=storage(store))


def constructor_async(nodes: list[BaseNode], store: BasePydanticVectorStore, gme: GMEEmbedding) -> None:
    MultimodalIndex(nodes, embed_model=gme, storage_context=storage(store), use_async=True)


def insert_nodes(nodes: list[BaseNode], store: BasePydanticVectorStore, gme: GMEEmbedding) -> None:
    MultimodalIndex.from_vector_store(store, embed_model=gme).insert_nodes(nodes)


def ainsert_nodes(nodes: list[BaseNode], store: BasePydanticVectorStore, gme: GMEEmbedding) -> None:
    asyncio.run(MultimodalIndex.from_vector_store(store, embed_model=gme).ainsert_nodes(nodes))


def from_documents(nodes: list[BaseNode], store: BasePydanticVectorStore, gme: GMEEmbedding) -> None:
    documents = [node for node in nodes if isinstance(node, Document)]
    MultimodalIndex.from_documents(documents, embed_model=gme, storage_context=storage(store))


def from_documents_async(nodes: list[BaseNode], store: BasePydanticVectorStore, gme: GMEEmbedding) -> None:
    documents = [node for node in nodes if isinstance(node, Document)]
    MultimodalIndex.from_documents(documents, embed_model=gme, storage_context=storage(store), use_async=True)


WAYS: list[Way] = [
    constructor,
    constructor_async,
    insert_nodes,
    ainsert_nodes,
    from_documents,
    from_documents_async,
]


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_is_embedded_as_what_it_is_and_found_after_a_reload(
    way: Way, gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path
) -> None:
    given = kinds(tmp_path)
    way([kind.node for kind in given], chroma(gme, tmp_path), gme)
    documents_only = way in (from_documents, from_documents_async)
    expected = [kind for kind in given if not documents_only or isinstance(kind.node, Document)]
    items = [item for _, batch, _ in encoder.calls for item in batch]
    assert [item.modality for item in items] == [kind.item.modality for kind in expected]
    assert [item.text for item in items] == [kind.item.text for kind in expected]
    again = MultimodalIndex.from_vector_store(chroma(gme, tmp_path), embed_model=gme)
    assert len(again.vector_store.get_nodes(None)) == len(expected) >= 4
    retriever = again.as_retriever(similarity_top_k=1)
    for kind in expected:
        query = gme.as_query(kind.item.text, kind.item.image)  # type: ignore[arg-type]
        for [found] in (retriever.retrieve(query), asyncio.run(retriever.aretrieve(query))):
            check(found.node, kind, split=documents_only and kind.item.image is None)
            assert found.score == pytest.approx(1.0, abs=1e-5)


def check(node: BaseNode, kind: Kind, split: bool) -> None:
    assert (node.ref_doc_id if split else node.node_id) == kind.name
    assert node.get_content(MetadataMode.NONE) == kind.node.get_content(MetadataMode.NONE)
    assert node.metadata == kind.node.metadata
    picture = node_picture(node)
    assert (picture is None) == (kind.item.image is None), kind.name
    if picture is not None and kind.item.image is not None:
        assert content_key(picture) == content_key(kind.item.image)


def test_a_call_may_be_longer_than_chromas_limit(gme: GMEEmbedding, tmp_path: Path) -> None:
    store = chroma(gme, tmp_path)
    assert store.client._client.get_max_batch_size() == LIMIT
    vector = [1.0] + [0.0] * 63
    nodes = [TextNode(id_=f"n{n}", text="x", embedding=vector) for n in range(LIMIT + 1)]
    index = MultimodalIndex.from_vector_store(store, embed_model=gme, insert_batch_size=10**6)
    index.insert_nodes(nodes)
    assert store.client.count() == LIMIT + 1


@pytest.mark.slow
def test_more_documents_than_chromas_limit_can_be_built_at_once(gme: GMEEmbedding, tmp_path: Path) -> None:
    store = chroma(gme, tmp_path)
    documents = [Document(id_=f"d{n}", text=f"text {n}") for n in range(LIMIT + 1)]
    index = MultimodalIndex.from_documents(
        documents, embed_model=gme, storage_context=storage(store), insert_batch_size=10**6
    )
    assert store.client.count() == LIMIT + 1
    documents[-1] = Document(id_=f"d{LIMIT}", text="changed")
    assert sum(index.refresh_ref_docs(documents)) == 1
    assert store.client.count() == LIMIT + 1


@pytest.mark.parametrize("space", ["l2", "cosine", "ip"])
def test_collections_of_every_space_rank_by_cosine(gme: GMEEmbedding, tmp_path: Path, space: str) -> None:
    texts = [f"text {number}" for number in range(30)]
    index = MultimodalIndex.from_vector_store(chroma(gme, tmp_path, space), embed_model=gme)
    index.insert_nodes([TextNode(id_=text, text=text) for text in texts])
    query = np.array(gme.get_query_embedding("what"))
    cosine = {text: float(query @ np.array(gme.get_text_embedding(text))) for text in texts}
    found = index.as_retriever(similarity_top_k=30).retrieve("what")
    assert [hit.node_id for hit in found] == sorted(texts, key=cosine.__getitem__, reverse=True)
    steepness = 2 if space == "l2" else 1
    for hit in found:
        assert hit.score == pytest.approx(math.exp(-steepness * (1 - cosine[hit.node_id])), abs=1e-5)


OPENINGS: list[Callable[[BasePydanticVectorStore, GMEEmbedding], Any]] = [
    lambda store, gme: MultimodalIndex.from_vector_store(store, embed_model=gme),
    lambda store, gme: MultimodalIndex([TextNode(text="b")], embed_model=gme, storage_context=storage(store)),
]


@pytest.mark.parametrize("opening", OPENINGS, ids=["from_vector_store", "storage_context"])
def test_a_collection_of_another_length_is_refused_before_anything_is_embedded(
    gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, opening: Any
) -> None:
    other = GMEEmbedding(encoder=FakeEncoder(dim=8, name="other"))
    MultimodalIndex.from_vector_store(chroma(other, tmp_path), embed_model=other).insert_nodes(
        [TextNode(text="a")]
    )
    store = chroma(gme, tmp_path)
    with pytest.raises(FingerprintError, match=r"'papers' holds vectors of 8 numbers, and 'fake' makes 64"):
        opening(store, gme)
    assert encoder.calls == []
    assert store.client.count() == 1


def test_a_simple_store_of_another_length_is_refused(gme: GMEEmbedding) -> None:
    store = SimpleVectorStore()
    store.add([TextNode(text="a", embedding=[1.0, 0.0])])
    with pytest.raises(FingerprintError, match="SimpleVectorStore holds vectors of 2 numbers"):
        MultimodalIndex(embed_model=gme, storage_context=storage(store))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["a", "b"], "'tags' is a list"),
        ({"a": 1}, "'tags' is a dict"),
        (math.nan, "'tags' is nan"),
        (b"x", "'tags' is a bytes"),
    ],
    ids=["list", "dict", "nan", "bytes"],
)
@pytest.mark.parametrize("way", WAYS)
def test_metadata_that_chroma_can_not_hold_is_named_before_anything_is_embedded(
    way: Way, gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, value: Any, reason: str
) -> None:
    store = chroma(gme, tmp_path)
    nodes: list[BaseNode] = [TextNode(text="a"), Document(id_="bad", text="b", metadata={"tags": value})]
    with pytest.raises(BatchError, match=reason) as caught:
        way(nodes, store, gme)
    [error] = caught.value.errors
    assert error.name is not None
    assert error.name.startswith("node ")
    assert encoder.calls == []
    assert store.client.count() == 0


def test_metadata_that_chroma_can_not_hold_are_left_out_with_a_warning(
    gme: GMEEmbedding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = chroma(gme, tmp_path)
    index = MultimodalIndex.from_vector_store(store, embed_model=gme, on_error="skip")
    index.insert_nodes([TextNode(id_="a", text="a"), TextNode(id_="bad", text="b", metadata={"tags": [1]})])
    assert [node.node_id for node in store.get_nodes(None)] == ["a"]
    assert "node bad" in caplog.text


def test_metadata_of_none_is_kept_as_chroma_keeps_it(gme: GMEEmbedding, tmp_path: Path) -> None:
    index = MultimodalIndex.from_vector_store(chroma(gme, tmp_path), embed_model=gme)
    metadata = {"none": None, "yes": True, "year": 2020, "share": 0.5}
    index.insert_nodes([TextNode(text="a", metadata=metadata)])
    [node] = index.vector_store.get_nodes(None)
    assert node.metadata == metadata


def test_filters_and_a_stock_retriever_work_on_what_the_index_wrote(
    gme: GMEEmbedding, tmp_path: Path
) -> None:
    given = kinds(tmp_path)
    store = chroma(gme, tmp_path)
    index = MultimodalIndex.from_vector_store(store, embed_model=gme)
    index.insert_nodes([kind.node for kind in given])
    filters = MetadataFilters(filters=[MetadataFilter(key="place", value="Delft")])
    noted = {"text-metadata", "image-metadata"}
    found = index.as_retriever(similarity_top_k=20, filters=filters).retrieve("a noted text")
    assert {hit.node_id for hit in found} == noted
    assert {node.node_id for node in store.get_nodes(None, filters)} == noted
    stock = VectorStoreIndex.from_vector_store(store, embed_model=gme).as_retriever(similarity_top_k=1)
    for kind in given:
        query = gme.as_query(kind.item.text, kind.item.image)  # type: ignore[arg-type]
        assert stock.retrieve(query)[0].node_id == kind.name
    query = VectorStoreQuery(query_embedding=gme.get_query_embedding("a text"), similarity_top_k=1)
    assert store.query(query).ids == ["text"]


@pytest.mark.parametrize(
    "bad",
    [
        TextNode(id_="a", text="new", embedding=[1.0, 2.0]),
        TextNode(id_="a", text="new", metadata={"chroma:document": "x"}),
        TextNode(id_="a", text="new", metadata={"": "x"}),
        TextNode(id_="a", text="new", metadata={"k": "x\ud800"}),
        TextNode(id_="a", text="new", metadata={"x\ud800": "k"}),
        TextNode(id_="a", text="new", metadata={"k": 2**70}),
        TextNode(id_="a", text="new\ud800"),
    ],
    ids=["vector", "chroma's key", "empty key", "surrogate", "surrogate key", "long number", "text"],
)
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_refused_replacement_costs_nothing(
    gme: GMEEmbedding, tmp_path: Path, bad: TextNode, way: str
) -> None:
    index = MultimodalIndex.from_vector_store(chroma(gme, tmp_path), embed_model=gme)
    index.insert_nodes([TextNode(id_="a", text="old")])
    with pytest.raises(BatchError, match="node a: "):
        _ = index.insert_nodes([bad]) if way == "sync" else asyncio.run(index.ainsert_nodes([bad]))
    assert [hit.node.get_content() for hit in index.as_retriever().retrieve("old")] == ["old"]


@pytest.mark.parametrize("space", ["cosine", "l2", "ip"])
def test_a_long_vector_is_refused_where_length_counts(gme: GMEEmbedding, tmp_path: Path, space: str) -> None:
    index = MultimodalIndex.from_vector_store(chroma(gme, tmp_path, space), embed_model=gme)
    vector = gme.get_text_embedding("far")
    index.insert_nodes([TextNode(text="one", embedding=vector)])
    node = TextNode(id_="x", text="far", embedding=[value * 9 for value in vector])
    if space == "cosine":
        index.insert_nodes([node])
    else:
        with pytest.raises(BatchError, match=f"node x: .*length 9, .*{space}"):
            index.insert_nodes([node])
