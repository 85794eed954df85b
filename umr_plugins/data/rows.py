"""Rows that stay in their file: checked once, kept as byte offsets, read when they are asked for.

A decoder turns one record of a file into rows; every reader of a text file is one decoder and `index_rows`.
"""

from __future__ import annotations

import hashlib
import operator
import os
import stat
from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from umr_plugins.data.fields import check_text
from umr_plugins.data.lines import Place, Problems, Record, TextFile, parse_json
from umr_plugins.data.schema import CLASSES, Row, Rows, parse_row
from umr_plugins.errors import DataError, ItemError
from umr_plugins.media.tar import check_member
from umr_plugins.types import TarImage


class Decoder(Protocol):
    """Turns one record into its rows, alike each time; small, since it is copied into worker processes."""

    @property
    def told(self) -> str:
        """All that the rows depend on besides their record, for the hash of the rows."""
        ...

    def rows(self, record: Record) -> Sequence[Row]:
        """The record's rows, none or several of one source; `DataError` that names `record.where`."""
        ...


class IndexedRows(Rows):
    """Rows that know their number, so that only `_row` is left to write."""

    def __len__(self) -> int:
        return len(self.classes)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(each) for each in range(*index.indices(len(self)))]
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self._row(place % len(self))

    @abstractmethod
    def _row(self, index: int) -> Row:
        """The row at a position from 0."""


class FileRows(IndexedRows):
    """Rows in a text file; 26 bytes of memory each. Can be pickled, shared by threads, used after a fork.

    Reading a row raises `DataError` if its file has changed since it was checked.
    """

    def __init__(self, name: str, file: TextFile, decoder: Decoder, growing: _Growing) -> None:
        self.name = name
        self.sha256 = growing.digest.hexdigest()
        self.classes = np.array(growing.classes, np.int8)
        self.pictures = np.array(growing.pictures, np.bool_)
        self.negatives = np.array(growing.negatives, np.int32)
        self._file, self._decoder = file, decoder
        self._starts: NDArray[np.int64] = np.array(growing.starts, np.int64)
        self._sizes: NDArray[np.int32] = np.array(growing.sizes, np.int32)
        self._lines: NDArray[np.int32] = np.array(growing.lines, np.int32)
        self._parts: NDArray[np.int32] = np.array(growing.parts, np.int32)

    def _row(self, index: int) -> Row:
        place = Place(int(self._starts[index]), int(self._sizes[index]), int(self._lines[index]))
        return self._decoder.rows(self._file.read(place))[int(self._parts[index])]


class _Growing:
    """What is kept of the rows of one source while their file is read through."""

    def __init__(self, told: str) -> None:
        self.digest = hashlib.sha256(told.encode("utf-8", "surrogateescape"))
        self.starts = array("q")
        self.classes, self.pictures = array("b"), array("b")
        self.sizes, self.lines, self.parts, self.negatives = (array("i") for _ in range(4))

    def add(self, place: Place, record: Record, rows: Sequence[Row]) -> None:
        self.digest.update(b"\n" + record.data)
        for part, row in enumerate(rows):
            self._add(place, part, row)

    def _add(self, place: Place, part: int, row: Row) -> None:
        self.starts.append(place.start)
        self.sizes.append(place.size)
        self.lines.append(place.line)
        self.parts.append(part)
        self.classes.append(CLASSES.index(row.modality_class))
        self.pictures.append(row.pictures)
        self.negatives.append(len(row.negatives))


def index_rows(
    file: TextFile,
    decoder: Decoder,
    *,
    quoted: bool = False,
    skip: int = 0,
    check_pictures: bool = True,
    watch: Callable[[Row], None] | None = None,
) -> list[Rows]:
    """Read a file through once, check every record, and keep where its rows are.

    Args:
        file: the file.
        decoder: turns a record into rows.
        quoted: see `TextFile.scan`.
        skip: records at the beginning that hold no rows, such as a header.
        check_pictures: look whether the pictures' files are there (their content is not read).
        watch: called with every row; may raise `DataError` for what only shows across rows.

    Returns:
        One `Rows` for each source, in the order in which they first occur.

    Raises:
        DataError: all problems together, or there is no row at all.
    """
    problems = Problems(file.path)
    sources: dict[str, _Growing] = {}
    for number, (place, record) in enumerate(file.scan(quoted=quoted)):
        if number < skip:
            continue
        try:
            rows = decoder.rows(record)
            for row in rows:
                if check_pictures:
                    check_files(row)
                if watch is not None:
                    watch(row)
        except DataError as error:
            problems.add(error)
            continue
        if rows:  # all of one source
            if rows[0].source not in sources:
                sources[rows[0].source] = _Growing(decoder.told)
            sources[rows[0].source].add(place, record, rows)
    problems.check()
    if not sources:
        raise DataError(f"{file.path} holds no rows")
    return [FileRows(name, file, decoder, growing) for name, growing in sources.items()]


def check_files(row: Row) -> None:
    """Raise `DataError` unless every picture of the row is a regular file (or member of a tar)."""
    for item in row.items():
        for picture in item.pictures:
            if isinstance(picture, TarImage):
                try:
                    check_member(picture.path, picture.member)
                except ItemError as error:
                    raise DataError(f"{row.where}: the picture {error.name}: {error.reason}") from None
            elif isinstance(picture, Path):
                _check_file(picture, row.where)


def _check_file(path: Path, where: str) -> None:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise DataError(
            f"{where}: the picture {path} can't be read ({os.strerror(error.errno or 0)})"
        ) from None
    if not regular:
        raise DataError(f"{where}: the picture {path} is no regular file")


@dataclass(frozen=True)
class _Lines:
    base: Path
    source: str
    told: str = ""

    def rows(self, record: Record) -> list[Row]:
        return [parse_row(parse_json(record), self.base, self.source, record.where)]


def read_rows(
    path: str | os.PathLike[str], *, source: str | None = None, check_pictures: bool = True
) -> list[Rows]:
    """Training rows in this library's own form, JSONL.

    Args:
        path: the file; pictures are named from its folder and lie below it.
        source: name for rows that have no `source`; the file's stem by default.
        check_pictures: look whether the pictures' files are there (their content is not read).

    Returns:
        One `Rows` for each source.

    Raises:
        DataError: lists the first ten problems of the file with their lines.
    """
    file = TextFile(path)
    return index_rows(
        file, _Lines(file.path.parent, source_name(source, file.path.stem)), check_pictures=check_pictures
    )


def source_name(given: str | None, fallback: str) -> str:
    """The name of a source that was given, checked, or else the fallback."""
    return fallback if given is None else check_text(given, "source")
