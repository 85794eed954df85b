"""One owner per index folder: locked against other processes, shared within this one."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from umr_plugins.errors import InputError, StorageError
from umr_plugins.index.chroma import check_url
from umr_plugins.index.lock import FolderLock
from umr_plugins.index.store import Store, ledger_file

_COLLECTION = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,60}[a-zA-Z0-9]")
_OURS = re.compile(r"^\.umr\.lock$|\.ledger\.sqlite3(-wal|-shm)?$|\.chroma-[0-9a-f]+$")

_stores: dict[tuple[str, str], Store] = {}
_locks: dict[str, tuple[FolderLock, list[int]]] = {}
_registry = threading.RLock()


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
        store.users = 1
        return store
    folder = Path(os.path.realpath(folder))
    with _registry:
        _drop_other_process()
        key = (str(folder), collection)
        store_or_none = _stores.get(key)
        if store_or_none is not None:
            if store_or_none.url != url:
                raise InputError(f"the index {folder} is open already, with another place for Chroma")
            store_or_none.users += 1
            return store_or_none
        _check_folder(folder, collection, create)
        with _locked(folder):
            store = Store(folder, collection, url)
            store.users = 1
            _stores[key] = store
        return store


def close_store(store: Store) -> None:
    """One user less; the last one closes it and frees the folder."""
    with _registry:
        if os.getpid() != store.pid:
            return
        store.users -= 1
        if store.users > 0:
            return
        with store.lock:
            store.close_parts(clean=True)
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
    for key in [key for key, store in _stores.items() if store.pid != os.getpid()]:
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
            f"there is no index in {folder}.{hint} Check the path, or make one: "
            f"umr index SOURCE --db {folder}, or Index(path, encoder)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in folder.iterdir() if not _OURS.search(path.name)]
    except OSError as error:
        raise StorageError(f"can't use {folder} as an index folder: {error.strerror}") from error
    if not there and foreign and not any(folder.glob("*.ledger.sqlite3")):
        raise StorageError(
            f"{folder} is not an index and not empty (it holds {foreign[0]!r}); give a new or an empty folder"
        )
