"""Readers of picture collections: classes in folders, captions, questions about pages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from umr_plugins.data.fields import instructions, make_item, nearest, picture_path
from umr_plugins.data.lines import Problems, Record, Table, open_table
from umr_plugins.data.rows import IndexedRows, index_rows, source_name
from umr_plugins.data.schema import CLASSES, Document, Row, Rows, check_distinct
from umr_plugins.errors import DataError, InputError, ItemError
from umr_plugins.media.files import kind_of
from umr_plugins.media.folder import walk
from umr_plugins.types import Item

Instruction = str | Sequence[str] | None
Direction = Literal["text_to_image", "image_to_text"]
Several = Literal["refuse", "skip", "together"]
_DIRECTIONS: Final = ("text_to_image", "image_to_text")
_SEVERAL: Final = ("refuse", "skip", "together")


class _Folders(IndexedRows):
    """Pictures by class; names are kept as one string per class, since there may be millions."""

    def __init__(
        self, base: Path, source: str, phrases: tuple[str, ...], names: dict[str, list[str]]
    ) -> None:
        self.name = source
        self._base, self._instructions = base, phrases
        self._classes = list(names)
        self._names = ["\0".join(each) for each in names.values()]
        self._ends = np.cumsum([len(each) for each in names.values()])
        count = int(self._ends[-1])
        self.classes = np.full(count, CLASSES.index("single"), np.int8)
        self.pictures = np.ones(count, np.bool_)
        self.negatives = np.zeros(count, np.int32)
        self.sha256 = hashlib.sha256(repr((phrases, names)).encode()).hexdigest()

    def _row(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        names = self._names[number].split("\0")
        own = index - (int(self._ends[number]) - len(names))
        documents = [Document(Item(image=self._base / name), id=name) for name in names]
        query = documents.pop(own)
        return Row(
            query.item,
            tuple(documents),
            (),
            self._instructions,
            self.name,
            query.id,
            f"{self.name}/{query.id}",
        )


def read_image_folders(
    folder: str | os.PathLike[str], *, source: str | None = None, instruction: Instruction = None
) -> list[Rows]:
    """Pictures of the same class find each other, as GME uses ImageNet (arXiv 2412.16855).

    Every picture is a query once; all other pictures of its class answer it, so that none of them is ever
    taken for a negative.

    Args:
        folder: holds one sub-folder for each class, and nothing else but names that begin with a dot.
        source: name of the data set; the folder's by default.
        instruction: of every query, or several to draw from.

    Raises:
        DataError: a class has a single picture; files that are no pictures, links, or files in no class.
        InputError: `folder` is no folder.
    """
    base = Path(os.path.realpath(folder))
    problems, names = Problems(base), dict[str, list[str]]()
    for found in walk(base):
        if isinstance(found, ItemError):
            problems.add(f"{found.name}: {found.reason}")
        elif "/" not in found.relative:
            problems.add(f"{found.relative}: it lies in no class; move it into a sub-folder, or away")
        elif kind_of(found.relative) != "image":
            problems.add(f"{found.relative}: its name is not that of a picture; move it away")
        else:
            names.setdefault(found.relative.partition("/")[0], []).append(found.relative)
    for name, pictures in names.items():
        if len(pictures) < 2:
            problems.add(f"class {name!r} has one picture; two are needed for one to find the other")
    problems.check()
    if not names:
        raise DataError(f"{base} holds no sub-folder with pictures")
    phrases = instructions(instruction, "instruction")
    return [_Folders(base, source_name(source, base.name), phrases, names)]


@dataclass(frozen=True)
class _Captions:
    base: Path
    table: Table
    source: str
    instructions: tuple[str, ...]
    image: str
    caption: str
    direction: Direction

    @property
    def told(self) -> str:
        return repr((self.table.header, self.instructions, self.image, self.caption, self.direction))

    def rows(self, record: Record) -> list[Row]:
        cells = self.table(record)
        picture = picture_path(_cell(cells, self.image, record), self.base, f"{record.where}: {self.image}")
        given = _cell(cells, self.caption, record)
        captions = given if isinstance(given, list) else [given]
        if not captions:
            raise DataError(f"{record.where}: {self.caption} needs at least one caption")
        texts = [make_item(caption, [], f"{record.where}: {self.caption}") for caption in captions]
        shown = Item(image=picture)
        pairs: list[tuple[Item, list[Item]]] = [(text, [shown]) for text in texts]
        if self.direction == "image_to_text":
            pairs = [(shown, texts)]
        rows = [
            Row(query, tuple(map(Document, found)), (), self.instructions, self.source, None, record.where)
            for query, found in pairs
        ]
        check_distinct(rows[0])
        return rows


class _Once:
    """Refuses a query picture that occurs twice: its other captions would be taken for negatives."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, row: Row) -> None:
        name = hashlib.blake2b(repr(row.query.image).encode(), digest_size=8).digest()
        if name in self._seen:
            raise DataError(
                f"{row.where}: the picture stands on an earlier line too; put all its captions into one list "
                "(JSONL), so that none of them is taken for a wrong answer"
            )
        self._seen.add(name)


