"""The ledger's knowledge of files: which version of each is indexed, and which were refused why."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from umr_plugins.errors import ItemCode, Stage
from umr_plugins.index.ledger import PENDING, STAGED, Ledger

COMPLETE, PARTIAL, REFUSED = "complete", "partial", "refused"
"""States of a file: all its parts are there; a run ended in the middle of it; nothing of it could be used."""


@dataclass(frozen=True)
class Refused:
    """A file (or one page of it) that could not be used.

    Args:
        path: absolute.
        page: 1-based page of a PDF, or None for the whole file.
    """

    path: Path
    page: int | None
    stage: Stage
    code: ItemCode
    reason: str


@dataclass(frozen=True)
class Version:
    """What is known of one version of a file. `reader` is the version of this library that read it."""

    path: bytes
    size: int
    mtime_ns: int
    inode: int
    sha256: bytes | None
    pages: str
    reader: str

    @property
    def stat(self) -> tuple[int, int, int]:
        """What tells, without reading, that a file is unchanged."""
        return self.size, self.mtime_ns, self.inode


@dataclass(frozen=True)
class Source:
    """A file the ledger knows."""

    id: int
    state: str
    version: Version


class Sources:
    """Reads and writes the file tables of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def find(self, path: bytes) -> Source | None:
        """The file at an absolute path, if known."""
        rows = self._ledger.read(
            "SELECT id, state, path, size, mtime_ns, inode, sha256, pages, reader FROM sources "
            "WHERE path = ?",
            [path],
        )
        return Source(rows[0][0], rows[0][1], Version(*rows[0][2:])) if rows else None

    def below(self, root: bytes) -> list[tuple[int, bytes]]:
        """(id, path) of all known files under a folder."""
        start = root.rstrip(b"/") + b"/"
        return [
            (row[0], row[1])
            for row in self._ledger.read(
                "SELECT id, path FROM sources WHERE path > ? AND path < ? ORDER BY path",
                [start, start[:-1] + b"0"],
            )
        ]

    def write(self, version: Version, state: str, parts: int) -> int:
        """Record a version of a file; returns its id."""
        self._ledger.write(
            "INSERT INTO sources (path, size, mtime_ns, inode, sha256, pages, parts, state, reader) "
            "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (path) DO UPDATE SET "
            "size=?2, mtime_ns=?3, inode=?4, sha256=?5, pages=?6, parts=?7, state=?8, reader=?9",
            [
                *(version.path, version.size, version.mtime_ns, version.inode, version.sha256, version.pages),
                *(parts, state, version.reader),
            ],
        )
        found = self.find(version.path)
        assert found is not None  # written just now, under the same lock
        return found.id

    def finish(self, version: Version, ids: Collection[str], refused: Sequence[Refused], parts: int) -> int:
        """Make this version the file's only one: publish its parts, forget those of older versions.

        Returns:
            How many items became visible by it.
        """
        with self._ledger.transaction():
            source = self.write(version, COMPLETE if ids else REFUSED, parts)
            known = self._ledger.read("SELECT seq, id FROM items WHERE source = ?", [source])
            self._ledger.bury([row[0] for row in known if row[1] not in ids])
            published = self._ledger.write(
                f"UPDATE items SET state = {PENDING} WHERE source = ? AND state = {STAGED}", [source]
            )
            self._ledger.write("DELETE FROM refusals WHERE source = ?", [source])
            for row in refused:
                self._ledger.write(
                    "INSERT INTO refusals VALUES (?, ?, ?, ?, ?)",
                    [source, row.page, row.stage, row.code, row.reason],
                )
        return published

    def touch(self, version: Version) -> None:
        """Record that a known file, its bytes unchanged, has new times or a new inode."""
        self._ledger.write(
            "UPDATE sources SET size = ?2, mtime_ns = ?3, inode = ?4 WHERE path = ?1 AND "
            "(size, mtime_ns, inode) != (?2, ?3, ?4)",
            [version.path, *version.stat],
        )

    def items(self, source: int) -> int:
        """Visible items of a file."""
        [(count,)] = self._ledger.read(
            f"SELECT count(*) FROM items WHERE source = ? AND state != {STAGED}", [source]
        )
        return int(count)

    def ids(self, source: int) -> set[str]:
        """Ids of a file's items, those of an unfinished newer version included."""
        return {row[0] for row in self._ledger.read("SELECT id FROM items WHERE source = ?", [source])}

    def refusals(self, source: Source) -> list[Refused]:
        """Why the file, or pages of it, were refused."""
        path = Path(os.fsdecode(source.version.path))
        rows = self._ledger.read(
            "SELECT page, stage, code, reason FROM refusals WHERE source = ? ORDER BY rowid", [source.id]
        )
        return [Refused(path, *row) for row in rows]

    def forget(self, sources: Iterable[int]) -> int:
        """Remove files with all their items; returns how many items went."""
        chosen = json.dumps(list(sources))
        with self._ledger.transaction():
            seqs = self._ledger.read(
                "SELECT seq FROM items WHERE source IN (SELECT value FROM json_each(?))", [chosen]
            )
            self._ledger.bury([row[0] for row in seqs])
            self._ledger.write("DELETE FROM sources WHERE id IN (SELECT value FROM json_each(?))", [chosen])
        return len(seqs)

    def count(self) -> int:
        """Files with items."""
        [(count,)] = self._ledger.read("SELECT count(*) FROM sources WHERE state != ?", [REFUSED])
        return int(count)

    # --- roots ------------------------------------------------------------------------------------------

    def root_device(self, root: bytes) -> int | None:
        """The device a folder was on when it was last read; None if the user never named it."""
        rows = self._ledger.read("SELECT device FROM roots WHERE path = ?", [root])
        return int(rows[0][0]) if rows else None

    def name_root(self, root: bytes, device: int) -> None:
        """Remember a folder (or single file) that the user named."""
        self._ledger.write(
            "INSERT INTO roots VALUES (?1, ?2, ?3) ON CONFLICT (path) DO UPDATE SET device = ?2",
            [root, device, time.time()],
        )

    def forget_root(self, root: bytes) -> None:
        """The user no longer wants it."""
        self._ledger.write("DELETE FROM roots WHERE path = ?", [root])

    def roots(self) -> list[Path]:
        """Folders and files that the user named."""
        return [
            Path(os.fsdecode(row[0])) for row in self._ledger.read("SELECT path FROM roots ORDER BY path")
        ]
