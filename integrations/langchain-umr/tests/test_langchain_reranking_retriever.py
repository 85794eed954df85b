"""`RerankingRetriever`: retrieve, judge, return; with traces, scores and pictures where there are any."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langchain_umr import MLLMReranker, RerankingRetriever, UMRVectorStore
from PIL import Image
from pydantic import ValidationError

from umr_plugins.errors import InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker
from umr_plugins.types import Item

TEXTS = ["a boat", "a red kite", "a sail", "a blue kite", "a reef", "red sand"]


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def judge() -> FakeReranker:
    return FakeReranker()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UMRVectorStore]:
    """Texts, a picture in memory, and a picture with text whose file is under no root."""
    photo = tmp_path / "blue.png"
    photo.write_bytes(png("blue"))
    with UMRVectorStore(FakeEncoder()) as made:
        made.add_texts(TEXTS, ids=TEXTS)
        made.add_items([Image.new("RGB", (30, 20), "red")], ids=["memory"])
        made.add_documents([Document("kite", id="file", metadata={"image": str(photo), "score": "mine"})])
        yield made


@pytest.fixture
def retriever(store: UMRVectorStore, judge: FakeReranker) -> RerankingRetriever:
    return RerankingRetriever(base=store, reranker=MLLMReranker(reranker=judge, weight="pure"), k=3)


def ids(found: Sequence[Document]) -> list[str | None]:
    return [document.id for document in found]


class Recorder(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


def tree(run: Run) -> Any:
    return (run.name, run.run_type, [tree(child) for child in run.child_runs])


class Shorter(BaseDocumentCompressor):
    """A compressor of somebody else: the shortest text first."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Any = None
    ) -> Sequence[Document]:
        return sorted(documents, key=lambda document: len(document.page_content))


class Fixed(BaseRetriever):
    """A retriever that can't be told how many to fetch."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.documents


class TestStandard(RetrieversIntegrationTests):
    """LangChain's own suite, unmodified."""

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        def make(k: int = 4) -> BaseRetriever:
            store = UMRVectorStore.from_texts(TEXTS, FakeEncoder())
            return RerankingRetriever(base=store, reranker=MLLMReranker(reranker=FakeReranker()), k=k)

        return make  # type: ignore[return-value]  # anything that makes one will do

    @property
    def retriever_query_example(self) -> str:
        return "a kite"


def test_the_best_of_what_was_fetched(retriever: RerankingRetriever, judge: FakeReranker) -> None:
    found = retriever.invoke("red kite")
    assert found[0].id == "a red kite"
    assert [one.metadata["relevance_score"] for one in found] == [1.0, 0.5, 0.5]
    assert len(judge.calls[0][1]) == 8
    assert len(retriever.invoke("red kite", k=1)) == 1
    assert retriever.invoke("red kite", k=0) == []
    assert len(retriever.model_copy(update={"k": None}).invoke("red kite")) == 5
    judge.calls.clear()
    retriever.model_copy(update={"fetch_k": 4}).invoke("red kite")
    retriever.model_copy(update={"fetch_k": 1}).invoke("red kite", k=6)
    assert [len(documents) for _, documents in judge.calls] == [4, 6]
    with pytest.raises(InputError, match="k must be"):
        retriever.invoke("red kite", k=-1)


async def test_async_gives_the_same(retriever: RerankingRetriever, store: UMRVectorStore) -> None:
    for query in ("red kite", {"text": "kite", "image": png()}):
        assert await retriever.ainvoke(query) == retriever.invoke(query)  # type: ignore[arg-type]
    assert await retriever.ainvoke("red kite", k=0) == []
    other = RerankingRetriever(base=store, reranker=Shorter(), k=2)
    assert await other.ainvoke("red kite") == other.invoke("red kite")
    assert retriever.batch(["red kite", "boat"]) == [retriever.invoke("red kite"), retriever.invoke("boat")]


def test_the_scores_of_our_own_store_count(store: UMRVectorStore, judge: FakeReranker) -> None:
    cosines = {document.id: score for document, score in store.similarity_search_with_score("red kite", k=8)}
    for weight in (0.0, 0.4, 3.0):
        reranker = MLLMReranker(reranker=judge, weight=weight, top_n=None)
        for base in (
            store,
            store.as_retriever(),
            store.as_retriever(
                search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.0}
            ),
        ):
            found = RerankingRetriever(base=base, reranker=reranker).invoke("red kite")
            totals = [cosines[one.id] + weight * one.metadata["relevance_score"] for one in found]
            assert len(found) == 8
            assert totals == sorted(totals, reverse=True)
            for one in found:
                expected = "mine" if one.id == "file" else pytest.approx(cosines[one.id], abs=1e-5)
                assert one.metadata["score"] == expected
    orders = {
        weight: ids(
            RerankingRetriever(base=store, reranker=MLLMReranker(reranker=judge, weight=weight)).invoke("red")
        )
        for weight in (0.0, 1e6)
    }
    assert orders[0.0] != orders[1e6], "the weight changes nothing"


