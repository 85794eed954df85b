"""The same index, asked through LlamaIndex and LangChain, each with its adapter's own classes.

The one place of the core package that knows of the adapters: the demo shows that all three give one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from umr_plugins.types import Encoder, Item

Search: TypeAlias = Callable[[Item, int], list[str]]
"""A query and the number of answers → ids, best first."""


@dataclass(frozen=True)
class Framework:
    """A framework to compare with the core.

    Args:
        name: the framework and its class.
        distribution: what to install.
        open: opens the index folder with an encoder, as a context; ImportError when the adapter is not
            installed.
    """

    name: str
    distribution: str
    open: Callable[[Path, Encoder], AbstractContextManager[Search]]


@contextmanager
def open_llama_index(db: Path, encoder: Encoder) -> Iterator[Search]:
    """Search through `MultimodalIndex` and its retriever."""
    from llama_index.embeddings.gme import GMEEmbedding
    from llama_index.indices.umr import MultimodalIndex

    model = GMEEmbedding(encoder=encoder)
    index = MultimodalIndex(path=db, embed_model=model)

    def search(item: Item, k: int) -> list[str]:
        retriever = index.as_retriever(similarity_top_k=k)
        return [found.node.node_id for found in retriever.retrieve(model.as_query(item.text, item.image))]

    with closing(index.vector_store.client):
        yield search


@contextmanager
def open_langchain(db: Path, encoder: Encoder) -> Iterator[Search]:
    """Search through `UMRVectorStore` and its retriever."""
    from langchain_umr import GMEEmbeddings, UMRVectorStore

    store = UMRVectorStore(embedding=GMEEmbeddings.from_encoder(encoder), path=db)

    def search(item: Item, k: int) -> list[str]:
        retriever = store.as_retriever(search_kwargs={"k": k})
        found = retriever.invoke({"text": item.text, "image": item.image})
        return [document.id or "" for document in found]

    with closing(store):
        yield search


FRAMEWORKS = (
    Framework("LlamaIndex MultimodalIndex", "llama-index-umr", open_llama_index),
    Framework("LangChain UMRVectorStore", "langchain-umr", open_langchain),
)
"""What the demo compares with the core."""
