"""The retriever for queries of text, picture or both."""

from __future__ import annotations

from dataclasses import replace

from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.embeddings.gme import GMEEmbedding


class MultimodalRetriever(VectorIndexRetriever):
    """Finds nodes of any kind for a query of any kind.

    `retrieve` takes a string, a `QueryBundle` with text, `image_path` or both, or what
    `GMEEmbedding.as_query` returns. Stock retrievers ignore `image_path`, and answer an empty query with
    arbitrary nodes; this one embeds the picture, and raises `InputError`.
    """

    _embed_model: GMEEmbedding

    # Parameter names must be those of the base class, which passes them by keyword.

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._needs_embedding():
            vector = self._embed_model.get_query_bundle_embedding(query_bundle)
            query_bundle = replace(query_bundle, embedding=vector)
        return self._get_nodes_with_embeddings(query_bundle)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._needs_embedding():
            vector = await self._embed_model.aget_query_bundle_embedding(query_bundle)
            query_bundle = replace(query_bundle, embedding=vector)
        return await self._aget_nodes_with_embeddings(query_bundle)
