"""Runs the model's work for coroutines without blocking their event loop."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Work = Literal["query", "document", "rerank", "store"]


@lru_cache
def _worker(pid: int, work: Work) -> ThreadPoolExecutor:
    # One thread per kind of work: a model takes one batch at a time whatever asks for it, a hundred waiting
    # batches must not fill the loop's default executor, and a query need not wait for documents before it.
    # Keyed by process, because a forked child inherits the object but not its thread.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"gme-{work}")


async def in_worker(work: Work, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in the one thread of this process that does such work for coroutines."""
    call = partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_worker(os.getpid(), work), call)
