"""What of a conversation fits into an LLM's context, and where a chat engine keeps it by default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.utils import get_tokenizer

_PICTURE = 256  # tokens, as LlamaIndex's Memory counts them


def tokens_of(blocks: Iterable[Any]) -> int:
    """Tokens of blocks, by LlamaIndex's tokenizer; every picture counts the same."""
    tokenizer = get_tokenizer()
    texts = pictures = 0
    for block in blocks:
        if isinstance(block, ImageBlock):
            pictures += 1
        elif isinstance(block, TextBlock):
            texts += len(tokenizer(block.text))
    return texts + _PICTURE * pictures


def newest(messages: Sequence[ChatMessage], room: int) -> list[ChatMessage]:
    """The newest messages that fit into `room` tokens, from one of the user's on; all if all fit.

    System messages at the start are kept in any case. No message is counted twice, and none that is older
    than the first one without room.
    """
    head = list(takewhile(lambda each: each.role == MessageRole.SYSTEM, messages))
    room -= sum(tokens_of(each.blocks) for each in head)
    start = len(messages)
    for position in range(len(messages) - 1, len(head) - 1, -1):
        room -= tokens_of(messages[position].blocks)
        if room < 0:
            break
        if messages[position].role == MessageRole.USER or position == len(head):
            start = position
    return [*head, *messages[start:]]


class PictureMemory(ChatMemoryBuffer):
    """A `ChatMemoryBuffer` that counts pictures too, and every message once.

    LlamaIndex's `Memory` would hold a database connection and its thread open for every engine; the plain
    buffer takes pictures for nothing, so that a conversation of pictures would outgrow any context.
    """

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "PictureMemory"

    def get(self, input: str | None = None, initial_token_count: int = 0, **kwargs: Any) -> list[ChatMessage]:
        """The newest messages that fit beside `initial_token_count` other tokens; see `newest`."""
        return newest(self.get_all(), self.token_limit - initial_token_count)
