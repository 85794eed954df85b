"""What passes between the encoding engine and a model family."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from umr_plugins.backbones.features import Features
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

    @cached_property
    def key(self) -> bytes:
        """Equal for equal pixels in an equal grid, whatever file they came from."""
        digest = hashlib.sha256(repr((self.grid, self.patches.shape)).encode())
        digest.update(np.ascontiguousarray(self.patches).data)
        return digest.digest()


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: words of the template, words of a user, or a picture.

    Args:
        text: the words.
        fixed: whether they are the template's, so that added tokens in them are recognised.
        picture: a picture instead of words.
    """

    text: str = ""
    fixed: bool = False
    picture: Picture | None = None


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
        max_length: tokens of the whole input, where it is less than the model's own limit.
    """

    text: str
    pictures: tuple[Picture, ...]
    instruction: str | None
    role: Role
    video: tuple[Picture, ...] = ()
    frames: int = 0
    max_length: int | None = None


@dataclass(frozen=True)
class Prepared:
    """One model-ready item.

    Args:
        ids: token ids `[length]`, picture slots expanded.
        positions: rotary positions `[3, length]` (time, row, column).
        pictures: frames and pictures in the order of their slots.
        truncated: whether text was cut to fit `max_length`.
        pooled_from: first position that takes part in pooling, for families that pool over positions.
        spans: of prompts, each picture's tokens as (first, one past the last).
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    pictures: tuple[Picture, ...] = field(default=())
    truncated: bool = False
    pooled_from: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        """Tokens, visual ones included."""
        return len(self.ids)


class Backbone(Protocol):
    """A loaded checkpoint of one family. Not thread-safe but for `picture`: the engine's worker owns it."""

    spec: ModelSpec
    model: Any
    device: torch.device
    hidden_size: int
    modalities: frozenset[Modality]

    @property
    def vocabulary_hash(self) -> str:
        """Changes with the tokenizer, for the fingerprint."""
        ...

    @property
    def added_tokens(self) -> frozenset[str]:
        """Names of the tokenizer's added tokens."""
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

    def single_tokens(self, word: str, *, blank: bool) -> set[int]:
        """Ids of the tokens that are a word alone; with `blank` also with a blank before it."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without template."""
        ...

    def prepare(self, inputs: list[Input]) -> list[Prepared | ItemError]:
        """Tokenise and put together template, instruction, pictures and text, cutting only text.

        No added token is recognised in user text. An input that can't fit is an `ItemError` in its place.
        """
        ...

    def prompt(self, pieces: Sequence[Piece]) -> Prepared:
        """Put a prompt together, of any length; only template pieces can hold added tokens."""
        ...

    def cut(self, text: str, count: int) -> str:
        """The text without its last `count` tokens, shorter by a character at least."""
        ...

    def features(self, pictures: list[Picture]) -> list[Features]:
        """What the vision tower makes of pictures, in order, computed anew."""
        ...

    def inputs(
        self, items: list[Prepared], features: Sequence[Features] | None = None, *, packed: bool = False
    ) -> dict[str, Any]:
        """Keywords for the language model: embeddings with pictures set in, padded right, and positions.

        Args:
            items: prepared.
            features: of all their pictures, in order; computed, or taken from the cache, if not given.
            packed: end to end in one row instead of padded, once `use_packing` said yes.
        """
        ...

    def forward(self, items: list[Prepared]) -> torch.Tensor:
        """Pooled last hidden states `[n, hidden]` in float32, not normalised."""
        ...

    def pooled(
        self, items: list[Prepared], features: Sequence[Features] | None = None, *, packed: bool = False
    ) -> torch.Tensor:
        """As `forward`, but with gradient where the caller wants one; arguments as `inputs`."""
        ...

    def use_packing(self) -> bool:
        """Prepare the language model for packed rows; False where the family can't take them."""
        ...
