"""`RerankingRetriever`: find many, judge them, return the best."""

from __future__ import annotations

from typing import Annotated, Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr

from langchain_umr.reranker import MLLMReranker
from langchain_umr.searching import Scored, StoreReader, check_k
from langchain_umr.threads import in_thread
from umr_plugins.types import Item


def _base(value: object) -> object:
    if isinstance(value, VectorStore):
        return value.as_retriever()
    if not isinstance(value, Runnable):
        raise ValueError(f"base must be a vector store or a retriever, got {type(value).__name__}")
    return value


class RerankingRetriever(BaseRetriever):
    """Retrieves `fetch_k` documents, reranks them, and returns the best.

    ```python
    from langchain_umr import MLLMReranker, RerankingRetriever

    retriever = RerankingRetriever(base=store, reranker=MLLMReranker(), k=5)
    retriever.invoke("a red kite")
    retriever.invoke({"text": "the same in blue", "image": "kite.jpg"})
    ```

    Over an `UMRVectorStore` (or its `as_retriever()`) the cosine similarities count beside the relevance, as
    `MLLMReranker.weight` says, and stand in the metadata under its `score_key` unless the document has such a
    key itself. What is judged is then what the store holds: pictures in memory, files, pages of PDFs. With
    any other base, what the documents hold counts; see `MLLMReranker` for scores and for pictures.

    Queries reach base and reranker as they are given. Both appear in traces as runs below this one.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, arbitrary_types_allowed=True)

    base: Annotated[Any, BeforeValidator(_base)]
    """A vector store or a retriever. Only vector stores' retrievers can be told how many to fetch."""
    reranker: BaseDocumentCompressor = Field(default_factory=MLLMReranker)
    """`MLLMReranker`, or any other document compressor."""
    fetch_k: int = Field(default=20, ge=1)
    """How many documents are retrieved and judged; at least `k` are."""
    k: int | None = Field(default=None, ge=0)
    """How many documents are returned; the reranker's own number by default."""

    def _get_relevant_documents(
        self, query: Any, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        k, fetch_k = self._numbers(k)
        if k == 0:
            return []
        base, reranker = self._first_stage(), self._second_stage(k)
        config = {"callbacks": run_manager.get_child()}
        found = base.invoke(query, config, **_wanted(base, fetch_k))[:fetch_k]
        if not isinstance(reranker, MLLMReranker):
            return list(reranker.compress_documents(found, query, run_manager.get_child()))[:k]
        asked, items = self._known(query, found)
        return reranker.rerank(asked, found, scores=_scores(base), items=items, config=config)  # type: ignore[arg-type]

    async def _aget_relevant_documents(
        self, query: Any, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        k, fetch_k = self._numbers(k)
        if k == 0:
            return []
        base, reranker = self._first_stage(), self._second_stage(k)
        config = {"callbacks": run_manager.get_child()}
        found = (await base.ainvoke(query, config, **_wanted(base, fetch_k)))[:fetch_k]
        if not isinstance(reranker, MLLMReranker):
            return list(await reranker.acompress_documents(found, query, run_manager.get_child()))[:k]
        asked, items = await in_thread("query", self._known, query, found)
        return await reranker.arerank(asked, found, scores=_scores(base), items=items, config=config)  # type: ignore[arg-type]

    def _numbers(self, k: int | None) -> tuple[int | None, int]:
        chosen = self.k if k is None else check_k(k)
        return chosen, max(self.fetch_k, chosen or 0)

    @property
    def _store(self) -> StoreReader | None:
        """The store of our own whose rows the base returns as they are."""
        store = self.base.vectorstore if type(self.base) is VectorStoreRetriever else None
        return store if isinstance(store, StoreReader) else None

    @property
    def _ours(self) -> MLLMReranker | None:
        return self.reranker if isinstance(self.reranker, MLLMReranker) else None

    def _first_stage(self) -> Any:
        """The base; where scores can be had, a copy for this one search that keeps them."""
        if self._store is None or self._ours is None or self.base.search_type == "mmr":
            return self.base
        fields = {name: getattr(self.base, name) for name in VectorStoreRetriever.model_fields}
        made = _Scoring(**{**fields, "name": self.base.get_name()})
        made._key = self._ours.score_key
        return made

    def _second_stage(self, k: int | None) -> BaseDocumentCompressor:
        if self._ours is None or k is None:
            return self.reranker
        return self._ours.model_copy(update={"top_n": k})

    def _known(self, query: Any, found: list[Document]) -> tuple[Any, list[Item | None] | None]:
        """What the store holds of the query, if it is one of its rows, and of each document."""
        if self._store is None:
            return query, None
        asked = self._store.query_item(query) if isinstance(query, Document) else query
        return asked, self._store.stored_items(found)


class _Scoring(VectorStoreRetriever):
    """For one search: keeps the cosine similarities of what it found."""

    _key: str | None = PrivateAttr(default=None)
    _scores: list[float] | None = PrivateAttr(default=None)

    def _get_relevant_documents(self, query: Any, *, run_manager: Any, **kwargs: Any) -> list[Document]:
        store, wanted = self.vectorstore, self.search_kwargs | kwargs
        if self.search_type == "similarity":
            return self._kept(store.similarity_search_with_score(query, **wanted))
        found = store.similarity_search_with_relevance_scores(query, **wanted)
        return self._kept([(document, 2 * relevance - 1) for document, relevance in found])

    async def _aget_relevant_documents(
        self, query: Any, *, run_manager: Any, **kwargs: Any
    ) -> list[Document]:
        return await in_thread(
            "query", self._get_relevant_documents, query, run_manager=run_manager, **kwargs
        )

    def _kept(self, found: Scored) -> list[Document]:
        self._scores = [score for _, score in found]
        if self._key is not None:
            for document, score in found:  # fresh from the store, nobody else's
                document.metadata.setdefault(self._key, score)
        return [document for document, _ in found]


def _scores(base: object) -> list[float] | None:
    return base._scores if isinstance(base, _Scoring) else None


def _wanted(base: object, fetch_k: int) -> dict[str, int]:
    return {"k": fetch_k} if isinstance(base, VectorStoreRetriever) else {}
