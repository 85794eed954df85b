"""Multimodal embeddings, a reranker and a vector store for LangChain, on `umr_plugins`.

`GMEEmbeddings` embeds text, pictures, and both fused into one vector; `UMRVectorStore` keeps and searches
them; `MLLMReranker` judges what was found, and `RerankingRetriever` does both in one step.
`documents_to_content_blocks` shows what was found, pictures included, to a chat model; `document_key` lets
LangChain's `index()` notice pictures that have changed. With langchain-core 1.8 there is `JudgeModel` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_umr.content_blocks import adocuments_to_content_blocks, documents_to_content_blocks
from langchain_umr.embeddings import GMEEmbeddings
from langchain_umr.indexing import document_key
from langchain_umr.reranker import MLLMReranker
from langchain_umr.retrievers import RerankingRetriever
from langchain_umr.vectorstores import UMRVectorStore

if TYPE_CHECKING:
    from langchain_umr.decisions import JudgeModel as JudgeModel

__version__ = "0.1.0"
__all__ = [
    "GMEEmbeddings",
    "MLLMReranker",
    "RerankingRetriever",
    "UMRVectorStore",
    "adocuments_to_content_blocks",
    "document_key",
    "documents_to_content_blocks",
]


def __getattr__(name: str) -> Any:
    if name != "JudgeModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from langchain_umr.decisions import JudgeModel  # says what is needed where langchain-core is too old

    return JudgeModel
