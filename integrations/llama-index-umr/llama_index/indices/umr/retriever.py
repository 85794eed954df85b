"""The retriever for queries of text, picture or both."""

from __future__ import annotations

from dataclasses import replace

from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.worker import in_worker
from llama_index.indices.umr.stores import on_loop

from umr_plugins.index.encode import query_vector


class MultimodalRetriever(VectorIndexRetriever):
    """Finds nodes of any kind for a query of any kind.

    `retrieve` takes a string, a `QueryBundle` with text, `image_path` or both, or what
    `GMEEmbedding.as_query` returns. Stock retrievers ignore `image_path`, and answer an empty query with
    arbitrary nodes; this one embeds the picture, and raises `InputError`. Empty `node_ids` or `doc_ids` find
    nothing, in any store.
    """

    _embed_model: GMEEmbedding

    # Parameter names must be those of the base class, which passes them by keyword.

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._nothing_allowed():
            return []
        if self._needs_embedding():
            vector = self._embed_model.get_query_bundle_embedding(query_bundle)
            query_bundle = self._with_vector(query_bundle, vector)
        return self._get_nodes_with_embeddings(query_bundle)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._nothing_allowed():
            return []
        if self._needs_embedding():
            vector = await self._embed_model.aget_query_bundle_embedding(query_bundle)
            query_bundle = self._with_vector(query_bundle, vector)
        if on_loop(self._vector_store, "aquery"):
            return await in_worker("store", self._get_nodes_with_embeddings, query_bundle)
        return await self._aget_nodes_with_embeddings(query_bundle)

    def _nothing_allowed(self) -> bool:
        return self._node_ids == [] or self._doc_ids == []

    def _with_vector(self, query_bundle: QueryBundle, vector: list[float]) -> QueryBundle:
        query_vector(vector, self._embed_model.encoder.dim)  # other stores answer a useless one with anything
        return replace(query_bundle, embedding=vector)
