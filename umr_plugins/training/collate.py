"""From rows to a batch: what is encoded, and what belongs to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from umr_plugins.data.schema import Document, Row
from umr_plugins.encoding.trainable import Entry
from umr_plugins.errors import DataError
from umr_plugins.training.losses import Relations
from umr_plugins.training.sampler import Mixture
from umr_plugins.types import Item

MOST_NEGATIVES = 8
"""Of a row's negatives, unless a number is asked for (GME trains with 8)."""


@dataclass(frozen=True)
class Batch:
    """One step's work for one process.

    Args:
        step: its number, from 0.
        entries: what this process encodes; equal inputs stand once.
        queries: `[own queries]`, positions in `entries`.
        documents: `[own documents]`, positions in `entries`.
        relations: of the whole batch: queries and documents of all processes, in rank order.
        masked: pairs left out of the negatives because the document is known to answer the query.
        where: the rows, for messages.
    """

    step: int
    entries: list[Entry]
    queries: torch.Tensor
    documents: torch.Tensor
    relations: Relations
    masked: int
    where: list[str]


class Batches(Dataset[Batch]):
    """The batches of a mixture, by number: phrasings, positives and negatives are drawn by seed and number.

    Args:
        mixture: which rows.
        negatives: hard negatives of each query; None takes those a row has, 8 at most.
        takes_instruction: whether the model has a place for a row's instruction.
        max_text_length: tokens of an input without a picture; None for the model's own limit.
        seed: of the draws.
        rank: number of this process.
        world: how many processes share each batch.

    Raises:
        DataError: a row that has fewer negatives than are asked for.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        negatives: int | None = None,
        takes_instruction: bool = True,
        max_text_length: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.mixture = mixture
        self._negatives, self._takes_instruction = negatives, takes_instruction
        self._max_text_length, self._seed = max_text_length, seed
        self._rank, self._world = rank, world
        if negatives:
            _check_negatives(mixture, negatives)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, step: int) -> Batch:
        chosen = self.mixture[step]
        rows = [self.mixture.sources[source][row] for source, row in chosen]
        drawn = [self._draw(row, step, place) for place, row in enumerate(rows)]
        parts = np.array_split(np.arange(len(rows)), self._world)
        positive: list[int] = []
        owner: list[int] = []
        names: list[set[str]] = []
        scores: list[float] = []
        for query in range(len(rows)):  # parts are contiguous, so this is rank order
            row, (_, documents) = rows[query], drawn[query]
            positive.append(len(owner))
            owner += [query] * len(documents)
            names += [_names(document, row.source) for document in documents]
            scores += [float("nan") if each.score is None else each.score for each in documents]
        known = _known(rows, names)
        relations = Relations(
            torch.tensor(positive),
            torch.tensor(owner),
            known,
            torch.tensor([source for source, _ in chosen]),
            torch.tensor(scores) if any(each == each for each in scores) else None,
        )
        entries: dict[tuple[object, ...], int] = {}
        made: list[Entry] = []
        queries, own = [], []
        for place in parts[self._rank]:
            row, (instruction, documents) = rows[place], drawn[place]
            queries.append(self._place(entries, made, row.query, row, instruction, query=True))
            own += [self._place(entries, made, each.item, row, None, query=False) for each in documents]
        return Batch(
            step,
            made,
            torch.tensor(queries, dtype=torch.long),
            torch.tensor(own, dtype=torch.long),
            relations,
            int(known.sum()) - len(rows),
            [row.where for row in rows],
        )

    def _draw(self, row: Row, step: int, place: int) -> tuple[str | None, list[Document]]:
        """The phrasing of the task; the positive, and then the negatives."""
        rng = np.random.default_rng([self._seed, 2, step, place])
        phrasing, which = rng.random(2)
        instruction = None
        if self._takes_instruction and row.instructions:
            instruction = row.instructions[int(phrasing * len(row.instructions))]
        positive = row.positives[int(which * len(row.positives))]
        most = MOST_NEGATIVES if self._negatives is None else self._negatives
        order = rng.permutation(len(row.negatives))[:most]
        return instruction, [positive, *(row.negatives[number] for number in order)]

    def _place(
        self,
        entries: dict[tuple[object, ...], int],
        made: list[Entry],
        item: Item,
        row: Row,
        instruction: str | None,
        *,
        query: bool,
    ) -> int:
        key = (query, instruction, Document(item).key(""))
        if key not in entries:
            limit = None if item.pictures else self._max_text_length
            entries[key] = len(made)
            made.append(Entry(item, "query" if query else "document", instruction, limit, row.where))
        return entries[key]


def _names(document: Document, source: str) -> set[str]:
    """What a document is recognised by: its id, if it has one, and its content."""
    return {document.key(source), Document(document.item).key("")}


def _known(rows: Sequence[Row], names: Sequence[set[str]]) -> torch.Tensor:
    """Bool `[queries, documents]`: which documents are among a query's positives.

    Rows of one source with the same query share their positives.
    """
    places: dict[str, list[int]] = {}
    for place, each in enumerate(names):
        for name in each:
            places.setdefault(name, []).append(place)
    asked = [(row.source, Document(row.query).key("")) for row in rows]
    answers: dict[tuple[str, str], set[str]] = {}
    for query, row in zip(asked, rows, strict=True):
        for positive in row.positives:
            answers.setdefault(query, set()).update(_names(positive, row.source))
    known = torch.zeros(len(rows), len(names), dtype=torch.bool)
    for number, query in enumerate(asked):
        for name in answers[query]:
            known[number, places.get(name, [])] = True
    return known


def _check_negatives(mixture: Mixture, wanted: int) -> None:
    """Of the rows that are drawn from; those with weight 0 may have as many as they like."""
    short = []
    for stratum in mixture.strata:
        rows = mixture.sources[stratum.source]
        short.append((rows, stratum.rows[np.asarray(rows.negatives)[stratum.rows] < wanted]))
    lacking = sum(len(found) for _, found in short)
    if not lacking:
        return
    few = "1 row has" if lacking == 1 else f"{lacking} rows have"
    shown = [rows[int(number)] for rows, found in short for number in found[:3]][:5]
    listed = ", ".join(f"{row.where} ({len(row.negatives)})" for row in shown)
    raise DataError(
        f"negatives: {wanted} hard negatives are asked for, but {few} fewer, such as {listed}. Mine more, "
        f"ask for fewer, or leave negatives out to take as many as each row has, {MOST_NEGATIVES} at most"
    )
