"""Every way LangChain searches a vector store, on one `Index`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from langchain_umr.documents import to_document
from langchain_umr.inputs import IMAGE_KEYS, document_item, document_pictures, document_text, to_item
from langchain_umr.threads import in_thread
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.types import Hit, ImageSource, Item

if TYPE_CHECKING:
    from umr_plugins.index.index import Index

Filter = Mapping[str, Any] | None
Scored = list[tuple[Document, float]]


class StoreReader(VectorStore):
    """The reading half of `UMRVectorStore`.

    A query is a string, a mapping with `text` and `image`, content blocks, a message, a picture, or a
    `Document` ("more like this"); retrievers pass it through untouched. A `Document` of this store stands for
    what was embedded; of any other, a picture counts only as data URI or base64, since anyone may have
    written the paths in its metadata: for a file give a mapping with `image`.

    `filter` is a metadata filter such as `{"lang": "en"}` or `{"year": {"$gte": 2020}}`. Scores are cosine
    similarities, relevance scores `(1 + cosine) / 2`.
    """

    index: Index
    image_keys: tuple[str, ...] = IMAGE_KEYS
    instruction: str | None = None

    def similarity_search(
        self,
        query: Any,
        k: int = 4,
        filter: Filter = None,
        *,
        instruction: str | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """The `k` documents nearest to the query, best first.

        Args:
            query: what is searched for.
            k: how many; 0 gives none.
            filter: metadata filter; None and `{}` filter nothing.
            instruction: task description for this query, instead of the embeddings' own.
            kwargs: none; an unknown one is refused.
        """
        _refuse(kwargs, "filter, instruction")
        return [self._document(hit) for hit in self._search(query, k, filter, instruction)]

    def similarity_search_with_score(
        self,
        query: Any,
        k: int = 4,
        filter: Filter = None,
        *,
        instruction: str | None = None,
        **kwargs: Any,
    ) -> Scored:
        """As `similarity_search`, each with its cosine similarity, higher is better."""
        _refuse(kwargs, "filter, instruction")
        return [(self._document(hit), hit.score) for hit in self._search(query, k, filter, instruction)]

    def similarity_search_by_vector(
        self,
        embedding: Sequence[float],
        k: int = 4,
        filter: Filter = None,
        **kwargs: Any,
    ) -> list[Document]:
        """The `k` documents nearest to a vector of the same embeddings."""
        found = self.similarity_search_by_vector_with_score(embedding, k, filter, **kwargs)
        return [document for document, _ in found]

    def similarity_search_by_vector_with_score(
        self,
        embedding: Sequence[float],
        k: int = 4,
        filter: Filter = None,
        **kwargs: Any,
    ) -> Scored:
        """As `similarity_search_by_vector`, each with its cosine similarity."""
        _refuse(kwargs, "filter")
        return [(self._document(hit), hit.score) for hit in self._near(_vector(embedding), k, filter)]

    def similarity_search_by_vector_with_relevance_scores(
        self,
        embedding: Sequence[float],
        k: int = 4,
        filter: Filter = None,
        **kwargs: Any,
    ) -> Scored:
        """As `similarity_search_by_vector`, each with its relevance in [0, 1]."""
        found = self.similarity_search_by_vector_with_score(embedding, k, filter, **kwargs)
        return [(document, relevance(score)) for document, score in found]

    def similarity_search_by_image(
        self,
        uri: ImageSource,
        k: int = 4,
        filter: Filter = None,
        **kwargs: Any,
    ) -> list[Document]:
        """The `k` documents nearest to a picture: a path, data URI, `PIL.Image` or encoded bytes."""
        return self.similarity_search(Item(image=uri), k, filter, **kwargs)

    def similarity_search_by_image_with_score(
        self,
        uri: ImageSource,
        k: int = 4,
        filter: Filter = None,
        **kwargs: Any,
    ) -> Scored:
        """As `similarity_search_by_image`, each with its cosine similarity."""
        return self.similarity_search_with_score(Item(image=uri), k, filter, **kwargs)

    def similarity_search_by_image_with_relevance_score(
        self,
        uri: ImageSource,
        k: int = 4,
        filter: Filter = None,
        **kwargs: Any,
    ) -> Scored:
        """As `similarity_search_by_image`, each with its relevance in [0, 1] (the name is `Chroma`'s)."""
        found = self.similarity_search_by_image_with_score(uri, k, filter, **kwargs)
        return [(document, relevance(score)) for document, score in found]

    def max_marginal_relevance_search(
        self,
        query: Any,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter = None,
        *,
        instruction: str | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`k` documents that are near the query and differ from each other, in the order they were chosen.

        Args:
            query: what is searched for.
            k: how many; 0 gives none.
            fetch_k: how many of the nearest to choose from.
            lambda_mult: 1 for nearness only, 0 for variety only.
            filter: metadata filter.
            instruction: task description for this query.
            kwargs: none; an unknown one is refused.
        """
        _refuse(kwargs, "fetch_k, lambda_mult, filter, instruction")
        if check_k(k) == 0:
            return []
        task = instruction or self.instruction
        try:
            vectors = np.asarray(self.index.encoder.encode_queries([self.query_item(query)], task))
        except BatchError as error:
            raise error.errors[0] from error
        return self._diverse(vectors[0], k, fetch_k, lambda_mult, filter)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: Sequence[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, for a vector of the same embeddings."""
        _refuse(kwargs, "fetch_k, lambda_mult, filter")
        return self._diverse(_vector(embedding), check_k(k), fetch_k, lambda_mult, filter)

    def stored_items(self, documents: Sequence[Document]) -> list[Item | None]:
        """What was embedded for each document that is a row of this index, with pictures; None for others.

        A document of another store can have the id of a row here, so its page content and what its metadata
        say of its picture must be the row's too. Pictures are those that were added here.
        """
        rows = self._rows(document.id for document in documents)
        found = [self._own_row(document, rows) for document in documents]
        return [
            row.embedded if row is not None and document.page_content == (row.text or "") else None
            for document, row in zip(documents, found, strict=True)
        ]

    def query_item(self, query: Any) -> Item:
        """What a query stands for; see the class for a `Document`.

        Raises:
            ItemError: it is none, or a `Document` of elsewhere that names a file or an address.
        """
        if not isinstance(query, Document):
            return to_item(query)
        row = self._own_row(query, self._rows([query.id]))
        if row is None and any(
            one[:5].lower() != "data:" for one in document_pictures(query, self.image_keys)
        ):
            raise ItemError(
                "unsupported",
                "a Document that is no row of this store is searched for by its text and by pictures that "
                "are data URIs: anyone may have written the paths in its metadata. If you trust this one, "
                'search for {"text": ..., "image": path}',
            )
        return self._item(query, row)

    async def asimilarity_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`similarity_search` in a thread."""
        return await in_thread("query", self.similarity_search, *args, **kwargs)

    async def asimilarity_search_with_score(self, *args: Any, **kwargs: Any) -> Scored:
        """`similarity_search_with_score` in a thread."""
        return await in_thread("query", self.similarity_search_with_score, *args, **kwargs)

    async def asimilarity_search_with_relevance_scores(self, *args: Any, **kwargs: Any) -> Scored:
        """`similarity_search_with_relevance_scores` in a thread."""
        return await in_thread("query", self.similarity_search_with_relevance_scores, *args, **kwargs)

    async def asimilarity_search_by_vector(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`similarity_search_by_vector` in a thread."""
        return await in_thread("query", self.similarity_search_by_vector, *args, **kwargs)

    async def asimilarity_search_by_image(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`similarity_search_by_image` in a thread."""
        return await in_thread("query", self.similarity_search_by_image, *args, **kwargs)

    async def amax_marginal_relevance_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`max_marginal_relevance_search` in a thread."""
        return await in_thread("query", self.max_marginal_relevance_search, *args, **kwargs)

    async def amax_marginal_relevance_search_by_vector(self, *args: Any, **kwargs: Any) -> list[Document]:
        """`max_marginal_relevance_search_by_vector` in a thread."""
        return await in_thread("query", self.max_marginal_relevance_search_by_vector, *args, **kwargs)

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """`get_by_ids` in a thread."""
        return await in_thread("query", self.get_by_ids, ids)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return relevance

    def _search(self, query: Any, k: int, where: Filter, instruction: str | None) -> list[Hit]:
        if check_k(k) == 0:
            return []
        task = instruction or self.instruction
        return self.index.search(self.query_item(query), k, where=where, instruction=task)

    def _near(self, vector: Any, k: int, where: Filter) -> list[Hit]:
        return self.index.search_vector(vector, k, where) if check_k(k) else []

    def _diverse(
        self, vector: Any, k: int, fetch_k: int, lambda_mult: float, where: Filter
    ) -> list[Document]:
        if not 0 <= lambda_mult <= 1:
            raise InputError(f"lambda_mult must be between 0 and 1, got {lambda_mult!r}")
        hits = self._near(vector, max(k, check_k(fetch_k, "fetch_k")), where) if k else []
        if not hits:
            return []
        vectors = self.index.vectors([hit.id for hit in hits])
        chosen = maximal_marginal_relevance(np.asarray(vector), list(vectors), lambda_mult, k)
        return [self._document(hits[place]) for place in chosen]

    def _rows(self, ids: Iterable[object]) -> dict[str, Hit]:
        names = dict.fromkeys(one for one in ids if isinstance(one, str) and one)
        return {hit.id: hit for hit in self.index.get(list(names))}

    def _own_row(self, document: Document, rows: Mapping[str, Hit]) -> Hit | None:
        """The row that a document was read from, if it still says of its picture what it said then."""
        row = rows.get(document.id or "")
        if row is None:
            return None
        now, read = document.metadata, self._document(row).metadata
        ours = [key for key in ("modality", "path", "page") if key in read and key not in row.metadata]
        same = all(now.get(key) == read.get(key) for key in (*ours, *self.image_keys))
        return row if same and ("modality" in now) == ("modality" in read) else None

    def _item(self, document: Document, row: Hit | None) -> Item:
        """What a document stands for; as a row of this index, its pictures, with the text it has now."""
        if row is not None and document.page_content == (row.text or ""):
            return row.embedded
        text = document_text(document)
        if row is not None and (text or row.modality != "text"):
            return replace(row.item, text=text)
        return document_item(document, self.image_keys)

    def _document(self, hit: Hit) -> Document:
        return to_document(hit, self.image_keys)


def relevance(cosine: float) -> float:
    """Cosine similarity as LangChain wants relevance: 0 for opposite, 1 for equal."""
    return min(1.0, max(0.0, (1.0 + cosine) / 2.0))


def check_k(k: int, name: str = "k") -> int:
    """`k`, if it is a whole number of at least 0.

    Raises:
        InputError: it is not.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise InputError(f"{name} must be a whole number of at least 0, got {k!r}")
    return k


def _vector(embedding: Sequence[float]) -> Any:
    return np.asarray(embedding, dtype=np.float32)


def _refuse(kwargs: Mapping[str, Any], allowed: str) -> None:
    if kwargs:
        raise InputError(f"unknown search arguments {sorted(kwargs)}; besides k there are {allowed}")
