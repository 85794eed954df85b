"""What a user says in a chat: text, pictures or both, in any form that LlamaIndex has for it."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import IOBase
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.schema import QueryBundle
from llama_index.embeddings.gme.nodes import as_picture

from umr_plugins.errors import InputError
from umr_plugins.types import ImageSource

_log = logging.getLogger(__name__)

Message: TypeAlias = str | QueryBundle | ChatMessage


@dataclass(frozen=True)
class Said:
    """One message of the user's.

    Args:
        text: the words; may be empty.
        pictures: the pictures, unopened.
        bundle: the query that the message was, if it was one.
    """

    text: str
    pictures: tuple[ImageSource, ...]
    bundle: QueryBundle | None = None

    @property
    def fixed(self) -> bool:
        """Whether the user said what to search with, so that nothing else may take its place."""
        given = self.bundle
        return given is not None and (given.embedding is not None or bool(given.custom_embedding_strs))

    def query(self) -> QueryBundle:
        """What to search with: the words and the first picture, or what the user fixed."""
        if self.bundle is not None and self.fixed:
            return self.bundle
        if len(self.pictures) > 1:
            _log.warning("of %d pictures, the first alone is searched with", len(self.pictures))
        first = self.pictures[0] if self.pictures else None
        # A path as text, as all of LlamaIndex expects it; our parts understand other pictures too.
        place: Any = str(first) if isinstance(first, Path) else first
        return replace(self.bundle or QueryBundle(""), query_str=self.text, image_path=place)


def read_message(message: Message, image: Any = None) -> Said:
    """What a message says.

    Args:
        message: words; a `QueryBundle` with `query_str`, `image_path` or both; or a `ChatMessage` of the
            user's with `TextBlock`s and `ImageBlock`s.
        image: a further picture, as `GMEEmbedding.as_query` takes it.

    Raises:
        InputError: the message is empty, or of another kind.
        ItemError: a picture is a URL.
    """
    bundle = None
    texts: list[str] = []
    pictures: list[ImageSource] = []
    if isinstance(message, str):
        texts.append(message)
    elif isinstance(message, QueryBundle):
        bundle = message
        words = message.query_str
        if not isinstance(words, str):
            raise InputError(f"query_str of a message is a text, got {words!r}")
        texts.append(words if words.strip() else "\n".join(message.embedding_strs))
        if message.image_path is not None:
            pictures.append(as_picture(message.image_path))
    elif isinstance(message, ChatMessage):
        for block in _blocks(message):
            if isinstance(block, TextBlock):
                texts.append(block.text)
            else:
                pictures.append(_picture(block))
    else:
        raise InputError(
            f"a message is a str, a QueryBundle or a ChatMessage, got {type(message).__name__}; pictures go "
            "into image=..."
        )
    if image is not None:
        pictures.append(as_picture(image))
    text = "\n".join(texts)
    if not text.strip() and not pictures:
        raise InputError(
            "the message is empty: give text, a picture (image=...), or both; no LLM can see a vector"
        )
    return Said(text, tuple(pictures), bundle)


def _blocks(message: ChatMessage) -> Iterator[TextBlock | ImageBlock]:
    if message.role != MessageRole.USER:
        raise InputError(f"a message to a chat engine is the user's, got the role {message.role.value!r}")
    for block in message.blocks:
        if not isinstance(block, TextBlock | ImageBlock):
            raise InputError(f"a message is texts and pictures, got a {type(block).__name__}; leave it out")
        yield block


def _picture(block: ImageBlock) -> ImageSource:
    if isinstance(block.image, IOBase):
        block.image.seek(0)
        return bytes(block.image.read())
    if block.image:
        return base64.b64decode(block.image)  # the block has made it so
    if block.path is not None:
        return Path(block.path)
    if block.url is not None:
        return as_picture(str(block.url))
    raise InputError("an ImageBlock of the message has no image, path or url; give it one")
