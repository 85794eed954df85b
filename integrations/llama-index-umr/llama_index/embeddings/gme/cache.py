"""Document vectors in a key-value store of LlamaIndex, by what was embedded and by which model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_index.core.storage.kvstore.types import BaseKVStore

from umr_plugins.errors import BatchError, ItemError
from umr_plugins.index.rows import content_hash
from umr_plugins.types import Encoded, Encoder, FloatArray, Item, ItemLike, OnError, as_item, check_on_error

COLLECTION = "umr_document_vectors"


class CachedEncoder:
    """An `Encoder` that asks a key-value store before it asks the model.

    The key is a hash of the text, the pictures' bytes, the instruction and the model's fingerprint, so no two
    inputs, models or options share a vector. Queries are not kept: they seldom come twice.

    Args:
        encoder: the model.
        store: where vectors are kept, as lists of numbers.
    """

    def __init__(self, encoder: Encoder, store: BaseKVStore) -> None:
        self._encoder, self._store = encoder, store

    def __getattr__(self, name: str) -> Any:
        if name == "_encoder":
            raise AttributeError(name)  # half a copy, which has no model yet
        return getattr(self._encoder, name)  # everything but documents is the model's

    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` of documents; `Encoded` with `on_error="skip"`."""
        check_on_error(on_error)
        vectors: dict[int, Any] = {}
        errors: list[ItemError] = []
        missing: list[tuple[int, Item, str | None]] = []
        for position, value in enumerate(items):
            try:
                item = as_item(value, position)
            except ItemError as error:
                errors.append(error.at(position))
                continue
            key = self._key(item, instruction)
            kept = None if key is None else self._store.get(key, collection=COLLECTION)
            if kept is None:
                missing.append((position, item, key))
            else:
                vectors[position] = kept["vector"]
        if missing:
            errors += self._encode(missing, instruction, show_progress, vectors)
        if errors and on_error == "raise":
            raise BatchError(sorted(errors, key=lambda error: error.index or 0), len(items))
        kept_positions = tuple(sorted(vectors))
        matrix = np.zeros((len(kept_positions), self._encoder.dim), np.float32)
        for row, position in enumerate(kept_positions):
            matrix[row] = vectors[position]
        return matrix if on_error == "raise" else Encoded(matrix, kept_positions, tuple(errors))

    def _encode(
        self,
        missing: list[tuple[int, Item, str | None]],
        instruction: str | None,
        show_progress: bool,
        vectors: dict[int, Any],
    ) -> list[ItemError]:
        encoded = self._encoder.encode_documents(
            [item for _, item, _ in missing], instruction, on_error="skip", show_progress=show_progress
        )
        assert isinstance(encoded, Encoded)  # what "skip" returns
        for at, vector in zip(encoded.kept, encoded.vectors, strict=True):
            position, _, key = missing[at]
            vectors[position] = vector
            if key is not None:
                self._store.put(key, {"vector": np.asarray(vector).tolist()}, collection=COLLECTION)
        return [
            ItemError(
                error.code,
                error.reason,
                stage=error.stage,
                index=missing[error.index or 0][0],
                name=error.name,
            )
            for error in encoded.errors
        ]

    def _key(self, item: Item, instruction: str | None) -> str | None:
        """None for a picture that can't be read, of which the model says what is wrong."""
        try:
            content = content_hash(item).hex()
        except ItemError:
            return None
        parts = json.dumps([self._encoder.fingerprint, instruction, content])
        return hashlib.sha256(parts.encode()).hexdigest()
