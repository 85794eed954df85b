"""One thread owns tokenizer and model; everything else queues.

Fast tokenizers and models keep state between calls, so two threads must never be inside them at once. The
queue also keeps the machine's cores with one forward pass at a time, and lets many callers take turns.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from umr_plugins.errors import UMRError

T = TypeVar("T")
_Job = tuple[Callable[..., Any], tuple[Any, ...], "Future[Any]"]


class Worker:
    """Runs submitted calls one after another on a thread of its own.

    The thread is a daemon and ends when the worker is closed or garbage collected, so neither an
    interpreter exit nor a forgotten embedder hangs. It computes with as many threads as torch had when the
    worker was made.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # A new thread would take torch's number of threads from whoever set it last.
        self._queue.put((compute_with, (torch.get_num_threads(),), Future()))
        self._closed = False
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=_serve, args=(self._queue,), name=f"umr-{name}", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._queue.put, None)

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""
        return self._closed

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Queue `call(*args)`; a future cancelled before its turn never runs."""
        future: Future[T] = Future()
        if os.getpid() != self._pid:  # threads do not survive fork: waiting would never end
            raise UMRError("this model belongs to the parent process; make a new one in this process")
        with self._lock:
            if self._closed:
                raise UMRError("this model was closed; make a new embedder or reranker")
            self._queue.put((call, args, future))
        return future

    def run(self, call: Callable[..., T], *args: Any) -> T:
        """`submit` and wait. Called from the worker's own thread it runs at once."""
        if threading.current_thread() is self._thread:
            return call(*args)
        return self.submit(call, *args).result()

    def close(self) -> None:
        """Finish what is queued, then end the thread. Calling it twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


def compute_with(threads: int) -> None:
    """Set torch's number of threads for calls from this thread.

    Torch's setting is also that of all threads that have not asked for it yet, this one included.
    """
    torch.get_num_threads()
    torch.set_num_threads(threads)


def _serve(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        call, args, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = call(*args)
        except BaseException as error:
            future.set_exception(error)
            del error
        else:
            future.set_result(result)
            del result
        # Drop the references before waiting for the next job: they can pin large tensors.
        del job, call, args, future
