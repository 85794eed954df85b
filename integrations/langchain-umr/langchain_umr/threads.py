"""Where async calls wait for the model."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

# The event loop's own pool has few threads; calls that wait for the model must not fill it.
_THREADS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="langchain-umr")


async def in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run in our own threads, with the caller's context variables (tracing lives in them)."""
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, call)
