"""Where each line of a large text file begins, so that any of them can be read alone.

The one way in which files of training data are opened, cut into records and decoded. A file is read through
once; afterwards a record costs one open, one read and one close, which is safe in threads and forks.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple

from umr_plugins.data.fields import kind_of, nearest
from umr_plugins.errors import DataError

MAX_RECORD: Final = 64 * 1024 * 1024
"""Bytes of the longest line that is read."""

Layout = Literal["jsonl", "csv", "tsv"]
_SUFFIXES: Final[dict[str, Layout]] = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}


class Place(NamedTuple):
    """Where a record stands: byte offset, bytes, and line from 1."""

    start: int
    size: int
    line: int


class Record(NamedTuple):
    """One record: a line without its end, or the lines of a CSV record with line breaks in quotes."""

    data: bytes
    where: str
    ended: bool = True  # False for a last line without line end, which may have been cut short


class TextFile:
    """A file of records that must not change while it is used.

    Raises:
        DataError: there is no such regular file, or it can't be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Links are not resolved: pictures lie beside the file where the user named it.
        self.path = Path(os.path.normpath(Path(path).absolute()))
        with self._open() as handle:
            self._stamp = _stamp(handle)

    def scan(self, *, quoted: bool = False) -> Iterator[tuple[Place, Record]]:
        """Every record with something in it; a byte order mark, CRLF and blank lines make no difference.

        Args:
            quoted: line breaks inside double quotes do not end a record (CSV).

        Raises:
            DataError: a record is too long or a quote not closed; the file changes meanwhile.
        """
        with self._open() as handle:
            start = len(codecs.BOM_UTF8) if handle.read(3) == codecs.BOM_UTF8 else 0
            handle.seek(start)
            line = 1
            while parts := self._record(handle, quoted, line):
                whole = b"".join(parts)
                data = whole.rstrip(b"\r\n")
                if data.strip():
                    record = Record(data, self.where(line), whole.endswith(b"\n"))
                    yield Place(start, len(data), line), record
                start += len(whole)
                line += len(parts)
            self._check(handle)

    def read(self, place: Place) -> Record:
        """One record again.

        Raises:
            DataError: the file is gone or is not the one that was scanned.
        """
        with self._open() as handle:
            self._check(handle)
            data = os.pread(handle.fileno(), place.size, place.start)
        return Record(data, self.where(place.line))

    def where(self, line: int) -> str:
        """How messages name a line."""
        return f"{self.path.name}:{line}"

    def _record(self, handle: BinaryIO, quoted: bool, line: int) -> list[bytes]:
        """The physical lines of the next record; none at the end of the file."""
        parts: list[bytes] = []
        left, inside_quotes = MAX_RECORD + 1, False
        while inside_quotes or not parts:
            part = handle.readline(left)
            if not part and inside_quotes:
                raise DataError(f"{self.where(line)}: a double quote is opened and never closed")
            if not part:
                break
            left -= len(part)
            if left <= 0:
                raise DataError(f"{self.where(line)}: the line has more than {MAX_RECORD:,} bytes; split it")
            parts.append(part)
            inside_quotes ^= quoted and part.count(b'"') % 2 == 1
        return parts

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe would wait for a writer
                raise DataError(f"{self.path} is no regular file; give the path of a text file")
            with self.path.open("rb") as handle:
                yield handle
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no valid path"
            raise DataError(f"{self.path} can't be read ({why})") from None

    def _check(self, handle: BinaryIO) -> None:
        if _stamp(handle) != self._stamp:
            raise DataError(
                f"{self.path} has changed since it was checked; open it again, and leave it alone while "
                "training reads it"
            )


def _stamp(handle: BinaryIO) -> tuple[int, int]:
    status = os.fstat(handle.fileno())
    return status.st_size, status.st_mtime_ns


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_JSON: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def parse_text(record: Record) -> str:
    """The record as text; `DataError` if it is not UTF-8."""
    try:
        return record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{record.where}: byte {error.start + 1} of the line is not valid UTF-8; convert the file"
        ) from None


def parse_json(record: Record) -> dict[str, Any]:
    """The record as a JSON object; `DataError` if it is none, has a key twice, or NaN."""
    try:
        value = _JSON.decode(parse_text(record))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        cut = "" if record.ended else "; it is the last line and has no line end: was the file cut short?"
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{record.where}: not JSON ({why}){cut}") from None
    if not isinstance(value, dict):
        raise DataError(f"{record.where}: each line is a JSON object, got {kind_of(value)}")
    return value


@dataclass(frozen=True)
class Table:
    """How a record becomes named cells: JSON, CSV with quotes (RFC 4180), or plain cells between tabs."""

    layout: Layout
    header: tuple[str, ...] = ()

    def __call__(self, record: Record) -> dict[str, Any]:
        """The cells by name; empty cells of CSV and TSV are left away.

        Raises:
            DataError: the record can't be read, or has more or fewer cells than the header.
        """
        if self.layout == "jsonl":
            return parse_json(record)
        cells = split_cells(record, self.layout)
        if len(cells) != len(self.header):
            raise DataError(
                f"{record.where}: {len(cells)} cells, but there are {len(self.header)} columns "
                f"({', '.join(self.header)})"
            )
        return {name: cell for name, cell in zip(self.header, cells, strict=True) if cell}


def split_cells(record: Record, layout: Layout) -> list[str]:
    """The cells of a CSV or TSV record."""
    text = parse_text(record)
    if layout == "tsv":
        return text.split("\t")
    try:
        [cells] = csv.reader([text], strict=True)
    except (csv.Error, ValueError) as error:
        raise DataError(f"{record.where}: not CSV ({error})") from None
    return cells


def layout_of(path: Path) -> Layout:
    """The layout by the file's suffix, or `DataError`."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"{path}: files end in {', '.join(_SUFFIXES)}; got {suffix or 'no suffix'!r}")
    return _SUFFIXES[suffix]


def open_table(path: str | os.PathLike[str], needed: tuple[str, ...] = ()) -> tuple[TextFile, Table]:
    """A file of named cells; the first record of CSV and TSV is the header.

    Raises:
        DataError: no such file, an unknown suffix, or a header that lacks or doubles a column.
    """
    file = TextFile(path)
    layout = layout_of(file.path)
    if layout == "jsonl":
        return file, Table(layout)
    first = next((record for _, record in file.scan(quoted=layout == "csv")), None)
    if first is None:
        raise DataError(f"{file.path} is empty; its first line names the columns")
    header = split_cells(first, layout)
    for name in needed:
        if name not in header:
            raise DataError(f"{first.where}: there is no column {name!r}{nearest(name, header)}")
    if len(set(header)) < len(header):
        raise DataError(f"{first.where}: a column is named twice: {', '.join(header)}")
    return file, Table(layout, tuple(header))


class Problems:
    """Gathers what is wrong with a file, so that one run shows it all."""

    def __init__(self, subject: object) -> None:
        self._subject = subject
        self._shown: list[str] = []
        self._count = 0

    def add(self, problem: object) -> None:
        """Note one; the first ten are shown in full."""
        self._count += 1
        if len(self._shown) < 10:
            self._shown.append(str(problem))

    def check(self) -> None:
        """Raise `DataError` if there is any."""
        if not self._count:
            return
        more = [f"and {self._count - len(self._shown)} more"] if self._count > len(self._shown) else []
        told = "".join(f"\n  {line}" for line in [*self._shown, *more])
        noun = "problem" if self._count == 1 else "problems"
        raise DataError(f"{self._count} {noun} in {self._subject}:{told}")
