"""`MultimodalIndex`: every kind of node in one vector space."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from llama_index.core import Settings, StorageContext
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.embeddings.utils import EmbedType
from llama_index.core.llms.utils import LLMType
from llama_index.core.schema import BaseNode, Document, TransformComponent
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr.documents import keep_pictures
from llama_index.indices.umr.engines import chat_engine, query_engine
from llama_index.indices.umr.replacing import DocumentIndex
from llama_index.indices.umr.retriever import MultimodalRetriever
from llama_index.indices.umr.stores import check_dim
from llama_index.indices.umr.turns import Turns
from llama_index.vector_stores.umr import UMRVectorStore

from umr_plugins.errors import InputError
from umr_plugins.index.index import Index
from umr_plugins.types import OnError

if TYPE_CHECKING:
    from umr_plugins.index.index import FolderReport
    from umr_plugins.types import PagesMode

_log = logging.getLogger(__name__)

_OPTIONS = ("use_async", "store_nodes_override", "insert_batch_size", "objects", "on_error")


class MultimodalIndex(DocumentIndex):
    """A `VectorStoreIndex` that embeds nodes as what they are: text, picture, or picture with text.

    Nodes with neither are refused with an error that names them. A document with a picture is one node;
    documents of text are split as usual. A node or document with an id that is there replaces the old one,
    in every store that can delete by id.

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
        FingerprintError: `path` was made by another model, or another store holds vectors of another length.
        InputError: options that exclude each other, or an embedding model that knows text only.

    Example:
        >>> index = MultimodalIndex.from_documents(documents, embed_model=GMEEmbedding(), path="db")
        >>> index.as_retriever(similarity_top_k=5).retrieve("a red bicycle")
    """

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
        check_dim(storage_context.vector_store, embed_model)
        self._on_error = on_error
        self._turns = Turns()
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
        """Index documents, in place of those of the same id that the store already has.

        Args:
            documents: each id once.
            storage_context: see the class.
            show_progress: show a progress bar.
            callback_manager: as for `VectorStoreIndex`.
            transformations: as for `VectorStoreIndex`; node parsers split texts only.
            embed_model: see the class.
            path: see the class.
            **kwargs: as for the class; anything else goes to the transformations and the store.
        """
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        index = cls(
            embed_model=embed_model,
            path=path,
            storage_context=storage_context,
            show_progress=show_progress,
            callback_manager=callback_manager,
            transformations=transformations,
            **options,
        )
        index._insert_documents(documents, kwargs)
        return index

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

    # --- asking -----------------------------------------------------------------------------------------

    def as_retriever(self, **kwargs: Any) -> BaseRetriever:
        """A retriever for text, picture and fused queries; options as for `VectorIndexRetriever`."""
        return MultimodalRetriever(
            self, callback_manager=self._callback_manager, object_map=self._object_map, **kwargs
        )

    # --- engines ----------------------------------------------------------------------------------------

    def as_query_engine(self, llm: LLMType | None = None, **kwargs: Any) -> BaseQueryEngine:
        """A `MultimodalQueryEngine`: its LLM sees the pictures of nodes, and the user's own.

        With an option that only LlamaIndex's `RetrieverQueryEngine` has, such as `response_mode`, a template
        or `multimodal`, it is one of those; `multimodal` is then on over `UMRVectorStore` if not said
        otherwise.

        Args:
            llm: by default the one in `Settings`, if one is set there; never one that nobody asked for.
            **kwargs: as for `as_retriever` (`similarity_top_k`, `filters`, ...) and the engine (`extractive`,
                `node_postprocessors`, `streaming`, `roots`, ...).

        Raises:
            InputError: no LLM, or one that does not chat; an option that there is not.
        """
        return query_engine(self, llm, kwargs)

    def as_chat_engine(
        self, chat_mode: ChatMode | str = ChatMode.BEST, llm: LLMType | None = None, **kwargs: Any
    ) -> BaseChatEngine:
        """A `MultimodalChatEngine`: its LLM sees the pictures of nodes, and those that the user sends.

        Args:
            chat_mode: `"best"` and `"condense_plus_context"` rewrite follow-up messages before the search,
                `"context"` does not. `"condense_question"` and `"simple"` are LlamaIndex's own engines.
            llm: by default the one in `Settings`, if one is set there; never one that nobody asked for.
            **kwargs: as for `as_retriever` (`similarity_top_k`, `filters`, ...) and the engine (`memory`,
                `system_prompt`, `node_postprocessors`, `roots`, ...).

        Raises:
            InputError: no LLM, or one that does not chat; a mode or an option that there is not.
        """
        return chat_engine(self, chat_mode, llm, kwargs)


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


def _is_empty(store: BasePydanticVectorStore) -> bool:
    return isinstance(store, SimpleVectorStore) and not store.data.embedding_dict
