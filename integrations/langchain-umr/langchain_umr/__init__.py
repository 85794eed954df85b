"""Multimodal embeddings and a vector store for LangChain, on `umr_plugins`.

`GMEEmbeddings` embeds text, pictures, and both fused into one vector; `UMRVectorStore` keeps and searches
them.
"""

from langchain_umr.embeddings import GMEEmbeddings
from langchain_umr.vectorstores import UMRVectorStore

__version__ = "0.1.0"
__all__ = ["GMEEmbeddings", "UMRVectorStore"]
