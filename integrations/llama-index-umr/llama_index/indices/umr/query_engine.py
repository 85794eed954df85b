"""A query engine whose LLM sees the pictures: those of the documents and the user's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core import Settings
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.llms.utils import LLMType
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.embeddings.gme.roots import Roots
from llama_index.indices.umr.answering import PROMPT, Answering, Finding, Prepared
from llama_index_instrumentation import get_dispatcher

from umr_plugins.media.jpeg import MAX_SIDE

_dispatcher = get_dispatcher(__name__)


class MultimodalQueryEngine(BaseQueryEngine):
    """Answers queries of text, picture or both from texts, pictures and pages.

    `query` and `aquery` take a string or a `QueryBundle` with text, `image_path` or both. The LLM sees every
    document under its number, with its text and its picture, and the user's own picture; LlamaIndex's own
    engines leave out the user's picture, and captions or pictures of some kinds of nodes. `source_nodes` of
    the answer are the documents in the order in which the LLM saw them; nothing found gives
    `"Empty Response"`, as there, and no LLM is asked. Documents for which the LLM's context has no room are
    left out, the last ones first: the LLM is told how many, and the log too.

    Pictures are decoded, shrunk and sent as JPEG. A file that a node names is opened only if this
    package opened it when it was indexed in a `UMRVectorStore`, or if it lies below one of `roots`; of other
    nodes the LLM sees the text, and the log has a warning.

    Args:
        retriever: any; `MultimodalIndex.as_retriever()` for queries with pictures.
        llm: any chat model that reads `ImageBlock`s; by default the one in `Settings`, if one is set there.
        extractive: answer with the documents themselves, numbered, without an LLM; pictures are named.
        node_postprocessors: such as `MLLMRerank`, in order.
        streaming: give the answer piece by piece, in a `StreamingResponse`.
        prompt: the system message.
        passage_length: characters per document of an extractive answer; longer texts are cut visibly.
        max_pictures: most pictures of documents to send, best first. A document beyond that is sent as text,
            and left out if it has none. The user's own picture is always sent.
        max_side: pixels of the longer side to which pictures are shrunk.
        roots: folders below which pictures and PDFs may lie that nodes of other stores name, links followed;
            a relative path counts from each in turn.
        callback_manager: the one of `Settings` by default; the postprocessors get it too.

    Raises:
        InputError: limits out of range; no LLM, or one that does not chat and would lose all pictures; an
            LLM for extractive answers.

    Example:
        >>> engine = index.as_query_engine(llm, similarity_top_k=20, node_postprocessors=[MLLMRerank()])
        >>> engine.query(QueryBundle("Which page shows it?", image_path="part.jpg")).source_nodes
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: LLMType | None = None,
        *,
        extractive: bool = False,
        node_postprocessors: Sequence[BaseNodePostprocessor] | None = None,
        streaming: bool = False,
        prompt: str = PROMPT,
        passage_length: int = 2000,
        max_pictures: int = 8,
        max_side: int = MAX_SIDE,
        roots: Roots = (),
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._answering = Answering(
            llm,
            extractive=extractive,
            prompt=prompt,
            passage_length=passage_length,
            max_pictures=max_pictures,
            max_side=max_side,
            roots=roots,
        )
        self._finding, self._streaming = Finding(retriever, node_postprocessors), streaming
        super().__init__(callback_manager=callback_manager or Settings.callback_manager)
        for postprocessor in self._finding.node_postprocessors:
            postprocessor.callback_manager = self.callback_manager

    @property
    def retriever(self) -> BaseRetriever:
        """What finds the documents."""
        return self._finding.retriever

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The documents for a query, after the postprocessors."""
        return self._finding.find(query_bundle)

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """`retrieve` for coroutines."""
        return await self._finding.afind(query_bundle)

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """The answer to a query from given documents; further sources are only added to the list of sources.

        Raises:
            InputError: a query without text and picture.
            ItemError: the query's picture can't be read.
        """
        self._answering.check(query_bundle)
        _dispatcher.event(SynthesizeStartEvent(query=query_bundle))
        with self.callback_manager.event(CBEventType.SYNTHESIZE, payload=_payload(query_bundle)) as event:
            prepared = self._answering.prepare(query_bundle, nodes)
            sources = _sources(prepared, additional_source_nodes)
            response: RESPONSE_TYPE
            if self._streaming:
                response = StreamingResponse(self._answering.stream(prepared), **sources)  # type: ignore[arg-type]  # any iterator will do
            else:
                response = Response(self._answering.reply(prepared), **sources)
            event.on_end(payload={EventPayload.RESPONSE: response})
        _dispatcher.event(SynthesizeEndEvent(query=query_bundle, response=response))
        return response

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """`synthesize` for coroutines."""
        self._answering.check(query_bundle)
        _dispatcher.event(SynthesizeStartEvent(query=query_bundle))
        with self.callback_manager.event(CBEventType.SYNTHESIZE, payload=_payload(query_bundle)) as event:
            prepared = await asyncio.to_thread(self._answering.prepare, query_bundle, nodes)
            sources = _sources(prepared, additional_source_nodes)
            response: RESPONSE_TYPE
            if self._streaming:
                stream = await self._answering.astream(prepared)
                response = AsyncStreamingResponse(stream, **sources)  # type: ignore[arg-type]  # as above
            else:
                response = Response(await self._answering.areply(prepared), **sources)
            event.on_end(payload={EventPayload.RESPONSE: response})
        _dispatcher.event(SynthesizeEndEvent(query=query_bundle, response=response))
        return response

    # Parameter names must be those of the base class: tracing binds them by name.

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        self._answering.check(query_bundle)
        with self.callback_manager.event(CBEventType.QUERY, payload=_payload(query_bundle)) as event:
            response = self.synthesize(query_bundle, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        self._answering.check(query_bundle)
        with self.callback_manager.event(CBEventType.QUERY, payload=_payload(query_bundle)) as event:
            response = await self.asynthesize(query_bundle, await self.aretrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _get_prompt_modules(self) -> dict[str, Any]:
        return {}


def _payload(query: QueryBundle) -> dict[EventPayload, str]:
    return {EventPayload.QUERY_STR: query.query_str}


def _sources(prepared: Prepared, further: Sequence[NodeWithScore] | None) -> dict[str, Any]:
    nodes = [*prepared.nodes, *(further or [])]
    return {"source_nodes": nodes, "metadata": {each.node_id: each.metadata for each in nodes}}
