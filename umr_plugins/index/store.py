"""Ledger and projection of one collection, kept in step.

Order of every change: committed to the ledger, written to Chroma, marked. Opening finishes whatever a kill
left undone, and makes the projection anew when Chroma can't be used any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from umr_plugins.errors import IndexLockedError, StorageError
from umr_plugins.index.catch_up import PROJECT_AT, SAMPLE, blocks, catch_up, compare, probe, write
from umr_plugins.index.chroma import Projection, ProjectionError
from umr_plugins.index.codes import Codes
from umr_plugins.index.ledger import Ledger

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""How long a failed attempt to make the projection anew is not repeated by searches."""


class Store:
    """Ledger and projection of one collection; see `owners.open_store`, which locks and shares it.

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
        self.pid = os.getpid()
        self.users = 0
        self.retry_at = 0.0
        self._projection: Projection | None = None
        self.ledger = Ledger(ledger_file(folder, collection) if folder else None)
        self.codes = Codes(self.ledger)
        try:
            self._open_projection()
        except BaseException:
            self.close_parts(clean=False)
            raise

    # --- opening and closing ----------------------------------------------------------------------------

    def _open_projection(self) -> None:
        name = self.ledger.meta("projection")
        if self.folder is not None and self.url is None:
            self._sweep(name)
        if name is None:
            self._replace_projection()
            return
        if self.folder is not None and self.url is None:
            unclean = self.ledger.meta("closed") != self._stamp(name)
            with contextlib.suppress(StorageError):  # a full disk must not keep anyone from searching
                self.ledger.set_meta("closed", None)
            if unclean and (wrong := probe(self.ledger, self._place(name), name)) is not None:
                self._mend_or_scan(f"Chroma's files can't be used ({wrong})")
                return
        try:
            self._projection = self._opened(name)
            catch_up(self.ledger, self._projection)
            wrong = compare(self.ledger, self._projection, SAMPLE)  # a child has compared more, if need be
        except ProjectionError as error:
            if self.url is not None and self._projection is None:
                raise StorageError(
                    f"the Chroma server {self.url} can't be used ({error}). Start it (chroma run)"
                ) from error
            wrong = str(error)
        if wrong is not None:
            self._mend_or_scan(wrong)

    def _mend_or_scan(self, reason: str) -> None:
        try:
            self.mend(reason)
        except StorageError as error:
            if not self.ledger.count():
                raise
            log.warning("%s; searching the ledger instead", error)
            self.retry_at = time.monotonic() + RETRY_SECONDS

    def _opened(self, name: str) -> Projection:
        try:
            return Projection(self._place(name), name)
        except ProjectionError:
            if self.url is None:
                raise
            # The server answers, but has lost our collection: then it can be made anew.
            with contextlib.closing(Projection(self.url, self._next_name(), create=True)) as fresh:
                fresh.drop()
            self.mend("the server no longer has the collection")
            assert self._projection is not None
            return self._projection

    def mend(self, reason: str) -> None:
        """Make the projection anew because of `reason`, which is logged and kept for `info`.

        Raises:
            StorageError: it can't be written.
        """
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
        if os.getpid() != self.pid:
            raise IndexLockedError(
                f"the index {self.folder or 'in memory'} was opened before this process was forked from "
                f"process {self.pid}; use it there only (or start workers with spawn)"
            )

    def close_parts(self, clean: bool) -> None:
        """Close Chroma and the ledger; `clean` records that the next opening needs no thorough check."""
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
        """Bring codes and Chroma up to the ledger, if at least so many changes wait.

        Raises:
            StorageError: Chroma can't be written even after making it anew. The ledger has everything.
        """
        with self.lock:
            waiting = sum(self.ledger.behind())
            if waiting < at_least or waiting == 0:
                return
            self.codes.fill()
            try:
                catch_up(self.ledger, self._usable())
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

    def _next_name(self) -> str:
        # Never used before, since Chroma caches its systems by path for the life of the process.
        return f"{self.collection}-{(self.ledger.meta('uid') or '')[:8]}-{uuid.uuid4().hex[:8]}"

    def _replace_projection(self) -> None:
        """Write a new projection from the ledger, then switch to it, then drop the old one.

        Raises:
            StorageError: the new one can't be written; the old state stays recorded.
        """
        with self.lock:
            self.ledger.check_file()
            name, old_name, old = self._next_name(), self.ledger.meta("projection"), self._projection
            place, fresh = self._place(name), None
            try:
                if isinstance(place, Path):
                    shutil.rmtree(place, ignore_errors=True)
                fresh = Projection(place, name, create=True)
                for seqs in blocks(self.ledger.seqs(), PROJECT_AT):
                    write(self.ledger, fresh, seqs)
                with self.ledger.transaction():
                    self.ledger.set_meta("projection", name)
                    self.ledger.mark_all_projected()
            except (ProjectionError, StorageError) as error:
                self._discard(fresh, place)
                raise StorageError(
                    f"the search side of the index can't be written ({error}). The ledger is whole and "
                    "nothing committed is lost; check that the disk has space (or that the server runs) and "
                    "try again"
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
        """Make codes and projection anew from the ledger; no model runs."""
        self.check_usable()
        self.codes.refill()
        self._replace_projection()


def ledger_file(folder: Path, collection: str) -> Path:
    """Where the ledger of a collection is."""
    return folder / f"{collection}.ledger.sqlite3"
