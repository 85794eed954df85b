"""The demonstration itself: index the sample corpus, ask every query, count what was found.

Every number is computed in the run that shows it. Each query searches the whole corpus, unfiltered.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umr_plugins.demo import FILES
from umr_plugins.demo.baselines import bm25
from umr_plugins.demo.frameworks import FRAMEWORKS, Framework
from umr_plugins.demo.queries import Query, load_cards, load_queries
from umr_plugins.errors import FingerprintError, MissingExtraError
from umr_plugins.evaluation.metrics import first_hit, hits_at, macro_average, random_hit_at, wilson_interval
from umr_plugins.index.index import Index
from umr_plugins.types import Encoder, Hit

K = 5
"""Answers per query."""


@dataclass(frozen=True)
class Asked:
    """One query and what came back.

    Args:
        query: what was asked.
        hits: the core's answers, best first.
        rank: of the first right answer among them, from 1.
        chance: probability that as many answers drawn at random hold a right one.
        bm25_rank: like `rank`, of BM25; None for no right answer, and for queries without words.
    """

    query: Query
    hits: list[Hit]
    rank: int | None
    chance: float
    bm25_rank: int | None = None


@dataclass(frozen=True)
class Row:
    """Figures of one group of queries; rates are in [0, 1].

    `bm25_at_5` is None where BM25 does not apply: queries without words, or BM25 not installed.
    """

    name: str
    n: int
    hit_at_1: float
    hit_at_5: float
    interval: tuple[float, float]
    random_at_5: float
    bm25_at_5: float | None


@dataclass(frozen=True)
class Comparison:
    """Whether a framework gave the core's answers.

    Args:
        name: the framework and its class.
        same: queries with the same answers in the same order; None if it is not installed.
        note: how to install it.
    """

    name: str
    same: int | None
    note: str = ""


@dataclass
class DemoResult:
    """Everything that the demo's table and report show."""

    model: dict[str, Any]
    items: int
    db: Path
    asked: list[Asked]
    rows: list[Row]
    subsets: list[Row]
    macro: Row
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bm25_note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The figures as one JSON object."""
        return {
            "model": self.model,
            "items": self.items,
            "queries": len(self.asked),
            "types": [_figures(row) for row in self.rows],
            "subsets": [_figures(row) for row in self.subsets],
            "macro_average": _figures(self.macro),
            "frameworks": [
                {"name": part.name, "same_as_core": part.same, "queries": len(self.asked), "note": part.note}
                for part in self.comparisons
            ],
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }


def run_demo(
    out: Path,
    *,
    encoder: Encoder | None = None,
    frameworks: Sequence[Framework] = FRAMEWORKS,
    tell: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Index the sample corpus into `out/db` and ask every query.

    Args:
        out: folder for everything the demo writes; created when absent, its index reused.
        encoder: instead of umr-tiny.
        frameworks: what is compared with the core.
        tell: gets one line per step.
    """
    started = time.perf_counter()
    encoder = encoder or _umr_tiny()
    queries, db = load_queries(), out / "db"
    tell("Indexing the sample corpus with umr-tiny, a demonstration model …")
    with _open(db, encoder, tell) as index:
        fill(index)
        seconds = {"index": time.perf_counter() - started}
        tell(f"{index.count()} items in {seconds['index']:.1f} s. Asking {len(queries)} queries …")
        started = time.perf_counter()
        asked, bm25_note = ask(index, queries)
        seconds["search"] = time.perf_counter() - started
        started = time.perf_counter()
        comparisons = [compare(framework, db, encoder, asked, tell) for framework in frameworks]
        seconds["frameworks"] = time.perf_counter() - started
        rows = [
            row_of(name, [each for each in asked if each.query.type == name])
            for name in dict.fromkeys(query.type for query in queries)
        ]
        subsets = [
            row_of(
                f"{name}: {subset}", [a for a in asked if (a.query.type, a.query.subset) == (name, subset)]
            )
            for name, subset in dict.fromkeys((q.type, q.subset) for q in queries if q.subset)
        ]
        info: dict[str, Any] = getattr(encoder, "info", dict)()
        return DemoResult(
            info, index.count(), db, asked, rows, subsets, macro_of(rows), comparisons, seconds, bm25_note
        )


