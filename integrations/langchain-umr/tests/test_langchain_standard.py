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
from langchain_umr import GMEEmbeddings, UMRVectorStore

from umr_plugins.testing import FakeEncoder


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
