"""Keys for LangChain's `index()` that notice when a picture has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from langchain_core.documents import Document

from langchain_umr.documents import label
from langchain_umr.inputs import IMAGE_KEYS, document_pictures
from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.images import content_key
from umr_plugins.types import ImageSource


def document_key(document: Document, image_keys: str | Sequence[str] = IMAGE_KEYS) -> str:
    """64 characters that change with a document's text, its metadata, or the content of its pictures.

    The `key_encoder` for `index()` and `aindex()` of `langchain_core.indexing`. Their own keys cover text and
    metadata only, so a picture that was replaced under the same name would be skipped as unchanged. Picture
    files are read for it, without being decoded.

    A picture that can't be read counts by its name, so that `add_documents` can say which document it belongs
    to. With `upsert_kwargs={"on_error": "skip"}` such a document is left out, and tried again once its
    picture can be read.

    Args:
        document: as it is given to `index()`.
        image_keys: metadata keys that name pictures, if the store has an `image_key` of its own; pass it as
            `functools.partial(document_key, image_keys="scan")`.

    Raises:
        InputError: the metadata holds something else than JSON values.

    Example:
        >>> index(documents, records, store, cleanup="full", key_encoder=document_key)  # doctest: +SKIP
    """
    keys = (image_keys,) if isinstance(image_keys, str) else tuple(image_keys)
    try:
        pictures = [_content(picture) for picture in document_pictures(document, keys)]
    except ItemError:
        pictures = []  # what the metadata holds there is no picture; that it holds it counts below
    try:
        parts = json.dumps([document.page_content, document.metadata, pictures], sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        name = label(document.id, document.page_content)
        raise InputError(f"{name}: its metadata must be JSON values: {error}") from None
    return hashlib.sha256(parts.encode()).hexdigest()


def _content(picture: ImageSource) -> str | None:
    try:
        return content_key(picture).hex()
    except ItemError:
        return None
