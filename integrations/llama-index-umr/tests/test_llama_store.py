"""`UMRVectorStore`: nodes come back whole, filters, deletes, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.vector_stores.umr import UMRVectorStore, where_of
from llama_nodes import kinds, png, save

from umr_plugins.errors import BatchError, FingerprintError, InputError
from umr_plugins.testing import FakeEncoder


@pytest.fixture
def gme() -> GMEEmbedding:
    return GMEEmbedding(encoder=FakeEncoder(dim=32))


@pytest.fixture
def store(gme: GMEEmbedding) -> UMRVectorStore:
    return UMRVectorStore(gme)


def filled(store: UMRVectorStore) -> UMRVectorStore:
    rows: list[tuple[str, dict[str, Any], str]] = [
        ("a", {"year": 2019, "lang": "en", "tags": ["red", "blue"]}, "one"),
        ("b", {"year": 2021, "lang": "nl", "tags": ["red"]}, "one"),
        ("c", {"year": 2023, "lang": "en"}, "two"),
        ("d", {}, "two"),
    ]
    nodes = [
        TextNode(
            text=name,
            id_=name,
            metadata=metadata,
            relationships={NodeRelationship.SOURCE: Document(text="x", id_=source).as_related_node_info()},
        )
        for name, metadata, source in rows
    ]
    store.add(store.embedding.embed_nodes(nodes))
    return store


def ids(store: UMRVectorStore, vector: list[float], **options: Any) -> set[str]:
    query = VectorStoreQuery(query_embedding=vector, similarity_top_k=10, **options)
    return set(store.query(query).ids or [])


def condition(key: str, operator: str, value: Any) -> MetadataFilter:
    return MetadataFilter(key=key, operator=FilterOperator(operator), value=value)


def test_nodes_come_back_as_they_were(store: UMRVectorStore, gme: GMEEmbedding, tmp_path: Path) -> None:
    nodes = [kind.node for kind in kinds(tmp_path)]
    store.add(gme.embed_nodes(nodes))
    for node, back in zip(nodes, store.get_nodes([node.node_id for node in nodes]), strict=True):
        assert type(back) is type(node)
        # Where the picture is a file or base64, only what was added differs.
        expected = node.to_dict() | {"embedding": None}
        found = back.to_dict()
        assert found["metadata"] == expected["metadata"] | (
            {"modality": found["metadata"]["modality"]} if "modality" in found["metadata"] else {}
        )
        for part in ("metadata", "excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
            del found[part], expected[part]
        assert found == expected


@pytest.mark.parametrize(
    "node",
    [
        Node(id_="x", image_resource=MediaResource(data=png(1))),
        Document(id_="x", text="a", image_resource=MediaResource(data=png(1))),
        ImageNode(id_="x", image=base64.b64encode(png(1)).decode()),
        ImageNode(id_="x", image="data:image/png;base64," + base64.b64encode(png(1)).decode()),
    ],
    ids=["Node", "Document", "ImageNode", "data-uri"],
)
def test_picture_bytes_survive_in_a_folder(gme: GMEEmbedding, tmp_path: Path, node: BaseNode) -> None:
    store = UMRVectorStore(gme, path=tmp_path / "db")
    store.add(gme.embed_nodes([node]))
    store.close()
    again = UMRVectorStore(gme, path=tmp_path / "db")
    [back] = again.get_nodes(["x"])
    data = back.image if isinstance(back, ImageNode) else back.image_resource.data  # type: ignore[attr-defined]
    assert base64.b64decode(data) == png(1)
    again.close()


def test_relative_paths_come_back_absolute(
    gme: GMEEmbedding, store: UMRVectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    store.add(gme.embed_nodes([ImageNode(id_="x", image_path="1.png")]))
    [back] = store.get_nodes(["x"])
    assert isinstance(back, ImageNode)
    assert back.image_path == str(tmp_path / "1.png")


def test_what_is_added_to_metadata_is_not_embedded_again(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    node = Node(text_resource=MediaResource(text="a"), image_resource=MediaResource(data=png(1)))
    [embedded] = gme.embed_nodes([node])
    store.add([embedded])
    [back] = store.get_nodes()
    assert back.metadata == {"modality": "fused"}
    assert gme.embed_nodes([back])[0].embedding == embedded.embedding


def test_a_node_that_comes_back_changed_says_its_new_modality(
    gme: GMEEmbedding, store: UMRVectorStore
) -> None:
    image = base64.b64encode(png(1)).decode()
    store.add(gme.embed_nodes([ImageNode(id_="x", text="said", image=image)]))
    [back] = store.get_nodes()
    assert back.metadata == {"modality": "fused"}
    back.text, back.embedding = "", None  # type: ignore[attr-defined]
    store.add(gme.embed_nodes([back]))
    only = MetadataFilters(filters=[condition("modality", "==", "image")])
    assert [node.metadata for node in store.get_nodes(filters=only)] == [{"modality": "image"}]


def test_own_metadata_wins(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    store.add(
        gme.embed_nodes([ImageNode(image=base64.b64encode(png(1)).decode(), metadata={"modality": "x"})])
    )
    assert store.get_nodes()[0].metadata == {"modality": "x"}


def test_an_index_node_keeps_its_object(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    store.add(gme.embed_nodes([IndexNode(text="a", index_id="i", obj=TextNode(text="inner"))]))
    [back] = store.get_nodes()
    assert isinstance(back, IndexNode)
    assert back.obj.text == "inner"


def test_subclasses_come_back_as_the_class_that_is_known(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    class Mine(TextNode):
        @classmethod
        def class_name(cls) -> str:
            return "Mine"

    store.add(gme.embed_nodes([Mine(text="a")]))
    assert type(store.get_nodes()[0]) is TextNode


def test_what_a_row_could_not_hold_is_refused_by_name(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    class Mine(TextNode):
        extra: str = "x"

    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    for node, words in (
        (Mine(id_="n", text="a"), r"node n: it would come back as a TextNode without .*\(extra\)"),
        (IndexNode(id_="n", text="a", index_id="i", obj=object()), "node n: it can't be written as JSON"),
        (TextNode(id_="n", text="a", metadata={"ref_doc_id": "book"}), "node n.*: .*ref_doc_id='book'"),
        (
            TextNode(id_="n", text="a", metadata={"ref_doc_id": "other"}, relationships=source),
            "node n.*: .*ref_doc_id='other'",
        ),
    ):
        with pytest.raises(BatchError, match=words):
            store.add(gme.embed_nodes([node]))
    assert store.get_nodes() == []
    store.add(gme.embed_nodes([TextNode(text="a", metadata={"ref_doc_id": "book"}, relationships=source)]))
    store.delete("book")
    assert store.get_nodes() == []


def test_what_is_added_is_not_shown_to_llms_but_for_the_place(
    gme: GMEEmbedding, store: UMRVectorStore, tmp_path: Path
) -> None:
    store.index.add_files([save(tmp_path, 1)])
    [back] = store.get_nodes()
    assert back.metadata == {"path": str(tmp_path / "1.png"), "modality": "image"}
    assert back.get_metadata_str(MetadataMode.LLM) == f"path: {tmp_path / '1.png'}"


def test_a_document_is_its_own_document_to_filters(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    store.add(gme.embed_nodes([Document(text="a", id_="doc"), TextNode(text="b", id_="node")]))
    asked = MetadataFilters(filters=[MetadataFilter(key="ref_doc_id", value="doc")])
    assert [node.node_id for node in store.get_nodes(filters=asked)] == ["doc"]


def test_scores_are_cosine_similarities(store: UMRVectorStore) -> None:
    nodes = [
        TextNode(id_="near", text="n", embedding=(np.eye(32)[0] * 3).tolist()),
        TextNode(id_="far", text="f", embedding=(-np.eye(32)[0]).tolist()),
    ]
    store.add(nodes)
    vector = np.eye(32)[0] * 0.6 + np.eye(32)[1] * 0.8
    result = store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=2))  # type: ignore[arg-type]
    assert result.ids == ["near", "far"]
    assert result.similarities == pytest.approx([0.6, -0.6], abs=1e-5)
    assert all(type(score) is float for score in result.similarities or [])


def test_a_node_of_the_same_id_replaces_the_old_one(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    for text in ("old", "new"):
        store.add(gme.embed_nodes([TextNode(text=text, id_="x", metadata={text: 1})]))
    [node] = store.get_nodes()
    assert (node.get_content(), node.metadata) == ("new", {"new": 1})
    query = VectorStoreQuery(query_embedding=gme.get_query_embedding("new: 1\n\nnew"), similarity_top_k=5)
    assert store.query(query).similarities == pytest.approx([1.0], abs=1e-5)


FILTERS: dict[str, tuple[MetadataFilters, set[str]]] = {
    "==": (MetadataFilters(filters=[condition("lang", "==", "en")]), {"a", "c"}),
    "!=": (MetadataFilters(filters=[condition("lang", "!=", "en")]), {"b", "d"}),
    ">": (MetadataFilters(filters=[condition("year", ">", 2019)]), {"b", "c"}),
    "<=": (MetadataFilters(filters=[condition("year", "<=", 2021)]), {"a", "b"}),
    "in": (MetadataFilters(filters=[condition("year", "in", [2019, 2023])]), {"a", "c"}),
    "nin": (MetadataFilters(filters=[condition("year", "nin", [2019, 2023])]), {"b", "d"}),
    "contains": (MetadataFilters(filters=[condition("tags", "contains", "blue")]), {"a"}),
    "any": (MetadataFilters(filters=[condition("tags", "any", ["blue", "red"])]), {"a", "b"}),
    "all": (MetadataFilters(filters=[condition("tags", "all", ["blue", "red"])]), {"a"}),
    "and": (
        MetadataFilters(filters=[condition("lang", "==", "en"), condition("year", ">=", 2020)]),
        {"c"},
    ),
    "or": (
        MetadataFilters(
            filters=[condition("lang", "==", "nl"), condition("year", ">=", 2023)],
            condition=FilterCondition.OR,
        ),
        {"b", "c"},
    ),
    "not": (
        MetadataFilters(
            filters=[condition("lang", "==", "nl"), condition("tags", "contains", "blue")],
            condition=FilterCondition.NOT,
        ),
        {"c", "d"},
    ),
    "nested": (
        MetadataFilters(
            filters=[
                MetadataFilters(
                    filters=[condition("lang", "==", "nl"), condition("year", "==", 2019)],
                    condition=FilterCondition.OR,
                ),
                condition("year", ">", 2020),
            ]
        ),
        {"b"},
    ),
    "in nothing": (MetadataFilters(filters=[condition("lang", "in", [])]), set()),
    "any of nothing": (MetadataFilters(filters=[condition("tags", "any", [])]), set()),
    "not in nothing": (MetadataFilters(filters=[condition("lang", "nin", [])]), {"a", "b", "c", "d"}),
    "all of nothing": (MetadataFilters(filters=[condition("tags", "all", [])]), {"a", "b", "c", "d"}),
    "not any of nothing": (
        MetadataFilters(filters=[condition("tags", "any", [])], condition=FilterCondition.NOT),
        {"a", "b", "c", "d"},
    ),
    "nothing and more": (
        MetadataFilters(filters=[condition("tags", "any", []), condition("lang", "==", "en")]),
        set(),
    ),
    "nothing or more": (
        MetadataFilters(
            filters=[condition("tags", "any", []), condition("lang", "==", "en")],
            condition=FilterCondition.OR,
        ),
        {"a", "c"},
    ),
    "none": (MetadataFilters(filters=[]), {"a", "b", "c", "d"}),
    "modality": (MetadataFilters(filters=[condition("modality", "==", "image")]), set()),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(store: UMRVectorStore, name: str) -> None:
    filters, expected = FILTERS[name]
    vector = filled(store).embedding.get_query_embedding("a")
    assert ids(store, vector, filters=filters) == expected
    assert {node.node_id for node in store.get_nodes(filters=filters)} == expected


@pytest.mark.parametrize(
    "filters",
    [
        MetadataFilters(filters=[condition("lang", "text_match", "e")]),
        MetadataFilters(filters=[condition("lang", "text_match_insensitive", "e")]),
        MetadataFilters(filters=[condition("lang", "is_empty", None)]),
        MetadataFilters(filters=[condition("lang", "==", None)]),
        MetadataFilters(filters=[condition("year", ">", 1)], condition=FilterCondition.NOT),
    ],
)
def test_filters_that_are_not_supported_are_refused(filters: MetadataFilters) -> None:
    with pytest.raises(InputError, match="not supported"):
        where_of(filters)


def test_a_double_negation_is_what_it_was() -> None:
    inner = MetadataFilters(
        filters=[condition("a", "==", 1), condition("b", "in", [1])], condition=FilterCondition.OR
    )
    once = MetadataFilters(filters=[inner], condition=FilterCondition.NOT)
    assert where_of(once) == {"$and": [{"a": {"$ne": 1}}, {"b": {"$nin": [1]}}]}
    twice = MetadataFilters(filters=[once], condition=FilterCondition.NOT)
    assert where_of(twice) == where_of(inner)


def test_search_within_documents_and_nodes(store: UMRVectorStore) -> None:
    vector = filled(store).embedding.get_query_embedding("a")
    assert ids(store, vector, doc_ids=["two"]) == {"c", "d"}
    assert ids(store, vector, node_ids=["a", "d", "gone"]) == {"a", "d"}
    assert ids(store, vector, node_ids=["a", "d"], doc_ids=["two"]) == {"d"}
    assert ids(store, vector, node_ids=["a", "b"], filters=FILTERS["=="][0]) == {"a"}
    assert ids(store, vector, doc_ids=[]) == set()
    nearest = VectorStoreQuery(query_embedding=vector, similarity_top_k=1)
    [best] = store.query(nearest).ids or []
    nearest.node_ids = [name for name in "abcd" if name != best]
    assert len(store.query(nearest).ids or []) == 1


@pytest.mark.parametrize(
    "query",
    [
        VectorStoreQuery(query_embedding=None),
        VectorStoreQuery(query_embedding=[]),
        VectorStoreQuery(query_embedding=[0.0] * 32),
        VectorStoreQuery(query_embedding=[1.0] * 32, mode=VectorStoreQueryMode.MMR),
        VectorStoreQuery(query_embedding=[1.0] * 32, mode=VectorStoreQueryMode.HYBRID),
    ],
)
def test_queries_without_a_meaning_are_refused(store: UMRVectorStore, query: VectorStoreQuery) -> None:
    filled(store)
    with pytest.raises(InputError):
        store.query(query)


def test_unknown_options_are_refused(store: UMRVectorStore) -> None:
    with pytest.raises(InputError, match="where"):
        store.query(VectorStoreQuery(query_embedding=[1.0] * 32), where={"a": 1})


def test_a_vector_of_another_length_is_refused(store: UMRVectorStore) -> None:
    with pytest.raises(FingerprintError):
        store.add([TextNode(text="a", embedding=[1.0, 0.0])])


def test_nodes_without_vector_are_named_and_nothing_is_stored(
    gme: GMEEmbedding, store: UMRVectorStore
) -> None:
    nodes = [*gme.embed_nodes([TextNode(text="a")]), TextNode(text="b", id_="bare")]
    with pytest.raises(BatchError, match="node bare: the node has no vector"):
        store.add(nodes)
    assert store.get_nodes() == []


def test_deleting(store: UMRVectorStore) -> None:
    filled(store).delete("one")
    assert {node.node_id for node in store.get_nodes()} == {"c", "d"}
    store.delete_nodes(["d", "gone"])
    assert {node.node_id for node in store.get_nodes()} == {"c"}
    store.delete("gone")
    store.clear()
    assert store.get_nodes() == []
    store.clear()


def test_deleting_by_filter(store: UMRVectorStore) -> None:
    filters = FILTERS["=="][0]
    filled(store).delete_nodes(["a", "b"], filters)
    assert {node.node_id for node in store.get_nodes()} == {"b", "c", "d"}
    store.delete_nodes(filters=filters)
    assert {node.node_id for node in store.get_nodes()} == {"b", "d"}
    with pytest.raises(InputError, match="clear"):
        store.delete_nodes()


def test_a_document_or_a_node_without_source_is_deleted_by_its_own_id(
    gme: GMEEmbedding, store: UMRVectorStore
) -> None:
    store.add(gme.embed_nodes([Document(text="a", id_="doc"), TextNode(text="b", id_="node")]))
    store.delete("doc")
    store.delete("node")
    assert store.get_nodes() == []


def test_coroutines(gme: GMEEmbedding, store: UMRVectorStore) -> None:
    async def main() -> None:
        nodes = await gme.aembed_nodes([TextNode(text=text, id_=text) for text in "abcd"])
        assert await store.async_add(nodes) == list("abcd")
        query = VectorStoreQuery(query_embedding=await gme.aget_query_embedding("b"), similarity_top_k=1)
        assert (await store.aquery(query)).ids == ["b"]
        await store.adelete("a")
        await store.adelete_nodes(["b"])
        assert [node.node_id for node in await store.aget_nodes()] == ["c", "d"]
        await store.aclear()
        assert await store.aget_nodes() == []

    asyncio.run(main())


def test_a_dump_opens_the_same_folder(gme: GMEEmbedding, tmp_path: Path) -> None:
    store = UMRVectorStore(gme, path=tmp_path / "db", collection="mine")
    store.add(gme.embed_nodes([TextNode(text="a", id_="x")]))
    again = UMRVectorStore.from_dict(store.to_dict())
    assert [node.node_id for node in again.get_nodes()] == ["x"]
    again.close()
    store.close()


def test_another_model_is_refused(gme: GMEEmbedding, tmp_path: Path) -> None:
    other = GMEEmbedding(encoder=FakeEncoder(dim=32, name="other"))
    store = UMRVectorStore(gme, path=tmp_path / "db")
    store.add(gme.embed_nodes([TextNode(text="a")]))
    with pytest.raises(FingerprintError):
        store.check(other)
    store.close()
    with pytest.raises(FingerprintError):
        UMRVectorStore(other, path=tmp_path / "db")


def test_persisting_memory_is_not_silent(
    store: UMRVectorStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.persist(str(tmp_path / "x.json"))
    assert "path=" in caplog.text
    assert list(tmp_path.iterdir()) == []
