"""Chroma clients for tests: each on a folder, closed, and without what other tests have registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb


@contextmanager
def client_of(folder: Path) -> Iterator[Any]:
    """A client on a folder; closed at the end, so that the next one reads what is on the disk."""
    client = chromadb.PersistentClient(
        str(folder), settings=chromadb.config.Settings(anonymized_telemetry=False)
    )
    try:
        yield client
    finally:
        client.close()
