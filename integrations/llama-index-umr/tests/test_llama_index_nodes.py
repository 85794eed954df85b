"""Every kind of node, on every way into the index, is embedded as what it is and found again."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import QueryBundle, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    TextNode,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.nodes import node_picture
from llama_index.indices.umr import KeepPictures, MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import Kind, kinds, png, save

from umr_plugins.errors import BatchError, InputError
from umr_plugins.media.images import content_key
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item


@pytest.fixture
def gme() -> GMEEmbedding:
    return GMEEmbedding(encoder=FakeEncoder(dim=64))


def constructor(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    return MultimodalIndex(nodes, embed_model=gme)


def constructor_async(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    return MultimodalIndex(nodes, embed_model=gme, use_async=True)


def insert_nodes(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    index = MultimodalIndex(embed_model=gme)
    index.insert_nodes(nodes)
    return index


def ainsert_nodes(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    index = MultimodalIndex(embed_model=gme)
    asyncio.run(index.ainsert_nodes(nodes))
    return index


def from_documents(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    return MultimodalIndex.from_documents([n for n in nodes if isinstance(n, Document)], embed_model=gme)


def from_documents_async(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    documents = [node for node in nodes if isinstance(node, Document)]
    return MultimodalIndex.from_documents(documents, embed_model=gme, use_async=True)


def inserted_one_by_one(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    index = MultimodalIndex(embed_model=gme)
    for node in nodes:
        if isinstance(node, Document):
            index.insert(node)
        else:
            index.insert_nodes([node])
    return index


def pipeline(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    store = UMRVectorStore(gme)
    IngestionPipeline(transformations=[gme], vector_store=store).run(nodes=nodes)
    return MultimodalIndex.from_vector_store(store)


def pipeline_async(nodes: list[BaseNode], gme: GMEEmbedding) -> MultimodalIndex:
    store = UMRVectorStore(gme)
    asyncio.run(IngestionPipeline(transformations=[gme], vector_store=store).arun(nodes=nodes))
    return MultimodalIndex.from_vector_store(store)


Way = Callable[[list[BaseNode], GMEEmbedding], MultimodalIndex]
WAYS = [
    constructor,
    constructor_async,
    insert_nodes,
    ainsert_nodes,
    from_documents,
    from_documents_async,
    inserted_one_by_one,
    pipeline,
    pipeline_async,
]


def query_for(item: Item, gme: GMEEmbedding) -> str | QueryBundle:
    """The item's own content as a user would ask for it."""
    if item.image is None:
        return item.text or ""
    if isinstance(item.image, Path):
        return QueryBundle(item.text or "", image_path=str(item.image))
    return gme.as_query(item.text, item.image)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_is_found_by_its_own_content(way: Way, gme: GMEEmbedding, tmp_path: Path) -> None:
    given = kinds(tmp_path)
    index = way([kind.node for kind in given], gme)
    whole = way not in (from_documents, from_documents_async)
    expected = [kind for kind in given if whole or isinstance(kind.node, Document)]
    assert index.vector_store.client.count() == len(expected) >= 4
    retriever = index.as_retriever(similarity_top_k=2)
    for kind in expected:
        query = query_for(kind.item, gme)
        found = retriever.retrieve(query)
        assert asyncio.run(retriever.aretrieve(query))[0].node_id == found[0].node_id
        assert found[0].score == pytest.approx(1.0, abs=1e-5), kind.name
        assert type(found[0].score) is float
        assert found[1].score is not None
        assert found[1].score < 0.9, kind.name
        if has_picture(kind) or not isinstance(kind.node, Document):
            assert found[0].node_id == kind.name
        assert (found[0].node.ref_doc_id or found[0].node_id) == kind.name
        assert_same_content(found[0].node, kind)


def has_picture(kind: Kind) -> bool:
    return kind.item.image is not None


def assert_same_content(node: BaseNode, kind: Kind) -> None:
    """Text, picture and metadata came back, however they had been given."""
    assert node.get_content(MetadataMode.NONE) == kind.node.get_content(MetadataMode.NONE)
    modality = {"modality": kind.item.modality} if has_picture(kind) else {}
    assert node.metadata == kind.node.metadata | modality, kind.name
    picture = node_picture(node)
    assert (picture is None) == (kind.item.image is None), kind.name
    if picture is not None and kind.item.image is not None:
        assert content_key(picture) == content_key(kind.item.image), kind.name


