"""Any LangChain `Embeddings` as an `Encoder` of the core."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from langchain_core.embeddings import Embeddings

from umr_plugins.errors import BatchError, ItemError
from umr_plugins.types import (
    Encoded,
    FloatArray,
    Item,
    ItemLike,
    Modality,
    OnError,
    Role,
    as_item,
    check_on_error,
)

_MODEL_FIELDS = ("model", "model_name", "model_id", "deployment", "revision", "dimensions", "size")


class TextEncoder:
    """An `Encoder` that lets a text-only `Embeddings` work under our index.

    Vectors are scaled to unit length. Pictures are refused. The fingerprint is made of the class and of the
    model's name as far as the object tells it, since LangChain has no notion of a model's identity.

    Args:
        embeddings: any LangChain embeddings.
    """

    pages = "text"

    def __init__(self, embeddings: Embeddings) -> None:
        self.embeddings = embeddings
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """Length of every vector; found by embedding one word, since LangChain does not tell it."""
        if self._dim is None:
            self._dim = len(self.embeddings.embed_query("dimension"))
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Of the class, its module, the model's name and its options."""
        kind = type(self.embeddings)
        parts = [kind.__module__, kind.__qualname__]
        for name in _MODEL_FIELDS:
            value = getattr(self.embeddings, name, None)
            if isinstance(value, str | int):
                parts.append(f"{name}={value}")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def modalities(self) -> frozenset[Modality]:
        """Text only."""
        return frozenset({"text"})

    def count_tokens(self, text: str) -> int:
        """A generous estimate: words, or a token per four characters where there are few blanks."""
        return max(len(text.split()), len(text) // 4)

    def encode_queries(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` through `embed_query`; LangChain knows no instruction, so one is refused."""
        return self._encode("query", items, instruction, on_error)

    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` through one call of `embed_documents`."""
        return self._encode("document", items, instruction, on_error)

    def _encode(
        self, role: Role, values: Sequence[ItemLike], instruction: str | None, on_error: OnError
    ) -> FloatArray | Encoded:
        check_on_error(on_error)
        texts: list[str] = []
        kept: list[int] = []
        errors: list[ItemError] = []
        for index, value in enumerate(values):
            try:
                texts.append(self._text(as_item(value), instruction))
                kept.append(index)
            except ItemError as error:
                errors.append(error.at(index))
        if errors and on_error == "raise":
            raise BatchError(errors, len(values))
        vectors = self._vectors(role, texts)
        return vectors if on_error == "raise" else Encoded(vectors, tuple(kept), tuple(errors))

    def _text(self, item: Item, instruction: str | None) -> str:
        name = type(self.embeddings).__name__
        if item.modality != "text" or item.text is None:
            raise ItemError(
                "unsupported",
                f"{name} embeds text only and this item has a picture; use GMEEmbeddings for pictures",
            )
        if instruction or item.instruction:
            raise ItemError("unsupported", f"{name} takes no instruction; write it into the text")
        return item.text

    def _vectors(self, role: Role, texts: list[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        if role == "query":
            raw = [self.embeddings.embed_query(text) for text in texts]
        else:
            raw = self.embeddings.embed_documents(texts)
        name = type(self.embeddings).__name__
        if len(raw) != len(texts):
            raise ItemError("model", f"{name} gave {len(raw)} vectors for {len(texts)} texts", stage="encode")
        matrix = np.asarray(raw, dtype=np.float64)
        lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise ItemError("model", f"{name} gave a vector that is zero or not finite", stage="encode")
        self._dim = matrix.shape[1]
        unit: FloatArray = (matrix / lengths).astype(np.float32)
        return unit