def test_what_the_store_holds_is_judged(
    retriever: RerankingRetriever, judge: FakeReranker, store: UMRVectorStore
) -> None:
    [first, *_] = retriever.invoke({"image": png("blue")})  # type: ignore[arg-type]  # the query has a picture
    assert (first.id, first.metadata["relevance_score"]) == ("file", 1.0)
    assert "rerank_error" not in first.metadata
    judged = {item.modality for item in judge.calls[-1][1]}
    assert judged == {"text", "image", "fused"}
    [row] = store.get_by_ids(["memory"])
    retriever.invoke(row)  # type: ignore[arg-type]  # more like this
    assert judge.calls[-1][0].modality == "image"


def test_a_row_cannot_name_a_file_that_was_not_added(
    store: UMRVectorStore, judge: FakeReranker, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    store.add_items(["a decoy kite"], [{"path": str(secret), "modality": "image"}], ids=["decoy"])
    retriever = RerankingRetriever(base=store, reranker=MLLMReranker(reranker=judge, top_n=None))
    retriever.invoke("kite")
    assert Item("a decoy kite") in judge.calls[-1][1]
    assert not any(item.image == secret for item in judge.calls[-1][1])


async def test_both_stages_appear_in_traces(retriever: RerankingRetriever, store: UMRVectorStore) -> None:
    recorder = Recorder()
    retriever.invoke("kite", {"callbacks": [recorder]})
    await retriever.ainvoke("kite", {"callbacks": [recorder]})
    below = [("VectorStoreRetriever", "retriever", []), ("rerank", "chain", [])]
    assert [tree(run) for run in recorder.runs] == [("RerankingRetriever", "retriever", below)] * 2
    assert recorder.runs[0].child_runs[0].extra["metadata"]["ls_vector_store_provider"] == "UMRVectorStore"
    with pytest.raises(ItemError):
        retriever.invoke("", {"callbacks": [recorder]})
    assert recorder.runs[-1].error


def test_any_other_base(judge: FakeReranker, tmp_path: Path) -> None:
    reranker = MLLMReranker(reranker=judge)
    other = InMemoryVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=8))
    for base in (other, other.as_retriever()):
        found = RerankingRetriever(base=base, reranker=reranker, k=2, fetch_k=6).invoke("red kite")
        assert found[0].page_content == "a red kite"
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    documents = [Document(text) for text in TEXTS] + [Document("", metadata={"image": str(secret)})]
    fixed = RerankingRetriever(base=Fixed(documents=documents), reranker=reranker, fetch_k=7, k=7)
    found = fixed.invoke("red kite")
    assert "roots" in found[-1].metadata["rerank_error"]
    assert (
        len(RerankingRetriever(base=Fixed(documents=documents), reranker=reranker, fetch_k=2).invoke("a"))
        == 2
    )
    plain = RunnableLambda(lambda query: documents[:3])
    assert len(RerankingRetriever(base=plain, reranker=reranker).invoke("red kite")) == 3
    assert RerankingRetriever(base=Fixed(documents=[]), reranker=reranker).invoke("red kite") == []


def test_mmr_has_no_scores(store: UMRVectorStore, judge: FakeReranker) -> None:
    base = store.as_retriever(search_type="mmr", search_kwargs={"lambda_mult": 1.0})
    found = RerankingRetriever(base=base, reranker=MLLMReranker(reranker=judge, top_n=None)).invoke(
        "red kite"
    )
    relevances = [one.metadata["relevance_score"] for one in found]
    assert len(found) == 8
    assert relevances == sorted(relevances, reverse=True)


def test_another_compressor(store: UMRVectorStore) -> None:
    found = RerankingRetriever(base=store, reranker=Shorter(), k=2).invoke("red kite")
    assert [len(one.page_content) for one in found] == [0, 4]
    assert "score" not in found[0].metadata


def test_wrong_arguments(store: UMRVectorStore) -> None:
    with pytest.raises(ValidationError, match="vector store or a retriever"):
        RerankingRetriever(base=TEXTS)
    with pytest.raises(ValidationError):
        RerankingRetriever(base=store, fetch_k=0)
    with pytest.raises(ValidationError):
        RerankingRetriever(base=store, reranker=FakeReranker())  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(ValidationError, match="top_k"):
        RerankingRetriever(base=store, top_k=2)  # type: ignore[call-arg]  # that is the mistake
    assert RerankingRetriever(base=store).reranker == MLLMReranker()


def test_in_a_chain(retriever: RerankingRetriever) -> None:
    chain = RunnableLambda(lambda question: {"text": question, "image": png("blue")}) | retriever
    assert chain.invoke("kite")[0].id == "file"
    assert np.isfinite([one.metadata["relevance_score"] for one in chain.invoke("boat")]).all()


async def test_inside_the_contextual_compression_retriever(
    store: UMRVectorStore, judge: FakeReranker
) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    recorder = Recorder()
    both = retrievers.ContextualCompressionRetriever(
        base_compressor=MLLMReranker(reranker=judge, top_n=2), base_retriever=store.as_retriever()
    )
    for found in (
        both.invoke({"text": "red kite"}, {"callbacks": [recorder]}),
        await both.ainvoke({"text": "red kite"}, {"callbacks": [recorder]}),
    ):
        assert len(found) == 2
    for run in recorder.runs:
        assert [child.name for child in run.child_runs] == ["VectorStoreRetriever", "rerank"]