def test_one_call_of_the_model_for_all_kinds(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    given = kinds(tmp_path)
    MultimodalIndex([kind.node for kind in given], embed_model=GMEEmbedding(encoder=encoder))
    [(role, items, instruction)] = encoder.calls
    assert (role, instruction) == ("document", None)
    assert [item.modality for item in items] == [kind.item.modality for kind in given]


def test_the_callers_nodes_are_not_changed(gme: GMEEmbedding, tmp_path: Path) -> None:
    given = kinds(tmp_path)
    before = [kind.node.to_dict() for kind in given]
    MultimodalIndex([kind.node for kind in given], embed_model=gme)
    assert [kind.node.to_dict() for kind in given] == before


def test_a_vector_that_is_there_is_kept(gme: GMEEmbedding) -> None:
    node = TextNode(text="a", embedding=[1.0] + [0.0] * 63)
    gme.embed_nodes([node])
    assert node.embedding == [1.0] + [0.0] * 63


BAD: dict[str, tuple[BaseNode, str]] = {
    "empty": (TextNode(text=" \n"), "neither text nor picture"),
    "empty-metadata": (TextNode(text="", metadata={"file_path": "a.txt"}), "neither text nor picture"),
    "empty-image": (ImageNode(metadata={"file_path": "a.png"}), "neither text nor picture"),
    "empty-node": (Node(), "neither text nor picture"),
    "url": (ImageNode(image_url="https://example.org/a.png"), "URL"),
    "resource-url": (Node(image_resource=MediaResource(url="https://example.org/a.png")), "URL"),
    "audio": (Node(audio_resource=MediaResource(data=b"abc")), "audio"),
    "video": (
        Node(text_resource=MediaResource(text="a"), video_resource=MediaResource(path=Path("a.mp4"))),
        "video",
    ),
    "lost-bytes": (
        Node.from_dict(Node(image_resource=MediaResource(data=png(1))).to_dict()),
        "out of every dump",
    ),
    "not-base64": (ImageNode(image="%%%"), "base64"),
    "missing": (ImageNode(image_path="no-such-file.png"), "no-such-file"),
    "not-a-picture": (ImageNode(image="aGVsbG8="), "picture"),
    "document-url": (
        Document(text="a", image_resource=MediaResource(url="https://example.org/a.png")),
        "URL",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_node_that_can_not_be_embedded_is_named(gme: GMEEmbedding, name: str) -> None:
    node, reason = BAD[name]
    good = TextNode(text="fine", id_="fine")
    with pytest.raises(BatchError, match=reason) as caught:
        MultimodalIndex([good, node], embed_model=gme)
    [error] = caught.value.errors
    assert error.index == 1
    assert error.name == f"node {node.node_id}"


def test_bad_nodes_can_be_left_out_with_a_warning(
    gme: GMEEmbedding, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [TextNode(text="fine", id_="fine"), *(node for node, _ in BAD.values())]
    index = MultimodalIndex(nodes, embed_model=gme, on_error="skip")
    assert [node.node_id for node in index.as_retriever(similarity_top_k=99).retrieve("fine")] == ["fine"]
    for node, _ in BAD.values():
        assert node.node_id in caplog.text


def test_all_bad_nodes_are_named_in_one_error(gme: GMEEmbedding) -> None:
    nodes = [node for node, _ in BAD.values()]
    with pytest.raises(BatchError) as caught:
        gme.embed_nodes(nodes)
    early = [name for name in BAD if name not in ("missing", "not-a-picture")]  # found out when opened
    assert len(caught.value.errors) >= len(early)


def test_stock_index_with_embedded_nodes_and_as_query(gme: GMEEmbedding, tmp_path: Path) -> None:
    given = kinds(tmp_path)
    store = UMRVectorStore(gme)
    IngestionPipeline(transformations=[gme], vector_store=store).run(nodes=[kind.node for kind in given])
    retriever = VectorStoreIndex.from_vector_store(store, embed_model=gme).as_retriever(similarity_top_k=1)
    for kind in given:
        query = gme.as_query(kind.item.text, kind.item.image)  # type: ignore[arg-type]
        assert retriever.retrieve(query)[0].node_id == kind.name
        assert asyncio.run(retriever.aretrieve(query))[0].node_id == kind.name


def test_the_pipelines_cache_does_not_mix_up_pictures(gme: GMEEmbedding) -> None:
    steps = IngestionPipeline(transformations=[KeepPictures(SentenceSplitter()), gme])
    first = steps.run(nodes=[Node(id_="one", image_resource=MediaResource(data=png(1)))])
    second = steps.run(nodes=[Node(id_="two", image_resource=MediaResource(data=png(2)))])
    assert [node.node_id for node in (*first, *second)] == ["one", "two"]
    assert first[0].embedding != second[0].embedding


def test_long_texts_are_split_and_pictures_are_not(gme: GMEEmbedding, tmp_path: Path) -> None:
    words = " ".join(f"word{number}." for number in range(300))
    documents = [
        Document(text=words, id_="long"),
        Document(text=words, id_="poster", image_resource=MediaResource(path=save(tmp_path, 1))),
        Document(text="short", id_="short"),
    ]
    steps = [SentenceSplitter(chunk_size=200, chunk_overlap=0)]
    index = MultimodalIndex.from_documents(documents, embed_model=gme, transformations=steps)
    nodes = index.vector_store.get_nodes()
    sources = [node.ref_doc_id for node in nodes]
    assert sources.count("long") > 3
    assert sources.count("poster") == sources.count("short") == 1
    assert sources == sorted(sources, key=["long", "poster", "short"].index)
    poster = nodes[sources.index("poster")]
    assert isinstance(poster, ImageNode)
    assert poster.text == words


@pytest.mark.parametrize("way", ["sync", "async"])
def test_documents_are_inserted_updated_and_deleted(gme: GMEEmbedding, tmp_path: Path, way: str) -> None:
    def run(name: str, *arguments: Any) -> None:
        if way == "sync":
            getattr(index, name)(*arguments)
        else:
            asyncio.run(getattr(index, f"a{name}")(*arguments))

    def document(number: int) -> Document:
        return Document(id_="poster", text="a", image_resource=MediaResource(path=save(tmp_path, number)))

    index = MultimodalIndex(embed_model=gme)
    run("insert", document(1))
    run("insert", Document(text="kept", id_="kept"))
    run("update_ref_doc", document(2))
    query = QueryBundle("a", image_path=str(tmp_path / "2.png"))
    found = index.as_retriever(similarity_top_k=5).retrieve(query)
    assert [node.node.ref_doc_id for node in found] == ["poster", "kept"]
    assert found[0].score == pytest.approx(1.0, abs=1e-5)
    run("delete_ref_doc", "poster")
    assert [node.ref_doc_id for node in index.vector_store.get_nodes()] == ["kept"]


def test_an_empty_query_is_refused(gme: GMEEmbedding) -> None:
    retriever = MultimodalIndex([TextNode(text="a")], embed_model=gme).as_retriever()
    with pytest.raises(InputError, match="empty"):
        retriever.retrieve("")
    with pytest.raises(InputError, match="empty"):
        asyncio.run(retriever.aretrieve(QueryBundle("")))


def test_the_callers_query_is_not_changed(gme: GMEEmbedding, tmp_path: Path) -> None:
    retriever = MultimodalIndex([TextNode(text="a")], embed_model=gme).as_retriever()
    query = QueryBundle("a", image_path=str(save(tmp_path, 1)))
    retriever.retrieve(query)
    assert query == QueryBundle("a", image_path=str(tmp_path / "1.png"))


def test_pictures_in_memory_can_be_asked_for(gme: GMEEmbedding) -> None:
    index = MultimodalIndex([Node(id_="one", image_resource=MediaResource(data=png(1)))], embed_model=gme)
    query = QueryBundle("", image_path=io.BytesIO(png(1)))  # type: ignore[arg-type]
    assert index.as_retriever().retrieve(query)[0].score == pytest.approx(1.0, abs=1e-5)


def test_an_index_in_a_folder_opens_again(gme: GMEEmbedding, tmp_path: Path) -> None:
    given = kinds(tmp_path)
    index = MultimodalIndex([kind.node for kind in given], embed_model=gme, path=tmp_path / "db")
    index.vector_store.close()
    again = MultimodalIndex(embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64)), path=tmp_path / "db")
    for kind in given:
        [found] = again.as_retriever(similarity_top_k=1).retrieve(query_for(kind.item, gme))
        assert found.node_id == kind.name
        assert_same_content(found.node, kind)
    again.vector_store.close()


def test_relationships_come_back(gme: GMEEmbedding) -> None:
    parent = TextNode(text="parent", id_="parent")
    child = TextNode(text="child", id_="child")
    child.relationships = {
        NodeRelationship.PARENT: parent.as_related_node_info(),
        NodeRelationship.SOURCE: Document(text="d", id_="d").as_related_node_info(),
    }
    index = MultimodalIndex([parent, child], embed_model=gme)
    [node] = index.vector_store.get_nodes(["child"])
    assert node.relationships == child.relationships


def test_path_and_storage_context_exclude_each_other(gme: GMEEmbedding, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not both"):
        MultimodalIndex(path=tmp_path / "db", storage_context=StorageContext.from_defaults(), embed_model=gme)
