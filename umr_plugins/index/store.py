"""The one owner of an index: lock, ledger and projection, kept in step.

Order of every change: committed to the ledger, written to Chroma, marked. Opening finishes whatever a kill
left undone, and makes the projection anew when Chroma can't be used any more. Chroma answers searches with
more candidates than asked for; the ledger's vectors decide the order and the scores. Where Chroma can't
answer, the ledger does, by a scan.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umr_plugins.errors import IndexLockedError, InputError, StorageError
from umr_plugins.index.chroma import Projection, ProjectionError, check_url, probe
from umr_plugins.index.ledger import Ledger, Stored, text_path
from umr_plugins.index.lock import NAME as LOCK_NAME
from umr_plugins.index.lock import FolderLock
from umr_plugins.index.rows import projected_metadata
from umr_plugins.index.where import matches
from umr_plugins.types import FloatArray

log = logging.getLogger(__name__)

OVER_FETCH = 4
"""Candidates asked of Chroma per wanted answer."""

PROJECT_AT = 256
"""Items per write to Chroma; what is committed but not yet there is found by a scan."""

CHECK_ALL = 20_000
"""After an unclean end, up to so many vectors are all compared when the index is opened, else a sample."""

TOLERANCE = 1e-4
"""Largest difference of a component between the ledger's vector and Chroma's, which normalises again."""

_RETRY_SECONDS = 30.0
_COLLECTION = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,60}[a-zA-Z0-9]")


class Store:
    """Owner of one collection. Use `open_store`, which shares it within the process.

    Args:
        folder: where ledger and lock are; None keeps everything in memory.
        collection: its name.
        url: a Chroma server to project into; None projects into `folder` too.
    """

    def __init__(self, folder: Path | None, collection: str, url: str | None) -> None:
        self.folder = folder
        self.collection = collection
        self.url = url
        self.lock = threading.RLock()
        self.sync_lock = threading.Lock()
        self.repairs: list[str] = []
        """What opening (or a search) had to mend, for people."""
        self._pid = os.getpid()
        self._users = 0
        self._retry_at = 0.0
        self._projection: Projection | None = None
        self.ledger = Ledger(ledger_file(folder, collection) if folder else None)
        try:
            self._open_projection()
        except BaseException:
            self._close_parts(clean=False)
            raise

    # --- opening and closing ----------------------------------------------------------------------------

    def _open_projection(self) -> None:
        name, unclean = self.ledger.meta("projection"), False
        if self.folder is not None and self.url is None:
            self._sweep(name)
        if name is None:
            self._replace_projection()
            return
        if self.folder is not None and self.url is None:
            unclean = self.ledger.meta("closed") != self._stamp(name)
            with contextlib.suppress(StorageError):  # a full disk must not keep anyone from searching
                self.ledger.set_meta("closed", None)
            wrong = probe(self._place(name), name) if unclean else None
            if wrong is not None:
                self._mend_or_scan(f"Chroma's files can't be read ({wrong})")
                return
        try:
            self._projection = self._opened(name)
            self._catch_up(self._projection)
            wrong = self._compare(self._projection, everything=unclean)
        except ProjectionError as error:
            if self.url is not None and self._projection is None:
                raise StorageError(
                    f"the Chroma server {self.url} can't be used ({error}). Start it (chroma run), or check the URL"
                ) from error
            wrong = str(error)
        if wrong is not None:
            self._mend_or_scan(wrong)

    def _mend_or_scan(self, reason: str) -> None:
        try:
            self._mend(reason)
        except StorageError as error:
            if not self.ledger.count():
                raise
            log.warning("%s; searching the ledger instead", error)
            self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _opened(self, name: str) -> Projection:
        try:
            return Projection(self._place(name), name)
        except ProjectionError:
            if self.url is None:
                raise
            # The server answers, but has lost our collection: then it can be made anew.
            with contextlib.closing(Projection(self.url, self._next_name(), create=True)) as fresh:
                fresh.drop()
            self._mend("the server no longer has the collection")
            assert self._projection is not None
            return self._projection

    def _mend(self, reason: str) -> None:
        log.warning("%s: %s; making the projection anew from the ledger", self.folder or "index", reason)
        self.repairs.append(reason)
        self._replace_projection()

    def _sweep(self, name: str | None) -> None:
        """Remove what an interrupted rebuild left."""
        assert self.folder is not None
        for path in self.folder.glob(f"{self.collection}.chroma-*"):
            if name is None or path != self._place(name):
                shutil.rmtree(path, ignore_errors=True)

    def _place(self, name: str) -> Any:
        if self.folder is None:
            return None
        return self.url or self.folder / f"{self.collection}.chroma-{name.rsplit('-', 1)[1]}"

    def _stamp(self, name: str) -> str:
        """Names, sizes and times of Chroma's files: the same after a clean end and an untouched night."""
        folder = self._place(name)
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.is_file():
                    digest.update(
                        f"{path.relative_to(folder)}:{status.st_size}:{status.st_mtime_ns};".encode()
                    )
        return digest.hexdigest()

    def check_usable(self) -> None:
        """Raise if this process is a fork of the owner: Chroma does not survive a fork."""
        if os.getpid() != self._pid:
            raise IndexLockedError(
                f"the index {self.folder or 'in memory'} was opened before this process was forked from process "
                f"{self._pid}; use it there only (or start workers with spawn)"
            )

    def _close_parts(self, clean: bool) -> None:
        name = None
        if self._projection is not None:
            name = self._projection.name
            try:
                self._projection.close()
            except ProjectionError as error:
                log.debug("closing: %s", error)
            self._projection = None
        try:
            if clean and name is not None and self.folder is not None and self.url is None:
                self.ledger.set_meta("closed", self._stamp(name))
        except StorageError as error:
            log.debug("closing: %s", error)  # then the next opening checks more
        finally:
            self.ledger.close()

    # --- the projection ---------------------------------------------------------------------------------

    def project(self, *, at_least: int = 1) -> None:
        """Bring Chroma up to the ledger, if at least so many changes wait.

        Raises:
            StorageError: Chroma can't be written even after making it anew. The ledger has everything.
        """
        with self.lock:
            waiting = sum(self.ledger.behind())
            if waiting < at_least or waiting == 0:
                return
            try:
                self._catch_up(self._usable())
            except ProjectionError as error:
                log.warning("%s; making the projection anew from the ledger", error)
                self.repairs.append(str(error))
                self._replace_projection()

    @property
    def projection(self) -> Projection | None:
        """Chroma's side; None while it can't be used."""
        return self._projection

    def dim(self) -> int | None:
        """Length of the index's vectors, once there are any."""
        value = self.ledger.meta("dim")
        return None if value is None else int(value)

    def _usable(self) -> Projection:
        if self._projection is None:
            raise ProjectionError("Chroma is not open")
        return self._projection

    def _catch_up(self, projection: Projection) -> None:
        while gone := self.ledger.tombstones(2000):
            projection.delete(gone)
            self.ledger.clear_tombstones(gone)
        while seqs := self.ledger.pending(PROJECT_AT):
            self._write(projection, seqs)
            self.ledger.mark_projected(seqs)

    def _write(self, projection: Projection, seqs: Sequence[int]) -> None:
        rows, vectors = self.ledger.stored(seqs), self.ledger.vectors(seqs)
        present = [seq for seq in seqs if seq in rows and seq in vectors]
        if present:
            matrix = np.stack([vectors[seq] for seq in present])
            projection.upsert(present, matrix, [projected(rows[seq]) for seq in present])

    def _next_name(self) -> str:
        uid, last = self.ledger.meta("uid") or "", self.ledger.meta("generation") or "0"
        return f"{self.collection}-{uid[:8]}-{int(last) + 1}"

    def _replace_projection(self) -> None:
        """Write a new projection from the ledger, then switch to it, then drop the old one.

        Raises:
            StorageError: the new one can't be written; the old state stays recorded.
        """
        with self.lock:
            name, old_name, old = self._next_name(), self.ledger.meta("projection"), self._projection
            place, fresh = self._place(name), None
            try:
                if isinstance(place, Path):
                    shutil.rmtree(place, ignore_errors=True)
                fresh = Projection(place, name, create=True)
                for seqs in _blocks(self.ledger.seqs(), PROJECT_AT):
                    self._write(fresh, seqs)
                with self.ledger.transaction():
                    self.ledger.set_meta("projection", name)
                    self.ledger.set_meta("generation", name.rsplit("-", 1)[1])
                    self.ledger.mark_all_projected()
            except (ProjectionError, StorageError) as error:
                self._discard(fresh, place)
                raise StorageError(
                    f"the search side of the index can't be written ({error}). The ledger is whole and nothing "
                    "committed is lost; check that the disk has space (or that the server runs) and try again"
                ) from error
            except BaseException:
                self._discard(fresh, place)
                raise
            self._projection = fresh
            self._discard(old, self._place(old_name) if old_name else None)

    def _discard(self, projection: Projection | None, place: Any) -> None:
        if projection is not None:
            with contextlib.suppress(ProjectionError):
                if self.url is not None:
                    projection.drop()
            with contextlib.suppress(ProjectionError):
                projection.close()
        if isinstance(place, Path):
            shutil.rmtree(place, ignore_errors=True)

    def rebuild(self) -> None:
        """Make the projection anew from the ledger; no model runs."""
        self.check_usable()
        self._replace_projection()

    def _compare(self, projection: Projection, *, everything: bool) -> str | None:
        """What differs between ledger and projection: the count, and all vectors or a sample."""
        seqs = self.ledger.seqs()
        if (count := projection.count()) != len(seqs):
            return f"Chroma has {count} items, the ledger {len(seqs)}"
        sample = CHECK_ALL if everything else 32
        if len(seqs) > sample:
            chosen = np.random.default_rng().choice(len(seqs), sample - 1, replace=False)
            seqs = sorted({*(seqs[at] for at in chosen), seqs[-1]})  # the last ones are the likeliest victims
        for block in _blocks(seqs, 2000):
            vectors = self.ledger.vectors(block)
            found = {seq: vector for seq, vector, _ in projection.read(block)}
            if len(found) != len(block):
                return f"Chroma lacks {len(block) - len(found)} vectors"
            if any(not same_vector(vectors[seq], found[seq]) for seq in block):
                return "Chroma has wrong vectors"
        if seqs:
            projection.query(self.ledger.vectors([seqs[0]])[seqs[0]], 1, None)
        return None

    # --- search -----------------------------------------------------------------------------------------

    def nearest(self, query: FloatArray, k: int, where: dict[str, Any] | None) -> list[tuple[int, float]]:
        """The `k` best items as (sequence number, cosine), best first; older items first among equals."""
        self.check_usable()
        total = self.ledger.count()
        if not total or k <= 0:
            return []
        # Read before Chroma is asked, so that an item can't slip from one list into the other unseen.
        pending, buried = self.ledger.behind()
        waiting = self.ledger.pending(pending) if pending else []
        wanted = OVER_FETCH * k + 16 + buried
        if where is None and wanted >= total:
            return self._scan(query, k, None)
        candidates = self._ask(query, min(wanted, total), where)
        if candidates is None:
            return self._scan(query, k, where)
        return self._rescored(query, candidates + self._passing(waiting, where), k)

    def _ask(self, query: FloatArray, count: int, where: dict[str, Any] | None) -> list[int] | None:
        """Chroma's candidates; None when it can't answer."""
        for attempt in range(2):
            with self.lock:
                projection = self._projection
            try:
                if projection is None:
                    raise ProjectionError("Chroma is not open")
                found = projection.query(query, count, where)
                # The graph may reach fewer rows than there are; a filter may leave fewer than asked for.
                return found if len(found) >= count else projection.matching(where)
            except ProjectionError as error:
                if attempt or not self._recover(projection, error):
                    return None
        return None

    def _recover(self, broken: Projection | None, error: ProjectionError) -> bool:
        with self.lock:
            if self._projection is not broken:
                return True  # another thread has mended it
            if time.monotonic() < self._retry_at:
                return False
            try:
                self._mend(str(error))
            except StorageError as failure:
                log.warning("%s; searching the ledger instead", failure)
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return False
            return True

    def _passing(self, seqs: Sequence[int], where: dict[str, Any] | None) -> list[int]:
        if where is None:
            return list(seqs)
        return [seq for seq, row in self.ledger.stored(seqs).items() if matches(projected(row), where)]

    def matching(self, where: dict[str, Any] | None) -> list[int]:
        """All items that pass a filter, by the ledger."""
        return [
            seq for block in _blocks(self.ledger.seqs(), 2000) for seq in sorted(self._passing(block, where))
        ]

    def _rescored(self, query: FloatArray, seqs: Sequence[int], k: int) -> list[tuple[int, float]]:
        best: list[tuple[int, float]] = []
        for block in _blocks(list(dict.fromkeys(seqs)), 2048):
            vectors = self.ledger.vectors(block)
            if vectors:
                present = list(vectors)
                best = _merge(best, present, np.stack([vectors[seq] for seq in present]) @ query, k)
        return best

    def _scan(self, query: FloatArray, k: int, where: dict[str, Any] | None) -> list[tuple[int, float]]:
        best: list[tuple[int, float]] = []
        for seqs, vectors in self.ledger.scan():
            if where is not None:
                passing = set(self._passing(seqs, where))
                rows = [at for at, seq in enumerate(seqs) if seq in passing]
                seqs, vectors = [seqs[at] for at in rows], vectors[rows]
            if seqs:
                best = _merge(best, seqs, vectors @ query, k)
        return best


