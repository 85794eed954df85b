"""An index to ask about, LLMs that say what a test wants, and what they were shown."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms import MockLLM
from llama_index.core.schema import BaseNode, ImageNode, MediaResource, Node, TextNode
from llama_index.embeddings.gme import GMEEmbedding, PageNode
from llama_index.indices.umr import MultimodalIndex
from llama_nodes import save
from PIL import Image

from umr_plugins.testing import FakeEncoder


def materials(folder: Path) -> list[BaseNode]:
    """A text, a picture with a caption, a fused node, and a page of a PDF."""
    Image.new("RGB", (80, 100), "blue").save(folder / "report.pdf")
    return [
        TextNode(id_="text", text="a red boat", metadata={"place": "Delft"}),
        ImageNode(id_="captioned", text="a caption", image_path=str(save(folder, 1))),
        Node(
            id_="fused",
            text_resource=MediaResource(text="boat and more"),
            image_resource=MediaResource(path=save(folder, 2)),
        ),
        PageNode(id_="page", page_path=str(folder / "report.pdf"), page=1, text="words of the page"),
    ]


def index_of(nodes: Sequence[BaseNode]) -> MultimodalIndex:
    return MultimodalIndex(nodes, embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64)))


def asked(folder: Path) -> Path:
    """A picture of the user's, of a size that no document has."""
    path = folder / "asked.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


def words(block: Any) -> str:
    """A block as a test can compare it: the text, or the size of the JPEG."""
    if isinstance(block, TextBlock):
        return block.text
    assert isinstance(block, ImageBlock)
    assert block.image_mimetype == "image/jpeg"
    picture = Image.open(io.BytesIO(block.resolve_image().read()))
    assert picture.format == "JPEG"
    return f"<{picture.width}x{picture.height}>"


def seen(message: ChatMessage) -> list[str]:
    """A message, block by block."""
    return [words(block) for block in message.blocks]


class Scripted(MockLLM):
    """A chat model that answers with the next of its lines, in four ways; an exception among them is raised.

    In a stream every word is a piece, and an exception in the script comes after the line before it.
    """

    lines: list[Any] = []  # noqa: RUF012  # a pydantic field
    calls: list[list[ChatMessage]] = []  # noqa: RUF012
    during: Callable[[], Any] | None = None

    def __init__(self, *lines: Any) -> None:
        super().__init__(is_chat_model=True)
        self.lines, self.calls = list(lines), []

    def _next(self, messages: Sequence[ChatMessage]) -> str:
        self.calls.append(list(messages))
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return str(line)

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _response(self._next(messages))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        line = self._next(messages)
        if self.during is not None:
            await self.during()
        return _response(line)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        pieces = self._pieces(messages)
        return (_response(piece, piece) for piece in pieces)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        pieces = self._pieces(messages)

        async def stream() -> ChatResponseAsyncGen:
            for piece in pieces:
                yield _response(piece, piece)

        return stream()

    def _pieces(self, messages: Sequence[ChatMessage]) -> Any:
        line = self._next(messages)
        broken = self.lines.pop(0) if self.lines and isinstance(self.lines[0], Exception) else None

        def pieces() -> Any:
            yield from (f"{word} " for word in line.split())
            if broken is not None:
                raise broken

        return pieces()


def _response(text: str, delta: str | None = None) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)
