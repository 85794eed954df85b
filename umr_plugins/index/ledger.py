"""The truth of an index: items, vectors and files in one SQLite database.

WAL with `synchronous=FULL`: what a transaction committed survives a kill and a power cut. Chroma is only a
projection of it. `seq` numbers are never reused, so a replaced item gets a new one; they are Chroma's ids.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umr_plugins.errors import StorageError
from umr_plugins.index.rows import Row
from umr_plugins.types import FloatArray

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PENDING, PROJECTED, STAGED = 0, 1, 2
"""States of an item: committed but not in Chroma yet; in Chroma; part of a file's new version that is not
complete yet, and therefore hidden."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (path BLOB PRIMARY KEY, device INTEGER NOT NULL, added REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE sources (
  id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB NOT NULL UNIQUE,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, sha256 BLOB,
  pages TEXT NOT NULL, parts INTEGER NOT NULL, state TEXT NOT NULL, reader TEXT NOT NULL
);
CREATE TABLE refusals (
  source INTEGER NOT NULL REFERENCES sources(id) ON DELETE CASCADE,
  page INTEGER, stage TEXT NOT NULL, code TEXT NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX refusals_source ON refusals(source);
CREATE TABLE items (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  source INTEGER REFERENCES sources(id), part INTEGER NOT NULL, page INTEGER, modality TEXT NOT NULL,
  text TEXT, pictures TEXT, metadata TEXT NOT NULL, payload TEXT,
  content BLOB NOT NULL, own INTEGER NOT NULL, state INTEGER NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX items_content ON items(content);
CREATE INDEX items_source ON items(source);
CREATE INDEX items_state ON items(state);
CREATE TABLE tombstones (seq INTEGER PRIMARY KEY);
CREATE TABLE blobs (hash BLOB PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE item_blobs (
  seq INTEGER NOT NULL REFERENCES items(seq) ON DELETE CASCADE, hash BLOB NOT NULL, PRIMARY KEY (seq, hash)
) WITHOUT ROWID;
CREATE INDEX item_blobs_hash ON item_blobs(hash);
"""


_LISTED = "IN (SELECT value FROM json_each(?))"  # takes a JSON list, since SQLite limits the ?s of a query


@dataclass(frozen=True)
class Stored:
    """One item read back, without its vector."""

    seq: int
    id: str
    source: bytes | None
    page: int | None
    modality: str
    text: str | None
    pictures: str | None
    metadata: dict[str, Any]
    payload: str | None


_INSERT = (
    "INSERT INTO items (id, source, part, page, modality, text, pictures, metadata, payload, content, own, "
    "state, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_STORED = (
    "SELECT i.seq, i.id, s.path, i.page, i.modality, i.text, i.pictures, i.metadata, i.payload "
    "FROM items i LEFT JOIN sources s ON s.id = i.source "
)


class Ledger:
    """One SQLite connection, shared by the threads of the owner process.

    Args:
        file: the database; None keeps it in memory. Created when absent.

    Raises:
        StorageError: not a ledger, damaged, made by a newer version, or not writable.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._lock = threading.RLock()
        self._depth = 0
        self._inode: int | None = None
        self.buried = 0
        """Items deleted since the ledger was opened."""
        with self._errors("open"):
            self._db = sqlite3.connect(
                str(file) if file else ":memory:", isolation_level=None, check_same_thread=False, timeout=5
            )
        try:
            with self._errors("open"):
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA foreign_keys=ON")
                self._create_or_check()
        except BaseException:
            self._db.close()
            raise

    def _create_or_check(self) -> None:
        [(version,)] = self._db.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"{self.file} has schema {version}; this version of umr-plugins reads up to "
                f"{SCHEMA_VERSION}. Upgrade it: pip install -U umr-plugins"
            )
        if version == SCHEMA_VERSION:
            return
        with self.transaction():
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StorageError(
                    f"{self.file} is a SQLite database, but not an index ledger; choose another folder"
                )
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    self._db.execute(statement)
            self.set_meta("uid", uuid.uuid4().hex)
            self.set_meta("created", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    # --- transactions -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nested uses join the outermost one."""
        with self._lock:
            if self._depth:
                yield
                return
            self.check_file()
            with self._errors("write"):
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                self._commit()
            except BaseException:
                # After a full disk SQLite may have rolled back by itself.
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def check_file(self) -> None:
        """Raise `StorageError` if the ledger was deleted or replaced while it was open."""
        # A deleted file can still be written to, and everything in it is lost at the end.
        if self.file is None:
            return
        try:
            inode = self.file.stat().st_ino
        except OSError:
            inode = None
        self._inode = self._inode or inode
        if inode is None or inode != self._inode:
            raise StorageError(
                f"the ledger {self.file} was deleted or replaced while it was open. Close the index, restore "
                "the folder (or index again), and open it anew"
            )

    def _commit(self) -> None:
        with self._errors("write"):
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explained(doing, error) from error

    def _explained(self, doing: str, error: sqlite3.Error) -> StorageError:
        text, what = str(error), f"can't {doing} the ledger {self.file or 'in memory'}"
        if "full" in text:
            return StorageError(
                f"{what}: the disk is full. Nothing committed is lost; free some space and go on"
            )
        if "readonly" in text or "unable to open" in text:
            return StorageError(
                f"{what}: the folder is read-only or gone ({text}). An index needs write access"
            )
        if "not a database" in text or "malformed" in text:
            return StorageError(f"{what}: the file is damaged ({text}). Restore it from a backup")
        if "locked" in text:
            return StorageError(f"{what}: another program holds the database ({text}); close it")
        return StorageError(f"{what}: {text}")

    def _run(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        with self.transaction(), self._errors("write"):
            return self._db.execute(sql, values)

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._errors("read"):
            return self._db.execute(sql, values).fetchall()

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query; for the modules that own other tables of this database."""
        return self._all(sql, values)

    def write(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Run one statement; returns the number of changed rows."""
        return self._run(sql, values).rowcount

    def _one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        rows = self._all(sql, values)
        return rows[0][0] if rows else None

    # --- facts about the index --------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A recorded fact."""
        value = self._one("SELECT value FROM meta WHERE key = ?", [key])
        return None if value is None else str(value)

    def set_meta(self, key: str, value: str | None) -> None:
        """Record a fact; None forgets it."""
        if value is None:
            self._run("DELETE FROM meta WHERE key = ?", [key])
        else:
            self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", [key, value])

    def integrity(self) -> list[str]:
        """What SQLite itself finds wrong with the file; empty when nothing."""
        try:
            found = [str(row[0]) for row in self._all("PRAGMA integrity_check(20)")]
        except StorageError as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def close(self) -> None:
        """Close the database; further calls raise `StorageError`."""
        with self._lock:
            self._db.close()

    # --- items ------------------------------------------------------------------------------------------

    def put(self, rows: Iterable[Row], *, source: int | None = None, state: int = PENDING) -> None:
        """Insert or replace items, in one transaction (or within the running one)."""
        with self.transaction():
            for row in rows:
                old = self._one("SELECT seq FROM items WHERE id = ?", [row.id])
                if old is not None:
                    self.bury([old])
                cursor = self._run(
                    _INSERT,
                    [
                        *(row.id, source, row.part, row.page, row.modality, row.text, row.pictures),
                        *(row.metadata, row.payload, row.content, int(row.own), state, row.vector),
                    ],
                )
                for key, data in row.blobs.items():
                    self._run("INSERT OR IGNORE INTO blobs VALUES (?, ?)", [key, data])
                    self._run("INSERT OR IGNORE INTO item_blobs VALUES (?, ?)", [cursor.lastrowid, key])

    def bury(self, seqs: Sequence[int]) -> int:
        """Delete items and remember to delete them from the projection; says how many there were."""
        with self.transaction():
            listed = json.dumps(list(seqs))
            self._run(
                f"INSERT OR IGNORE INTO tombstones SELECT seq FROM items WHERE seq {_LISTED} "
                f"AND state != {STAGED}",
                [listed],
            )
            blobs = self._all(f"SELECT DISTINCT hash FROM item_blobs WHERE seq {_LISTED}", [listed])
            count = self._run(f"DELETE FROM items WHERE seq {_LISTED}", [listed]).rowcount
            self.buried += count
            for (key,) in blobs:
                self._run(
                    "DELETE FROM blobs WHERE hash = ?1 AND NOT EXISTS "
                    "(SELECT 1 FROM item_blobs WHERE hash = ?1)",
                    [key],
                )
            return count

    def count(self) -> int:
        """Visible items."""
        return int(self._one(f"SELECT count(*) FROM items WHERE state != {STAGED}"))

    def count_state(self, state: int) -> int:
        """Items in one state."""
        return int(self._one("SELECT count(*) FROM items WHERE state = ?", [state]))

    def ids(self) -> list[str]:
        """Ids of all visible items, oldest first."""
        return [row[0] for row in self._all(f"SELECT id FROM items WHERE state != {STAGED} ORDER BY seq")]

    def seqs(self) -> list[int]:
        """Sequence numbers of all visible items, ascending."""
        return [row[0] for row in self._all(f"SELECT seq FROM items WHERE state != {STAGED} ORDER BY seq")]

    def seqs_of(self, ids: Sequence[str]) -> dict[str, int]:
        """Sequence numbers of those ids that are there."""
        sql = f"SELECT id, seq FROM items WHERE state != {STAGED} AND id {_LISTED}"
        return dict(self._all(sql, [json.dumps(list(ids))]))

    def stored(self, seqs: Sequence[int]) -> dict[int, Stored]:
        """Visible items by sequence number; absent ones are left out."""
        rows = self._all(
            _STORED + f"WHERE i.seq {_LISTED} AND i.state != {STAGED}",
            [json.dumps(list(seqs))],
        )
        return {row[0]: Stored(*row[:7], *[json.loads(row[7]), row[8]]) for row in rows}

    def vectors(self, seqs: Sequence[int]) -> dict[int, FloatArray]:
        """Vectors by sequence number; absent items are left out."""
        rows = self._all(
            f"SELECT seq, vector FROM items WHERE seq {_LISTED} AND state != {STAGED}",
            [json.dumps(list(seqs))],
        )
        return {seq: np.frombuffer(vector, dtype="<f4") for seq, vector in rows}

    def scan(self, size: int = 2048) -> Iterator[tuple[list[int], FloatArray]]:
        """All visible vectors, as (sequence numbers, `[n, dim]`) blocks."""
        last = -1
        while True:
            rows = self._all(
                f"SELECT seq, vector FROM items WHERE seq > ? AND state != {STAGED} ORDER BY seq LIMIT ?",
                [last, size],
            )
            if not rows:
                return
            last = rows[-1][0]
            yield [row[0] for row in rows], np.stack([np.frombuffer(row[1], dtype="<f4") for row in rows])

    def known_vectors(self, contents: Iterable[bytes]) -> dict[bytes, bytes]:
        """Vectors that the encoder has already made, by content hash."""
        found: dict[bytes, bytes] = {}
        for content in set(contents):
            vector = self._one("SELECT vector FROM items WHERE content = ? AND own = 0 LIMIT 1", [content])
            if vector is not None:
                found[content] = vector
        return found

    def blob(self, key: bytes) -> bytes | None:
        """A picture kept in the ledger."""
        data = self._one("SELECT data FROM blobs WHERE hash = ?", [key])
        return None if data is None else bytes(data)

    # --- the projection's progress ----------------------------------------------------------------------

    def pending(self, limit: int) -> list[int]:
        """Items that Chroma has not confirmed, oldest first."""
        return [
            row[0]
            for row in self._all(
                "SELECT seq FROM items WHERE state = ? ORDER BY seq LIMIT ?", [PENDING, limit]
            )
        ]

    def tombstones(self, limit: int) -> list[int]:
        """Deleted items that Chroma may still hold."""
        return [row[0] for row in self._all("SELECT seq FROM tombstones ORDER BY seq LIMIT ?", [limit])]

    def behind(self) -> tuple[int, int]:
        """How many items and how many deletions the projection has not seen."""
        return self.count_state(PENDING), int(self._one("SELECT count(*) FROM tombstones"))

    def mark_projected(self, seqs: Sequence[int]) -> None:
        """Chroma has confirmed these."""
        self._run(
            f"UPDATE items SET state = {PROJECTED} WHERE state = {PENDING} AND seq {_LISTED}",
            [json.dumps(list(seqs))],
        )

    def clear_tombstones(self, seqs: Sequence[int]) -> None:
        """Chroma has forgotten these."""
        self._run(f"DELETE FROM tombstones WHERE seq {_LISTED}", [json.dumps(list(seqs))])

    def mark_all_projected(self) -> None:
        """A projection was written from scratch."""
        self._run(f"UPDATE items SET state = {PROJECTED} WHERE state = {PENDING}")
        self._run("DELETE FROM tombstones")


def text_path(path: bytes) -> str:
    """A stored path as a string."""
    return os.fsdecode(path)