def read_captions(
    path: str | os.PathLike[str],
    *,
    image: str = "image",
    caption: str = "caption",
    direction: Direction = "text_to_image",
    root: str | os.PathLike[str] | None = None,
    source: str | None = None,
    instruction: Instruction = None,
    check_pictures: bool = True,
) -> list[Rows]:
    """Pictures with captions: JSONL, CSV or TSV with a column for each. Other columns are not read.

    Args:
        path: the file. In JSONL a caption may be a list.
        image: the column of paths.
        caption: the column of captions.
        direction: `"text_to_image"` (each caption finds its picture) or `"image_to_text"` (the picture finds
            all its captions).
        root: the folder that paths start from and stay below; the file's own by default.
        source: name of the data set; the file's stem by default.
        instruction: of every query, or several to draw from.
        check_pictures: look whether the pictures' files are there (their content is not read).

    Raises:
        DataError: lists the first ten problems with their lines.
        InputError: an unknown direction.
    """
    _choice("direction", direction, _DIRECTIONS)
    file, table = open_table(path, (image, caption))
    base = file.path.parent if root is None else _absolute(root)
    name = source_name(source, file.path.stem)
    decoder = _Captions(
        base, table, name, instructions(instruction, "instruction"), image, caption, direction
    )
    return index_rows(
        file,
        decoder,
        quoted=table.layout == "csv",
        skip=bool(table.header),
        check_pictures=check_pictures,
        watch=_Once() if direction == "image_to_text" else None,
    )


@dataclass(frozen=True)
class _Pages:
    base: Path
    source: str
    instructions: tuple[str, ...]
    several: Several

    @property
    def told(self) -> str:
        return repr((self.instructions, self.several))

    def rows(self, record: Record) -> list[Row]:
        cells = Table("jsonl")(record)
        given = cells.get("images")
        names = [_cell(cells, "image", record)] if given is None else given
        if not isinstance(names, list) or not names or (given is not None and "image" in cells):
            raise DataError(f'{record.where}: give "image", a path, or "images", a list of at least one path')
        pictures = [picture_path(name, self.base, f"{record.where}: images") for name in names]
        questions = self._questions(cells, record)
        if len(pictures) > 1 and self.several != "together":
            if self.several == "skip":
                return []
            raise DataError(
                f"{record.where}: {len(pictures)} pages, and nothing says which of them answers; split the "
                'line, or pass several="skip" or several="together"'
            )
        page = Document(make_item(None, pictures, record.where))
        return [
            Row(question, (page,), (), self.instructions, self.source, None, record.where)
            for question in questions
        ]

    def _questions(self, cells: dict[str, Any], record: Record) -> list[Item]:
        if "question" in cells:
            return [make_item(cells["question"], [], f"{record.where}: question")]
        given = cells.get("texts")
        good = isinstance(given, list) and given and all(isinstance(each, dict) for each in given)
        if not good:
            raise DataError(
                f'{record.where}: give "question", or "texts": [{{"user": question, "assistant": answer}}]'
            )
        return [
            make_item(each.get("user"), [], f"{record.where}: texts[{number}].user")
            for number, each in enumerate(given or [])
        ]


def read_pages(
    path: str | os.PathLike[str],
    *,
    several: Several = "refuse",
    source: str | None = None,
    instruction: Instruction = None,
    check_pictures: bool = True,
) -> list[Rows]:
    """Questions about document pages, in Docmatix' form: each question finds the picture of its page.

    Args:
        path: JSONL with `image` or `images` (paths from the file's folder), and `question` or
            `texts: [{"user": question, "assistant": answer}]`. Answers and other fields are not read.
        several: for a line with several pages, which does not say which of them answers: `"refuse"` it,
            `"skip"` it, or take all pages `"together"` as one document (for models that take several
            pictures).
        source: name of the data set; the file's stem by default.
        instruction: of every query, or several to draw from.
        check_pictures: look whether the pictures' files are there (their content is not read).

    Raises:
        DataError: lists the first ten problems with their lines.
        InputError: an unknown value of `several`.
    """
    _choice("several", several, _SEVERAL)
    file, table = open_table(path)
    if table.layout != "jsonl":
        raise DataError(f"{file.path}: pages are read from JSONL")
    name = source_name(source, file.path.stem)
    decoder = _Pages(file.path.parent, name, instructions(instruction, "instruction"), several)
    return index_rows(file, decoder, check_pictures=check_pictures)


def _cell(cells: dict[str, Any], name: str, record: Record) -> Any:
    if cells.get(name) is None:
        raise DataError(f"{record.where}: there is no {name!r}{nearest(name, cells)}")
    return cells[name]


def _choice(name: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise InputError(f"{name}={given!r} is not known{nearest(given, allowed)}")


def _absolute(folder: str | os.PathLike[str]) -> Path:
    return Path(os.path.normpath(Path(folder).absolute()))
