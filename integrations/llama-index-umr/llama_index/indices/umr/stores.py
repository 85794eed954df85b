"""Other vector stores: what they can't take, found out before anything is embedded; how they are asked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.checks import check_vector
from llama_index.embeddings.gme.nodes import name_of
from llama_index.embeddings.gme.worker import in_worker
from llama_index.vector_stores.umr import UMRVectorStore
from llama_index.vector_stores.umr.checks import check_metadata_of
from llama_index.vector_stores.umr.rows import row_of

from umr_plugins.errors import FingerprintError, ItemError

_SYNC = {
    "async_add": "add",
    "adelete": "delete",
    "adelete_nodes": "delete_nodes",
    "aget_nodes": "get_nodes",
    "aquery": "query",
}
_CHROMA_KEY = "chroma:document"  # Chroma's own, which it refuses in metadata


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


def check_storable(store: BasePydanticVectorStore, node: BaseNode, embedding: GMEEmbedding) -> None:
    """Make sure that a store takes a node's metadata, and a vector that the node brings.

    Many stores can replace a node only by deleting the old one first, which a refusal after that would lose.

    Raises:
        ItemError: names the node and the key.
    """
    if isinstance(store, UMRVectorStore):
        check_metadata_of(node)
        row_of(node)
        return
    if node.embedding is not None:
        check_vector(node, embedding.encoder.dim)
        _check_unit(store, node)
    if getattr(store, "flat_metadata", False):
        _check_flat(store, node)


async def ask(store: BasePydanticVectorStore, method: str, *args: Any, **options: Any) -> Any:
    """Await a store's coroutine; one that would do the work on the event loop does it in a thread instead."""
    if on_loop(store, method):
        return await in_worker("store", getattr(store, _SYNC[method]), *args, **options)
    return await getattr(store, method)(*args, **options)


def on_loop(store: BasePydanticVectorStore, method: str) -> bool:
    """Whether a coroutine of a store is LlamaIndex's own, which just calls the method without `a`."""
    return getattr(type(store), method) is getattr(BasePydanticVectorStore, method)


def batch_limit(store: BasePydanticVectorStore) -> int | None:
    """Most nodes that a store takes in one call, if it says so (Chroma's does, and fails beyond)."""
    limit = getattr(getattr(_collection(store), "_client", None), "get_max_batch_size", None)
    return None if limit is None else int(limit())


def _check_flat(store: BasePydanticVectorStore, node: BaseNode) -> None:
    for what, text in (("id", node.node_id), ("text", node.get_content(MetadataMode.NONE))):
        if not _is_utf8(text):
            raise ItemError(
                "unsupported", f"its {what} is not valid Unicode (UTF-8)", stage="store", name=name_of(node)
            )
    for key, value in node.metadata.items():
        if not isinstance(key, str):
            reason = f"the metadata key {key!r} is no string"
        elif key in ("", _CHROMA_KEY):
            reason = f"the metadata key {key!r} is one that Chroma refuses"
        elif not _is_utf8(key) or (isinstance(value, str) and not _is_utf8(value)):
            reason = f"the metadata of {key!r} is not valid Unicode (UTF-8)"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            reason = f"the metadata value of {key!r} is outside 64 bits; write it as a string"
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


def _check_unit(store: BasePydanticVectorStore, node: BaseNode) -> None:
    collection, length = _collection(store), float(np.linalg.norm(node.get_embedding()))
    hnsw = {} if collection is None else (collection.configuration_json.get("hnsw") or {})
    if hnsw.get("space", "cosine") != "cosine" and abs(length - 1) > 1e-3:
        raise ItemError(
            "unsupported",
            f"the node brings a vector of length {length:.3g}, which a Chroma collection of space "
            f"{hnsw['space']!r} ranks wrongly; divide it by its length",
            stage="store",
            name=name_of(node),
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
