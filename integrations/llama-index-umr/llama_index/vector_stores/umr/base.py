"""`UMRVectorStore`: LlamaIndex's vector store interface on `umr_plugins.Index`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.vector_stores.umr.checks import check_lengths, rows_of
from llama_index.vector_stores.umr.filters import join, where_of
from llama_index.vector_stores.umr.rows import REF_DOC_ID, node_of

from umr_plugins.errors import FingerprintError, InputError
from umr_plugins.index.index import Index
from umr_plugins.types import Encoder, Hit

_log = logging.getLogger(__name__)


class UMRVectorStore(BasePydanticVectorStore):
    """Keeps nodes whole: text, metadata, relationships and pictures, bytes included.

    A node with an id that is there replaces the old one. Scores are cosine similarities. Every change is on
    disk when the call returns. Files that `umr index` or `MultimodalIndex.from_folder` put into the same
    folder come back as nodes too.

    Args:
        embedding: the model whose vectors are stored; may be left out for a folder that has an index.
        path: folder of the index; without it, everything stays in memory.
        collection: name of the index within the folder.

    Raises:
        FingerprintError: the folder was made by another model.
        IndexLockedError: another process has the folder open.

    Example:
        >>> store = UMRVectorStore(GMEEmbedding(), path="db")
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    path: str | None = Field(default=None, description="Folder of the index.")
    collection: str = Field(default="umr", description="Name of the index within the folder.")

    _index: Index = PrivateAttr()
    _embedding: GMEEmbedding | None = PrivateAttr(default=None)

    def __init__(
        self,
        embedding: GMEEmbedding | Encoder | None = None,
        *,
        path: str | PathLike[str] | None = None,
        collection: str = "umr",
        stores_text: Literal[True] = True,
        is_embedding_query: Literal[True] = True,
    ) -> None:
        folder = None if path is None else fspath(path)
        super().__init__(path=folder, collection=collection)  # type: ignore[call-arg]  # pydantic fields
        if embedding is not None and not isinstance(embedding, GMEEmbedding):
            embedding = GMEEmbedding(encoder=embedding)
        self._embedding = embedding
        self._index = Index(folder, embedding.encoder if embedding else None, collection=collection)

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "UMRVectorStore"

    @property
    def index(self) -> Index:
        """The index below, for everything LlamaIndex has no name for."""
        return self._index

    @property
    def client(self) -> Index:
        """`index`, under LlamaIndex's name."""
        return self._index

    @property
    def embedding(self) -> GMEEmbedding:
        """The embedding model: the one given, or the one that the folder was made with."""
        if self._embedding is None:
            self._embedding = GMEEmbedding(encoder=self._index.encoder)
        return self._embedding

    # --- copies -----------------------------------------------------------------------------------------

    # All handles on a folder are one index, in one process. Rows in memory have no name to be found by again.

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Open the folder that `to_dict` names, with the model it was made with.

        Raises:
            InputError: the store was in memory.
        """
        _check_named(data.get("path"))
        store: Self = super().from_dict(data, **kwargs)
        return store

    def __getstate__(self) -> dict[str, Any]:
        _check_named(self.path)
        place = str(Path(self.path or "").absolute())
        return {"path": place, "collection": self.collection, "embedding": self._embedding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("embedding"), **state)  # type: ignore[misc]  # as BaseComponent does

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        _check_named(self.path)
        return self.model_copy()

    # --- adding and removing ----------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes with their vectors, replacing those of the same id.

        Metadata are JSON values. Filters see strings, numbers, booleans and lists of one kind of them; None
        and nested values come back with the node, but to filters the node lacks them.

        Raises:
            BatchError: nodes without a useful vector, with neither text nor picture, or with metadata that
                JSON can't hold; nothing is stored then.
            FingerprintError: a vector of another length than the store's.
            InputError: an id comes twice.
        """
        _refuse("add", kwargs)
        rows = rows_of(nodes)
        if not rows:
            return []
        check_lengths(nodes, self._index.dim)
        return self._index.add(
            [row.item for row in rows],
            ids=[node.node_id for node in nodes],
            metadatas=[row.metadata for row in rows],
            payloads=[row.payload for row in rows],
            vectors=[node.get_embedding() for node in nodes],
        )

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """`add` for coroutines."""
        return await asyncio.to_thread(partial(self.add, nodes, **kwargs))

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove all nodes of a document, and the node that is the document."""
        _refuse("delete", delete_kwargs)
        self._index.delete([*self._selected(None, {REF_DOC_ID: ref_doc_id}), ref_doc_id])

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete` for coroutines."""
        await asyncio.to_thread(partial(self.delete, ref_doc_id, **delete_kwargs))

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Remove nodes by id, by filter, or those of the ids that pass the filter."""
        _refuse("delete_nodes", delete_kwargs)
        where = where_of(filters)
        if node_ids is None and where is None:
            raise InputError("delete_nodes needs node_ids or filters; clear() removes everything")
        self._index.delete(self._selected(node_ids, where))

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """`delete_nodes` for coroutines."""
        await asyncio.to_thread(partial(self.delete_nodes, node_ids, filters, **delete_kwargs))

    def clear(self) -> None:
        """Remove everything, and forget which files were indexed."""
        for root in self._index.roots():
            self._index.remove_folder(root)
        self._index.delete(self._index.ids())

    async def aclear(self) -> None:
        """`clear` for coroutines."""
        await asyncio.to_thread(self.clear)

    # --- reading ----------------------------------------------------------------------------------------

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Nodes by id, by filter, by both, or all. Ids that are not there are left out."""
        return [node_of(hit) for hit in self._index.get(self._selected(node_ids, where_of(filters)))]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """`get_nodes` for coroutines."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes nearest to `query.query_embedding`, best first, with their cosine similarity.

        Raises:
            InputError: no vector, a mode other than the default, or a filter that is not supported.
        """
        _refuse("query", kwargs)
        if query.mode is not VectorStoreQueryMode.DEFAULT:
            raise InputError(
                f"the query mode {query.mode.value!r} is not supported; only 'default' (nearest vectors) is"
            )
        if query.query_embedding is None:
            raise InputError("the query has no vector; pass query_embedding, or ask through a retriever")
        hits = self._nearest(query.query_embedding, query)
        return VectorStoreQueryResult(
            nodes=[node_of(hit) for hit in hits],
            similarities=[float(hit.score) for hit in hits],
            ids=[hit.id for hit in hits],
        )

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """`query` for coroutines."""
        return await asyncio.to_thread(partial(self.query, query, **kwargs))

    def _nearest(self, vector: list[float], query: VectorStoreQuery) -> list[Hit]:
        if query.doc_ids == []:
            return []  # but LlamaIndex's own index passes an empty list of nodes where it means any
        conditions = [] if (where := where_of(query.filters)) is None else [where]
        if query.doc_ids:
            conditions.append({REF_DOC_ID: {"$in": query.doc_ids}})
        where = join("$and", conditions)
        if not query.node_ids:
            return self._index.search_vector(vector, query.similarity_top_k, where)
        hits = self._index.search_vector(vector, self._index.count(), where)
        wanted = set(query.node_ids)
        return [hit for hit in hits if hit.id in wanted][: query.similarity_top_k]

    def _selected(self, node_ids: list[str] | None, where: dict[str, Any] | None) -> list[str]:
        """Ids among `node_ids` (or all) that pass `where`."""
        if where is None:
            return self._index.ids() if node_ids is None else node_ids
        if self._index.dim is None:
            return []
        # Any vector will do: every row that passes comes back.
        hits = self._index.search_vector([1.0] * self._index.dim, self._index.count(), where)
        passing = [hit.id for hit in hits]
        return passing if node_ids is None else [name for name in node_ids if name in set(passing)]

    # --- the rest ---------------------------------------------------------------------------------------

    def check(self, embedding: GMEEmbedding) -> None:
        """Make sure that a model's queries can be compared with the stored vectors.

        Raises:
            FingerprintError: another model made them.
        """
        recorded = self._index.info()["fingerprint"]
        if recorded is not None and recorded != embedding.encoder.fingerprint:
            raise FingerprintError(
                f"the store was made with another model than {embedding.model_name!r} or other options; "
                "leave embed_model out to use the one it was made with, or make a new store"
            )

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Do nothing: with `path` every change is on disk already. Without, a warning is logged."""
        if self.path is None:
            _log.warning("a UMRVectorStore without path is not persisted; make it with path=")

    def close(self) -> None:
        """Free the folder for other processes."""
        self._index.close()


def _check_named(path: str | None) -> None:
    if path is None:
        raise InputError(
            "a UMRVectorStore in memory can't be pickled, deep-copied or made from a dict, because its rows "
            "would be lost; make it with path="
        )


def _refuse(method: str, options: dict[str, Any]) -> None:
    if options:
        raise InputError(f"{method} of UMRVectorStore knows no option {', '.join(map(repr, options))}")
