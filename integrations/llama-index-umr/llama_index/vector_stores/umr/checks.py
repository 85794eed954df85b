"""What is wrong with nodes on their way into `UMRVectorStore`, by the names of the nodes."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.schema import BaseNode
from llama_index.embeddings.gme.checks import check_vector
from llama_index.embeddings.gme.nodes import name_of
from llama_index.vector_stores.umr.rows import Row, row_of

from umr_plugins.errors import BatchError, FingerprintError, InputError, ItemError
from umr_plugins.index.rows import check_metadata


def check_metadata_of(node: BaseNode) -> None:
    """Make sure that a node's metadata can be kept.

    Raises:
        ItemError: names the node and the key.
    """
    try:
        check_metadata(node.metadata, 0)
    except InputError as error:
        reason = str(error).replace("metadata 0", "its metadata", 1)
        raise ItemError("unsupported", reason, stage="store", name=name_of(node)) from None


def rows_of(nodes: Sequence[BaseNode]) -> list[Row]:
    """The rows of nodes that have their vector.

    Raises:
        BatchError: nodes without a useful vector or with metadata that can't be kept, and as `row_of`.
    """
    rows: list[Row] = []
    errors: list[ItemError] = []
    for position, node in enumerate(nodes):
        try:
            if node.embedding is None:
                raise ItemError(
                    "empty",
                    "the node has no vector; embed it first (GMEEmbedding().embed_nodes)",
                    stage="store",
                    name=name_of(node),
                )
            check_vector(node)
            check_metadata_of(node)
            rows.append(row_of(node))
        except ItemError as error:
            errors.append(error.at(position))
    if errors:
        raise BatchError(errors, len(nodes))
    return rows


def check_lengths(nodes: Sequence[BaseNode], dim: int | None) -> None:
    """Make sure that all vectors are as long as the store's, or as the first where the store is empty.

    Raises:
        FingerprintError: names the node.
    """
    expected = dim or len(nodes[0].get_embedding())
    for node in nodes:
        found = len(node.get_embedding())
        if found != expected:
            raise FingerprintError(
                f"{name_of(node)} has a vector of {found} numbers; those of the store have {expected}"
            )
