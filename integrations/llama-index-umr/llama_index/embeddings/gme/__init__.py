"""GME embeddings for LlamaIndex: text, pictures, and picture-with-text in one vector space."""

from llama_index.embeddings.gme.base import GMEEmbedding
from llama_index.embeddings.gme.nodes import item_of
from llama_index.embeddings.gme.pages import PageNode

__all__ = ["GMEEmbedding", "PageNode", "item_of"]
