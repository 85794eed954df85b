"""Turns items into ledger-ready vectors: checked, of the right length, duplicates encoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from umr_plugins.errors import FingerprintError, InputError, ItemError
from umr_plugins.index.rows import unit_rows
from umr_plugins.types import Encoded, Encoder, FloatArray, Item

Known = Callable[[Sequence[bytes]], Mapping[bytes, bytes]]


def document_vectors(
    encoder: Callable[[], Encoder],
    items: Sequence[Item],
    contents: Sequence[bytes],
    known: Known,
    show_progress: bool = False,
) -> list[bytes | ItemError]:
    """For each item its vector as bytes, or why there is none.

    Args:
        encoder: called only when something has to be encoded.
        items: what to embed.
        contents: the content hash of each.
        known: looks up vectors that were made before, by content hash.
        show_progress: a progress bar of the encoder.
    """
    done: dict[bytes, bytes | ItemError] = dict(known(contents))
    first: dict[bytes, int] = {}
    for at, content in enumerate(contents):
        if content not in done:
            first.setdefault(content, at)
    if first:
        made = _encoded(encoder(), [items[at] for at in first.values()], show_progress)
        done.update(zip(first, made, strict=True))
    return [done[content] for content in contents]


def _encoded(encoder: Encoder, items: list[Item], show_progress: bool) -> list[bytes | ItemError]:
    result = encoder.encode_documents(items, on_error="skip", show_progress=show_progress)
    if not isinstance(result, Encoded):
        result = Encoded(np.asarray(result), tuple(range(len(items))))
    if len(result.vectors) != len(result.kept):
        raise InputError(f"the encoder returned {len(result.vectors)} vectors for {len(result.kept)} items")
    found: dict[int, bytes | ItemError] = {
        error.index: error for error in result.errors if error.index is not None
    }
    if len(result.kept):
        matrix = checked_matrix(result.vectors, encoder.dim)
        for at, vector in zip(result.kept, matrix, strict=True):
            found[at] = vector_bytes(vector) if np.isfinite(vector[0]) else _useless()
    lost = ItemError("model", "the encoder returned neither a vector nor an error", stage="encode")
    return [found.get(at, lost) for at in range(len(items))]


def _useless() -> ItemError:
    return ItemError(
        "model", "the model's vector is zero or not finite; try the model in float32", stage="encode"
    )


def checked_matrix(vectors: Any, dim: int | None) -> FloatArray:
    """Unit rows `[n, dim]`; rows that can't be are NaN.

    Raises:
        InputError: not a matrix of numbers.
        FingerprintError: another dimension than the index has.
    """
    try:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            matrix = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError("vectors must be an array [n, dim] of numbers") from error
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise InputError(f"vectors must be an array [n, dim], got the shape {list(matrix.shape)}")
    if dim is not None and matrix.shape[1] != dim:
        raise wrong_dim(dim, matrix.shape[1])
    return unit_rows(matrix)


def wrong_dim(dim: int, got: int) -> FingerprintError:
    """The error for vectors of another length."""
    return FingerprintError(
        f"the vectors of this index have {dim} dimensions, these have {got}. Use the model and `dim` that "
        "it was made with (umr info --db), or make a new index"
    )


def vector_bytes(vector: FloatArray) -> bytes:
    """As the ledger keeps it."""
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def query_vector(vector: Any, dim: int | None) -> FloatArray:
    """One checked unit vector `[dim]` to search with.

    Raises:
        InputError: not a finite, non-zero vector. Chroma would answer such a query arbitrarily.
        FingerprintError: another dimension than the index has.
    """
    try:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            array = np.asarray(vector, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError("a query vector must be a list or array of numbers") from error
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or not array.size:
        raise InputError(f"a query vector has the shape [dim], got {list(array.shape)}")
    unit: FloatArray = checked_matrix(array[None], dim)[0]
    if not np.isfinite(unit[0]):
        raise InputError(
            "the query vector is zero or holds NaN or infinity; no neighbour of it is meaningful"
        )
    return unit
