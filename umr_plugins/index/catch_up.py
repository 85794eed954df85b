"""Brings a projection up to its ledger and compares the two.

After an unclean end this is done in a process of its own first, since Chroma's files may be damaged so that
touching them crashes the process: the owner goes on only with what its child has read, written and searched.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umr_plugins.index.chroma import Projection
from umr_plugins.index.ledger import Ledger, Stored, text_path
from umr_plugins.index.rows import projected_metadata
from umr_plugins.types import FloatArray

PROJECT_AT = 256
"""Items per write to Chroma; what is committed but not yet there is found by a scan."""

CHECK_ALL, SAMPLE = 20_000, 32
"""How many vectors are compared at most after an unclean end, and after a clean one."""

TOLERANCE = 1e-4
"""Largest difference of a component between the ledger's vector and Chroma's, which normalises again."""

_PROBE_SECONDS = 600


def catch_up(ledger: Ledger, projection: Projection) -> None:
    """Delete and write in Chroma what the ledger has and Chroma has not confirmed."""
    while gone := ledger.tombstones(2000):
        projection.delete(gone)
        ledger.clear_tombstones(gone)
    while seqs := ledger.pending(PROJECT_AT):
        write(ledger, projection, seqs)
        ledger.mark_projected(seqs)


def write(ledger: Ledger, projection: Projection, seqs: Sequence[int]) -> None:
    """Write those of some items that are still in the ledger."""
    rows, vectors = ledger.stored(seqs), ledger.vectors(seqs)
    present = [seq for seq in seqs if seq in rows and seq in vectors]
    if present:
        matrix = np.stack([vectors[seq] for seq in present])
        projection.upsert(present, matrix, [projected(rows[seq]) for seq in present])


def compare(ledger: Ledger, projection: Projection, most: int) -> str | None:
    """What differs between ledger and projection: the count, and the vectors or a sample of `most`."""
    seqs = ledger.seqs()
    if (count := projection.count()) != len(seqs):
        return f"Chroma has {count} items, the ledger {len(seqs)}"
    if len(seqs) > most:
        chosen = np.random.default_rng().choice(len(seqs), most - 1, replace=False)
        seqs = sorted({*(seqs[at] for at in chosen), seqs[-1]})  # the last ones are the likeliest victims
    for block in blocks(seqs, 2000):
        vectors = ledger.vectors(block)
        found = {seq: vector for seq, vector, _ in projection.read(block)}
        if len(found) != len(block):
            return f"Chroma lacks {len(block) - len(found)} vectors"
        if any(not same_vector(vectors[seq], found[seq]) for seq in block):
            return "Chroma has wrong vectors"
    if seqs:
        projection.query(ledger.vectors([seqs[0]])[seqs[0]], 10, None)
    return None


def projected(row: Stored) -> dict[str, Any]:
    """The metadata of a row as Chroma gets it."""
    path = None if row.source is None else text_path(row.source)
    return projected_metadata(row.metadata, row.modality, path, row.page)


def same_vector(ours: FloatArray, theirs: FloatArray) -> bool:
    """Whether Chroma's vector is the ledger's, up to its own normalising."""
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= TOLERANCE)


def blocks(values: Sequence[int], size: int) -> Iterator[list[int]]:
    """Lists of at most `size` values, in order."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


def probe(ledger: Ledger, folder: Path, name: str) -> str | None:
    """Catch up, read everything, compare and search in a child process.

    Returns:
        What is wrong, or None.
    """
    command = [sys.executable, "-m", "umr_plugins.index.catch_up", str(ledger.file), str(folder), name]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    if done.returncode == 0:
        return None
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"exit status {done.returncode}" + (f", {lines[-1]}" if lines else "")


def _main(file: str, folder: str, name: str) -> str | None:
    ledger, projection = Ledger(Path(file)), Projection(Path(folder), name)
    for _ in projection.read([int(each) for each in projection.names()]):
        pass  # rows that the ledger no longer has can be damaged too
    catch_up(ledger, projection)
    wrong = compare(ledger, projection, CHECK_ALL)
    projection.close()
    ledger.close()
    return wrong


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
