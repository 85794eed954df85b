"""What goes in and what comes out: items, encoded batches, hits, and the two protocols.

One item gives exactly one vector; an item with picture and text is fused into one. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from umr_plugins.errors import InputError, ItemError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FloatArray: TypeAlias = "NDArray[np.float32]"
"""Vectors; a name in quotes, so that importing the package imports no numpy."""

Modality = Literal["text", "image", "fused"]
Role = Literal["query", "document"]
OnError = Literal["raise", "skip"]
PagesMode = Literal["image", "fused", "text"]
"""What a PDF page is embedded as: its picture, picture and text layer, or text layer."""


@dataclass(frozen=True)
class PageImage:
    """The picture of one page of a PDF file: `page` counts from 1."""

    path: Path
    page: int


@dataclass(frozen=True)
class TarImage:
    """A picture inside an uncompressed tar file: `member` is its name in there."""

    path: Path
    member: str


ImageSource: TypeAlias = "Image | Path | bytes | str | PageImage | TarImage"
"""A picture: `PIL.Image`, path, encoded bytes, or a string that is a path or a data URI."""


@dataclass(frozen=True)
class Item:
    """One thing to embed: text, a picture, or both (fused into one vector).

    Args:
        text: plain text, never a path.
        image: one picture.
        images: several pictures, for model families trained on them; use `image` for one.
        video: sampled frames, for model families trained on them.
        instruction: overrides the call's instruction for this item (queries only).
    """

    text: str | None = None
    image: ImageSource | None = None
    images: tuple[ImageSource, ...] = ()
    video: tuple[ImageSource, ...] = ()
    instruction: str | None = None

    @property
    def pictures(self) -> tuple[ImageSource, ...]:
        """`image` or `images`, as one tuple."""
        return (self.image,) if self.image is not None else self.images

    @property
    def modality(self) -> Modality:
        """`"text"`, `"image"` or `"fused"`."""
        if not self.pictures and not self.video:
            return "text"
        return "fused" if self.text else "image"


ItemLike: TypeAlias = "Item | str | Mapping[str, Any] | Image | Path | PageImage | TarImage"

_FIELDS = ("text", "image", "images", "video", "instruction")


def as_item(value: object, index: int | None = None) -> Item:
    """Read `value` as an `Item` and check its form (pictures are not opened).

    A `str` is text, never a path. A `Path`, `PageImage`, `TarImage` or `PIL.Image` is a picture. A mapping
    has the fields of `Item`. Lone surrogates in the text become U+FFFD, since no tokenizer or store takes
    them.

    Raises:
        ItemError: `unsupported` for another type, an unknown field or both `image` and `images`; `empty`
            when there is neither text nor picture.
    """
    if isinstance(value, Item):
        item = value
    elif isinstance(value, str):
        item = Item(text=value)
    elif isinstance(value, Mapping):
        item = _from_mapping(value, index)
    elif isinstance(value, Path | PageImage | TarImage) or _is_pil(value):
        item = Item(image=value)  # type: ignore[arg-type]  # _is_pil has no TypeGuard without importing PIL
    else:
        raise ItemError(
            "unsupported",
            f"an item is a str (text), Item, mapping with {', '.join(_FIELDS)}, PIL.Image or Path; got "
            f"{type(value).__name__}"
            + (". Wrap encoded pictures: Item(image=...)" if isinstance(value, bytes) else ""),
            index=index,
        )
    return _checked(item, index)


def _from_mapping(value: Mapping[Any, Any], index: int | None) -> Item:
    unknown = sorted(str(key) for key in value if key not in _FIELDS)
    if unknown:
        raise ItemError(
            "unsupported", f"unknown item fields {unknown}; allowed are {list(_FIELDS)}", index=index
        )
    given = {key: part for key, part in value.items() if part is not None}
    for plural in ("images", "video"):
        if plural in given:
            if isinstance(given[plural], str | bytes | os.PathLike):
                raise ItemError("unsupported", f"`{plural}` is a list of pictures", index=index)
            given[plural] = tuple(given[plural])
    return Item(**given)


def _checked(item: Item, index: int | None) -> Item:
    for name in ("text", "instruction"):
        part = getattr(item, name)
        if part is not None and not isinstance(part, str):
            raise ItemError("unsupported", f"`{name}` must be str, got {type(part).__name__}", index=index)
    if item.image is not None and item.images:
        raise ItemError("unsupported", "give `image` or `images`, not both", index=index)
    if not item.pictures and not item.video and not (item.text and item.text.strip()):
        raise ItemError("empty", "the item has no picture and its text is empty or blank", index=index)
    text, instruction = clean_text(item.text), clean_text(item.instruction)
    if text == item.text and instruction == item.instruction:
        return item
    return Item(text, item.image, item.images, item.video, instruction)


def clean_text(text: str | None) -> str | None:
    """Replace lone surrogates by U+FFFD; valid text comes back unchanged."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_pil(value: object) -> bool:
    return any(base.__module__ == "PIL.Image" and base.__name__ == "Image" for base in type(value).__mro__)


