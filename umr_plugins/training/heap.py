"""Gives memory back that the C library keeps.

Chunks are of many sizes. On a CPU their tensors leave holes in the heap that later ones of other sizes do not
fill, and over a large batch the process grows without holding more.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

_SLACK = 1.05  # growth that is left alone: giving back costs a few milliseconds


class Heap:
    """Watches the size of this process. Does nothing where the C library can't give memory back."""

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._status = Path("/proc/self/statm")
        if not self._status.exists():
            self._trim = None
        self._limit = 0.0

    def tidy(self) -> bool:
        """Give free memory back if the process has grown since the last time; whether it was done."""
        if self._trim is None or self.resident() <= self._limit:
            return False
        self._trim(0)
        self._limit = _SLACK * self.resident()
        return True

    def resident(self) -> int:
        """Bytes of memory in use."""
        return int(self._status.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
