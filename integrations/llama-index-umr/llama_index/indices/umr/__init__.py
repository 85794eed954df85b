"""An index for text, pictures, picture-with-text and PDF pages, with a retriever and engines for them."""

from llama_index.indices.umr.base import MultimodalIndex
from llama_index.indices.umr.chat import MultimodalChatEngine
from llama_index.indices.umr.documents import KeepPictures, to_storable
from llama_index.indices.umr.query_engine import MultimodalQueryEngine
from llama_index.indices.umr.retriever import MultimodalRetriever

__all__ = [
    "KeepPictures",
    "MultimodalChatEngine",
    "MultimodalIndex",
    "MultimodalQueryEngine",
    "MultimodalRetriever",
    "to_storable",
]
