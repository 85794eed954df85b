"""The stores that everything has to work over, each empty and in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.umr import UMRVectorStore


def own(gme: GMEEmbedding, folder: Path) -> UMRVectorStore:
    """`UMRVectorStore`; a second call opens it again."""
    return UMRVectorStore(gme, path=folder / "own")


def chroma(gme: GMEEmbedding, folder: Path, space: str = "cosine") -> ChromaVectorStore:
    """LlamaIndex's `ChromaVectorStore`; a second call opens it again."""
    client = chromadb.PersistentClient(str(folder / "chroma"))
    collection = client.get_or_create_collection(
        "papers", configuration={"hnsw": {"space": space}}, embedding_function=None
    )
    return ChromaVectorStore(chroma_collection=collection)


class FlatStore(BasePydanticVectorStore):
    """Keeps a node as stock stores such as Chroma's do: its text, and flat metadata with the node as JSON.

    It can neither list nodes nor delete them by id.
    """

    stores_text: bool = True
    rows: dict[str, Any] = {}  # noqa: RUF012  # a pydantic field

    @property
    def client(self) -> None:
        return None

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        for node in nodes:
            metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=True)
            text = node.get_content(MetadataMode.NONE)
            self.rows[node.node_id] = (node.get_embedding(), metadata, text)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        self.rows = {key: row for key, row in self.rows.items() if row[1]["document_id"] != ref_doc_id}

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        assert query.node_ids is None  # would hide every text from stores that read it
        scored = sorted(((np.dot(row[0], query.query_embedding), key) for key, row in self.rows.items()))
        best = scored[::-1][: query.similarity_top_k]
        return VectorStoreQueryResult(
            nodes=[metadata_dict_to_node(self.rows[key][1], text=self.rows[key][2]) for _, key in best],
            similarities=[score for score, _ in best],
            ids=[key for _, key in best],
        )


STORES = {"own": own, "chroma": chroma}
