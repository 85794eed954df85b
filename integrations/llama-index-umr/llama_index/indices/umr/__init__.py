"""An index for text, pictures, picture-with-text and PDF pages, with one retriever for all of them."""

from llama_index.indices.umr.base import MultimodalIndex
from llama_index.indices.umr.documents import KeepPictures, to_storable
from llama_index.indices.umr.retriever import MultimodalRetriever

__all__ = ["KeepPictures", "MultimodalIndex", "MultimodalRetriever", "to_storable"]
