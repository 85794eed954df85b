"""Options of models in the form that LlamaIndex dumps."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any


def plain(value: Any) -> Any:
    """Paths, and torch's devices and dtypes, as strings that JSON takes; sequences element by element."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, list | tuple):
        return tuple(plain(part) for part in value)
    return value if isinstance(value, str | int) else str(value).removeprefix("torch.")