def _umr_tiny() -> Encoder:
    from umr_plugins.embedder import shared_embedder

    return shared_embedder(model="umr-tiny")


def _open(db: Path, encoder: Encoder, tell: Callable[[str], None]) -> Index:
    try:
        return Index(db, encoder)
    except FingerprintError:
        tell(f"{db} is of another version of umr-tiny: making it anew.")
        shutil.rmtree(db)
        return Index(db, encoder)


def fill(index: Index) -> None:
    """Index the files as a folder and the cards as items; what is there already is not embedded again."""
    index.add_folder(FILES)
    ids, items = load_cards()
    index.add(items, ids=ids)


def ask(index: Index, queries: Sequence[Query]) -> tuple[list[Asked], str]:
    """Ask the core, and BM25 beside it. The string says why there is no BM25, if there is none."""
    everything = index.get(index.ids())
    note = ""
    by_id = {hit.id: hit for hit in everything}
    try:
        words = bm25(list(by_id), [hit.text or "" for hit in everything])
    except MissingExtraError as error:
        words, note = (lambda text, k: []), str(error)
    asked = []
    for query, hits in zip(queries, index.search_many([query.item for query in queries], K), strict=True):
        relevant = sum(map(query.is_right, everything))
        found = [by_id[id_] for id_ in words(query.item.text, K)] if query.item.text else []
        asked.append(
            Asked(
                query,
                hits,
                first_hit(hits, query.is_right),
                random_hit_at(len(everything), relevant, K),
                first_hit(found, query.is_right),
            )
        )
    return asked, note


def row_of(name: str, asked: Sequence[Asked], *, with_bm25: bool = True) -> Row:
    """The figures of a group of queries."""
    n, ranks = len(asked), [each.rank for each in asked]
    has_words = with_bm25 and all(each.query.item.text for each in asked)
    return Row(
        name,
        n,
        hits_at(ranks, 1) / n,
        hits_at(ranks, K) / n,
        wilson_interval(hits_at(ranks, K), n),
        macro_average([each.chance for each in asked]),
        hits_at([each.bm25_rank for each in asked], K) / n if has_words else None,
    )


def macro_of(rows: Sequence[Row]) -> Row:
    """The mean over types, every type counting the same; queries that BM25 can't answer count as missed."""
    return Row(
        "macro average",
        sum(row.n for row in rows),
        macro_average([row.hit_at_1 for row in rows]),
        macro_average([row.hit_at_5 for row in rows]),
        _macro_interval(rows),
        macro_average([row.random_at_5 for row in rows]),
        None
        if all(row.bm25_at_5 is None for row in rows)
        else macro_average([row.bm25_at_5 or 0 for row in rows]),
    )


def _macro_interval(rows: Sequence[Row]) -> tuple[float, float]:
    # The types are independent samples, so the squares of their deviations add up; each Wilson interval gives
    # its type's deviation to either side.
    mean, count = macro_average([row.hit_at_5 for row in rows]), len(rows)
    below = sum((row.hit_at_5 - row.interval[0]) ** 2 for row in rows) ** 0.5 / count
    above = sum((row.interval[1] - row.hit_at_5) ** 2 for row in rows) ** 0.5 / count
    return (mean - below, mean + above)


def compare(
    framework: Framework, db: Path, encoder: Encoder, asked: Sequence[Asked], tell: Callable[[str], None]
) -> Comparison:
    """Ask the same queries through `framework`, and count the queries with the core's answers."""
    with ExitStack() as stack:
        try:
            search = stack.enter_context(framework.open(db, encoder))
        except ImportError:
            return Comparison(framework.name, None, f"not installed: pip install {framework.distribution}")
        tell(f"The same queries through {framework.name} …")
        same = sum(search(each.query.item, K) == [hit.id for hit in each.hits] for each in asked)
    return Comparison(framework.name, same)


def _figures(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "n": row.n,
        "hit_at_1": row.hit_at_1,
        "hit_at_5": row.hit_at_5,
        "hit_at_5_interval": list(row.interval),
        "random_hit_at_5": row.random_at_5,
        "bm25_hit_at_5": row.bm25_at_5,
    }
