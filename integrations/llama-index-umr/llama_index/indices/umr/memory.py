"""The conversation of a chat engine that was given no memory."""

from __future__ import annotations

from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.memory import ChatMemoryBuffer

_PICTURE = 256  # tokens, as LlamaIndex's Memory counts them


class PictureMemory(ChatMemoryBuffer):
    """A `ChatMemoryBuffer` that counts pictures too.

    LlamaIndex's `Memory` would hold a database connection and its thread open for every engine; the plain
    buffer takes pictures for nothing, so that a conversation of pictures would outgrow any context.
    """

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "PictureMemory"

    def _token_count_for_messages(self, messages: list[ChatMessage]) -> int:
        pictures = sum(isinstance(block, ImageBlock) for each in messages for block in each.blocks)
        words: int = super()._token_count_for_messages(messages)
        return words + _PICTURE * pictures
