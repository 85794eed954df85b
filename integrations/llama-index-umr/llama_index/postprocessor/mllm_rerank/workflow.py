"""Retrieve, rerank, answer: a workflow for questions of text, picture or both.

LlamaIndex's engines never show the LLM the user's picture, and leave out the text of an `ImageNode` or the
picture of a `Node`. Here every step is an event of its own, and the LLM sees all of it, under numbers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import Response
from llama_index.core.llms.utils import LLMType
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step
from llama_index.embeddings.gme.nodes import as_picture
from llama_index.embeddings.gme.roots import Roots
from llama_index.indices.umr.answering import PROMPT, Answering

from umr_plugins.errors import InputError
from umr_plugins.media.jpeg import MAX_SIDE


class Question(StartEvent):
    """What the user asks: text, a picture (a path, or as `GMEEmbedding.as_query` takes it), or both."""

    question: Any = ""  # the first step says what is wrong with it
    image: Any = None


class Retrieved(Event):
    """What the first stage found."""

    query: Any
    nodes: list[NodeWithScore]


class Reranked(Event):
    """What the LLM is to read, best first."""

    query: Any
    nodes: list[NodeWithScore]


class RetrieveRerankAnswer(Workflow):
    """Answers a question from retrieved texts, pictures and pages.

    `await workflow.run(question=..., image=...)` gives a `Response`: `response` is the answer, `source_nodes`
    are the documents in the order in which the LLM saw them ("Document 1" is the first).

    Pictures are decoded, shrunk and sent as JPEG, so that nothing but pictures leaves the machine, whatever
    file a node names. A file that a node names is opened only if this package opened it when it was indexed
    in a `UMRVectorStore`, or if it lies below one of `roots`. Pictures given as URL are not fetched.

    Args:
        retriever: any; `MultimodalIndex.as_retriever()` for questions with pictures.
        reranker: `MLLMRerank`, or any other postprocessor of nodes; none by default.
        llm: any chat model that reads `ImageBlock`s; by default the one in `Settings`, if one is set there.
        extractive: answer with the documents themselves, numbered, without an LLM; pictures are named.
        prompt: the system message.
        passage_length: characters per document of an extractive answer; longer texts are cut visibly.
        max_pictures: most pictures of documents to send, best first. A document beyond that is sent as text,
            and left out if it has none. The user's own picture is always sent.
        max_side: pixels of the longer side to which pictures are shrunk.
        roots: folders below which pictures and PDFs may lie that nodes of other stores name, links followed;
            a relative path counts from each in turn.
        timeout: seconds for one question; None for no limit.
        **options: as for `Workflow`.

    Raises:
        InputError: limits out of range; no LLM, or one that does not chat and would lose all pictures; an
            LLM for extractive answers.

    Example:
        >>> workflow = RetrieveRerankAnswer(index.as_retriever(similarity_top_k=20), MLLMRerank(), llm)
        >>> (await workflow.run(question="Which page shows it?", image="part.jpg")).source_nodes
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        reranker: BaseNodePostprocessor | None = None,
        llm: LLMType | None = None,
        *,
        extractive: bool = False,
        prompt: str = PROMPT,
        passage_length: int = 2000,
        max_pictures: int = 8,
        max_side: int = MAX_SIDE,
        roots: Roots = (),
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        self.answering = Answering(
            llm,
            extractive=extractive,
            prompt=prompt,
            passage_length=passage_length,
            max_pictures=max_pictures,
            max_side=max_side,
            roots=roots,
        )
        super().__init__(timeout=timeout, **options)
        self.retriever, self.reranker = retriever, reranker

    @step
    async def retrieve(self, question: Question) -> Retrieved:
        """Search for the question, text and picture together.

        Raises:
            InputError: there is none, it is no text, or `run` was given anything else.
        """
        remedy = "pass run(question=...), run(image=...), or both"
        if unknown := ", ".join(sorted(map(str, question.keys()))):
            raise InputError(f"a question has no {unknown}; {remedy}")
        text = "" if question.question is None else question.question
        if not isinstance(text, str):
            raise InputError(f"the question is a {type(text).__name__}, and must be a text; {remedy}")
        if not text.strip() and question.image is None:
            raise InputError(f"there is no question: {remedy}")
        picture = None if question.image is None else as_picture(question.image)
        # A path as text, as all of LlamaIndex expects it; our parts understand other pictures too.
        place: Any = str(picture) if isinstance(picture, Path) else picture
        query = QueryBundle(text, image_path=place)
        return Retrieved(query=query, nodes=await self.retriever.aretrieve(query))

    @step
    async def rerank(self, found: Retrieved) -> Reranked:
        """Keep the best of what was found."""
        nodes = found.nodes
        if self.reranker is not None:
            nodes = await self.reranker.apostprocess_nodes(nodes, query_bundle=found.query)
        return Reranked(query=found.query, nodes=nodes)

    @step
    async def answer(self, best: Reranked) -> StopEvent:
        """Ask the LLM, with everything it is to see in blocks of one message."""
        prepared = await asyncio.to_thread(self.answering.prepare, best.query, best.nodes)
        text = await self.answering.areply(prepared)
        metadata = {each.node_id: each.metadata for each in prepared.nodes}
        return StopEvent(result=Response(text, source_nodes=prepared.nodes, metadata=metadata))
