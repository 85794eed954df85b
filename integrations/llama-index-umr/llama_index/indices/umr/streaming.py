"""The tokens of an answer as LlamaIndex's streaming chat response reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole


def growing(tokens: Iterator[str]) -> Iterator[ChatResponse]:
    """The answer so far, with each token; at least one, since a stream without any would not be kept."""
    text = ""
    for token in tokens:
        text += token
        yield _so_far(text, token)
    if not text:
        yield _so_far("", "")


async def agrowing(tokens: AsyncIterator[str]) -> AsyncIterator[ChatResponse]:
    """`growing` for coroutines."""
    text = ""
    async for token in tokens:
        text += token
        yield _so_far(text, token)
    if not text:
        yield _so_far("", "")


def _so_far(text: str, token: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=token)
