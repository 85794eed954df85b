"""Keeps Pillow's warnings about users' files out of the program's output, from any thread."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _Quiet:
    """Silences Pillow's own warnings while any thread decodes.

    `warnings.catch_warnings` swaps global state, so threads that enter and leave in any order would
    restore each other's filters: the first one in sets the filter, the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: warnings.catch_warnings[None] | None = None

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._saved is not None:
                self._saved.__exit__(None, None, None)
                self._saved = None


_QUIET = _Quiet()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings are ignored inside; may be entered by many threads at once."""
    if getattr(sys.flags, "context_aware_warnings", False):  # Python 3.14: filters are each thread's own
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
        return
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()
