"""Codes of an index's vectors: kept in the ledger beside them, scanned in place of asking Chroma.

They follow from the vectors, so they are filled in whenever they lag behind and can be made anew at any time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from umr_plugins.errors import InputError, StorageError
from umr_plugins.index.ledger import Ledger
from umr_plugins.index.quantize import OVER_FETCH, CodeArray, CodeKind, quantize, scores
from umr_plugins.types import FloatArray

log = logging.getLogger(__name__)

CodesOption = Literal["off", "int8", "binary"]

_TABLE = (
    "CREATE TABLE IF NOT EXISTS codes "
    "(seq INTEGER PRIMARY KEY REFERENCES items(seq) ON DELETE CASCADE, code BLOB NOT NULL)"
)
_PAGE = 4096
_SMALL = 16_384
"""Blocks in memory that are smaller are joined with what comes next."""


class Codes:
    """The codes of one ledger, and a copy of them in memory from the first search on."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._blocks: list[tuple[npt.NDArray[np.int64], CodeArray]] = []
        self._last = -1
        self._buried = self._ledger.buried

    @property
    def kind(self) -> CodeKind | None:
        """Which codes searches use; None for none."""
        return cast("CodeKind | None", self._ledger.meta("codes"))

    def use(self, option: CodesOption | None) -> None:
        """Keep these codes from now on; None leaves it as recorded.

        Raises:
            InputError: not one of the options.
        """
        if option is None:
            return
        if option not in ("off", *OVER_FETCH):
            raise InputError(f'codes must be "off", "int8" or "binary", got {option!r}')
        kind = None if option == "off" else option
        with self._lock, self._ledger.transaction():
            if kind != self.kind:
                self._ledger.write("DROP TABLE IF EXISTS codes")
                if kind is not None:
                    self._ledger.write(_TABLE)
                self._ledger.set_meta("codes", kind)
                self._forget()
        self.fill()

    def fill(self) -> None:
        """Write the codes of items that have none yet."""
        with self._lock:
            kind = self.kind
            while kind is not None and (rows := self._missing()):
                with self._ledger.transaction():
                    for seq, vector in rows:
                        self._ledger.write("INSERT INTO codes VALUES (?, ?)", [seq, _code(kind, vector)])

    def _missing(self) -> list[tuple[Any, ...]]:
        # Sequence numbers only grow, and codes are filled in their order.
        return self._ledger.read(
            "SELECT seq, vector FROM items WHERE seq > (SELECT coalesce(max(seq), -1) FROM codes) "
            "ORDER BY seq LIMIT ?",
            [_PAGE],
        )

    def refill(self) -> None:
        """Make all codes anew from the vectors."""
        if self.kind is not None:
            with self._lock:
                self._ledger.write("DELETE FROM codes")
                self._forget()
            self.fill()

    def ranked(self, query: FloatArray) -> tuple[CodeKind, npt.NDArray[np.int64]] | None:
        """All items, those first whose codes are nearest to the query; None when there are no codes."""
        try:
            self.fill()
        except StorageError as error:  # a full disk must not keep anyone from searching
            log.warning("%s; searching without codes", error)
            return None
        with self._lock:
            kind = self.kind
            if kind is None:
                return None
            self._refresh()
            blocks = list(self._blocks)
        if not blocks:
            return kind, np.zeros(0, np.int64)
        seqs = np.concatenate([seqs for seqs, _ in blocks])
        found = np.concatenate([scores(kind, query, codes) for _, codes in blocks])
        return kind, seqs[np.argsort(-found, kind="stable")]

    def _refresh(self) -> None:
        """Bring the copy in memory up to the ledger."""
        if self._buried != self._ledger.buried:
            self._buried = self._ledger.buried
            there = np.array([row[0] for row in self._ledger.read("SELECT seq FROM codes")], np.int64)
            kept = [(seqs, codes, np.isin(seqs, there)) for seqs, codes in self._blocks]
            self._blocks = [(seqs[keep], codes[keep]) for seqs, codes, keep in kept if keep.any()]
        for seqs, codes in self._read_after(self._last):
            self._last = int(seqs[-1])
            if self._blocks and len(self._blocks[-1][0]) < _SMALL:
                last_seqs, last_codes = self._blocks.pop()
                seqs, codes = np.concatenate([last_seqs, seqs]), np.concatenate([last_codes, codes])
            self._blocks.append((seqs, codes))

    def _read_after(self, last: int) -> Iterator[tuple[npt.NDArray[np.int64], CodeArray]]:
        while rows := self._ledger.read(
            "SELECT seq, code FROM codes WHERE seq > ? ORDER BY seq LIMIT ?", [last, _PAGE]
        ):
            last = rows[-1][0]
            codes = np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(len(rows), -1)
            yield np.array([row[0] for row in rows], np.int64), codes

    def wrong(self) -> int:
        """How many items have no code, or another one than their vector gives."""
        kind = self.kind
        if kind is None:
            return 0
        self.fill()
        count, last = 0, -1
        while rows := self._ledger.read(
            "SELECT i.seq, i.vector, c.code FROM items i LEFT JOIN codes c ON c.seq = i.seq WHERE i.seq > ? "
            "ORDER BY i.seq LIMIT ?",
            [last, _PAGE],
        ):
            last = rows[-1][0]
            count += sum(code != _code(kind, vector) for _, vector, code in rows)
        return count


def _code(kind: CodeKind, vector: bytes) -> bytes:
    return quantize(kind, np.frombuffer(vector, "<f4")).tobytes()
