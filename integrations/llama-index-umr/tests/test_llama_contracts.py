"""What LlamaIndex expects of an embedding, of a step of its pipeline, and of a vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.embeddings.base import SimilarityMode, mean_agg
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.ingestion.cache import IngestionCache
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    Node,
    NodeRelationship,
    TextNode,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import KeepPictures, MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import kinds, png, save
from llama_stores import STORES

from umr_plugins.errors import InputError
from umr_plugins.testing import FakeEncoder


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder(dim=64)


@pytest.fixture
def gme(encoder: FakeEncoder) -> GMEEmbedding:
    return GMEEmbedding(encoder=encoder)


# --- the embedding --------------------------------------------------------------------------------------


def test_the_class_is_an_embedding_by_name() -> None:
    assert {"BaseEmbedding", "MultiModalEmbedding"} <= {base.__name__ for base in GMEEmbedding.__mro__}
    assert "BasePydanticVectorStore" in {base.__name__ for base in UMRVectorStore.__mro__}
    assert "VectorStoreIndex" in {base.__name__ for base in MultimodalIndex.__mro__}


@pytest.mark.parametrize("num_workers", [None, 1, 4])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_texts_go_in_batches_and_come_back_in_order(
    encoder: FakeEncoder, num_workers: int | None, way: str
) -> None:
    gme = GMEEmbedding(encoder=encoder, embed_batch_size=7, num_workers=num_workers)
    texts = [f"text {number}" for number in range(24)]
    if way == "sync":
        vectors = gme.get_text_embedding_batch(texts)
    else:
        vectors = asyncio.run(gme.aget_text_embedding_batch(texts))
    assert sorted(len(items) for _, items, _ in encoder.calls) == [3, 7, 7, 7]
    assert vectors == [gme.get_text_embedding(text) for text in texts]


def test_no_texts_give_no_vectors(gme: GMEEmbedding) -> None:
    assert gme.get_text_embedding_batch([]) == []
    assert gme.get_image_embedding_batch([]) == []
    assert gme.embed_nodes([]) == []


@pytest.mark.parametrize(
    ("mode", "of_equal", "of_opposite"),
    [
        (SimilarityMode.DEFAULT, 1.0, -1.0),
        (SimilarityMode.DOT_PRODUCT, 1.0, -1.0),
        (SimilarityMode.EUCLIDEAN, 0.0, -2.0),
    ],
)
def test_similarity_of_its_vectors(
    gme: GMEEmbedding, mode: SimilarityMode, of_equal: float, of_opposite: float
) -> None:
    one, other = gme.get_text_embedding("one"), gme.get_text_embedding("other")
    assert gme.similarity(one, one, mode) == pytest.approx(of_equal, abs=1e-6)
    assert gme.similarity(one, [-value for value in one], mode) == pytest.approx(of_opposite, abs=1e-6)
    between = gme.similarity(one, other, mode)
    assert min(of_equal, of_opposite) < between < max(of_equal, of_opposite)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_mean_of_queries_has_length_one(gme: GMEEmbedding, way: str) -> None:
    def mean(*arguments: Any) -> list[float]:
        if way == "sync":
            return gme.get_agg_embedding_from_queries(*arguments)
        return asyncio.run(gme.aget_agg_embedding_from_queries(*arguments))

    queries = ["cat", "dog", "bird"]
    total = np.sum([gme.get_query_embedding(query) for query in queries], axis=0)
    np.testing.assert_allclose(mean(queries), total / np.linalg.norm(total), atol=1e-6)
    np.testing.assert_allclose(mean(queries, mean_agg), total / 3, atol=1e-6)  # who asks for another gets it
    with pytest.raises(InputError, match="no query"):
        mean([])


def test_queries_that_cancel_out_are_refused(gme: GMEEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = iter([1.0, -1.0])
    monkeypatch.setattr(GMEEmbedding, "_get_query_embedding", lambda self, query: [next(sign), 0.0])
    with pytest.raises(InputError, match="cancel out"):
        gme.get_agg_embedding_from_queries(["a", "b"])


class Limiter:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def acquire(self) -> None:
        self.asked += 1

    async def async_acquire(self) -> None:
        self.asked += 1


CALLS: dict[str, tuple[Callable[[GMEEmbedding], Any], int]] = {
    "texts": (lambda gme: gme.get_text_embedding_batch(list("abcde")), 3),
    "texts-async": (lambda gme: asyncio.run(gme.aget_text_embedding_batch(list("abcde"))), 3),
    "query": (lambda gme: gme.get_query_embedding("a"), 1),
    "pictures": (lambda gme: gme.get_image_embedding_batch([png(1)]), 1),  # type: ignore[list-item]
    "pictures-async": (lambda gme: asyncio.run(gme.aget_image_embedding_batch([png(1)])), 1),  # type: ignore[list-item]
    "nodes": (lambda gme: gme.embed_nodes([TextNode(text="a"), TextNode(text="b")]), 1),
    "fused-query": (lambda gme: gme.as_query("a", png(1)), 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_rate_limiter_is_asked_before_every_call_of_the_model(encoder: FakeEncoder, name: str) -> None:
    limiter = Limiter()
    gme = GMEEmbedding(encoder=encoder, rate_limiter=limiter, embed_batch_size=2)
    call, times = CALLS[name]
    call(gme)
    assert limiter.asked == len(encoder.calls) == times


# --- a step of a pipeline -------------------------------------------------------------------------------


def run(steps: IngestionPipeline, way: str, **options: Any) -> list[BaseNode]:
    return list(steps.run(**options) if way == "sync" else asyncio.run(steps.arun(**options)))


@pytest.fixture(params=["sync", "async"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_pipeline_embeds_and_keeps_the_source(gme: GMEEmbedding, tmp_path: Path, way: str) -> None:
    steps = IngestionPipeline(transformations=[KeepPictures(SentenceSplitter()), gme])
    photo = ImageDocument(id_="photo", image_path=str(save(tmp_path, 1)))
    nodes = run(steps, way, documents=[Document(id_="one", text="one."), photo])
    assert [node.ref_doc_id or node.node_id for node in nodes] == ["one", "photo"]
    assert nodes[0].embedding == gme.get_text_embedding("one.")
    assert nodes[1].embedding == gme.get_image_embedding(photo.image_path)  # type: ignore[arg-type]


def test_every_kind_goes_through_a_pipeline_as_what_it_is(
    gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, way: str
) -> None:
    given = kinds(tmp_path)
    store = UMRVectorStore(gme)
    run(
        IngestionPipeline(transformations=[gme], vector_store=store),
        way,
        nodes=[kind.node for kind in given],
    )
    [(_, items, _)] = encoder.calls
    assert [(item.modality, item.text) for item in items] == [(k.item.modality, k.item.text) for k in given]
    retriever = MultimodalIndex.from_vector_store(store).as_retriever(similarity_top_k=1)
    for kind in given:
        [found] = retriever.retrieve(gme.as_query(kind.item.text, kind.item.image))  # type: ignore[arg-type]
        assert (found.node_id, round(found.score or 0, 4)) == (kind.name, 1.0)


def test_a_pipeline_is_persisted_and_loaded(
    gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, way: str
) -> None:
    def made() -> IngestionPipeline:
        steps = [KeepPictures(SentenceSplitter()), gme]
        return IngestionPipeline(transformations=steps, docstore=SimpleDocumentStore(), vector_store=store)

    store = UMRVectorStore(gme)
    documents = [Document(id_="one", text="one."), Document(id_="two", text="two.")]
    first = made()
    assert len(run(first, way, documents=documents)) == 2
    first.persist(str(tmp_path / "steps"))
    second = made()
    second.load(str(tmp_path / "steps"))
    encoder.calls.clear()
    assert run(second, way, documents=[*documents, Document(id_="three", text="three.")])[0].text == "three."  # type: ignore[attr-defined]
    assert [len(items) for _, items, _ in encoder.calls] == [1]
    assert len(store.get_nodes()) == 3


def test_the_cache_tells_pictures_and_models_apart(tmp_path: Path, way: str) -> None:
    cache = IngestionCache()
    vectors = []
    for name in ("one model", "another"):
        gme = GMEEmbedding(encoder=FakeEncoder(name=name))
        for number in (1, 2):
            steps = IngestionPipeline(transformations=[gme], cache=cache)
            node = Node(id_=f"{name} {number}", image_resource=MediaResource(data=png(number)))
            [found] = run(steps, way, nodes=[node])
            assert found.node_id == f"{name} {number}"
            vectors.append(found.embedding)
    assert vectors[0] != vectors[1]


def test_the_steps_before_the_model_are_still_answered_from_the_cache(gme: GMEEmbedding, way: str) -> None:
    steps = IngestionPipeline(transformations=[SentenceSplitter(), gme])
    first = run(steps, way, documents=[Document(id_="d", text="one.")])
    second = run(steps, way, documents=[Document(id_="d", text="one.")])
    assert [node.node_id for node in first] == [node.node_id for node in second]  # made once by the splitter
    assert first[0].embedding == second[0].embedding


@pytest.mark.parametrize("strategy", [DocstoreStrategy.UPSERTS, DocstoreStrategy.UPSERTS_AND_DELETE])
def test_a_pipeline_replaces_what_changed(
    gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, way: str, strategy: DocstoreStrategy
) -> None:
    store = UMRVectorStore(gme)
    steps = IngestionPipeline(
        transformations=[KeepPictures(SentenceSplitter()), gme],
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
        vector_store=store,
    )

    def given(text: str, year: int, picture: int) -> list[Document]:
        return [
            Document(id_="same", text="same."),
            Document(id_="text", text=text),
            Document(id_="metadata", text="noted.", metadata={"year": year}),
            ImageDocument(id_="photo", image_path=str(save(tmp_path, picture))),
            Document(id_="bytes", image_resource=MediaResource(data=png(picture))),
        ]

    run(steps, way, documents=[*given("old.", 2020, 1), Document(id_="gone", text="gone.")])
    encoder.calls.clear()
    run(steps, way, documents=given("new.", 2021, 2))
    [(_, items, _)] = encoder.calls
    assert [item.text for item in items] == ["new.", "year: 2021\n\nnoted.", None, None]
    sources = sorted(node.ref_doc_id or node.node_id for node in store.get_nodes())
    kept = ["gone"] if strategy is DocstoreStrategy.UPSERTS else []
    assert sources == ["bytes", *kept, "metadata", "photo", "same", "text"]
    retriever = MultimodalIndex.from_vector_store(store).as_retriever(similarity_top_k=2)
    found = retriever.retrieve(gme.as_query(image=png(2)))
    assert {hit.node_id for hit in found} == {"photo", "bytes"}
    assert [hit.score for hit in found] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_a_pipeline_leaves_duplicates_out(gme: GMEEmbedding, encoder: FakeEncoder, way: str) -> None:
    steps = IngestionPipeline(
        transformations=[gme],
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.DUPLICATES_ONLY,
    )
    assert len(run(steps, way, documents=[Document(text="a"), Document(text="a"), Document(text="b")])) == 2
    assert len(run(steps, way, documents=[Document(text="a"), Document(text="c")])) == 1
    assert [item.text for _, items, _ in encoder.calls for item in items] == ["a", "b", "c"]


@pytest.mark.slow
def test_a_pipeline_may_use_several_processes(gme: GMEEmbedding, tmp_path: Path) -> None:
    # The default tokenizer of the splitter is fetched from the network when it is unpickled.
    splitter = SentenceSplitter(chunk_size=50, chunk_overlap=0, tokenizer=str.split)
    store = UMRVectorStore(gme)
    steps = IngestionPipeline(transformations=[KeepPictures(splitter), gme], vector_store=store)
    documents = [kind for kind in kinds(tmp_path) if isinstance(kind.node, Document)]
    long = Document(id_="long", text=" ".join(f"word{number}." for number in range(300)))
    steps.run(documents=[*(kind.node for kind in documents), long], num_workers=2)  # type: ignore[list-item]
    assert [node.ref_doc_id for node in store.get_nodes()].count("long") > 3
    retriever = MultimodalIndex.from_vector_store(store).as_retriever(similarity_top_k=1)
    for kind in documents:
        [found] = retriever.retrieve(gme.as_query(kind.item.text, kind.item.image))  # type: ignore[arg-type]
        assert (found.node.ref_doc_id or found.node_id) == kind.name
        assert found.score == pytest.approx(1.0, abs=1e-5)


# --- a vector store -------------------------------------------------------------------------------------


@pytest.fixture(params=list(STORES))
def store(request: pytest.FixtureRequest, gme: GMEEmbedding, tmp_path: Path) -> Iterator[Any]:
    """Each of the stores, filled through `MultimodalIndex`."""
    made = STORES[request.param](gme, tmp_path)
    MultimodalIndex.from_vector_store(made, embed_model=gme).insert_nodes(shelf(tmp_path))
    yield made
    if isinstance(made, UMRVectorStore):
        made.close()


def shelf(folder: Path) -> list[BaseNode]:
    """Texts, pictures and picture-with-text of two documents."""

    def source(name: str) -> dict[str, Any]:
        info = Document(id_=name, text="x").as_related_node_info()
        return {"relationships": {NodeRelationship.SOURCE: info}}

    return [
        TextNode(id_="text", text="words", metadata={"kind": "text", "rank": 1}, **source("one")),
        ImageNode(
            id_="picture",
            image_path=str(save(folder, 1)),
            metadata={"kind": "picture", "rank": 2},
            **source("one"),
        ),
        Node(
            id_="fused",
            text_resource=MediaResource(text="caption"),
            image_resource=MediaResource(data=png(2)),
            metadata={"kind": "fused", "rank": 3},
            **source("two"),
        ),
        TextNode(id_="other", text="more words", metadata={"kind": "text", "rank": 4}, **source("two")),
    ]


def ask(store: BasePydanticVectorStore, way: str, **options: Any) -> list[str]:
    query = VectorStoreQuery(**({"similarity_top_k": 10} | options))
    result = store.query(query) if way == "sync" else asyncio.run(store.aquery(query))
    assert result.nodes is not None
    assert result.ids == [node.node_id for node in result.nodes]
    return result.ids


def test_every_kind_is_nearest_to_itself(store: Any, gme: GMEEmbedding, tmp_path: Path, way: str) -> None:
    for node in gme.embed_nodes(shelf(tmp_path)):
        assert ask(store, way, query_embedding=node.embedding, similarity_top_k=1) == [node.node_id]


def one(key: str, operator: FilterOperator, value: Any) -> MetadataFilter:
    return MetadataFilter(key=key, operator=operator, value=value)


RANKS: list[tuple[MetadataFilters, set[str]]] = [
    (MetadataFilters(filters=[one("kind", FilterOperator.EQ, "text")]), {"text", "other"}),
    (MetadataFilters(filters=[one("kind", FilterOperator.NE, "text")]), {"picture", "fused"}),
    (MetadataFilters(filters=[one("kind", FilterOperator.IN, ["picture", "fused"])]), {"picture", "fused"}),
    (MetadataFilters(filters=[one("kind", FilterOperator.NIN, ["picture"])]), {"text", "fused", "other"}),
    (MetadataFilters(filters=[one("rank", FilterOperator.GT, 2)]), {"fused", "other"}),
    (MetadataFilters(filters=[one("rank", FilterOperator.LTE, 2)]), {"text", "picture"}),
    (
        MetadataFilters(
            filters=[one("kind", FilterOperator.EQ, "text"), one("rank", FilterOperator.GTE, 2)],
            condition=FilterCondition.AND,
        ),
        {"other"},
    ),
    (
        MetadataFilters(
            filters=[one("kind", FilterOperator.EQ, "fused"), one("rank", FilterOperator.LT, 2)],
            condition=FilterCondition.OR,
        ),
        {"fused", "text"},
    ),
]


@pytest.mark.parametrize(("filters", "expected"), RANKS, ids=lambda value: "")
def test_filters_with_and_without_a_query(
    store: Any, gme: GMEEmbedding, way: str, filters: MetadataFilters, expected: set[str]
) -> None:
    vector = gme.get_query_embedding("words")
    assert set(ask(store, way, query_embedding=vector, filters=filters)) == expected
    nodes = store.get_nodes(None, filters=filters)
    if way == "async":
        nodes = asyncio.run(store.aget_nodes(None, filters=filters))
    assert {node.node_id for node in nodes} == expected


def test_nodes_are_read_and_deleted_by_id_and_the_rest_cleared(
    store: Any, gme: GMEEmbedding, way: str
) -> None:
    def do(method: str, *arguments: Any) -> Any:
        if way == "sync":
            return getattr(store, method)(*arguments)
        return asyncio.run(getattr(store, f"a{method}")(*arguments))

    def left() -> set[str]:
        return {node.node_id for node in do("get_nodes", None)}

    assert {node.node_id for node in do("get_nodes", ["picture", "fused"])} == {"picture", "fused"}
    assert left() == {"text", "picture", "fused", "other"}
    do("delete_nodes", ["picture"])
    assert left() == {"text", "fused", "other"}
    do("delete", "two")
    assert left() == {"text"}
    do("clear")
    assert left() == set()
    MultimodalIndex.from_vector_store(store, embed_model=gme).insert_nodes([TextNode(id_="new", text="n")])
    assert left() == {"new"}


def test_what_comes_back_has_its_source_and_metadata(store: Any, gme: GMEEmbedding, way: str) -> None:
    found = {node.node_id: node for node in store.get_nodes(None)}
    assert {name: node.ref_doc_id for name, node in found.items()} == {
        "text": "one",
        "picture": "one",
        "fused": "two",
        "other": "two",
    }
    assert [found[name].metadata["rank"] for name in ("text", "picture", "fused", "other")] == [1, 2, 3, 4]
