"""Makes an index agree with files: embeds what is new, replaces what changed, removes what is gone.

Files are read in a thread ahead of the model; batches mix parts of several files and are committed 32 items
at a time. A new version of a file stays hidden until its last part is there and then replaces the old one in
the same transaction. A run that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umr_plugins import __version__
from umr_plugins.errors import InputError, ItemError
from umr_plugins.index.ahead import ahead
from umr_plugins.index.catch_up import PROJECT_AT
from umr_plugins.index.encode import Known, document_vectors
from umr_plugins.index.ledger import PENDING, STAGED
from umr_plugins.index.rows import Row, content_hash, file_item_id, file_pictures
from umr_plugins.index.sources import COMPLETE, PARTIAL, REFUSED, Refused, Source, Sources, Version
from umr_plugins.index.store import Store
from umr_plugins.media.files import FilePart, file_parts, kind_of
from umr_plugins.media.folder import FoundFile, read_file, walk
from umr_plugins.types import Encoder, Item, PagesMode

COMMIT_AT = 32
"""Items per ledger commit: what a kill can cost at most."""

_READ_AHEAD = 16
_FILES_PER_COMMIT = 256
_TRANSIENT = {"unreadable"}
"""Refusals that are tried again on every run, since mending them need not change the file."""


@dataclass(frozen=True)
class FolderReport:
    """What a run did.

    Args:
        indexed: files that are new or changed, and are in the index now.
        unchanged: files that were in the index already.
        removed: indexed files that are gone from disk, and now from the index.
        items: items that the files under the given paths have in the index after the run.
        refused: every file or page that can't be used at present, whichever run found it out.
    """

    indexed: int
    unchanged: int
    removed: int
    items: int
    refused: tuple[Refused, ...]


@dataclass
class _File:
    """A file on its way into the index."""

    path: Path
    version: Version
    staged: bool = False
    known: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    refused: list[Refused] = field(default_factory=list)
    parts: int = 0
    reread: bool = True

    def refuse(self, error: ItemError, page: int | None = None) -> None:
        self.refused.append(Refused(self.path, page, error.stage, error.code, error.reason))


@dataclass(frozen=True)
class _Part:
    file: _File
    item: Item
    row: Row  # still without its vector


_Event = _Part | _File  # a file after its last part


class FolderSync:
    """One run over folders or files.

    Args:
        store: the index's owner.
        encoder: makes the encoder when something has to be encoded.
        known: looks up vectors made before, by content hash.
        pages: what of a PDF page is embedded.
        count_tokens: the model's counter, for splitting texts.
        on_commit: called after each ledger commit with the items committed so far in this run.
        show_progress: a bar on stderr.
        retry_refused: read refused files again although they have not changed.
    """

    def __init__(
        self,
        store: Store,
        encoder: Callable[[], Encoder],
        known: Known,
        *,
        pages: PagesMode,
        count_tokens: Callable[[str], int],
        on_commit: Callable[[int], None] | None = None,
        show_progress: bool = False,
        retry_refused: bool = False,
    ) -> None:
        self._store = store
        self._sources = Sources(store.ledger)
        self._encoder = encoder
        self._known = known
        self._pages = pages
        self._count_tokens = count_tokens
        self._on_commit = on_commit
        self._show_progress = show_progress
        self._retry = retry_refused
        self._committed = 0
        self._indexed = self._unchanged = 0
        self._refused: list[Refused] = []

    # --- the two entrances ------------------------------------------------------------------------------

    def folder(self, root: Path) -> FolderReport:
        """Everything below `root`.

        Raises:
            InputError: not a folder, and never indexed.
        """
        base = Path(os.path.realpath(root))
        key = os.fsencode(base)
        try:
            found = list(walk(base, skip=[self._store.folder] if self._store.folder else []))
            device = base.stat().st_dev
        except (InputError, ItemError, OSError) as error:
            if not self._sources.below(key):
                if isinstance(error, ItemError):
                    raise InputError(f"the folder {base} can't be read: {error.reason}") from error
                raise
            return self._absent(base, f"the folder can't be read; is its disk connected? ({error})")
        before = self._sources.root_device(key)
        if not found and before not in (None, device) and self._sources.below(key):
            # The empty mount point of a disk that is not there looks like a folder whose files were deleted.
            return self._absent(
                base, "the folder is empty and on another device than before; is its disk connected?"
            )
        self._sources.name_root(key, device)
        files = [each for each in found if isinstance(each, FoundFile)]
        kept = []
        for refusal in (each for each in found if isinstance(each, ItemError)):
            path = base / (refusal.name or "")
            self._refused.append(Refused(path, None, refusal.stage, refusal.code, refusal.reason))
            if refusal.code in _TRANSIENT:
                kept.append(os.fsencode(path))
        self._run(files)
        seen = {os.fsencode(each.path) for each in files}
        gone = [
            (source, path)
            for source, path in self._sources.below(key)
            if path not in seen and not any(path == keep or path.startswith(keep + b"/") for keep in kept)
        ]
        removed = self._remove(gone)
        return self._report([path for _, path in self._sources.below(key)], removed)

    def files(self, paths: Iterable[Path]) -> FolderReport:
        """Single files. One that was indexed and no longer exists in its folder is removed."""
        found: dict[bytes, FoundFile] = {}
        gone: list[tuple[int, bytes]] = []
        named: list[bytes] = []
        for given in paths:
            path = Path(given).expanduser().absolute()
            key = os.fsencode(path)
            named.append(key)
            try:
                status = path.lstat()
                found[key] = FoundFile(path, path.name, status.st_size, status.st_mtime_ns, status.st_ino)
                self._sources.name_root(key, status.st_dev)
            except (OSError, ValueError) as error:
                source = self._sources.find(key)
                if source is not None and isinstance(error, FileNotFoundError) and path.parent.is_dir():
                    gone.append((source.id, key))
                    continue
                self._refused.append(
                    Refused(path, None, "open", "unreadable", f"it can't be looked at ({error})")
                )
        self._run(list(found.values()))
        return self._report(named, self._remove(gone))

    def _absent(self, base: Path, reason: str) -> FolderReport:
        self._refused.append(Refused(base, None, "open", "unreadable", reason + " What was indexed is kept."))
        return self._report([path for _, path in self._sources.below(os.fsencode(base))], 0)

    def _remove(self, gone: list[tuple[int, bytes]]) -> int:
        removed = 0
        for start in range(0, len(gone), _FILES_PER_COMMIT):
            some = gone[start : start + _FILES_PER_COMMIT]
            sources = [self._sources.find(path) for _, path in some]
            removed += sum(1 for source in sources if source is not None and source.state != REFUSED)
            with self._store.lock:
                self._sources.forget([source for source, _ in some])
        self._store.project()
        return removed

    def _report(self, paths: list[bytes], removed: int) -> FolderReport:
        sources = [self._sources.find(path) for path in dict.fromkeys(paths)]
        items = sum(self._sources.items(source.id) for source in sources if source is not None)
        refused = sorted(self._refused, key=lambda row: (os.fsencode(row.path), row.page or 0))
        return FolderReport(self._indexed, self._unchanged, removed, items, tuple(refused))

    # --- the run ----------------------------------------------------------------------------------------

    def _run(self, files: list[FoundFile]) -> None:
        batch: list[_Part] = []
        done: list[_File] = []
        with _bar(len(files), self._show_progress) as bar:
            events = ahead(self._events(files), _READ_AHEAD)
            try:
                for event in events:
                    if isinstance(event, _Part):
                        batch.append(event)
                    else:
                        done.append(event)
                        bar.update(1)
                    if len(batch) == COMMIT_AT or len(done) == _FILES_PER_COMMIT:
                        self._commit(batch, done)
                        batch, done = [], []
                self._commit(batch, done)
            finally:
                events.close()  # type: ignore[attr-defined]  # a generator
        self._store.project()

    def _events(self, files: list[FoundFile]) -> Iterator[_Event]:
        for found in files:
            version = Version(
                os.fsencode(found.path),
                *(found.size, found.mtime_ns, found.inode, None),
                self._pages if kind_of(found.path.name) == "pdf" else "",
                __version__,
            )
            source = self._sources.find(version.path)
            if source is not None and self._is_same(source, version) and source.version.stat == version.stat:
                yield self._known_file(found.path, source, source.version)
                continue
            yield from self._read(_File(found.path, version), source)

    def _is_same(self, source: Source, version: Version) -> bool:
        """Whether the ledger's answer about a file still holds, provided that its bytes are the same."""
        if source.state == PARTIAL or source.version.pages != version.pages:
            return False
        return source.state == COMPLETE or (not self._retry and source.version.reader == version.reader)

    def _known_file(self, path: Path, source: Source, version: Version) -> _File:
        known = _File(path, version, reread=False, refused=self._sources.refusals(source))
        known.known = {"indexed"} if source.state == COMPLETE else set()
        return known

    def _read(self, file: _File, source: Source | None) -> Iterator[_Event]:
        try:
            # A file that is not indexed by its name need not be read to be refused.
            data = read_file(file.path) if kind_of(file.path.name) else b""
        except ItemError as error:
            if error.code in _TRANSIENT:
                self._refused.append(Refused(file.path, None, error.stage, error.code, error.reason))
                return
            file.refuse(error)
            yield file
            return
        file.version = Version(
            *(file.version.path, *file.version.stat),
            hashlib.sha256(data).digest(),
            file.version.pages,
            __version__,
        )
        same = source is not None and source.version.sha256 == file.version.sha256
        if source is not None and same and self._is_same(source, file.version):
            yield self._known_file(file.path, source, file.version)
            return
        if source is not None:
            file.known = self._sources.ids(source.id)
            file.staged = not (same and source.state == PARTIAL)
        parts = file_parts(file.path, data, pages=self._pages, count_tokens=self._count_tokens)
        try:
            for part in parts:
                file.parts += 1
                ready = self._part(file, part)
                if ready is not None:
                    yield ready
        except ItemError as error:
            file.refuse(error)
        yield file

    def _part(self, file: _File, part: FilePart) -> _Part | None:
        if part.error is not None or part.item is None:
            file.refuse(part.error or ItemError("no_text", "there is nothing to embed"), part.page)
            return None
        try:
            content = content_hash(part.item)
        except ItemError as error:
            file.refuse(error, part.page)
            return None
        name = file_item_id(file.version.path, part.part, part.page, content, part.text)
        if name in file.known:
            file.ids.add(name)
            return None
        pictures = file_pictures(part.page) if part.item.pictures else None
        modality = part.item.modality
        text = part.text if part.text is not None else part.item.text
        row = Row(name, modality, text, pictures, content, b"", part=part.part, page=part.page)
        return _Part(file, part.item, row)

    # --- commits ----------------------------------------------------------------------------------------

    def _commit(self, batch: list[_Part], done: list[_File]) -> None:
        if not batch and not done:
            return
        vectors = document_vectors(
            self._encoder, [part.item for part in batch], [part.row.content for part in batch], self._known
        )
        rows: dict[bytes, tuple[_File, list[Row]]] = {}
        for part, vector in zip(batch, vectors, strict=True):
            if isinstance(vector, ItemError):
                part.file.refuse(vector, part.row.page)
                continue
            part.file.ids.add(part.row.id)
            rows.setdefault(part.file.version.path, (part.file, []))[1].append(part.row.with_vector(vector))
        visible = 0
        with self._store.lock, self._store.ledger.transaction():
            for file, ready in rows.values():
                self._store.ledger.put(
                    ready, source=self._source(file), state=STAGED if file.staged else PENDING
                )
                visible += 0 if file.staged else len(ready)
            for file in done:
                visible += self._finish(file)
        for file in done:
            self._count(file)
        if visible:
            self._committed += visible
            if self._on_commit is not None:
                self._on_commit(self._committed)
        self._store.project(at_least=PROJECT_AT)

    def _source(self, file: _File) -> int:
        source = self._sources.find(file.version.path)
        # The record of an older, complete version stands until the new one is complete.
        return (
            source.id if source is not None and file.staged else self._sources.write(file.version, PARTIAL, 0)
        )

    def _finish(self, file: _File) -> int:
        if file.reread:
            return self._sources.finish(file.version, file.ids, file.refused, file.parts)
        self._sources.touch(file.version)
        return 0

    def _count(self, file: _File) -> None:
        self._refused += file.refused
        if not file.reread:
            self._unchanged += bool(file.known)
        else:
            self._indexed += bool(file.ids)


def _bar(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="file", desc="index", disable=not show)
