"""Reads the arguments of `Index`, with errors that say what is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umr_plugins.errors import InputError
from umr_plugins.types import Encoder


def folder_and_url(
    path: str | os.PathLike[str] | None, ledger: str | os.PathLike[str] | None
) -> tuple[Path | None, str | None]:
    """(folder of the ledger, server URL); both None for memory."""
    if isinstance(path, str) and "://" in path:
        if ledger is None:
            raise InputError(
                "with a server URL the ledger needs a local folder: Index(url, encoder, ledger='folder')"
            )
        return Path(ledger).expanduser(), path
    if ledger is not None:
        raise InputError("ledger= is for server URLs; a folder holds its own ledger")
    if path is None:
        return None, None
    if not str(path):
        raise InputError("path is empty; give a folder, a server URL, or None for memory")
    return Path(path).expanduser(), None


def loaded(encoder: Encoder | str | None) -> Encoder | None:
    """The encoder itself; a model's name is loaded, once per process."""
    if isinstance(encoder, str):
        from umr_plugins.embedder import shared_embedder

        return shared_embedder(model=encoder)
    if encoder is not None and not hasattr(encoder, "encode_documents"):
        raise InputError(f"encoder must be an Embedder, a model's name or None, got {type(encoder).__name__}")
    return encoder


def listed(name: str, values: Iterable[Any] | None, count: int) -> list[Any]:
    """One value for each item."""
    if values is None:
        return [None] * count
    found = list(no_string(name, values))
    if len(found) != count:
        raise InputError(f"{name} has {len(found)} entries for {count} items")
    return found


def no_string(name: str, values: Iterable[Any]) -> Iterable[Any]:
    """The values, unless someone gave one string where a list belongs."""
    if isinstance(values, str | bytes | Mapping):
        raise InputError(f"{name} must be a list, got {type(values).__name__}")
    return values


def check_unique(names: Sequence[str]) -> None:
    """No id twice in a call."""
    seen: set[str] = set()
    twice = {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
    if twice:
        raise InputError(f"ids given more than once in this call: {sorted(twice)[:10]}")


def check_k(k: Any) -> int:
    """How many answers are wanted."""
    if isinstance(k, bool) or not hasattr(k, "__index__") or int(k) < 0:
        raise InputError(f"k must be a whole number of at least 0, got {k!r}")
    return int(k)
