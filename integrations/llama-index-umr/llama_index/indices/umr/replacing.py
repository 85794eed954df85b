"""Documents in an index: put in, replaced, refreshed and taken out, over any store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_index.core.async_utils import run_async_tasks
from llama_index.core.ingestion import run_transformations
from llama_index.core.schema import BaseNode, Document
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.utils import get_tqdm_iterable, iter_batch
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from llama_index.indices.umr.documents import off_loop
from llama_index.indices.umr.exchange import Exchange, ids_of
from llama_index.indices.umr.identity import (
    Held,
    as_own_source,
    document_hash,
    document_of,
    held_of,
    outdated,
    refuse_repeated,
    with_hashes,
)
from llama_index.indices.umr.stores import ask
from llama_index.indices.umr.turns import Turns
from llama_index.indices.umr.writing import WritingIndex
from llama_index.vector_stores.umr import UMRVectorStore

from umr_plugins.errors import InputError
from umr_plugins.types import chunks

_ASKED = 256  # documents or nodes per question to a store


class DocumentIndex(WritingIndex):
    """An index that has each document once, in the state in which it came last.

    The store itself says which nodes are of which document and in what state, so that all of this works on a
    reopened store too. Stores that can't be asked for nodes (`get_nodes`) are cleared of a document before
    its nodes are added, and the docstore says what state they are in. Calls from several threads or
    coroutines take turns, those of one index.
    """

    _turns: Turns

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Add a document, or put it in the place of the one with its id."""
        with self._callback_manager.as_trace("insert"):
            self._replace([document], _hashes([document]), insert_kwargs)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """`insert` for coroutines."""
        with self._callback_manager.as_trace("ainsert"):
            await self._areplace([document], await _ahashes([document]), insert_kwargs)

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Put a document in the place of the one with its id.

        The old nodes go when the new ones are stored, so a document that can't be embedded costs nothing.

        Args:
            document: what replaces.
            **update_kwargs: `insert_kwargs` and `delete_kwargs`, for the store.
        """
        with self._callback_manager.as_trace("update_ref_doc"):
            self._replace([document], _hashes([document]), **_updating(update_kwargs))

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """`update_ref_doc` for coroutines."""
        with self._callback_manager.as_trace("aupdate_ref_doc"):
            await self._areplace([document], await _ahashes([document]), **_updating(update_kwargs))

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Add the documents that are new and replace those that have changed; the others are not embedded.

        Changed means another text, other metadata, or a picture of other content, also under the same path.
        A document of which the store lacks nodes, after an error half-way for instance, is stored again.

        Args:
            documents: each id once.
            **update_kwargs: `insert_kwargs` for new ones; `update_kwargs` with `insert_kwargs` and
                `delete_kwargs` for changed ones.

        Returns:
            For each document whether it was stored now. With `on_error="skip"` a document that can't be
            embedded is left as it was.

        Raises:
            InputError: a document id comes twice.
            BatchError: documents that can't be embedded; the store keeps what it has of them.
        """
        with self._callback_manager.as_trace("refresh_ref_docs"):
            refuse_repeated("document", documents)
            hashes = _hashes(documents)
            held = self._held(list(hashes))
            recorded = {} if held is not None else {n: self._docstore.get_document_hash(n) for n in hashes}
            stored: set[str] = set()
            for group, options in self._outdated(documents, hashes, held, recorded, update_kwargs):
                stored |= self._replace(group, hashes, **options)
            return [document.node_id in stored for document in documents]

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """`refresh_ref_docs` for coroutines."""
        with self._callback_manager.as_trace("arefresh_ref_docs"):
            refuse_repeated("document", documents)
            hashes = await _ahashes(documents)
            held = await self._aheld(list(hashes))
            recorded = (
                {} if held is not None else {n: await self._docstore.aget_document_hash(n) for n in hashes}
            )
            stored: set[str] = set()
            for group, options in self._outdated(documents, hashes, held, recorded, update_kwargs):
                stored |= await self._areplace(group, hashes, **options)
            return [document.node_id in stored for document in documents]

    def delete_ref_doc(
        self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """Remove all nodes of a document, and the node of its id.

        Args:
            ref_doc_id: which document.
            delete_from_docstore: remove the copies in the docstore as well, where there are any.
            **delete_kwargs: for the store.
        """
        with self._turns:
            held = self._held([ref_doc_id])
            self._vector_store.delete(ref_doc_id, **delete_kwargs)
            if not isinstance(self._vector_store, UMRVectorStore):
                self._drop([ref_doc_id])  # a document that is one node has no source in many stores
            if held is None:
                self._docstore.delete_document(ref_doc_id, raise_error=False)  # the state it was in
            self._forget(ids_of(ref_doc_id, held), delete_from_docstore)

    async def adelete_ref_doc(
        self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """`delete_ref_doc` for coroutines."""
        async with self._turns:
            held = await self._aheld([ref_doc_id])
            await ask(self._vector_store, "adelete", ref_doc_id, **delete_kwargs)
            if not isinstance(self._vector_store, UMRVectorStore):
                await self._adrop([ref_doc_id])
            if held is None:
                await self._docstore.adelete_document(ref_doc_id, raise_error=False)
            await self._aforget(ids_of(ref_doc_id, held), delete_from_docstore)

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents that the store holds: ids of their nodes, and metadata.

        Nodes that name no source and came from no document are not among them, nor are files.

        Raises:
            InputError: the store can't be asked.
        """
        if not self._vector_store.stores_text:
            return super().ref_doc_info
        try:
            documents: dict[str, RefDocInfo] = {}
            for node in self._all_nodes():
                if node.ref_doc_id or isinstance(node, Document):
                    info = documents.setdefault(document_of(node), RefDocInfo(metadata=dict(node.metadata)))
                    info.node_ids.append(node.node_id)
            return documents
        except NotImplementedError:
            raise InputError(
                f"{type(self._vector_store).__name__} can't list its nodes (get_nodes), so nobody knows its "
                "documents; use UMRVectorStore, or a store with get_nodes such as ChromaVectorStore"
            ) from None

    def _all_nodes(self) -> Iterator[BaseNode]:
        if isinstance(self._vector_store, UMRVectorStore):
            ids = self._vector_store.index.ids()
            for part in chunks(ids, _ASKED):  # with their pictures, so not all at once
                yield from self._vector_store.get_nodes(part)
        else:
            yield from self._vector_store.get_nodes(None)

    # --- replacing --------------------------------------------------------------------------------------

    def _outdated(
        self,
        documents: Sequence[Document],
        hashes: Mapping[str, str | None],
        held: Mapping[str, Held] | None,
        recorded: Mapping[str, str | None],
        kwargs: Mapping[str, Any],
    ) -> Iterator[tuple[list[Document], dict[str, Any]]]:
        """New and changed documents in groups, each with the options to store it with."""
        new, changed = outdated(documents, hashes, held, recorded)
        inserting = {"insert_kwargs": kwargs.get("insert_kwargs", {})}
        for members, options in ((new, inserting), (changed, _updating(kwargs.get("update_kwargs", {})))):
            for group in iter_batch(members, self._insert_batch_size):
                yield list(group), options

    def _replace(
        self,
        documents: Sequence[Document],
        hashes: Mapping[str, str | None],
        insert_kwargs: Mapping[str, Any] | None = None,
        delete_kwargs: Mapping[str, Any] | None = None,
    ) -> set[str]:
        """Store documents in place of what there is of them; returns the ids of those that were stored."""
        inserting, deleting = dict(insert_kwargs or {}), dict(delete_kwargs or {})
        refuse_repeated("document", documents)
        nodes = run_transformations(
            [as_own_source(document) for document in documents],
            self._transformations,
            show_progress=self._show_progress,
            **inserting,
        )
        exchange = self._exchange(documents, nodes, hashes)
        with self._turns:
            old = self._held(exchange.names)
            for batch in exchange.batches(self._batch_size):
                embedded = self._get_node_with_embedding(batch, self._show_progress)
                for name in exchange.arriving(embedded):
                    if old is None:
                        self._docstore.set_document_hash(name, "")  # until it has arrived whole
                        self._vector_store.delete(name, **deleting)
                self._write(self._index_struct, embedded, **inserting)
                if stale := exchange.stale(old):
                    self._drop(stale, **deleting)
                    self._forget(stale, from_docstore=True)
            if old is None:
                for name in exchange.stored:
                    self._docstore.set_document_hash(name, hashes[name] or "")
            self._storage_context.index_store.add_index_struct(self._index_struct)
        return exchange.stored

    async def _areplace(
        self,
        documents: Sequence[Document],
        hashes: Mapping[str, str | None],
        insert_kwargs: Mapping[str, Any] | None = None,
        delete_kwargs: Mapping[str, Any] | None = None,
    ) -> set[str]:
        inserting, deleting = dict(insert_kwargs or {}), dict(delete_kwargs or {})
        refuse_repeated("document", documents)
        nodes: Sequence[BaseNode] = [as_own_source(document) for document in documents]
        steps = get_tqdm_iterable(self._transformations, self._show_progress, "Applying transformations")
        for step in steps:
            nodes = await off_loop(step, nodes, **inserting)
        exchange = await asyncio.to_thread(self._exchange, documents, nodes, hashes)
        async with self._turns:
            old = await self._aheld(exchange.names)
            for batch in exchange.batches(await self._abatch_size()):
                embedded = await self._aget_node_with_embedding(batch, self._show_progress)
                for name in exchange.arriving(embedded):
                    if old is None:
                        await self._docstore.aset_document_hash(name, "")
                        await ask(self._vector_store, "adelete", name, **deleting)
                await self._awrite(self._index_struct, embedded, **inserting)
                if stale := exchange.stale(old):
                    await self._adrop(stale, **deleting)
                    await self._aforget(stale, from_docstore=True)
            if old is None:
                for name in exchange.stored:
                    await self._docstore.aset_document_hash(name, hashes[name] or "")
            await self._storage_context.index_store.async_add_index_struct(self._index_struct)
        return exchange.stored

    def _insert_documents(self, documents: Sequence[Document], insert_kwargs: Mapping[str, Any]) -> None:
        """`insert` for many, in the way (`use_async`) that the index was made with."""
        with self._callback_manager.as_trace("index_construction"):
            hashes = _hashes(documents)
            if self._use_async:
                run_async_tasks([self._areplace(documents, hashes, insert_kwargs)])
            else:
                self._replace(documents, hashes, insert_kwargs)

    def _exchange(
        self, documents: Sequence[Document], nodes: Sequence[BaseNode], hashes: Mapping[str, str | None]
    ) -> Exchange:
        marked = with_hashes(nodes, hashes)
        self._validate_serializable(marked)
        return Exchange([document.node_id for document in documents], marked, self._admitted(marked))

    # --- what there is ----------------------------------------------------------------------------------

    def _held(self, names: Sequence[str]) -> dict[str, Held] | None:
        """What the store has of documents; None where it can't be asked."""
        if not self._vector_store.stores_text:
            infos = [self._docstore.get_ref_doc_info(name) for name in names]
            return held_of(self._docstore.get_nodes(self._present(infos), raise_error=False))
        try:
            return held_of(
                node
                for part in chunks(names, _ASKED)
                for node in self._vector_store.get_nodes(None, filters=_of_documents(part))
            )
        except NotImplementedError:
            return None

    async def _aheld(self, names: Sequence[str]) -> dict[str, Held] | None:
        if not self._vector_store.stores_text:
            infos = [await self._docstore.aget_ref_doc_info(name) for name in names]
            return held_of(await self._docstore.aget_nodes(self._present(infos), raise_error=False))
        try:
            nodes: list[BaseNode] = []
            for part in chunks(names, _ASKED):
                nodes += await ask(self._vector_store, "aget_nodes", None, filters=_of_documents(part))
            return held_of(nodes)
        except NotImplementedError:
            return None

    def _present(self, infos: Sequence[RefDocInfo | None]) -> list[str]:
        """Nodes that the docstore has of documents and the index has not deleted."""
        indexed = set(self._index_struct.nodes_dict.values())
        return [name for info in infos if info is not None for name in info.node_ids if name in indexed]


def _hashes(documents: Sequence[Document]) -> dict[str, str | None]:
    return {document.node_id: document_hash(document) for document in documents}


async def _ahashes(documents: Sequence[Document]) -> dict[str, str | None]:
    return await asyncio.to_thread(_hashes, documents)  # which reads the pictures


def _updating(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of LlamaIndex's update methods, by our names for them."""
    return {name: kwargs.get(name, {}) for name in ("insert_kwargs", "delete_kwargs")}


def _of_documents(names: Sequence[str]) -> MetadataFilters:
    return MetadataFilters(
        filters=[MetadataFilter(key="ref_doc_id", operator=FilterOperator.IN, value=list(names))]
    )
