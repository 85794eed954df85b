"""Between the rows of an index and LangChain's `Document`s."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.documents import Document

from langchain_umr.inputs import IMAGE_KEYS
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.media.images import content_key
from umr_plugins.types import Hit, ImageSource, Item, PageImage


def to_document(hit: Hit, image_keys: Sequence[str] = IMAGE_KEYS) -> Document:
    """A row as a `Document`: its text (or `""`), the user's metadata, and where its picture is.

    Rows that came from a file have `path` and `page`; picture rows have `modality` and, unless the user's own
    metadata names the picture, its `path`. Text rows that came from no file have nothing added.
    """
    ours: dict[str, Any] = {}
    if hit.path is not None:
        ours["path"] = str(hit.path)
        if hit.page is not None:
            ours["page"] = hit.page
    elif isinstance(hit.item.image, Path) and not any(hit.metadata.get(key) for key in image_keys):
        ours["path"] = str(hit.item.image)
    if hit.modality != "text":
        ours["modality"] = hit.modality
    metadata = ours | hit.metadata  # as in filters, the user's own keys win
    return Document(id=hit.id, page_content=hit.text or "", metadata=metadata)


def fill_ids(
    ids: Sequence[str | None] | None, items: Sequence[Item | ItemError], metadatas: Sequence[dict[str, Any]]
) -> list[str | None]:
    """The given ids, and for the rest one made of content, metadata and how often it stands in this call.

    Adding the same things again replaces them; equal texts with other metadata, and equal rows of one call,
    are kept apart. What could not be read gets none.
    """
    if ids is None:
        ids = [None] * len(items)
    wrong = [one for one in ids if one is not None and not isinstance(one, str)]
    if wrong:
        raise InputError(f"ids must be str or None, got {wrong[0]!r} ({type(wrong[0]).__name__})")
    twice = [one for one, count in Counter(one for one in ids if one).items() if count > 1]
    if twice:
        raise InputError(f"ids must differ within a call; given more than once: {twice[:5]}")
    seen: Counter[str] = Counter()
    filled: list[str | None] = []
    for given, item, metadata in zip(ids, items, metadatas, strict=True):
        if given or isinstance(item, ItemError):
            filled.append(given)
            continue
        parts = [item.text, [_picture_key(picture) for picture in (*item.pictures, *item.video)], metadata]
        key = json.dumps(parts, sort_keys=True, default=repr)
        seen[key] += 1
        filled.append(hashlib.sha256(f"{seen[key]}{key}".encode("utf-8", "surrogatepass")).hexdigest()[:32])
    return filled


def same_length(name: str, values: Iterable[Any] | None, count: int, of: str) -> list[Any] | None:
    """`values` as a list of `count`, or None.

    Raises:
        InputError: another number of values, or one str.
    """
    if values is None:
        return None
    if isinstance(values, str | bytes | Mapping):
        raise InputError(f"{name} is a list with one entry per {of}, got one {type(values).__name__}")
    listed = list(values)
    if len(listed) != count:
        raise InputError(f"{name} must have one entry per {of}: got {len(listed)} for {count}")
    return listed


def named(error: BatchError, labels: Sequence[str], ids: Sequence[str | None] = ()) -> BatchError:
    """The same errors, each under the name of its document instead of an id that may be made up."""
    errors = [
        one
        if one.index is None
        else ItemError(
            one.code,
            f"{one.name}: {one.reason}" if one.name and one.name not in ids else one.reason,
            stage=one.stage,
            index=one.index,
            name=labels[one.index],
        )
        for one in error.errors
    ]
    return BatchError(errors, error.total)


def label(document_id: str | None, text: str) -> str:
    """How an error message calls a document."""
    if document_id:
        return f"document {document_id!r}"
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return f"document {shown!r}" if shown.strip() else "document without text"


def _picture_key(picture: ImageSource) -> str:
    """Names the picture, without reading files: a file that has changed keeps its row."""
    if isinstance(picture, Path):
        return str(picture.absolute())
    if isinstance(picture, str | PageImage):
        return str(picture)
    return content_key(picture).hex()
