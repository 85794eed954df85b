"""What passes between the encoding engine and a model family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from umr_plugins.backbones.registry import ModelSpec
    from umr_plugins.types import Item, Modality

Grid = tuple[int, int]
"""Patches of a picture as (rows, columns), before merging."""


@dataclass(frozen=True)
class Picture:
    """A picture cut to patches: uint8 `[rows * columns, 3 * patch * patch]` in the model's own order."""

    patches: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True)
class Prepared:
    """One model-ready item.

    Args:
        ids: token ids `[length]`, picture slots expanded.
        positions: rotary positions `[3, length]` (time, row, column).
        pictures: in the order of their slots.
        truncated: whether text was cut to fit `max_length`.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    pictures: tuple[Picture, ...] = field(default=())
    truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens, visual ones included."""
        return len(self.ids)


class Backbone(Protocol):
    """A loaded checkpoint of one family. Not thread-safe but for `picture`: the engine's worker owns it."""

    spec: ModelSpec
    hidden_size: int
    modalities: frozenset[Modality]

    @property
    def vocabulary_hash(self) -> str:
        """Changes with the tokenizer, for the fingerprint."""
        ...

    def check(self, item: Item) -> None:
        """Raise `ItemError` for an item the family was not trained on (several pictures, video, …)."""
        ...

    def picture(self, source: Any) -> Picture:
        """Decode, resize and cut one picture. Called from several threads."""
        ...

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of user text: no added token is ever recognised, nothing is cut."""
        ...

    def compose(self, text: list[int], pictures: tuple[Picture, ...], instruction: list[int]) -> Prepared:
        """Put the fixed template, the instruction, pictures and text together, cutting only text."""
        ...

    def forward(self, items: list[Prepared]) -> torch.Tensor:
        """Pooled last hidden states `[n, hidden]` in float32, not normalised."""
        ...
