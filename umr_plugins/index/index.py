"""`Index`: items and their vectors, kept safe in a ledger and searchable through Chroma."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from umr_plugins.errors import BatchError, InputError, ItemError, StorageError
from umr_plugins.index.adding import AddCall
from umr_plugins.index.arguments import check_k, folder_and_url, loaded, no_string
from umr_plugins.index.catch_up import PROJECT_AT
from umr_plugins.index.codes import CodesOption
from umr_plugins.index.encode import query_vector
from umr_plugins.index.folder_sync import FolderReport, FolderSync
from umr_plugins.index.identity import Identity
from umr_plugins.index.ledger import SCHEMA_VERSION, Stored, text_path
from umr_plugins.index.nearest import Search
from umr_plugins.index.owners import close_store, open_store
from umr_plugins.index.rows import check_id, item_of
from umr_plugins.index.sources import Refused, Sources
from umr_plugins.index.store import ledger_file
from umr_plugins.index.verify import VerifyReport, verify
from umr_plugins.index.where import Where, check_where
from umr_plugins.types import Encoder, FloatArray, Hit, ItemLike, OnError, PagesMode, as_item, check_on_error

log = logging.getLogger(__name__)

_SKIP_CHUNK = 256
"""Items per commit of `add(..., on_error="skip")`, so that a kill costs little of a long call."""


class Index:
    """Items, vectors and metadata in a folder, searchable by text, picture or both.

    A SQLite ledger in the folder is the truth and Chroma a projection of it: a kill at any moment loses
    nothing that was committed, and opening the index mends what was under way. One process at a time owns a
    folder; within it, any number of threads and `Index` objects share it.

    Args:
        path: a folder, the URL of a Chroma server, or None to keep everything in memory.
        encoder: what embeds items and queries: an `Embedder`, anything with the `Encoder` members, or a
            model's name. None on an existing index loads the recorded model when it is first needed.
        collection: a name; one folder can hold several.
        ledger: with a server URL, the local folder of the ledger.
        create: make the index if it is not there. Default: only when an encoder is given.
        codes: `"int8"` or `"binary"`: keep such codes of the vectors, and search by scanning them in memory
            instead of asking Chroma; what they propose is scored from the float32 vectors. `"off"` asks
            Chroma. Recorded in the index; default: as recorded, off in a new one.

    Raises:
        IndexLockedError: another process has the folder open.
        FingerprintError: the index was made with another model.
        StorageError: no index there, not an index, damaged, not writable.
        InputError: an argument.

    Example:
        >>> from umr_plugins.testing import FakeEncoder
        >>> with Index(None, FakeEncoder()) as index:
        ...     added = index.add(["a red apple", "a blue boat"], ids=["apple", "boat"])
        ...     index.search("a blue boat", k=1)[0].id
        'boat'
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        encoder: Encoder | str | None = None,
        *,
        collection: str = "umr",
        ledger: str | os.PathLike[str] | None = None,
        create: bool | None = None,
        codes: CodesOption | None = None,
    ) -> None:
        folder, url = folder_and_url(path, ledger)
        given: Encoder | None = loaded(encoder)
        self._encoder_lock = threading.Lock()
        self._closed = False
        may_create = folder is None or (create if create is not None else given is not None)
        self._store = open_store(folder, collection, url=url, create=may_create)
        try:
            self._search = Search(self._store)
            self._sources = Sources(self._store.ledger)
            self._identity = Identity(self._store.ledger)
            self._encoder = given
            self._store.codes.use(codes)
            if given is not None:
                with self._store.lock:
                    self._identity.check(given)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def exists(path: str | os.PathLike[str], collection: str = "umr") -> bool:
        """Whether there is an index in a folder; opens nothing."""
        return ledger_file(Path(path), collection).is_file()

    @property
    def path(self) -> Path | None:
        """The folder, or None in memory."""
        return self._store.folder

    @property
    def dim(self) -> int | None:
        """Length of the vectors, once known."""
        return self._identity.dim

    @property
    def encoder(self) -> Encoder:
        """The index's encoder, loaded if need be.

        Raises:
            InputError: none was given, and none can be loaded from what is recorded.
        """
        with self._encoder_lock:
            if self._encoder is None:
                self._encoder = self._identity.recreate()
            return self._encoder

    # --- adding -----------------------------------------------------------------------------------------

    def add(
        self,
        items: Iterable[ItemLike | ItemError],
        *,
        ids: Iterable[str | None] | None = None,
        metadatas: Iterable[Mapping[str, Any] | None] | None = None,
        payloads: Iterable[str | None] | None = None,
        vectors: Any = None,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> list[str]:
        """Embed items and store them; an item whose id is there already replaces it, metadata included.

        Pictures in memory are kept in the ledger; paths stay references. Content that the index has embedded
        before is not embedded again.

        Args:
            items: what to store. An `ItemError` stands for an item that could not be read, and counts as bad.
            ids: one for each; default (also for single None) a hash of the item's content.
            metadatas: JSON values; flat ones can be used in `where`.
            payloads: opaque strings that come back in `Hit.payload`.
            vectors: `[n, dim]`, instead of embedding.
            on_error: `"raise"` stores nothing unless every item is good; `"skip"` leaves out bad items, logs
                each, and commits as it goes.
            show_progress: a progress bar of the encoder, on stderr.

        Returns:
            Ids of the stored items, in input order.

        Raises:
            BatchError: with `"raise"`, lists every bad item.
            InputError: ids twice, lengths that differ, metadata that JSON can't hold.
            StorageError: not written; or written to the ledger but not yet to Chroma, as the message says.
        """
        check_on_error(on_error)
        self._check_open()
        call = AddCall(list(items), ids, metadatas, payloads, vectors, self._identity.dim)
        added: list[str] = []
        for span in call.spans(_SKIP_CHUNK if on_error == "skip" else None):
            rows, errors = call.rows(
                span, lambda: self.encoder, self._store.ledger.known_vectors, show_progress=show_progress
            )
            if errors and on_error == "raise":
                raise BatchError(errors, len(call.values))
            for refused in errors:
                log.warning("not stored: %s", refused)
            with self._store.lock:
                if call.dim is not None:
                    self._identity.fix_dim(call.dim)
                self._store.ledger.put(rows)
                self._store.project(at_least=1 if span.stop == len(call.values) else PROJECT_AT)
            added += [row.id for row in rows]
        return added

    def add_folder(
        self,
        root: str | os.PathLike[str],
        *,
        pages: PagesMode | None = None,
        show_progress: bool = False,
        on_commit: Callable[[int], None] | None = None,
        retry_refused: bool = False,
    ) -> FolderReport:
        """Make the index agree with a folder: embed what is new or changed, remove what is gone.

        One bad file costs only itself and is reported. The run can be interrupted at any moment; what was
        committed is kept, and the next run goes on from there. A folder (or sub-folder) that can't be read,
        such as that of a disk that is not connected, is reported and nothing of it is removed.

        Args:
            root: the folder; a single file works too.
            pages: embed a PDF page as `"image"`, `"fused"` with its text, or `"text"`; default:
                what the model does best.
            show_progress: a bar on stderr.
            on_commit: called after each ledger commit with the number of items committed in this run.
            retry_refused: also read refused files again that have not changed.

        Raises:
            InputError: no such folder.
        """
        path = Path(root).expanduser()
        if path.is_file():
            return self.add_files(
                [path],
                pages=pages,
                show_progress=show_progress,
                on_commit=on_commit,
                retry_refused=retry_refused,
            )
        with self._store.sync_lock:
            return self._sync(pages, on_commit, show_progress, retry_refused).folder(path)

    def add_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        pages: PagesMode | None = None,
        show_progress: bool = False,
        on_commit: Callable[[int], None] | None = None,
        retry_refused: bool = False,
    ) -> FolderReport:
        """Like `add_folder`, for single files."""
        if isinstance(paths, str | os.PathLike):
            raise InputError("add_files takes a list of paths; give [path]")
        with self._store.sync_lock:
            sync = self._sync(pages, on_commit, show_progress, retry_refused)
            return sync.files([Path(path) for path in paths])

    def _sync(
        self, pages: str | None, on_commit: Callable[[int], None] | None, show_progress: bool, retry: bool
    ) -> FolderSync:
        self._check_open()
        mode = pages or self._store.ledger.meta("pages") or getattr(self.encoder, "pages", "image")
        if mode not in ("image", "fused", "text"):
            raise InputError(f'pages must be "image", "fused" or "text", got {mode!r}')
        return FolderSync(
            self._store,
            lambda: self.encoder,
            self._store.ledger.known_vectors,
            pages=mode,  # type: ignore[arg-type]  # checked just above
            count_tokens=self._count_tokens,
            on_commit=on_commit,
            show_progress=show_progress,
            retry_refused=retry,
        )

    def _count_tokens(self, text: str) -> int:
        counter = getattr(self.encoder, "count_tokens", None)
        # A third of the bytes is more than any tokenizer of these models needs for prose.
        return int(counter(text)) if counter is not None else len(text.encode()) // 3 + 1

    # --- searching --------------------------------------------------------------------------------------

    def search(
        self, query: ItemLike, k: int = 10, *, where: Where | None = None, instruction: str | None = None
    ) -> list[Hit]:
        """The `k` items nearest to a text, a picture or both, best first.

        Args:
            query: text, picture, or an `Item` of both.
            k: how many, at most.
            where: metadata filter as in Chroma, e.g. `{"year": {"$gte": 2020}}`; `modality`, `page` and
                `path` can be used too. None and `{}` mean no filter.
            instruction: tells the model what counts as an answer.

        Raises:
            ItemError: the query can't be embedded.
            InputError: `k` or `where`.
        """
        try:
            return self.search_many([query], k, where=where, instruction=instruction)[0]
        except BatchError as error:
            raise error.errors[0] from None

    def search_many(
        self,
        queries: Sequence[ItemLike],
        k: int = 10,
        *,
        where: Where | None = None,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """`search` for several queries, which are encoded together."""
        count, condition = check_k(k), check_where(where)
        self._check_open()
        items = [as_item(query, at) for at, query in enumerate(queries)]
        if not items or not count or not self.count():
            return [[] for _ in items]
        vectors = self.encoder.encode_queries(items, instruction)
        return [self._nearest(vector, count, condition) for vector in np.asarray(vectors)]

    def search_vector(self, vector: Any, k: int = 10, where: Where | None = None) -> list[Hit]:
        """The `k` items nearest to a query vector `[dim]`."""
        count, condition = check_k(k), check_where(where)
        self._check_open()
        return self._nearest(vector, count, condition)

    def _nearest(self, vector: Any, k: int, where: dict[str, Any] | None) -> list[Hit]:
        query = query_vector(vector, self._identity.dim)
        found = self._search.nearest(query, k, where)
        rows = self._store.ledger.stored([seq for seq, _ in found])
        # An item that another thread has just deleted is left out.
        return [self._hit(rows[seq], score) for seq, score in found if seq in rows]

    # --- reading and deleting ---------------------------------------------------------------------------

    def get(self, ids: Iterable[str]) -> list[Hit]:
        """Items by id, in the order asked for; unknown ids are left out. Their `score` is NaN."""
        self._check_open()
        names = [check_id(name) for name in no_string("ids", ids)]
        seqs = self._store.ledger.seqs_of(names)
        rows = self._store.ledger.stored(list(seqs.values()))
        return [self._hit(rows[seqs[name]], float("nan")) for name in names if seqs.get(name) in rows]

    def vectors(self, ids: Iterable[str]) -> FloatArray:
        """Stored unit vectors `[n, dim]` of items, in the order asked for.

        Raises:
            InputError: an id is not in the index.
        """
        self._check_open()
        names = [check_id(name) for name in no_string("ids", ids)]
        seqs = self._store.ledger.seqs_of(names)
        found = self._store.ledger.vectors(list(seqs.values()))
        unknown = [name for name in names if seqs.get(name) not in found]
        if unknown:
            raise InputError(f"not in the index: {unknown[:10]}")
        empty = np.zeros((0, self._identity.dim or 0), np.float32)
        return np.stack([found[seqs[name]] for name in names]) if names else empty

    def delete(self, ids: Iterable[str] | None = None, *, where: Where | None = None) -> int:
        """Delete items by id, or all that pass a filter; returns how many there were.

        Items of files stay deleted until their file changes; `remove_folder` forgets files.

        Raises:
            InputError: neither ids nor a filter, or both.
        """
        self._check_open()
        condition = check_where(where)
        if (ids is None) == (condition is None):
            raise InputError("delete takes either ids or a non-empty where")
        names = None if ids is None else [check_id(name) for name in no_string("ids", ids)]
        with self._store.lock:
            if names is not None:
                seqs = list(self._store.ledger.seqs_of(names).values())
            else:
                seqs = self._search.matching(condition)
            count = self._store.ledger.bury(seqs)
            self._store.project()
        return count

    def remove_folder(self, root: str | os.PathLike[str]) -> int:
        """Forget a folder or file that was indexed, with all its items; returns how many items went."""
        self._check_open()
        key = os.fsencode(os.path.realpath(Path(root).expanduser()))
        with self._store.sync_lock, self._store.lock:
            single = self._sources.find(key)
            known = [source for source, _ in self._sources.below(key)] + ([single.id] if single else [])
            count = self._sources.forget(known)
            self._sources.forget_root(key)
            self._store.project()
        return count

    def count(self) -> int:
        """Items."""
        self._check_open()
        return self._store.ledger.count()

    def ids(self) -> list[str]:
        """Ids of all items, oldest first."""
        self._check_open()
        return self._store.ledger.ids()

    def _hit(self, row: Stored, score: float) -> Hit:
        path = None if row.source is None else Path(text_path(row.source))
        item = item_of(row.text, row.pictures, path, self._store.ledger.blob)
        return Hit(
            *(row.id, score, item, row.metadata, path, row.page),
            modality=row.modality,  # type: ignore[arg-type]  # written from Item.modality
            payload=row.payload,
        )

    # --- care -------------------------------------------------------------------------------------------

    def verify(self) -> VerifyReport:
        """Compare every id, vector and filterable value in Chroma with the ledger; changes nothing."""
        self._check_open()
        return verify(self._store)

    def rebuild(self) -> None:
        """Make Chroma's side and the codes anew from the ledger, damaged or gone as they may be."""
        self._check_open()
        self._store.rebuild()

    def roots(self) -> list[Path]:
        """Folders and files that the user named to `add_folder` and `add_files`."""
        self._check_open()
        return self._sources.roots()

    def info(self) -> dict[str, Any]:
        """Facts, as JSON values: items, files, roots, model, fingerprint, dim, dtype, what was mended."""
        self._check_open()
        pending, buried = self._store.ledger.behind()
        return {
            "path": None if self._store.folder is None else str(self._store.folder),
            "server": self._store.url,
            "collection": self._store.collection,
            "items": self._store.ledger.count(),
            "files": self._sources.count(),
            "roots": [str(root) for root in self._sources.roots()],
            **self._identity.facts(),
            "codes": self._store.codes.kind,
            "schema": SCHEMA_VERSION,
            "behind": pending + buried,
            "mended": list(self._store.repairs),
        }

    def close(self) -> None:
        """Free the folder; the last `Index` of this process on it does so. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            close_store(self._store)

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("this Index is closed; open it again: Index(path)")
        self._store.check_usable()

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.count()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.count()} items"
        return f"Index({str(self._store.folder) if self._store.folder else None!r}, {state})"


__all__ = ["FolderReport", "Index", "Refused", "VerifyReport"]