def check_on_error(on_error: str) -> None:
    """Raise `InputError` unless `on_error` is one of the two policies."""
    if on_error not in ("raise", "skip"):
        raise InputError(f'on_error must be "raise" or "skip", got {on_error!r}')


@dataclass(frozen=True)
class Encoded:
    """Vectors of the items that could be encoded.

    Args:
        vectors: float32 `[len(kept), dim]`, unit length, in input order.
        kept: input positions of the rows of `vectors`, ascending.
        errors: one `ItemError` for every other input position.
    """

    vectors: FloatArray
    kept: tuple[int, ...]
    errors: tuple[ItemError, ...] = ()


@dataclass(frozen=True)
class Hit:
    """One answer of a search.

    Args:
        id: the item's id in the index.
        score: cosine similarity, higher is better.
        item: what was embedded; pictures of files as path or `PageImage`, opened only when asked.
        metadata: the user's own.
        path: absolute path of the file it came from, if any.
        page: 1-based page of a PDF.
        modality: what was embedded: `"text"`, `"image"` or `"fused"`.
        payload: an adapter's own opaque string, if it stored one.
    """

    id: str
    score: float
    item: Item
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    page: int | None = None
    modality: Modality = "text"
    payload: str | None = None

    @property
    def text(self) -> str | None:
        """The item's text (for a PDF page its text layer, whatever was embedded)."""
        return self.item.text

    @property
    def embedded(self) -> Item:
        """What was embedded: a page that was embedded as a picture without the text layer kept beside it."""
        item = self.item
        return Item(None, item.image, item.images, item.video) if self.modality == "image" else item


@dataclass(frozen=True)
class RankedItem:
    """One document of a reranking.

    Args:
        index: its position in the list that was given.
        score: what it is ordered by: its first-stage score plus the weight times its relevance, or its
            relevance alone.
        relevance: the model's probability that it answers the query, in [0, 1]; None if it was not judged.
        item: the document.
        prompt: the exact string that was judged, if asked for.
        error: why it was not judged; it keeps the rank the first stage gave it.
    """

    index: int
    score: float
    relevance: float | None
    item: Item
    prompt: str | None = None
    error: ItemError | None = None


@runtime_checkable
class Encoder(Protocol):
    """Turns items into unit vectors. `Embedder` is one; so is any object with these members."""

    @property
    def dim(self) -> int:
        """Length of every vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever a document's vector could: weights, template, positions, pixel rule."""
        ...

    @property
    def modalities(self) -> frozenset[Modality]:
        """What can be encoded."""
        ...

    def encode_queries(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` of queries; `Encoded` with `on_error="skip"`."""
        ...

    def encode_documents(
        self,
        items: Sequence[ItemLike],
        instruction: str | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> FloatArray | Encoded:
        """Vectors `[n, dim]` of documents; `Encoded` with `on_error="skip"`."""
        ...


@runtime_checkable
class PairScorer(Protocol):
    """Judges how relevant each document is to a query. `Reranker` is one."""

    def score(self, query: ItemLike, documents: Sequence[ItemLike]) -> FloatArray:
        """Relevance `[n]` in [0, 1], input order; `BatchError` if a document can't be judged."""
        ...

    def rank(
        self,
        query: ItemLike,
        documents: Sequence[ItemLike],
        top_n: int | None = None,
        first_stage: Sequence[float | None] | None = None,
        weight: float | Literal["pure"] | None = None,
        explain: bool = False,
    ) -> list[RankedItem]:
        """Documents, best first. None is lost: one that can't be judged keeps its first-stage rank."""
        ...


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items, in order."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
