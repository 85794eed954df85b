"""Where async calls wait for the model."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Kind = Literal["query", "document", "rerank"]

# The event loop's own pool has few threads; calls that wait for the model must not fill it. Nor may one kind
# of work fill the pool of another: a model lets a query in between two batches, if a thread can ask for it.
# Most of these threads wait, so there may be more of them than cores; idle ones cost next to nothing.
_POOLS = {
    kind: ThreadPoolExecutor(max_workers=workers, thread_name_prefix=f"langchain-umr-{kind}")
    for kind, workers in (("query", 16), ("document", 4), ("rerank", 8))
}


async def in_thread(kind: Kind, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run in our own threads, with the caller's context variables (tracing lives in them).

    Args:
        kind: `"query"` for what someone waits for, `"document"` for embedding, adding and deleting in bulk,
            `"rerank"` for judging. Each has threads of its own.
        function: what to run.
        args: for the function.
        kwargs: for the function.
    """
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_POOLS[kind], call)
