"""Multimodal embeddings, a reranker and a vector store for LangChain, on `umr_plugins`.

`GMEEmbeddings` embeds text, pictures, and both fused into one vector; `UMRVectorStore` keeps and searches
them; `MLLMReranker` judges what was found, and `RerankingRetriever` does both in one step.
"""

from langchain_umr.embeddings import GMEEmbeddings
from langchain_umr.reranker import MLLMReranker
from langchain_umr.retrievers import RerankingRetriever
from langchain_umr.vectorstores import UMRVectorStore

__version__ = "0.1.0"
__all__ = ["GMEEmbeddings", "MLLMReranker", "RerankingRetriever", "UMRVectorStore"]
