"""Runs the model's work for coroutines without blocking their event loop."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import ParamSpec, TypeVar

from umr_plugins.types import Role

P = ParamSpec("P")
T = TypeVar("T")


@lru_cache
def _worker(pid: int, role: Role) -> ThreadPoolExecutor:
    # One thread per role: a model takes one batch at a time whatever asks for it, a hundred waiting batches
    # must not fill the loop's default executor, and a query need not wait for all documents before it.
    # Keyed by process, because a forked child inherits the object but not its thread.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"gme-{role}")


async def in_worker(role: Role, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in the one thread of this process that embeds queries (or documents) for coroutines."""
    call = partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_worker(os.getpid(), role), call)
