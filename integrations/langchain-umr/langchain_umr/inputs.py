"""What LangChain users pass as one thing to embed, read as an `Item`.

A string, a mapping, a content block or a list of them (the v1 form, the older v0 form, OpenAI's and
Anthropic's), a message, a `Document`, or anything the core takes. Pictures are not opened here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage

from umr_plugins.errors import BatchError, ItemError
from umr_plugins.media.kinds import PICTURES, sniff
from umr_plugins.types import ImageSource, Item, as_item

IMAGE_KEYS = ("image", "image_uri", "image_path")
"""Metadata keys of a `Document` that name its picture, or a list of pictures; the first set counts."""

_DATA_URI = re.compile(r"data:image/[\w.+-]+(;[\w.+=-]+)*;base64", re.IGNORECASE)
_TEXT_BLOCKS = ("text", "text-plain")
_FORMS = "a str, a mapping with text and image, content blocks, a message, a Document, a PIL.Image or a Path"


def to_item(value: object, index: int | None = None) -> Item:
    """Read one input as an `Item`.

    Raises:
        ItemError: `unsupported` for a form that is not listed above or a picture that is only a web address;
            `empty` without text and picture.
    """
    try:
        if isinstance(value, Document):
            return document_item(value)
        if isinstance(value, BaseMessage):
            return _blocks_item(value.content)
        if isinstance(value, Mapping) and "type" in value:
            return _blocks_item([value])
        if isinstance(value, Mapping) and "role" in value and "content" in value:
            return _blocks_item(value["content"])
        if isinstance(value, list | tuple):
            return _blocks_item(value)
        return as_item(value)
    except ItemError as error:
        raise error.at(index) from error.__cause__


def to_items(values: Iterable[object]) -> list[Item]:
    """Read many inputs, as `to_item` reads one.

    Raises:
        BatchError: lists every input that can't be read.
        ItemError: `values` is one input and not a list of them.
    """
    listed = listed_inputs(values)
    items: list[Item] = []
    errors: list[ItemError] = []
    for index, value in enumerate(listed):
        try:
            items.append(to_item(value, index))
        except ItemError as error:
            errors.append(error)
    if errors:
        raise BatchError(errors, len(listed))
    return items


def listed_inputs(values: Iterable[object]) -> list[object]:
    """Many inputs, not read yet; raises `ItemError` for one input."""
    if isinstance(values, str | bytes | Mapping | Item | Document | BaseMessage):
        raise ItemError("unsupported", f"give a list of inputs, not one {type(values).__name__}")
    return list(values)


def document_item(document: Document, image_keys: Sequence[str] = IMAGE_KEYS) -> Item:
    """The text of a `Document`, fused with the picture (or pictures) that its metadata names, if any.

    Raises:
        ItemError: `unsupported` when the metadata holds something else than paths and data URIs there, or
            when the document is a picture of a store whose picture is out of reach; `empty` without both.
    """
    pictures = document_pictures(document, image_keys) or _encoded_picture(document.page_content)
    if not pictures and is_stored_picture(document):
        raise ItemError(
            "unsupported",
            f"metadata['modality'] is {document.metadata['modality']!r}, but the document holds no picture; "
            f"name it in the metadata under one of {list(image_keys)}, or give the picture itself",
        )
    return make_item(document_text(document), pictures)


def document_text(document: Document) -> str | None:
    """The page content; None if it is blank, or no text at all but a picture as base64.

    Some stores (`Chroma.add_images` of `langchain_chroma`) hand pictures out like that.
    """
    text = document.page_content
    return None if not text.strip() or _encoded_picture(text) else text


def document_pictures(document: Document, image_keys: Sequence[str] = IMAGE_KEYS) -> tuple[ImageSource, ...]:
    """The pictures that a document's metadata names under the first key that is set, not opened.

    Raises:
        ItemError: `unsupported` when it holds something else there than a path, a data URI or a list of them.
    """
    for key in image_keys:
        value = document.metadata.get(key)
        if value is None or (isinstance(value, str | list | tuple) and not value):
            continue
        named = value if isinstance(value, list | tuple) else [value]
        wrong = [type(one).__name__ for one in named if not isinstance(one, str) or not one]
        if wrong:
            got = "an empty str" if wrong[0] == "str" else wrong[0]
            raise ItemError(
                "unsupported",
                f"metadata[{key!r}] must be a path or data URI, or a list of them, got {got}. Pictures in "
                "memory go through UMRVectorStore.add_items; set image_key if this is no picture",
            )
        return tuple(named)
    return ()


def make_item(text: str | None, pictures: Sequence[ImageSource]) -> Item:
    """An item with any number of pictures; raises `ItemError` (`empty`) without text and picture."""
    if len(pictures) > 1:
        return as_item(Item(text=text, images=tuple(pictures)))
    return as_item(Item(text=text, image=pictures[0] if pictures else None))


def _encoded_picture(text: str) -> tuple[str, ...]:
    """A text that is nothing but a picture as base64 or data URI, as a data URI; empty for any other text.

    Lines may be broken, as MIME does. What kind of picture a data URI holds is left to the decoder.
    """
    head, comma, data = text[:100].partition(",")
    is_uri = bool(comma) and _DATA_URI.fullmatch(head.strip()) is not None
    try:
        start = _joined(data if is_uri else text[:100])
        kind = sniff(base64.b64decode(start[: min(64, len(start) // 4 * 4)], validate=True))
        if kind not in PICTURES and not is_uri:  # decides all but one text in many millions
            return ()
        whole = _joined(text.partition(",")[2] if is_uri else text)
        if len(whole) < 64:
            return ()
        base64.b64decode(whole, validate=True)
    except (binascii.Error, ValueError):
        return ()
    return (f"{head.strip()},{whole}" if is_uri else f"data:image/{str(kind).lower()};base64,{whole}",)


def _joined(encoded: str) -> str:
    return "".join(line.strip() for line in encoded.splitlines())


def is_stored_picture(document: Document) -> bool:
    """Whether the document looks like a picture row that a store has returned."""
    return document.metadata.get("modality") in ("image", "fused")


def _blocks_item(content: object) -> Item:
    blocks = [content] if isinstance(content, str) else content
    if not isinstance(blocks, list | tuple) or not all(isinstance(block, str | Mapping) for block in blocks):
        raise ItemError("unsupported", f"content blocks are str or mappings; an input is {_FORMS}")
    texts: list[str] = []
    pictures: list[ImageSource] = []
    for block in blocks:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") in _TEXT_BLOCKS and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif block.get("type") in ("image", "image_url"):
            pictures.append(_block_picture(block))
        else:
            raise ItemError(
                "unsupported",
                f"a content block of type {block.get('type')!r} can't be embedded; allowed are text, image "
                "and image_url",
            )
    text = "\n".join(texts) if any(part.strip() for part in texts) else None
    return make_item(text, pictures)


def _block_picture(block: Mapping[str, Any]) -> str:
    """The picture of an image block as a data URI, whichever of the four forms the block has."""
    source = block.get("source")
    if isinstance(source, Mapping):  # Anthropic
        return _data_uri(source.get("data"), source.get("media_type")) or _only_data(source.get("url"), block)
    if block.get("source_type") == "base64":  # LangChain v0
        return _data_uri(block.get("data"), block.get("mime_type")) or _only_data(None, block)
    if block["type"] == "image_url":  # OpenAI
        nested = block.get("image_url")
        return _only_data(nested.get("url") if isinstance(nested, Mapping) else nested, block)
    return _data_uri(block.get("base64"), block.get("mime_type")) or _only_data(block.get("url"), block)


def _data_uri(data: object, mime_type: object) -> str | None:
    if not isinstance(data, str) or not data:
        return None
    return f"data:{mime_type or 'application/octet-stream'};base64,{data}"


def _only_data(url: object, block: Mapping[str, Any]) -> str:
    """Blocks come from chats: a web address or a path in one is never followed."""
    if isinstance(url, str) and url[:5].lower() == "data:":
        return url
    given = f"the address {url[:80]!r}" if isinstance(url, str) else f"the keys {sorted(map(str, block))}"
    raise ItemError(
        "unsupported",
        f"an image block must hold the picture as base64 or data URI, got {given}. Addresses and paths in "
        "blocks are not followed: download or open the picture and give its bytes",
    )
