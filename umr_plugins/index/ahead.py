"""Runs an iterator in a thread, a few values ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(values: Iterator[T], size: int) -> Iterator[T]:
    """Yield what `values` yields, at most `size` values ahead; its exceptions are raised here.

    Closing the generator stops the thread and closes `values`.
    """
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(size)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for value in values:
                if not put("value", value):
                    break
            else:
                put("end", None)
        except BaseException as error:  # handed to the consumer, whatever it is
            put("error", error)
        finally:
            close = getattr(values, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=run, name="umr-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