def _merge(
    best: list[tuple[int, float]], seqs: Sequence[int], scores: FloatArray, k: int
) -> list[tuple[int, float]]:
    joined = best + [(seq, float(score)) for seq, score in zip(seqs, scores, strict=True)]
    return sorted(joined, key=lambda pair: (-pair[1], pair[0]))[:k]


def projected(row: Stored) -> dict[str, Any]:
    """The metadata of a row as Chroma gets it."""
    path = None if row.source is None else text_path(row.source)
    return projected_metadata(row.metadata, row.modality, path, row.page)


def same_vector(ours: FloatArray, theirs: FloatArray) -> bool:
    """Whether Chroma's vector is the ledger's, up to its own normalising."""
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= TOLERANCE)


def _blocks(values: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


# --- one owner per folder ---------------------------------------------------------------------------------

_stores: dict[tuple[str, str], Store] = {}
_locks: dict[str, tuple[FolderLock, list[int]]] = {}
_registry = threading.RLock()


def ledger_file(folder: Path, collection: str) -> Path:
    """Where the ledger of a collection is."""
    return folder / f"{collection}.ledger.sqlite3"


def open_store(folder: Path | None, collection: str, *, url: str | None, create: bool) -> Store:
    """The owner of `collection` in `folder`, shared with whoever has it open in this process.

    Raises:
        InputError: the collection's name or the URL.
        IndexLockedError: another process has the folder.
        StorageError: nothing there and `create` is False; not an index folder; not writable.
    """
    if not _COLLECTION.fullmatch(collection):
        raise InputError(
            f"a collection's name has 2 to 62 characters of a-z, A-Z, 0-9, '.', '_', '-', got {collection!r}"
        )
    if url is not None:
        check_url(url)
    if folder is None:
        store = Store(None, collection, None)
        store._users = 1
        return store
    folder = Path(os.path.realpath(folder))
    with _registry:
        _drop_other_process()
        key = (str(folder), collection)
        store_or_none = _stores.get(key)
        if store_or_none is not None:
            if store_or_none.url != url:
                raise InputError(f"the index {folder} is open already, with another place for Chroma")
            store_or_none._users += 1
            return store_or_none
        _check_folder(folder, collection, create)
        with _locked(folder):
            store = Store(folder, collection, url)
            store._users = 1
            _stores[key] = store
        return store


def close_store(store: Store) -> None:
    """One user less; the last one closes it and frees the folder."""
    with _registry:
        if os.getpid() != store._pid:
            return
        store._users -= 1
        if store._users > 0:
            return
        with store.lock:
            store._close_parts(clean=True)
        if store.folder is not None:
            _stores.pop((str(store.folder), store.collection), None)
            _unlock(store.folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Take the folder's lock (or one more share of it), giving it back if opening fails."""
    if str(folder) not in _locks:
        _locks[str(folder)] = (FolderLock(folder), [0])
    _locks[str(folder)][1][0] += 1
    try:
        yield
    except BaseException:
        _unlock(folder)
        raise


def _unlock(folder: Path) -> None:
    lock, shares = _locks[str(folder)]
    shares[0] -= 1
    if not shares[0]:
        lock.release()
        del _locks[str(folder)]


def _drop_other_process() -> None:
    """After a fork the parent still owns the folders; its owners are of no use here."""
    for key in [key for key, store in _stores.items() if store._pid != os.getpid()]:
        _stores.pop(key)
        lock = _locks.pop(key[0], None)
        if lock is not None:
            lock[0].release()


def _check_folder(folder: Path, collection: str, create: bool) -> None:
    there = ledger_file(folder, collection).is_file()
    if not there and not create:
        others = sorted(path.name.removesuffix(".ledger.sqlite3") for path in folder.glob("*.ledger.sqlite3"))
        hint = f" It has the collections {others}." if others else ""
        raise StorageError(
            f"there is no index in {folder}.{hint} Check the path, or make one: umr index SOURCE --db {folder}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [
            path.name
            for path in folder.iterdir()
            if path.name != LOCK_NAME
            and not re.search(r"\.(ledger\.sqlite3(-wal|-shm)?|chroma-\d+)$", path.name)
        ]
    except OSError as error:
        raise StorageError(f"can't use {folder} as an index folder: {error.strerror}") from error
    if not there and foreign and not any(folder.glob("*.ledger.sqlite3")):
        raise StorageError(
            f"{folder} is not an index and not empty (it holds {foreign[0]!r}); give a new or an empty folder"
        )
