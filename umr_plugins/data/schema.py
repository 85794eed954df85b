"""One training row: a query, what answers it, what does not; read from JSON and checked.

Pictures stay paths until they are used. Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from umr_plugins.data.fields import (
    check_id,
    check_text,
    instructions,
    kind_of,
    make_item,
    nearest,
    picture_path,
)
from umr_plugins.errors import DataError
from umr_plugins.types import ImageSource, Item, PageImage, TarImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ModalityClass = Literal["single", "cross", "fused"]
"""What a row trains, in the words of GME (arXiv 2412.16855)."""

CLASSES: Final[tuple[ModalityClass, ...]] = ("single", "cross", "fused")
"""What the numbers in `Rows.classes` stand for."""

_ROW_KEYS: Final = ("id", "query", "instruction", "positives", "negatives", "source")
_QUERY_KEYS: Final = ("text", "image", "images")
_DOCUMENT_KEYS: Final = ("id", *_QUERY_KEYS, "score", "kind", "pool")


@dataclass(frozen=True)
class Document:
    """A positive or negative of a row.

    Args:
        item: what is embedded.
        id: equal ids of one source (or pool) are the same document.
        score: a reranker's or retriever's score for the row's query.
        kind: how a negative was found, such as `"wrong_modality"`.
        pool: the collection that `id` is of, where several sources draw from one.
    """

    item: Item
    id: str | None = None
    score: float | None = None
    kind: str | None = None
    pool: str | None = None

    def key(self, source: str) -> str:
        """Equal for equal documents: by id within a source or pool, else by text and pictures' names.

        Pictures in memory, which have no name, count by their content.
        """
        if self.id is not None:
            return f"{self.pool or source}\0{self.id}"
        digest = hashlib.sha256(repr(self.item.text).encode())
        for picture in self.item.pictures:
            digest.update(b"\0" + _picture_name(picture))
        return digest.hexdigest()


@dataclass(frozen=True)
class Row:
    """One query with its documents.

    Args:
        query: what is searched with.
        positives: documents that answer it, at least one.
        negatives: documents that do not.
        instructions: phrasings of the task, of which training draws one; may be empty.
        source: name of the data set.
        id: the query's id.
        where: where it stands, `"train.jsonl:12"`.
    """

    query: Item
    positives: tuple[Document, ...]
    negatives: tuple[Document, ...] = ()
    instructions: tuple[str, ...] = ()
    source: str = ""
    id: str | None = None
    where: str = ""

    @property
    def modality_class(self) -> ModalityClass:
        """`"fused"` if the query or a positive holds picture and text, `"single"` if all are of one modality.

        `"cross"` otherwise.
        """
        found = {self.query.modality, *(document.item.modality for document in self.positives)}
        if "fused" in found:
            return "fused"
        return "single" if len(found) == 1 else "cross"

    @property
    def pictures(self) -> bool:
        """Whether the query or any document has a picture."""
        return any(item.pictures for item in self.items())

    def items(self) -> Iterable[Item]:
        """The query and every document, as items."""
        yield self.query
        for document in (*self.positives, *self.negatives):
            yield document.item


class Rows(Sequence[Row]):
    """The rows of one source. Rows are read when they are asked for; what a sampler needs is in arrays.

    Attributes:
        name: of the source.
        classes: `[n]`, positions in `CLASSES`.
        pictures: `[n]`, whether the row has a picture anywhere.
        negatives: `[n]`, how many negatives it has.
        sha256: of what the rows say (texts, ids, names of pictures, not their pixels).
    """

    name: str
    classes: NDArray[np.int8]
    pictures: NDArray[np.bool_]
    negatives: NDArray[np.int32]
    sha256: str


def parse_row(value: object, base: Path, source: str, where: str) -> Row:
    """A row from its JSON form.

    Files are not looked at. Null is the same as leaving a key away; blank text beside a picture is no text.

    Args:
        value: a decoded JSON object.
        base: the folder that paths of pictures start from and may not leave.
        source: name of the data set for a row that names none.
        where: where the row stands, for messages.

    Raises:
        DataError: names `where`, what was given and what is allowed.
    """
    fields = _fields(value, _ROW_KEYS, where)
    if "query" not in fields:
        raise DataError(f'{where}: there is no "query"; give {{"query": {{"text": "…"}}, "positives": […]}}')
    query = _fields(fields["query"], _QUERY_KEYS, f"{where}: query")
    positives = _documents(fields, "positives", base, where)
    negatives = _documents(fields, "negatives", base, where)
    if not positives:
        raise DataError(f'{where}: "positives" needs at least one document')
    source = check_text(fields.get("source", source), f"{where}: source")
    row = Row(
        query=_item(query, base, f"{where}: query"),
        positives=positives,
        negatives=negatives,
        instructions=instructions(fields.get("instruction"), f"{where}: instruction"),
        source=source,
        id=None if "id" not in fields else check_id(fields["id"], f"{where}: id"),
        where=where,
    )
    check_distinct(row)
    return row


def check_distinct(row: Row) -> None:
    """Raise `DataError` if a document is given twice among the positives or is a negative too."""
    if len(row.positives) + len(row.negatives) < 2:
        return
    seen: set[str] = set()
    for number, document in enumerate(row.positives):
        key = document.key(row.source)
        if key in seen:
            raise DataError(f"{row.where}: positives[{number}] is given twice; name each document once")
        seen.add(key)
    for number, document in enumerate(row.negatives):
        if document.key(row.source) in seen:
            raise DataError(
                f"{row.where}: negatives[{number}] is also a positive; a document is one or the other"
            )


def as_json(row: Row, base: Path) -> dict[str, Any]:
    """The row as `parse_row` reads it, pictures named from the folder `base`.

    Raises:
        DataError: a picture is not a file below `base`.
    """
    found: dict[str, Any] = {} if row.id is None else {"id": row.id}
    found["query"] = _item_json(row.query, base, row.where)
    if row.instructions:
        found["instruction"] = list(row.instructions) if len(row.instructions) > 1 else row.instructions[0]
    for name in ("positives", "negatives"):
        documents: tuple[Document, ...] = getattr(row, name)
        if documents:
            found[name] = [_document_json(each, base, row.where) for each in documents]
    if row.source:
        found["source"] = row.source
    return found


def _document_json(document: Document, base: Path, where: str) -> dict[str, Any]:
    told = {"id": document.id, **_item_json(document.item, base, where)}
    told |= {"score": document.score, "kind": document.kind, "pool": document.pool}
    return {key: part for key, part in told.items() if part is not None}


def _item_json(item: Item, base: Path, where: str) -> dict[str, Any]:
    names = [_relative(picture, base, where) for picture in item.pictures]
    pictures = {"image": names[0]} if item.image is not None else {"images": names} if names else {}
    return ({} if item.text is None else {"text": item.text}) | pictures


def _relative(picture: ImageSource, base: Path, where: str) -> str:
    path = picture.path if isinstance(picture, TarImage) else picture
    if not isinstance(path, Path) or not path.is_relative_to(base):
        raise DataError(
            f"{where}: the picture {picture!s:.80} is no file below {base}, so the row can't be written "
            "with a path; save its pictures there first"
        )
    name = path.relative_to(base).as_posix()
    return f"{name}#{picture.member}" if isinstance(picture, TarImage) else name


def _documents(fields: Mapping[str, Any], name: str, base: Path, where: str) -> tuple[Document, ...]:
    given = fields.get(name, [])
    if not isinstance(given, list):
        raise DataError(f'{where}: "{name}" is a list of documents, got {kind_of(given)}')
    return tuple(_document(each, base, f"{where}: {name}[{number}]") for number, each in enumerate(given))


def _document(value: object, base: Path, at: str) -> Document:
    fields = _fields(value, _DOCUMENT_KEYS, at)
    return Document(
        item=_item(fields, base, at),
        id=None if "id" not in fields else check_id(fields["id"], f"{at}: id"),
        score=None if "score" not in fields else _score(fields["score"], at),
        kind=None if "kind" not in fields else check_text(fields["kind"], f"{at}: kind"),
        pool=None if "pool" not in fields else check_text(fields["pool"], f"{at}: pool"),
    )


def _fields(value: object, allowed: Sequence[str], at: str) -> dict[str, Any]:
    """The given parts of an object that has no other keys."""
    if not isinstance(value, Mapping):
        raise DataError(f"{at}: must be an object with {', '.join(allowed)}; got {kind_of(value)}")
    for key in value:
        if key not in allowed:
            raise DataError(f"{at}: unknown key {key!r}{nearest(key, allowed)}")
    return {key: part for key, part in value.items() if part is not None}


def _item(fields: Mapping[str, Any], base: Path, at: str) -> Item:
    if "image" in fields and "images" in fields:
        raise DataError(f'{at}: give "image" or "images", not both')
    several = fields.get("images", [])
    if not isinstance(several, list):
        raise DataError(f"{at}: images is a list of paths, got {kind_of(several)}")
    names = [fields["image"]] if "image" in fields else several
    pictures = [picture_path(name, base, at) for name in names]
    return make_item(fields.get("text"), pictures, at, several="images" in fields)


def _score(value: object, at: str) -> float:
    try:
        good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        good = False
    if not good:
        raise DataError(f"{at}: score must be a finite number, got {value!r:.80}")
    return float(value)  # type: ignore[arg-type]  # a number, as just checked


def _picture_name(picture: ImageSource) -> bytes:
    if isinstance(picture, Path | str | PageImage | TarImage):
        return repr(picture).encode("utf-8", "surrogateescape")
    from umr_plugins.media.images import content_key

    return content_key(picture)
