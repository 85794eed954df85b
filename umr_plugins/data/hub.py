"""Rows out of a Hugging Face `datasets.Dataset`, or anything that looks like one.

`datasets` itself is needed for `read_dataset` alone. Pictures are taken as encoded bytes where the data set
holds them so, and decoded by `umr_plugins.media` when a row is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from umr_plugins.data.fields import check_text, instructions, kind_of, make_item, nearest
from umr_plugins.data.lines import Problems
from umr_plugins.data.pictures import Instruction
from umr_plugins.data.rows import IndexedRows, check_files
from umr_plugins.data.schema import CLASSES, Document, Row, Rows, check_distinct
from umr_plugins.errors import DataError, InputError, ItemError, MissingExtraError
from umr_plugins.types import ImageSource

ROLES: Final = (
    "query_text",
    "query_image",
    "positive_text",
    "positive_image",
    "negative_text",
    "negative_image",
    "instruction",
)
"""What a column can be."""


class Columns(Protocol):
    """The part of `datasets.Dataset` that is used."""

    @property
    def column_names(self) -> Sequence[str]:
        """Names of the columns."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class _DatasetRows(IndexedRows):
    def __init__(
        self, dataset: Columns, columns: dict[str, str], source: str, phrases: tuple[str, ...]
    ) -> None:
        self.name = source
        self._dataset, self._columns, self._instructions = _undecoded(dataset, columns), columns, phrases
        version = getattr(dataset, "_fingerprint", None)
        if not isinstance(version, str):
            raise DataError(f"{source}: the data set has no _fingerprint, so changes to it could not be seen")
        told = repr((version, sorted(columns.items()), phrases))
        self.sha256 = hashlib.sha256(told.encode()).hexdigest()
        count = len(dataset)
        self.classes = np.zeros(count, np.int8)
        self.pictures = np.zeros(count, np.bool_)
        self.negatives = np.zeros(count, np.int32)

    def _row(self, index: int) -> Row:
        where = f"{self.name}, row {index}"
        cells = self._dataset[index]
        given = {role: cells[column] for role, column in self._columns.items()}
        queries = _documents(given, "query", where)
        if len(queries) != 1 or not (positives := _documents(given, "positive", where)):
            raise DataError(f"{where}: needs one query (got {len(queries)}) and at least one positive")
        told = given.get("instruction")
        return Row(
            query=queries[0].item,
            positives=tuple(positives),
            negatives=tuple(_documents(given, "negative", where)),
            instructions=self._instructions if told is None else instructions(told, f"{where}: instruction"),
            source=self.name,
            where=where,
        )

    def check(self) -> None:
        """Read every row once and fill the arrays."""
        problems = Problems(self.name)
        for index in range(len(self)):
            try:
                row = self._row(index)
                check_distinct(row)
                check_files(row)
            except DataError as error:
                problems.add(error)
                continue
            except ItemError as error:  # a picture in memory that is needed to tell documents apart
                problems.add(f"{self.name}, row {index}: {error.reason}")
                continue
            self.classes[index] = CLASSES.index(row.modality_class)
            self.pictures[index] = row.pictures
            self.negatives[index] = len(row.negatives)
        problems.check()


def from_dataset(
    dataset: Columns, columns: Mapping[str, str], *, source: str, instruction: Instruction = None
) -> list[Rows]:
    """Rows of a data set in memory or on disk, each row read when it is used.

    Args:
        dataset: a `datasets.Dataset`, or an object with `__len__`, `__getitem__`, `column_names` and
            `_fingerprint`.
        columns: which column holds what, `{"query_text": "question", "positive_image": "page"}`; the keys
            are `ROLES`. Text and picture of the same document are one item. Where a row has several
            positives or negatives the cells are lists, of the same length if both text and picture are
            given.
        source: name of the data set.
        instruction: of every query that has none of its own, or several to draw from.

    Raises:
        DataError: lists the first ten rows that can't be used.
        InputError: an unknown role or column, or neither query nor positive among them.
    """
    for role, column in columns.items():
        if role not in ROLES:
            raise InputError(f"{role!r} is nothing that a column can be{nearest(role, ROLES)}")
        if column not in dataset.column_names:
            raise InputError(f"there is no column {column!r}{nearest(column, dataset.column_names)}")
    for side in ("query", "positive"):
        if not any(role.startswith(side) for role in columns):
            raise InputError(f"columns name no {side}; give {side}_text or {side}_image")
    if not len(dataset):
        raise DataError(f"{source}: the data set holds no rows")
    phrases = instructions(instruction, "instruction")
    rows = _DatasetRows(dataset, dict(columns), check_text(source, "source"), phrases)
    rows.check()
    return [rows]


def read_dataset(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str],
    split: str | None = None,
    source: str | None = None,
    instruction: Instruction = None,
) -> list[Rows]:
    """Rows of a data set that `datasets` saved by `save_to_disk`.

    Args:
        path: the folder.
        columns: as for `from_dataset`.
        split: which, where the folder holds several.
        source: name of the data set; the folder's by default.
        instruction: as for `from_dataset`.

    Raises:
        MissingExtraError: `datasets` is not installed.
        InputError: no such data set or split, or as `from_dataset`.
        DataError: as `from_dataset`.
    """
    try:
        import datasets
    except ImportError as error:
        said = "format: dataset needs Hugging Face's datasets: pip install datasets"
        raise MissingExtraError(said) from error
    try:
        found: Any = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} holds no data set that datasets.save_to_disk wrote") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{path} holds the splits {', '.join(found)}; name one of them by split")
        found = found[split]
    elif split is not None:
        raise InputError(f"{path} is one data set without splits; leave split out")
    return from_dataset(found, columns, source=source or Path(path).name, instruction=instruction)


def _undecoded(dataset: Columns, columns: Mapping[str, str]) -> Columns:
    """The data set with its pictures as encoded bytes, so that reading a row decodes none."""
    features = getattr(dataset, "features", None) or {}
    changed: Any = dataset
    for role, column in columns.items():
        feature = features.get(column)
        if role.endswith("_image") and dataclasses.is_dataclass(feature) and hasattr(feature, "decode"):
            plain = dataclasses.replace(feature, decode=False)  # type: ignore[type-var]  # an instance
            changed = changed.cast_column(column, plain)
    return changed  # type: ignore[no-any-return]  # cast_column gives a data set again


def _documents(given: Mapping[str, Any], side: str, where: str) -> list[Document]:
    texts, pictures = _cells(given.get(f"{side}_text")), _cells(given.get(f"{side}_image"))
    if texts and pictures and len(texts) != len(pictures):
        raise DataError(
            f"{where}: {len(texts)} texts and {len(pictures)} pictures as {side}; text and picture of one "
            "document stand at the same place"
        )
    found = []
    for number in range(max(len(texts), len(pictures))):
        text = texts[number] if texts else None
        picture = pictures[number] if pictures else None
        shown = [] if picture is None else [_picture(picture, f"{where}: {side}_image")]
        found.append(Document(make_item(text, shown, f"{where}: {side}")))
    return found


def _cells(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _picture(value: Any, at: str) -> ImageSource:
    """A cell as picture; `{"bytes", "path"}` is what `datasets` gives for one that is not decoded."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = Path(value)
    if isinstance(value, bytes | Path) or hasattr(value, "getexif"):
        return value  # type: ignore[no-any-return]  # bytes, a path or a PIL picture
    raise DataError(f"{at}: a picture is a PIL.Image, bytes or a path, got {kind_of(value)}")
