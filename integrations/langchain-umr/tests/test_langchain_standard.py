"""LangChain's own standard suites, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import EmbeddingsUnitTests
from langchain_umr import GMEEmbeddings, MLLMReranker, RerankingRetriever, UMRVectorStore

from umr_plugins.testing import FakeEncoder, FakeReranker


class TestEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return GMEEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "umr-tiny"}


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return GMEEmbeddings

    @pytest.fixture
    def model(self) -> Embeddings:
        return GMEEmbeddings.from_encoder(FakeEncoder())


class TestStoreInMemory(VectorStoreIntegrationTests):
    """With LangChain's text-only fake embeddings."""

    @pytest.fixture
    def vectorstore(self) -> Iterator[VectorStore]:
        with UMRVectorStore(self.get_embeddings()) as store:
            yield store


class TestStoreInFolder(VectorStoreIntegrationTests):
    """With our own embeddings, on disk."""

    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        with UMRVectorStore(GMEEmbeddings.from_encoder(FakeEncoder()), path=tmp_path / "db") as store:
            yield store


class TestRetriever(RetrieversIntegrationTests):
    """The retriever that LangChain makes of our store."""

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        def make(k: int = 4) -> BaseRetriever:
            store = UMRVectorStore.from_texts(["kite", "boat", "sail", "reef", "buoy"], FakeEncoder())
            return store.as_retriever(search_kwargs={"k": k})

        return make  # type: ignore[return-value]  # anything that makes one will do

    @property
    def retriever_query_example(self) -> str:
        return "kite"


class TestBundledModel(EmbeddingsIntegrationTests):
    """With the bundled model, nothing faked."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return GMEEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "umr-tiny"}


class TestStoreOfBundledModel(VectorStoreIntegrationTests):
    """With the bundled model, on disk."""

    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        with UMRVectorStore(GMEEmbeddings(model="umr-tiny"), path=tmp_path / "db") as store:
            yield store


class TestRetrieverOfBundledModel(RetrieversIntegrationTests):
    """Retrieve and rerank in a folder, opened with its own recorded model."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "db"
        texts = ["kite", "boat", "sail", "reef", "buoy"]
        UMRVectorStore.from_texts(texts, GMEEmbeddings(model="umr-tiny"), path=self.folder).close()

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        def make(k: int = 4) -> BaseRetriever:
            reranker = MLLMReranker(reranker=FakeReranker())
            return RerankingRetriever(base=UMRVectorStore(path=self.folder), reranker=reranker, k=k)

        return make  # type: ignore[return-value]  # anything that makes one will do

    @property
    def retriever_query_example(self) -> str:
        return "kite"
