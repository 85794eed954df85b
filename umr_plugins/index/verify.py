"""Compares every id and vector of the projection with the ledger: counts alone prove nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from umr_plugins.index.catch_up import blocks, projected, same_vector
from umr_plugins.index.chroma import Projection, ProjectionError
from umr_plugins.index.ledger import Ledger
from umr_plugins.index.store import Store

_BLOCK = 500
_SHOWN = 20


@dataclass(frozen=True)
class VerifyReport:
    """What a check found.

    Args:
        ok: nothing is wrong.
        items: items in the ledger.
        missing: ids that Chroma lacks.
        orphaned: Chroma's ids that the ledger doesn't know.
        wrong: ids whose vector or metadata in Chroma is not the ledger's.
        problems: everything that is wrong, as sentences.
    """

    ok: bool
    items: int
    missing: tuple[str, ...] = ()
    orphaned: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def verify(store: Store) -> VerifyReport:
    """Check ledger and projection exhaustively; changes nothing. Takes about 0.2 s per 1,000 items."""
    store.check_usable()
    with store.lock:
        ledger = store.ledger
        problems = [f"the ledger's file: {line}" for line in ledger.integrity()]
        problems += _vectors(ledger, store.dim())
        if stale := store.codes.wrong():
            problems.append(f"{stale} items have another {store.codes.kind} code than their vectors give")
        pending, buried = ledger.behind()
        if pending or buried:
            problems.append(f"Chroma is behind by {pending} items and {buried} deletions")
        missing: list[str] = []
        orphaned: list[str] = []
        wrong: list[str] = []
        projection = store.projection
        try:
            if projection is None:
                raise ProjectionError("Chroma is not open")
            missing, orphaned, wrong = _compare(ledger, projection)
        except ProjectionError as error:
            problems.append(f"Chroma can't be read ({error})")
        for ids, what in (
            (missing, "are missing in Chroma"),
            (orphaned, "are in Chroma but not in the ledger"),
            (wrong, "have another vector or metadata in Chroma"),
        ):
            if ids:
                more = ", …" if len(ids) > _SHOWN else ""
                problems.append(f"{len(ids)} items {what}: {', '.join(ids[:_SHOWN])}{more}")
        if problems and ledger.integrity() == []:
            problems.append("rebuild() makes Chroma's side and codes anew from the ledger; no model runs")
        return VerifyReport(
            not problems, ledger.count(), tuple(missing), tuple(orphaned), tuple(wrong), tuple(problems)
        )


def _vectors(ledger: Ledger, dim: int | None) -> list[str]:
    """Vectors of the ledger that are no unit vectors of the right length."""
    bad = 0
    for seq_block in blocks(ledger.seqs(), _BLOCK):
        for vector in ledger.vectors(seq_block).values():
            good = vector.shape == (dim,) and bool(np.isfinite(vector).all())
            bad += not (good and abs(float(np.linalg.norm(vector)) - 1) < 1e-3)
    return [f"{bad} vectors of the ledger are damaged: index their items again"] if bad else []


def _compare(ledger: Ledger, projection: Projection) -> tuple[list[str], list[str], list[str]]:
    seqs = ledger.seqs()
    names = set(projection.names())
    expected = {str(seq) for seq in seqs}
    orphaned = sorted(names - expected)
    missing: list[str] = []
    wrong: list[str] = []
    for block in blocks(seqs, _BLOCK):
        rows, vectors = ledger.stored(block), ledger.vectors(block)
        found = {seq: (vector, metadata) for seq, vector, metadata in projection.read(block)}
        for seq in block:
            if seq not in found or str(seq) not in names:
                missing.append(rows[seq].id)
            elif not same_vector(vectors[seq], found[seq][0]) or found[seq][1] != projected(rows[seq]):
                wrong.append(rows[seq].id)
    if seqs:
        first = ledger.vectors(seqs[:1])[seqs[0]]
        projection.query(first, 10, None)
        if projection.count() != len(names):
            raise ProjectionError(f"it counts {projection.count()} items and lists {len(names)}")
    return missing, orphaned, wrong
