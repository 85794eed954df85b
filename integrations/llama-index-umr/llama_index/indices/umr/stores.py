"""What a vector store can't take, found out before anything is embedded for it."""

from __future__ import annotations

import math
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.nodes import name_of
from llama_index.vector_stores.umr import UMRVectorStore
from llama_index.vector_stores.umr.checks import check_metadata_of

from umr_plugins.errors import FingerprintError, ItemError


def check_dim(store: BasePydanticVectorStore, embedding: GMEEmbedding) -> None:
    """Make sure that a filled store's vectors are as long as the model's.

    `UMRVectorStore` checks the model itself. Of other stores, Chroma's and LlamaIndex's simple one say how
    long their vectors are. Chroma's distances `l2`, `cosine` and `ip` rank vectors of length 1 alike, so each
    of them is fine.

    Raises:
        FingerprintError: they are not; names the store.
    """
    name, found = _filled(store)
    if found is not None and found != embedding.encoder.dim:
        raise FingerprintError(
            f"{name} holds vectors of {found} numbers, and {embedding.model_name!r} makes "
            f"{embedding.encoder.dim}; use the model and options it was made with, or an empty collection"
        )


def check_storable(store: BasePydanticVectorStore, node: BaseNode) -> None:
    """Make sure that a store takes a node's metadata.

    Raises:
        ItemError: names the node and the key.
    """
    if isinstance(store, UMRVectorStore):
        check_metadata_of(node)
    elif getattr(store, "flat_metadata", False):
        _check_flat(store, node)


def batch_limit(store: BasePydanticVectorStore) -> int | None:
    """Most nodes that a store takes in one call, if it says so (Chroma's does, and fails beyond)."""
    limit = getattr(getattr(_collection(store), "_client", None), "get_max_batch_size", None)
    return None if limit is None else int(limit())


def _check_flat(store: BasePydanticVectorStore, node: BaseNode) -> None:
    for key, value in node.metadata.items():
        if not isinstance(key, str):
            reason = f"the metadata key {key!r} is no string"
        elif isinstance(value, float) and not math.isfinite(value):
            reason = f"the metadata value of {key!r} is {value!r}; only finite numbers can be kept"
        elif not isinstance(value, str | int | float | None):
            reason = (
                f"the metadata value of {key!r} is a {type(value).__name__}; {type(store).__name__} takes "
                "strings, numbers, booleans and None (write it as JSON, or use UMRVectorStore)"
            )
        else:
            continue
        raise ItemError("unsupported", reason, stage="store", name=name_of(node))


def _filled(store: BasePydanticVectorStore) -> tuple[str, int | None]:
    """Name of a store and length of the vectors in it, None where it is empty or does not say."""
    if isinstance(store, SimpleVectorStore):
        vectors = store.data.embedding_dict.values()
        return "the SimpleVectorStore", next((len(vector) for vector in vectors), None)
    collection = _collection(store)
    if collection is None:
        return type(store).__name__, None
    rows = collection.get(limit=1, include=["embeddings"])["embeddings"]
    return f"the Chroma collection {collection.name!r}", len(rows[0]) if len(rows) else None


def _collection(store: BasePydanticVectorStore) -> Any:
    """Chroma's collection behind a stock `ChromaVectorStore`; the package itself need not be there."""
    return store.client if store.class_name() == "ChromaVectorStore" else None
