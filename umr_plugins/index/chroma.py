"""The projection of the ledger into Chroma: ids and vectors to search, metadata to filter.

The only file that imports chromadb. Collections never get an embedding function, so nothing that is stored
can make the client build one. Never opens `chroma.sqlite3` itself: a second SQLite library in the process
would drop Chroma's locks.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from umr_plugins.errors import InputError, MissingExtraError
from umr_plugins.types import FloatArray

MAX_BYTES = 32 * 2**20
"""Bytes of one request, for servers with a body limit of 40 MiB (a component takes 16/3 as base64)."""

EF_SEARCH = 200
"""Breadth of the graph search: queries of one modality for items of another are far from their answers, where
Chroma's default of 100 misses more."""

_CONFIGURATION = {"hnsw": {"space": "cosine", "ef_search": EF_SEARCH}}
_PAGE = 500
_SERVER_SECONDS = 120


class ProjectionError(Exception):
    """Chroma failed. Never reaches the user: the owner falls back to the ledger and rebuilds."""


class Projection:
    """One Chroma collection, in a folder, on a server or in memory.

    Args:
        place: a folder, an `http(s)://host:port` URL, or None for memory.
        name: of the collection.
        create: make the collection; it must not be there yet.

    Raises:
        ProjectionError: Chroma can't open it.
    """

    def __init__(self, place: Path | str | None, name: str, *, create: bool = False) -> None:
        self.name = name
        self._closed = threading.Lock()
        self._memory = place is None
        chromadb = _chromadb()
        with _Errors("open"):
            self._client = _client(chromadb, place)
            try:
                if create:
                    self._collection = self._client.create_collection(
                        name, embedding_function=None, configuration=_CONFIGURATION
                    )
                else:
                    self._collection = self._client.get_collection(name, embedding_function=None)
                self._rows = min(self._client.get_max_batch_size(), 1000)
            except BaseException:
                _close(self._client)
                raise

    def upsert(self, seqs: Sequence[int], vectors: FloatArray, metadatas: Sequence[dict[str, Any]]) -> None:
        """Write rows, in requests bounded by number and bytes. Repeating it changes nothing."""
        weights = [vectors.shape[1] * 16 // 3 + 64 + len(str(metadata).encode()) for metadata in metadatas]
        for rows in _slices(weights, self._rows):
            with _Errors("write"):
                self._collection.upsert(
                    ids=[str(seq) for seq in seqs[rows]],
                    embeddings=vectors[rows],
                    metadatas=list(metadatas[rows]),
                    documents=[""] * (rows.stop - rows.start),
                )

    def delete(self, seqs: Sequence[int]) -> None:
        """Forget rows; absent ones are no error."""
        for start in range(0, len(seqs), _PAGE):
            with _Errors("delete"):
                self._collection.delete(ids=[str(seq) for seq in seqs[start : start + _PAGE]])

    def query(self, vector: FloatArray, count: int, where: dict[str, Any] | None) -> list[int]:
        """Sequence numbers of about the `count` nearest rows."""
        with _Errors("search"):
            found = self._collection.query(
                query_embeddings=vector.reshape(1, -1), n_results=count, where=where, include=[]
            )
            return [int(each) for each in found["ids"][0]]

    def matching(self, where: dict[str, Any] | None) -> list[int]:
        """Sequence numbers of all rows that pass a filter."""
        with _Errors("filter"):
            return [int(each) for each in self._collection.get(where=where, include=[])["ids"]]

    def names(self) -> list[str]:
        """Ids of all rows as Chroma has them, which need not be numbers of ours."""
        with _Errors("list"):
            return list(self._collection.get(include=[])["ids"])

    def count(self) -> int:
        """Rows."""
        with _Errors("count"):
            return int(self._collection.count())

    def read(self, seqs: Sequence[int]) -> Iterator[tuple[int, FloatArray, dict[str, Any]]]:
        """(sequence number, vector, metadata) of those rows that are there."""
        for start in range(0, len(seqs), _PAGE):
            with _Errors("read"):
                page = self._collection.get(
                    ids=[str(seq) for seq in seqs[start : start + _PAGE]], include=["embeddings", "metadatas"]
                )
                ids, vectors, metadatas = page["ids"], page["embeddings"], page["metadatas"]
                rows = [
                    (int(ids[at]), np.asarray(vectors[at], np.float32), dict(metadatas[at] or {}))
                    for at in range(len(ids))
                ]
            yield from rows

    def drop(self) -> None:
        """Delete the collection, its rows first.

        Chroma 1.5.9 leaves the lists in the metadata of a dropped collection behind, and the rows of a later
        collection inherit them; a deleted row takes its lists along.
        """
        with _Errors("drop"):
            while ids := self._collection.get(limit=_PAGE, include=[])["ids"]:
                self._collection.delete(ids=ids)
            self._client.delete_collection(self.name)

    def close(self) -> None:
        """Free Chroma's files and threads."""
        if not self._closed.acquire(blocking=False):
            return
        if self._memory:  # all clients in memory share one system, so its collection would stay for ever
            try:
                self.drop()
            except ProjectionError:
                logging.getLogger(__name__).debug("the collection %s was gone already", self.name)
        with _Errors("close"):
            _close(self._client)


class _Errors:
    """Turns whatever Chroma raises into `ProjectionError`, panics of its Rust side included."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or error is None:
            return
        # PanicException of the Rust bindings is no Exception.
        if isinstance(error, Exception) or kind.__name__ == "PanicException":
            raise ProjectionError(f"Chroma can't {self._doing}: {kind.__name__}: {error}") from error


def _slices(weights: Sequence[int], rows: int) -> Iterator[slice]:
    start = size = 0
    for at, weight in enumerate(weights):
        if at > start and (at - start >= rows or size + weight > MAX_BYTES):
            yield slice(start, at)
            start, size = at, 0
        size += weight
    if weights:
        yield slice(start, len(weights))


def _chromadb() -> Any:
    try:
        import chromadb
    except ImportError as error:
        raise MissingExtraError("chromadb is not installed: pip install 'chromadb>=1.5,<2'") from error
    logging.getLogger("chromadb").setLevel(max(logging.WARNING, logging.getLogger("chromadb").level))
    return chromadb


def _client(chromadb: Any, place: Path | str | None) -> Any:
    if place is None:
        # Chroma allows one setting for all clients in memory of a process, so ours must be its defaults.
        return chromadb.EphemeralClient()
    settings = chromadb.config.Settings(anonymized_telemetry=False)
    if isinstance(place, Path):
        return chromadb.PersistentClient(str(place), settings=settings)
    url = urlsplit(place)
    host, port = url.hostname or "", url.port or 8000
    # Asked first, since Chroma's client leaves its connections open when it can't reach the server.
    socket.create_connection((host, port), timeout=10).close()
    client = chromadb.HttpClient(host=host, port=port, ssl=url.scheme == "https", settings=settings)
    for session in _sessions(client):
        session.timeout = _SERVER_SECONDS  # by default it would wait for ever
    return client


def _sessions(client: Any) -> list[Any]:
    """The HTTP sessions of a client, which Chroma itself neither limits nor closes."""
    clients = (client, getattr(client, "_admin_client", None))
    found = [getattr(getattr(each, "_server", None), "_session", None) for each in clients]
    return [session for session in found if session is not None]


def _close(client: Any) -> None:
    sessions = _sessions(client)
    client.close()
    for session in sessions:
        session.close()


def check_url(url: str) -> str:
    """A server URL that can be used, or `InputError`."""
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        usable = False
    if not usable or parts.path.strip("/") or parts.query:
        raise InputError(f"the URL of a Chroma server looks like http://localhost:8000, got {url!r}")
    return url
