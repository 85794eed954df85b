"""M-BEIR (UniIR, arXiv 2311.17136): eight tasks over ten data sets, each query with its instructions.

Reads the layout of the published data set as local files. Candidates stay on disk and are found by id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from umr_plugins.data.fields import check_id, make_item, nearest, picture_path
from umr_plugins.data.lines import Problems, Record, TextFile, parse_json, split_cells
from umr_plugins.data.lookup import Lookup
from umr_plugins.data.rows import index_rows, source_name
from umr_plugins.data.schema import Document, Row, Rows, check_distinct
from umr_plugins.errors import DataError, InputError
from umr_plugins.types import Item

DATASETS: Final = (
    "VisualNews",
    "Fashion200K",
    "WebQA",
    "EDIS",
    "NIGHTS",
    "OVEN",
    "INFOSEEK",
    "FashionIQ",
    "CIRR",
    "MSCOCO",
)
"""What the number before the colon of a query's or candidate's id stands for."""

POOL: Final = "mbeir"
"""Candidate ids are the same in every M-BEIR source, so equal candidates are known across sources."""

_INSTRUCTIONS: Final = "instructions/query_instructions.tsv"
_MODALITIES: Final[dict[str, tuple[bool, bool]]] = {
    "text": (True, False),
    "image": (False, True),
    "image,text": (True, True),
}
"""Whether there is text and a picture."""

_Key = tuple[str, str, str]  # data set, query's modality, candidate's modality


@dataclass(frozen=True)
class _Queries:
    base: Path
    source: str
    pool: Lookup
    prompts: Mapping[_Key, tuple[str, ...]]
    negatives: bool
    clean: bool

    @property
    def told(self) -> str:
        return repr((self.pool.sha256, sorted(self.prompts.items()), self.negatives, self.clean))

    def rows(self, record: Record) -> list[Row]:
        value, where = parse_json(record), record.where
        qid = _id(value, "qid", where)
        query, asked = self._side(value, "query_txt", "query_img_path", "query_modality", where)
        found = [self._candidate(did, where) for did in _ids(value, "pos_cand_list", where)]
        if not found:
            raise DataError(f"{where}: pos_cand_list is empty; each query needs a positive")
        wrong = _ids(value, "neg_cand_list", where) if self.negatives else []
        row = Row(
            query,
            tuple(document for document, _ in found),
            tuple(self._candidate(did, where)[0] for did in wrong),
            self._instructions(qid, asked, found, where),
            self.source,
            qid,
            where,
        )
        check_distinct(row)
        return [row]

    def _candidate(self, did: str, where: str) -> tuple[Document, str]:
        found = self.pool.find(did)
        if found is None:
            raise DataError(
                f'{where}: candidate {did!r} is not in {self.pool.file.path}; pool="global" has the '
                "candidates of all data sets"
            )
        item, modality = self._side(found[0], "txt", "img_path", "modality", found[1])
        return Document(item, id=did, pool=POOL), modality

    def _side(
        self, value: Mapping[str, Any], text: str, image: str, kind: str, where: str
    ) -> tuple[Item, str]:
        """A query or candidate as item, and its modality; the two must agree."""
        modality = value.get(kind)
        if not isinstance(modality, str) or modality not in _MODALITIES:
            raise DataError(f"{where}: {kind} is {modality!r}{nearest(modality, _MODALITIES)}")
        words, name = value.get(text), value.get(image)
        words = self._words(words) if isinstance(words, str) else words
        pictures = [] if name is None else [picture_path(name, self.base, f"{where}: {image}")]
        item = make_item(words, pictures, where)
        if (item.text is not None, bool(item.pictures)) != _MODALITIES[modality]:
            raise DataError(f"{where}: {kind} is {modality!r}, but {text} and {image} hold {item.modality}")
        return item, modality

    def _instructions(
        self, qid: str, asked: str, found: Sequence[tuple[Document, str]], where: str
    ) -> tuple[str, ...]:
        """The instructions of the query's own data set.

        OVEN and InfoSeek list each other's candidates as positives. These count as positives, but what the
        instruction asks for is told by the positives of the query's own data set.
        """
        dataset = _dataset(qid)
        own = {modality for document, modality in found if _dataset(document.id or "") == dataset}
        if len(own) != 1:
            told = " and ".join(sorted(own)) or "none at all"
            raise DataError(
                f"{where}: the positives of the query's own data set ({_name(dataset)}) must be of one "
                f"modality, which chooses the instruction; they are {told}"
            )
        key = (dataset, asked, own.pop())
        if key not in self.prompts:
            raise DataError(
                f"{where}: {_INSTRUCTIONS} has no instruction for {_name(dataset)} from {key[1]} to {key[2]}"
            )
        return tuple(map(self._words, self.prompts[key]))

    def _words(self, text: str) -> str:
        return clean_up(text) if self.clean else text


def read_mbeir(
    root: str | os.PathLike[str],
    name: str,
    split: str = "train",
    *,
    pool: Literal["local", "global"] | None = None,
    negatives: bool = False,
    clean: bool = False,
    source: str | None = None,
    check_pictures: bool = True,
) -> list[Rows]:
    """One task of M-BEIR.

    Of `query/{split}/mbeir_{name}_{split}.jsonl` each line is a row; its instructions are the prompts of
    `instructions/query_instructions.tsv` for its data set and the modalities of query and positives.
    Positives of another data set (OVEN and InfoSeek) stay positives, so that they are never taken for
    negatives, but do not choose the instruction.

    Args:
        root: the data set's folder.
        name: such as `"webqa_task2"`.
        split: `"train"`, `"val"` or `"test"`.
        pool: `"local"`, the task's own candidates, or `"global"`, those of all tasks of the split, which
            training needs wherever the local pool holds test candidates only. None takes the local pool if
            there is one.
        negatives: take the negatives that come with the data; UniIR's published models were trained without.
        clean: clean texts up as UniIR does, see `clean_up`.
        source: name of the data set; `name` by default.
        check_pictures: look whether the pictures' files are there (their content is not read).

    Raises:
        DataError: lists the first ten problems with their lines.
        InputError: an unknown `pool`.
    """
    base = Path(os.path.normpath(Path(root).absolute()))
    file = TextFile(base / "query" / split / f"mbeir_{name}_{split}.jsonl")
    decoder = _Queries(
        base,
        source_name(source, name),
        Lookup(_pool(base, name, split, pool), "did"),
        read_instructions(base / _INSTRUCTIONS),
        negatives,
        clean,
    )
    return index_rows(file, decoder, check_pictures=check_pictures)


def _pool(base: Path, name: str, split: str, pool: str | None) -> Path:
    folder = base / "cand_pool"
    # MSCOCO's local pools are named by split.
    places = {
        "local": [folder / "local" / f"mbeir_{name}{part}_cand_pool.jsonl" for part in ("", f"_{split}")],
        "global": [folder / "global" / f"mbeir_union_{split}_cand_pool.jsonl"],
    }
    if pool is not None and pool not in places:
        raise InputError(f"pool={pool!r} is not known{nearest(pool, places)}")
    tried = places[pool] if pool else [*places["local"], *places["global"]]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        raise DataError(f"there is no pool of candidates; looked for {', '.join(map(str, tried))}")
    return found


def read_instructions(path: Path) -> dict[_Key, tuple[str, ...]]:
    """M-BEIR's instructions by data set number, query's modality and candidate's modality.

    Raises:
        DataError: lists the first ten problems with their lines.
    """
    file = TextFile(path)
    found: dict[_Key, tuple[str, ...]] = {}
    problems = Problems(file.path)
    for number, (_, record) in enumerate(file.scan()):
        if number == 0:
            continue  # the header
        try:
            cells = [cell.strip() for cell in split_cells(record, "tsv")]
            if len(cells) < 5 or not all(mode in _MODALITIES for mode in cells[:2]) or not any(cells[4:]):
                raise DataError(
                    f"{record.where}: needs the modalities of query and candidate, name and number of the "
                    "data set, and at least one prompt, with tabs between"
                )
            key = (cells[3], cells[0], cells[1])
            if key in found:
                raise DataError(f"{record.where}: data set {key[0]} from {key[1]} to {key[2]} is there twice")
            found[key] = tuple(cell for cell in cells[4:] if cell)
        except DataError as error:
            problems.add(error)
    problems.check()
    return found


def clean_up(text: str) -> str:
    """UniIR's clean-up: no carriage returns, outer blanks or quotes; a capital first, a full stop last."""
    text = text.replace("\r", "").strip().strip('"')
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def _dataset(id: str) -> str:
    return id.partition(":")[0]


def _name(dataset: str) -> str:
    known = dataset.isdecimal() and int(dataset) < len(DATASETS)
    return DATASETS[int(dataset)] if known else f"data set {dataset!r}"


def _id(value: Mapping[str, Any], key: str, where: str) -> str:
    if key not in value:
        raise DataError(f"{where}: there is no {key!r}{nearest(key, value)}")
    return check_id(value[key], f"{where}: {key}")


def _ids(value: Mapping[str, Any], key: str, where: str) -> list[str]:
    given = value.get(key)
    if given is not None and not isinstance(given, list):
        raise DataError(f"{where}: {key} is a list of ids, got {given!r:.80}")
    return [check_id(each, f"{where}: {key}") for each in given or []]
