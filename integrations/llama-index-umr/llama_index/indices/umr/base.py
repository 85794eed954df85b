"""`MultimodalIndex`: every kind of node in one vector space."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from llama_index.core import Settings, StorageContext, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.embeddings.utils import EmbedType
from llama_index.core.schema import BaseNode, Document, TransformComponent
from llama_index.core.utils import iter_batch
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr.documents import keep_pictures, to_storable
from llama_index.indices.umr.retriever import MultimodalRetriever
from llama_index.vector_stores.umr import UMRVectorStore

from umr_plugins.errors import InputError, ItemError
from umr_plugins.index.index import Index
from umr_plugins.types import OnError

if TYPE_CHECKING:
    from umr_plugins.index.index import FolderReport
    from umr_plugins.types import PagesMode

_log = logging.getLogger(__name__)


class MultimodalIndex(VectorStoreIndex):
    """A `VectorStoreIndex` that embeds nodes as what they are: text, picture, or picture with text.

    Nodes with neither are refused with an error that names them. A document with a picture is one node;
    documents of text are split as usual.

    Args:
        nodes: what to index; may be left out, to open what `path` holds.
        embed_model: by default the one of `Settings` if it is a `GMEEmbedding`, else the one that `path` was
            made with, else `GMEEmbedding()`.
        path: folder of the index; without it, everything stays in memory.
        on_error: `"skip"` leaves nodes that can't be embedded out, with a warning in the log for each.
        storage_context: another store, instead of `path`.
        **kwargs: as for `VectorStoreIndex`.

    Raises:
        BatchError: nodes that can't be embedded.
        FingerprintError: `path` was made by another model.
        InputError: options that exclude each other, or an embedding model that knows text only.

    Example:
        >>> index = MultimodalIndex.from_documents(documents, embed_model=GMEEmbedding(), path="db")
        >>> index.as_retriever(similarity_top_k=5).retrieve("a red bicycle")
    """

    _embed_model: GMEEmbedding

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        embed_model: EmbedType | None = None,
        path: str | PathLike[str] | None = None,
        on_error: OnError = "raise",
        storage_context: StorageContext | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("index_struct") is None:
            nodes = list(nodes or [])
        embed_model, storage_context = _parts(embed_model, path, storage_context)
        self._on_error = on_error
        self.report: FolderReport | None = None
        """What the last call of `insert_folder` or `insert_files` did and refused."""
        super().__init__(nodes=nodes, embed_model=embed_model, storage_context=storage_context, **kwargs)
        self._transformations = keep_pictures(self._transformations)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        storage_context: StorageContext | None = None,
        show_progress: bool = False,
        callback_manager: Any = None,
        transformations: list[TransformComponent] | None = None,
        *,
        embed_model: EmbedType | None = None,
        path: str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Index documents; see the class for the options."""
        embed_model, storage_context = _parts(embed_model, path, storage_context)
        return super().from_documents(
            documents,
            storage_context=storage_context,
            show_progress=show_progress,
            callback_manager=callback_manager,
            transformations=keep_pictures(transformations or Settings.transformations),
            embed_model=embed_model,
            **kwargs,
        )

    @classmethod
    def from_vector_store(
        cls, vector_store: BasePydanticVectorStore, embed_model: EmbedType | None = None, **kwargs: Any
    ) -> Self:
        """An index over any vector store; with `UMRVectorStore`, `embed_model` may be left out.

        A `SimpleVectorStore` keeps no nodes, so it must be empty: an index over a filled one needs the
        `storage_context` with its docstore.
        """
        if not vector_store.stores_text and not _is_empty(vector_store):
            raise InputError(
                f"{type(vector_store).__name__} keeps vectors but no nodes: use MultimodalIndex("
                "storage_context=...) with the docstore that has them"
            )
        kwargs["storage_context"] = StorageContext.from_defaults(vector_store=vector_store)
        return cls(embed_model=embed_model, **kwargs)

    @classmethod
    def from_folder(
        cls,
        folder: str | PathLike[str],
        *,
        embed_model: EmbedType | None = None,
        path: str | PathLike[str] | None = None,
        pages: PagesMode | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Index all pictures, PDFs and texts in a folder, or bring the index in `path` up to date with it.

        A PDF page is one item. What could not be read is in `report.refused` of the result, and in the log.

        Args:
            folder: where the files are.
            embed_model: see the class.
            path: folder of the index; without it, everything stays in memory.
            pages: what of a PDF page is embedded: `"image"`, `"fused"` or `"text"`; the model's choice by
                default.
            show_progress: show a progress bar.
            **kwargs: as for the class.
        """
        index = cls(embed_model=embed_model, path=path, **kwargs)
        index.insert_folder(folder, pages=pages, show_progress=show_progress)
        return index

    # --- files ------------------------------------------------------------------------------------------

    def insert_folder(
        self, folder: str | PathLike[str], *, pages: PagesMode | None = None, show_progress: bool = False
    ) -> FolderReport:
        """Add new and changed files of a folder and remove deleted ones; see `from_folder`."""
        index = self._umr_store().index
        return self._reported(index.add_folder(folder, pages=pages, show_progress=show_progress))

    def insert_files(
        self,
        files: Iterable[str | PathLike[str]],
        *,
        pages: PagesMode | None = None,
        show_progress: bool = False,
    ) -> FolderReport:
        """Add files, or replace those that have changed; see `from_folder`."""
        index = self._umr_store().index
        return self._reported(index.add_files(list(files), pages=pages, show_progress=show_progress))

    async def ainsert_folder(self, folder: str | PathLike[str], **kwargs: Any) -> FolderReport:
        """`insert_folder` for coroutines."""
        return await asyncio.to_thread(partial(self.insert_folder, folder, **kwargs))

    async def ainsert_files(self, files: Iterable[str | PathLike[str]], **kwargs: Any) -> FolderReport:
        """`insert_files` for coroutines."""
        return await asyncio.to_thread(partial(self.insert_files, files, **kwargs))

    def _umr_store(self) -> UMRVectorStore:
        if not isinstance(self._vector_store, UMRVectorStore):
            raise InputError(
                f"files go into the index's own store only, not into {type(self._vector_store).__name__}; "
                "leave storage_context and vector_store out, or read the files into documents"
            )
        return self._vector_store

    def _reported(self, report: FolderReport) -> FolderReport:
        for refused in report.refused:
            page = "" if refused.page is None else f", page {refused.page}"
            _log.warning("left out: %s%s: %s [%s]", refused.path, page, refused.reason, refused.code)
        self.report = report
        return report

    # --- nodes ------------------------------------------------------------------------------------------

    def build_index_from_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> IndexDict:
        """Embed and store `nodes`. The base class would drop those without text."""
        return self._build_index_from_nodes(nodes, **insert_kwargs)

    def _get_node_with_embedding(
        self, nodes: Sequence[BaseNode], show_progress: bool = False
    ) -> list[BaseNode]:
        return self._embed_model.embed_nodes(self._storable(nodes), show_progress, self._on_error)

    async def _aget_node_with_embedding(
        self, nodes: Sequence[BaseNode], show_progress: bool = False
    ) -> list[BaseNode]:
        return await self._embed_model.aembed_nodes(self._storable(nodes), show_progress, self._on_error)

    def _storable(self, nodes: Sequence[BaseNode]) -> list[BaseNode]:
        return [_whole(node, any_store=not self._keeps_all) for node in nodes]

    @property
    def _keeps_all(self) -> bool:
        """Whether the store returns whole nodes, so that the docstore need not hold copies of them."""
        return isinstance(self._vector_store, UMRVectorStore) and not self._store_nodes_override

    def _add_nodes_to_index(
        self,
        index_struct: IndexDict,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        **insert_kwargs: Any,
    ) -> None:
        if not self._keeps_all:
            super()._add_nodes_to_index(index_struct, nodes, show_progress, **insert_kwargs)
            return
        for batch in iter_batch(nodes, self._insert_batch_size):
            self._vector_store.add(self._get_node_with_embedding(batch, show_progress), **insert_kwargs)

    async def _async_add_nodes_to_index(
        self,
        index_struct: IndexDict,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        **insert_kwargs: Any,
    ) -> None:
        if not self._keeps_all:
            await super()._async_add_nodes_to_index(index_struct, nodes, show_progress, **insert_kwargs)
            return
        for batch in iter_batch(nodes, self._insert_batch_size):
            embedded = await self._aget_node_with_embedding(batch, show_progress)
            await self._vector_store.async_add(embedded, **insert_kwargs)

    def as_retriever(self, **kwargs: Any) -> BaseRetriever:
        """A retriever for text, picture and fused queries; options as for `VectorIndexRetriever`."""
        return MultimodalRetriever(
            self, callback_manager=self._callback_manager, object_map=self._object_map, **kwargs
        )


def _parts(
    embed_model: EmbedType | None,
    path: str | PathLike[str] | None,
    storage_context: StorageContext | None,
) -> tuple[GMEEmbedding, StorageContext]:
    """The embedding model and the storage that the options mean."""
    if storage_context is None:
        chosen = _chosen(embed_model)
        store = UMRVectorStore(chosen or (None if _exists(path) else GMEEmbedding()), path=path)
        return store.embedding, StorageContext.from_defaults(vector_store=store)
    if path is not None:
        raise InputError("give path or storage_context, not both: a storage context has its own store")
    kept = storage_context.vector_store
    if isinstance(kept, UMRVectorStore):
        chosen = _chosen(embed_model)
        if chosen is not None:
            kept.check(chosen)
        return chosen or kept.embedding, storage_context
    return _chosen(embed_model) or GMEEmbedding(), storage_context


def _chosen(embed_model: EmbedType | None) -> GMEEmbedding | None:
    """The embedding model that the user named, here or in `Settings`."""
    given = embed_model if embed_model is not None else Settings._embed_model
    if given is None or isinstance(given, GMEEmbedding):
        return given
    where = "embed_model" if embed_model is not None else "Settings.embed_model"
    raise InputError(
        f"{where} is {type(given).__name__}, which MultimodalIndex can't ask for pictures; pass "
        "embed_model=GMEEmbedding(), or GMEEmbedding(encoder=...) around any encoder of umr_plugins"
    )


def _exists(path: str | PathLike[str] | None) -> bool:
    return path is not None and Index.exists(path)


def _whole(node: BaseNode, any_store: bool) -> BaseNode:
    try:
        return to_storable(node, any_store)
    except ItemError:
        return node.model_copy()  # the embedding model collects what is wrong with any of them


def _is_empty(store: BasePydanticVectorStore) -> bool:
    return isinstance(store, SimpleVectorStore) and not store.data.embedding_dict
