"""Test doubles for `Embedder` and `Reranker`: deterministic, recording, without torch.

For tests of code that takes an `Encoder` or a `PairScorer` (adapters, indexes, your application). Vectors
depend on content and role only, so equal items get equal vectors and different ones nearly orthogonal ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from umr_plugins.errors import BatchError, ItemError
from umr_plugins.media.images import content_key, load_image
from umr_plugins.ranking import order
from umr_plugins.types import (
    Encoded,
    FloatArray,
    Item,
    ItemLike,
    Modality,
    OnError,
    RankedItem,
    Role,
    as_item,
    check_on_error,
)


class FakeEncoder:
    """An `Encoder` that hashes content to a unit vector.

    A query and a document of equal content get the same vector, so a search for an item's own content
    finds it first. Texts containing `"poison"` are refused, to test error paths.

    Args:
        dim: length of the vectors.
        name: part of the fingerprint; another name acts as another model.
    """

    pages = "fused"

    def __init__(self, dim: int = 16, name: str = "fake") -> None:
        self.name = name
        self._dim = dim
        self.calls: list[tuple[Role, list[Item], str | None]] = []
        """Every call as (role, items, instruction)."""

    @property
    def dim(self) -> int:
        """Length of every vector."""
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Of the name and dimension."""
        return f"{self.name}-{self._dim}"

    @property
    def modalities(self) -> frozenset[Modality]:
        """All three."""
        return frozenset({"text", "image", "fused"})

    @property
    def config(self) -> dict[str, Any]:
        """What an index records to recreate the encoder (a fake can't be recreated)."""
        return {"model": self.name}

    def count_tokens(self, text: str) -> int:
        """Words, as tokens."""
        return len(text.split())

    def encode_queries(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` of queries."""
        return self._encode("query", items, instruction, on_error)

    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` of documents."""
        return self._encode("document", items, instruction, on_error)

    def _encode(
        self, role: Role, values: Sequence[ItemLike], instruction: str | None, on_error: OnError
    ) -> FloatArray | Encoded:
        check_on_error(on_error)
        items: list[Item] = []
        vectors: list[FloatArray] = []
        kept: list[int] = []
        errors: list[ItemError] = []
        for index, value in enumerate(values):
            try:
                item = as_item(value, index)
                vectors.append(self._vector(item))
            except ItemError as error:
                errors.append(error.at(index))
                continue
            items.append(item)
            kept.append(index)
        self.calls.append((role, items, instruction))
        if errors and on_error == "raise":
            raise BatchError(errors, len(values))
        matrix = np.stack(vectors) if vectors else np.zeros((0, self._dim), np.float32)
        return matrix if on_error == "raise" else Encoded(matrix, tuple(kept), tuple(errors))

    def _vector(self, item: Item) -> FloatArray:
        if item.text and "poison" in item.text:
            raise ItemError("model", "the fake encoder refuses poison", stage="encode")
        digest = hashlib.sha256((item.text or "").encode())
        for picture in item.pictures:
            load_image(picture)
            digest.update(content_key(picture))
        seed = int.from_bytes(digest.digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(self._dim).astype(np.float32)
        return vector / np.float32(np.linalg.norm(vector))


class FakeReranker:
    """A `PairScorer` that counts: relevance is the share of the query's words that a document's text holds.

    A document with the same picture as the query is fully relevant. Texts containing `"poison"` are refused,
    to test error paths.

    Args:
        model: a name, as `Reranker` has one.
    """

    def __init__(self, model: str = "fake") -> None:
        self.model = model
        self.calls: list[tuple[Item, list[Item]]] = []
        """Every call as (query, documents)."""

    def score(self, query: ItemLike, documents: Sequence[ItemLike]) -> FloatArray:
        """Relevance `[n]`; `BatchError` names what is refused."""
        outcomes = self._judge(query, documents)[2]
        errors = [outcome for outcome in outcomes if isinstance(outcome, ItemError)]
        if errors:
            raise BatchError(errors, len(documents))
        return np.array(outcomes, np.float32)

    def rank(
        self,
        query: ItemLike,
        documents: Sequence[ItemLike],
        top_n: int | None = None,
        first_stage: Sequence[float | None] | None = None,
        weight: float | Literal["pure"] | None = None,
        explain: bool = False,
    ) -> list[RankedItem]:
        """As `Reranker.rank`."""
        asked, items, outcomes = self._judge(query, documents)
        prompts = [f"{asked.text}|{item.text}" for item in items] if explain else None
        return order(
            items,
            outcomes,
            query=asked.modality,
            top_n=top_n,
            first_stage=first_stage,
            weight=weight,
            prompts=prompts,
        )

    def _judge(
        self, query: ItemLike, documents: Sequence[ItemLike]
    ) -> tuple[Item, list[Item], list[float | ItemError]]:
        asked = as_item(query)
        items = [as_item(document, index) for index, document in enumerate(documents)]
        self.calls.append((asked, items))
        return asked, items, [self._relevance(asked, item, index) for index, item in enumerate(items)]

    def _relevance(self, query: Item, document: Item, index: int) -> float | ItemError:
        if document.text and "poison" in document.text:
            return ItemError("model", "the fake reranker refuses poison", stage="encode", index=index)
        try:
            asked, shown = ({content_key(p) for p in each.pictures} for each in (query, document))
        except ItemError as error:
            return error.at(index)
        if asked & shown:
            return 1.0
        words = set((query.text or "").lower().split())
        return len(words & set((document.text or "").lower().split())) / max(1, len(words))
