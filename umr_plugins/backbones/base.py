"""What passes between the encoding engine and a model family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from umr_plugins.backbones.spec import ModelSpec
    from umr_plugins.errors import ItemError
    from umr_plugins.types import Item, Modality, Role

Grid = tuple[int, int]
"""Patches of a picture as (rows, columns), before merging."""


@dataclass(frozen=True)
class Picture:
    """A picture, or two frames of a video, in the layout its family takes, uint8.

    Args:
        patches: Qwen-VL: `[rows * columns, 3 * patch * patch]` in the model's own order, twice as wide for
            two frames; LLaVA-NeXT: one tile `[side, side, 3]`.
        grid: patches as (rows, columns).
    """

    patches: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True)
class Input:
    """One item on its way into a model: its pictures are cut, its text is not yet tokenised.

    Args:
        text: user text, maybe empty.
        pictures: in order.
        instruction: what fills the template's slot; None for the form without one.
        role: queries and documents may be written differently.
        video: pairs of frames, in order.
        frames: how many frames those are.
    """

    text: str
    pictures: tuple[Picture, ...]
    instruction: str | None
    role: Role
    video: tuple[Picture, ...] = ()
    frames: int = 0


@dataclass(frozen=True)
class Prepared:
    """One model-ready item.

    Args:
        ids: token ids `[length]`, picture slots expanded.
        positions: rotary positions `[3, length]` (time, row, column).
        pictures: frames and pictures in the order of their slots.
        truncated: whether text was cut to fit `max_length`.
        pooled_from: first position that takes part in pooling, for families that pool over positions.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    pictures: tuple[Picture, ...] = field(default=())
    truncated: bool = False
    pooled_from: int = 0

    @property
    def length(self) -> int:
        """Tokens, visual ones included."""
        return len(self.ids)


class Backbone(Protocol):
    """A loaded checkpoint of one family. Not thread-safe but for `picture`: the engine's worker owns it."""

    spec: ModelSpec
    model: Any
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

    def video(self, frames: Sequence[Any]) -> tuple[Picture, ...]:
        """Decode, resize and cut the frames of one video, in pairs. Called from several threads."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without template."""
        ...

    def prepare(self, inputs: list[Input]) -> list[Prepared | ItemError]:
        """Tokenise and put together template, instruction, pictures and text, cutting only text.

        No added token is recognised in user text. An input that can't fit is an `ItemError` in its place.
        """
        ...

    def forward(self, items: list[Prepared]) -> torch.Tensor:
        """Pooled last hidden states `[n, hidden]` in float32, not normalised."""
        ...
