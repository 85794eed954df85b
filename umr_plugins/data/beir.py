"""Text retrieval sets: BEIR's folders (arXiv 2104.08663), which MTEB uses too, and triples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from umr_plugins.data.fields import check_id, instructions, kind_of, make_item, nearest
from umr_plugins.data.lines import (
    Problems,
    Record,
    Table,
    TextFile,
    layout_of,
    parse_json,
    split_cells,
)
from umr_plugins.data.lookup import Lookup
from umr_plugins.data.pictures import Instruction
from umr_plugins.data.rows import index_rows, source_name
from umr_plugins.data.schema import Document, Row, Rows, check_distinct
from umr_plugins.errors import DataError

_QRELS: Final = ("query-id", "corpus-id", "score")
_TRIPLE: Final = {
    "query": ("query", "anchor"),
    "positive": ("positive", "pos"),
    "negative": ("negative", "neg"),
}
"""The spellings of each part."""


@dataclass(frozen=True)
class _Queries:
    base: Path
    source: str
    instructions: tuple[str, ...]
    corpus: Lookup
    positives: Mapping[str, list[str]]

    @property
    def told(self) -> str:
        return repr((self.instructions, self.corpus.sha256, self.positives))

    def rows(self, record: Record) -> list[Row]:
        value = parse_json(record)
        name = check_id(value.get("_id"), f"{record.where}: _id")
        wanted = self.positives.get(name)
        if not wanted:
            return []  # a query of another split
        query = make_item(value.get("text"), [], record.where)
        found = tuple(self._document(each) for each in wanted)
        return [Row(query, found, (), self.instructions, self.source, name, record.where)]

    def _document(self, name: str) -> Document:
        found = self.corpus.find(name)
        if found is None:
            raise DataError(f"{self.corpus.file.path}: the document {name!r} is gone")
        value, where = found
        parts = [value.get(key) or "" for key in ("title", "text")]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{where}: title and text must be strings")
        return Document(make_item(" ".join(parts).strip(), [], where), id=name)


def read_beir(
    folder: str | os.PathLike[str],
    split: str = "train",
    *,
    source: str | None = None,
    instruction: Instruction = None,
) -> list[Rows]:
    """A set in BEIR's layout: `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv`.

    A document is its title, a blank and its text. Judgements above 0 are positives, others are not used;
    queries without a positive in this split are not rows of it.

    Args:
        folder: holds the three.
        split: `"train"`, `"dev"` or `"test"`.
        source: name of the data set; the folder's by default.
        instruction: of every query, or several to draw from.

    Raises:
        DataError: lists the first ten problems with their lines, among them ids that are in the judgements
            only.
    """
    base = Path(os.path.normpath(Path(folder).absolute()))
    queries, corpus = TextFile(base / "queries.jsonl"), Lookup(base / "corpus.jsonl", "_id")
    asked = Lookup(queries.path, "_id")
    positives = _read_qrels(base / "qrels" / f"{split}.tsv", asked, corpus)
    phrases = instructions(instruction, "instruction")
    decoder = _Queries(base, source_name(source, base.name), phrases, corpus, positives)
    return index_rows(queries, decoder)


def _read_qrels(path: Path, queries: Lookup, corpus: Lookup) -> dict[str, list[str]]:
    """The documents that answer each query, in the order of the file."""
    file = TextFile(path)
    found: dict[str, list[str]] = {}
    problems = Problems(file.path)
    for number, (_, record) in enumerate(file.scan()):
        try:
            cells = split_cells(record, "tsv")
            if number == 0:
                if tuple(cells) != _QRELS:
                    raise DataError(
                        f"{record.where}: the header must be {', '.join(_QRELS)}, with tabs between"
                    )
                continue
            query, document = _judged(cells, record)
            if query is None:
                continue
            for name, known, where in ((query, queries, "queries"), (document, corpus, "corpus")):
                if name not in known:
                    raise DataError(f"{record.where}: {name!r} is not in {where}.jsonl")
            if document in found.setdefault(query, []):
                raise DataError(f"{record.where}: {document!r} is judged twice for {query!r}")
            found[query].append(document)
        except DataError as error:
            problems.add(error)
    problems.check()
    return found


def _judged(cells: list[str], record: Record) -> tuple[str | None, str]:
    """Query and document; None for a document that does not answer."""
    try:
        query, document, score = cells
        return (query if float(score) > 0 else None), document
    except ValueError:
        raise DataError(f"{record.where}: needs {', '.join(_QRELS)} (a number), with tabs between") from None


@dataclass(frozen=True)
class _Triples:
    base: Path
    source: str
    instructions: tuple[str, ...]
    table: Table

    @property
    def told(self) -> str:
        return repr((self.instructions, self.table.header))

    def rows(self, record: Record) -> list[Row]:
        where, cells = record.where, self.table(record)
        known = [name for spellings in _TRIPLE.values() for name in spellings]
        unknown = next((name for name in cells if name not in known), None)
        if unknown is not None:
            raise DataError(f"{where}: unknown key {unknown!r}{nearest(unknown, known)}")
        queries, positives, negatives = (self._texts(cells, part, where) for part in _TRIPLE)
        if not queries or not positives:
            raise DataError(f"{where}: there is no {'positive' if queries else 'query'}")
        row = Row(
            queries[0].item, tuple(positives), tuple(negatives), self.instructions, self.source, None, where
        )
        check_distinct(row)
        return [row]

    def _texts(self, cells: Mapping[str, Any], part: str, where: str) -> list[Document]:
        given = [name for name in _TRIPLE[part] if cells.get(name) is not None]
        if len(given) > 1:
            raise DataError(f"{where}: give {' or '.join(given)}, not both")
        value = cells[given[0]] if given else []
        if isinstance(value, list) and part == "query" and given:
            raise DataError(f"{where}: {given[0]} is one text, got {kind_of(value)}")
        texts = value if isinstance(value, list) else [value]
        return [Document(make_item(text, [], f"{where}: {given[0]}")) for text in texts]


def read_triples(
    path: str | os.PathLike[str], *, source: str | None = None, instruction: Instruction = None
) -> list[Rows]:
    """Queries with positive and negative texts.

    Args:
        path: JSONL with `query` (or `anchor`), `positive` (`pos`) and, if there are any, `negative` (`neg`),
            the latter two a text or a list; or TSV or CSV with these names as header. A TSV without header
            holds query, positive and negative in this order.
        source: name of the data set; the file's stem by default.
        instruction: of every query, or several to draw from.

    Raises:
        DataError: lists the first ten problems with their lines.
    """
    file = TextFile(path)
    layout = layout_of(file.path)
    quoted = layout == "csv"
    table, skip = Table(layout), 0
    if layout != "jsonl":
        first = next((record for _, record in file.scan(quoted=quoted)), None)
        cells = [] if first is None else split_cells(first, layout)
        known = [name for spellings in _TRIPLE.values() for name in spellings]
        if quoted or set(cells) & set(known):
            table, skip = Table(layout, tuple(cells)), 1
        else:
            table = Table(layout, tuple(_TRIPLE)[: max(2, len(cells))])
    decoder = _Triples(
        file.path.parent, source_name(source, file.path.stem), instructions(instruction, "instruction"), table
    )
    return index_rows(file, decoder, quoted=quoted, skip=skip)
