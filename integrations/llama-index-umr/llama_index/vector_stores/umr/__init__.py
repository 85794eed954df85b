"""A LlamaIndex vector store that keeps pictures, replaces rows and survives crashes."""

from llama_index.vector_stores.umr.base import UMRVectorStore
from llama_index.vector_stores.umr.filters import where_of
from llama_index.vector_stores.umr.rows import node_of

__all__ = ["UMRVectorStore", "node_of", "where_of"]
