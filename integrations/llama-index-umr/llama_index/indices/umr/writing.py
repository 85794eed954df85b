"""Nodes into a store and out of it again: what is checked, replaced and remembered on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.schema import BaseNode, ImageNode, IndexNode
from llama_index.core.utils import iter_batch
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.worker import in_worker
from llama_index.indices.umr.documents import to_storable
from llama_index.indices.umr.identity import refuse_repeated
from llama_index.indices.umr.stores import ask, batch_limit, check_storable
from llama_index.vector_stores.umr import UMRVectorStore

from umr_plugins.errors import BatchError, ItemError
from umr_plugins.types import OnError

_log = logging.getLogger(__name__)


class WritingIndex(VectorStoreIndex):
    """A `VectorStoreIndex` that writes nodes as what they are, one for each id, whatever the store."""

    _embed_model: GMEEmbedding
    _on_error: OnError

    def build_index_from_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> IndexDict:
        """Embed and store `nodes`. The base class would drop those without text."""
        return self._build_index_from_nodes(nodes, **insert_kwargs)

    def _add_nodes_to_index(
        self,
        index_struct: IndexDict,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        **insert_kwargs: Any,
    ) -> None:
        for batch in iter_batch(self._admitted(nodes), self._batch_size):
            self._write(index_struct, self._get_node_with_embedding(batch, show_progress), **insert_kwargs)

    async def _async_add_nodes_to_index(
        self,
        index_struct: IndexDict,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        **insert_kwargs: Any,
    ) -> None:
        admitted = await asyncio.to_thread(self._admitted, nodes)
        for batch in iter_batch(admitted, await self._abatch_size()):
            embedded = await self._aget_node_with_embedding(batch, show_progress)
            await self._awrite(index_struct, embedded, **insert_kwargs)

    # --- before -----------------------------------------------------------------------------------------

    @property
    def _batch_size(self) -> int:
        return min(self._insert_batch_size, batch_limit(self._vector_store) or self._insert_batch_size)

    async def _abatch_size(self) -> int:
        return await in_worker("store", lambda: self._batch_size)  # a server may be asked

    def _admitted(self, nodes: Sequence[BaseNode]) -> list[BaseNode]:
        """The nodes that the store will take, before the model is asked for any of them."""
        refuse_repeated("node", nodes)
        refused: dict[int, ItemError] = {}
        for position, node in enumerate(nodes):
            try:
                check_storable(self._vector_store, node, self._embed_model)
            except ItemError as error:
                refused[position] = error.at(position)
        found = self._embed_model.refused(nodes)
        if (refused or found) and self._on_error == "raise":
            found = self._embed_model.refused(nodes, pictures=True)  # one error names everything
        refused |= {error.index or 0: error for error in found}
        errors = [refused[position] for position in sorted(refused)]
        if errors and self._on_error == "raise":
            raise BatchError(errors, len(nodes), done="stored")
        for error in errors:
            _log.warning("left out: %s", error)
        return [node for position, node in enumerate(nodes) if position not in refused]

    def _get_node_with_embedding(
        self, nodes: Sequence[BaseNode], show_progress: bool = False
    ) -> list[BaseNode]:
        return self._embed_model.embed_nodes(self._storable(nodes), show_progress, self._on_error)

    async def _aget_node_with_embedding(
        self, nodes: Sequence[BaseNode], show_progress: bool = False
    ) -> list[BaseNode]:
        storable = await asyncio.to_thread(self._storable, nodes)  # which may render pages
        return await self._embed_model.aembed_nodes(storable, show_progress, self._on_error)

    def _storable(self, nodes: Sequence[BaseNode]) -> list[BaseNode]:
        return [_whole(node, any_store=not self._keeps_all) for node in nodes]

    # --- writing ----------------------------------------------------------------------------------------

    @property
    def _keeps_all(self) -> bool:
        """Whether the store returns whole nodes, so that the docstore need not hold copies of them."""
        return isinstance(self._vector_store, UMRVectorStore) and not self._store_nodes_override

    def _write(self, index_struct: IndexDict, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Store embedded nodes, at most `_batch_size`, in place of those of the same id."""
        if not nodes:
            return
        if not isinstance(self._vector_store, UMRVectorStore):
            self._drop([node.node_id for node in nodes])  # many stores ignore an id that they have
        new_ids = self._vector_store.add(list(nodes), **insert_kwargs)
        if copies := self._remembered(index_struct, nodes, new_ids):
            self._docstore.add_documents(copies, allow_update=True)

    async def _awrite(self, index_struct: IndexDict, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        if not nodes:
            return
        if not isinstance(self._vector_store, UMRVectorStore):
            await self._adrop([node.node_id for node in nodes])
        new_ids = await ask(self._vector_store, "async_add", list(nodes), **insert_kwargs)
        if copies := self._remembered(index_struct, nodes, new_ids):
            await self._docstore.async_add_documents(copies, allow_update=True)

    def _remembered(
        self, index_struct: IndexDict, nodes: Sequence[BaseNode], new_ids: Sequence[str]
    ) -> list[BaseNode]:
        """Copies for the docstore, as LlamaIndex wants them: all nodes, or those that stores may cripple."""
        copies: list[BaseNode] = []
        if self._keeps_all:
            return copies
        everything = not self._vector_store.stores_text or self._store_nodes_override
        for node, new_id in zip(nodes, new_ids, strict=True):
            if everything or isinstance(node, ImageNode | IndexNode):
                copy = node.model_copy()
                copy.embedding = None
                index_struct.add_node(copy, text_id=new_id)
                copies.append(copy)
        return copies

    # --- deleting ---------------------------------------------------------------------------------------

    def delete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id; ids that are not there change nothing.

        Args:
            node_ids: which.
            delete_from_docstore: remove the copies in the docstore as well, where there are any.
            **delete_kwargs: for the store.
        """
        if node_ids:
            self._vector_store.delete_nodes(node_ids, **delete_kwargs)
            self._forget(node_ids, delete_from_docstore)

    async def adelete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """`delete_nodes` for coroutines."""
        if node_ids:
            await ask(self._vector_store, "adelete_nodes", node_ids, **delete_kwargs)
            await self._aforget(node_ids, delete_from_docstore)

    def _drop(self, node_ids: Sequence[str], **delete_kwargs: Any) -> None:
        # A store that can't delete by id does with it what its add does; there is no other way to ask it.
        with suppress(NotImplementedError):
            for part in iter_batch(node_ids, self._batch_size):
                self._vector_store.delete_nodes(list(part), **delete_kwargs)

    async def _adrop(self, node_ids: Sequence[str], **delete_kwargs: Any) -> None:
        with suppress(NotImplementedError):
            for part in iter_batch(node_ids, await self._abatch_size()):
                await ask(self._vector_store, "adelete_nodes", list(part), **delete_kwargs)

    def _forget(self, node_ids: Sequence[str], from_docstore: bool) -> None:
        for node_id in node_ids:
            self._index_struct.nodes_dict.pop(node_id, None)
            if from_docstore:
                self._docstore.delete_document(node_id, raise_error=False)
        self._storage_context.index_store.add_index_struct(self._index_struct)

    async def _aforget(self, node_ids: Sequence[str], from_docstore: bool) -> None:
        for node_id in node_ids:
            self._index_struct.nodes_dict.pop(node_id, None)
            if from_docstore:
                await self._docstore.adelete_document(node_id, raise_error=False)
        await self._storage_context.index_store.async_add_index_struct(self._index_struct)


def _whole(node: BaseNode, any_store: bool) -> BaseNode:
    try:
        return to_storable(node, any_store)
    except ItemError:
        return node.model_copy()  # the embedding model collects what is wrong with any of them
