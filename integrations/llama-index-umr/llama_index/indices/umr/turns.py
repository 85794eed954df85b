"""One after another: threads and coroutines that change the same index."""

from __future__ import annotations

import asyncio
import threading


class Turns:
    """A lock for `with` and `async with`. A copy or pickle of it is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    async def __aenter__(self) -> None:
        # To wait for the lock here would stop the event loop, and threads that wait for it could fill the
        # pool that its holder needs to go on.
        while not self._lock.acquire(blocking=False):
            await asyncio.sleep(0.005)

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()
