"""What tracing sees of an embedding: both of LlamaIndex's event systems, for pictures as for text.

LlamaIndex itself reports pictures to the older system only, so tracing tools do not see them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index_instrumentation import get_dispatcher

_dispatcher = get_dispatcher(__name__)


@contextmanager
def observed(model: BaseEmbedding) -> Iterator[Callable[[list[str], list[Embedding]], None]]:
    """Surround one call of the model with a start and an end in both event systems.

    Yields:
        A function to report what was embedded: one string per input (never picture data) and the vectors.
    """
    chunks: list[str] = []
    vectors: list[Embedding] = []

    def report(new_chunks: list[str], new_vectors: list[Embedding]) -> None:
        chunks.extend(new_chunks)
        vectors.extend(new_vectors)

    payload = model.to_payload()
    _dispatcher.event(EmbeddingStartEvent(model_dict=payload))
    with model.callback_manager.event(
        CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: payload}
    ) as event:
        if model.rate_limiter is not None:
            model.rate_limiter.acquire()
        yield report
        event.on_end(payload={EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: vectors})
    _dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=vectors))


class NeverCached(str):
    """A string equal to any other of the same characters, whose `repr` is new each time.

    `IngestionPipeline` caches a step under a hash of the nodes' text and `str(step.to_dict())`. Two pictures
    without text would share one entry, and the second run would return the first picture's nodes. A step does
    not see the nodes when it is asked for its dict, so it can't put the pictures into the key. With one such
    value in the dict no two keys are equal, and that cache never answers for a step that knows pictures. What
    the model made is kept by `GMEEmbedding(embeddings_cache=...)` instead.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{super().__repr__()} {uuid.uuid4().hex}"
