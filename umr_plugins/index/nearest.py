"""Answers a query vector: Chroma proposes, the ledger's vectors decide.

Chroma is asked for four times as many candidates as wanted, and their order and scores are computed exactly
from the ledger. What is not in Chroma yet takes part as well. An index with int8 or binary codes scans those
instead of asking Chroma, and scores what they propose in the same way. Where Chroma can't answer, it is made
anew once; where that fails too (a full disk), the ledger is scanned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from umr_plugins.errors import StorageError
from umr_plugins.index import quantize
from umr_plugins.index.catch_up import blocks, projected
from umr_plugins.index.chroma import Projection, ProjectionError
from umr_plugins.index.store import RETRY_SECONDS, Store
from umr_plugins.index.where import matches, superset
from umr_plugins.types import FloatArray

log = logging.getLogger(__name__)

OVER_FETCH = 4
"""Candidates asked of Chroma per wanted answer."""

Ranked: TypeAlias = "list[tuple[int, float]]"
"""(sequence number, cosine), best first."""


class Search:
    """Searches one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def nearest(self, query: FloatArray, k: int, where: dict[str, Any] | None) -> Ranked:
        """The `k` best items as (sequence number, cosine), best first; older items first among equals."""
        self._store.check_usable()
        total = self._store.ledger.count()
        if not total or k <= 0:
            return []
        if self._store.codes.kind is not None and (found := self._by_codes(query, k, where)) is not None:
            return found
        # Read before Chroma is asked, so that an item can't slip from one list into the other unseen.
        pending, buried = self._store.ledger.behind()
        waiting = self._store.ledger.pending(pending) if pending else []
        wanted = OVER_FETCH * k + 16 + buried
        if where is None and wanted >= total:
            return self._scan(query, k, None)
        candidates = self._ask(query, k, min(wanted, total), where)
        if candidates is None:
            return self._scan(query, k, where)
        return self._rescored(query, candidates + self._passing(waiting, where), k)

    def _by_codes(self, query: FloatArray, k: int, where: dict[str, Any] | None) -> Ranked | None:
        """What the codes propose, scored exactly; None when they were switched off meanwhile."""
        ranked = self._store.codes.ranked(query)
        if ranked is None:
            return None
        kind, seqs = ranked
        wanted = quantize.OVER_FETCH[kind] * k + 16
        if where is None:
            return self._rescored(query, seqs[:wanted].tolist(), k)
        passing: list[int] = []
        for block in blocks(seqs.tolist(), 2000):
            passing += self._passing(block, where)
            if len(passing) >= wanted:
                break
        return self._rescored(query, passing, k)

    def _ask(self, query: FloatArray, k: int, count: int, where: dict[str, Any] | None) -> list[int] | None:
        """Chroma's candidates; None when it has no good answer."""
        condition = superset(where)
        for attempt in range(2):
            projection = self._store.projection  # without the lock: a rebuild must not hold up searches
            try:
                if projection is None:
                    raise ProjectionError("Chroma is not open")
                found = projection.query(query, count, condition)
                if complete := len(found) < count:
                    # The graph may reach fewer rows than there are, and a filter leave fewer than asked for.
                    found = projection.matching(condition)
                passing = self._passing(found, where)
                return passing if complete or len(passing) >= k else None
            except ProjectionError as error:
                if attempt or not self._recover(projection, error):
                    return None
        return None

    def _recover(self, broken: Projection | None, error: ProjectionError) -> bool:
        with self._store.lock:
            if self._store.projection is not broken:
                return True  # another thread has mended it
            if time.monotonic() < self._store.retry_at:
                return False
            try:
                self._store.mend(str(error))
            except StorageError as failure:
                log.warning("%s; searching the ledger instead", failure)
                self._store.retry_at = time.monotonic() + RETRY_SECONDS
                return False
            return True

    def _passing(self, seqs: Sequence[int], where: dict[str, Any] | None) -> list[int]:
        if where is None:
            return list(seqs)
        return [seq for seq, row in self._store.ledger.stored(seqs).items() if matches(projected(row), where)]

    def matching(self, where: dict[str, Any] | None) -> list[int]:
        """All items that pass a filter, by the ledger."""
        seqs = self._store.ledger.seqs()
        return [seq for block in blocks(seqs, 2000) for seq in sorted(self._passing(block, where))]

    def _rescored(self, query: FloatArray, seqs: Sequence[int], k: int) -> Ranked:
        best: Ranked = []
        for block in blocks(list(dict.fromkeys(seqs)), 2048):
            vectors = self._store.ledger.vectors(block)
            if vectors:
                present = list(vectors)
                best = _merge(best, present, np.stack([vectors[seq] for seq in present]) @ query, k)
        return best

    def _scan(self, query: FloatArray, k: int, where: dict[str, Any] | None) -> Ranked:
        best: Ranked = []
        for seqs, vectors in self._store.ledger.scan():
            if where is not None:
                passing = set(self._passing(seqs, where))
                rows = [at for at, seq in enumerate(seqs) if seq in passing]
                seqs, vectors = [seqs[at] for at in rows], vectors[rows]
            if seqs:
                best = _merge(best, seqs, vectors @ query, k)
        return best


def _merge(best: Ranked, seqs: Sequence[int], scores: FloatArray, k: int) -> Ranked:
    joined = best + [(seq, float(score)) for seq, score in zip(seqs, scores, strict=True)]
    return sorted(joined, key=lambda pair: (-pair[1], pair[0]))[:k]
