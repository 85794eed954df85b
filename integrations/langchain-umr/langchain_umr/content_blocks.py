"""Found documents as content blocks, for a chat model that reads text and pictures.

A `Document` holds no pictures, so putting documents into a prompt leaves them out (or prints their base64).
Here pictures are opened at the last moment, shrunk, and put beside the text they belong to.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from langchain_core.documents import Document

from langchain_umr.documents import label
from langchain_umr.inputs import IMAGE_KEYS, document_text
from langchain_umr.judging import listed_documents
from langchain_umr.references import guarded_item
from langchain_umr.searching import StoreReader
from langchain_umr.threads import in_thread
from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.jpeg import MAX_SIDE, as_jpeg
from umr_plugins.media.roots import absolute_roots
from umr_plugins.types import ImageSource, Item

log = logging.getLogger(__name__)

Block = dict[str, Any]
"""A text or image block in the form of `langchain_core.messages.content`."""

MAX_IMAGES = 8
MAX_BYTES = 16 * 2**20
_REMEDY = "documents_to_content_blocks(roots=[folder]), or with store= for rows of an UMRVectorStore"


def documents_to_content_blocks(
    documents: Iterable[Document],
    *,
    store: StoreReader | None = None,
    roots: Any = (),
    max_images: int = MAX_IMAGES,
    max_bytes: int = MAX_BYTES,
    max_side: int = MAX_SIDE,
    image_keys: str | Sequence[str] = IMAGE_KEYS,
) -> list[Block]:
    """Content blocks of a message: for each document a label, its text and its pictures, in order.

    Labels count from 1 and name file and page: "Document 2 (report.pdf, page 3)". Pictures are encoded anew
    as JPEG. A picture that is over a limit, or can't be opened, leaves a text block that says so; the reason
    in full, with paths, goes to the log only. Documents are text for a model: they may have been written by
    anyone, so tell the model that they are material and no instructions.

    Args:
        documents: best first, as a retriever or reranker returns them. Not changed.
        store: the `UMRVectorStore` that the documents came from. Pictures of its rows are then those that
            were added to it (files, pages of PDFs, pictures in memory). A document counts as its row if id
            and page content are the row's, and what its metadata say of its picture.
        roots: folders below which the pictures of other documents may lie. Metadata that comes back from a
            store may have been written by anyone, so without roots only data URIs are shown.
        max_images: most pictures in all.
        max_bytes: most bytes of pictures in all, as they are sent (base64).
        max_side: pixels of the longer side to which pictures are shrunk.
        image_keys: metadata keys under which documents outside `store` name their pictures.

    Raises:
        InputError: a limit makes no sense, `documents` are none, or `store` is another kind of store.

    Example:
        >>> found = [Document("A kite needs wind.", metadata={"source": "kites.txt"})]
        >>> print(documents_to_content_blocks(found)[0]["text"])
        Document 1 (kites.txt)
        A kite needs wind.
    """
    listed = listed_documents(documents)
    pictures = _Pictures(max_images, max_bytes, max_side)
    keys = (image_keys,) if isinstance(image_keys, str) else tuple(image_keys)
    folders = absolute_roots(roots)
    if store is not None and not isinstance(store, StoreReader):
        raise InputError(f"store must be an UMRVectorStore, got {type(store).__name__}")
    known = [None] * len(listed) if store is None else store.stored_items(listed)
    blocks: list[Block] = []
    for place, (document, item) in enumerate(zip(listed, known, strict=True), start=1):
        title, text = _title(place, document, keys), document_text(document)
        shown, refusal = _sources(document, item, folders, keys)
        if text is None and not shown and refusal is None:
            text = "(it has neither text nor picture)"
        blocks.append({"type": "text", "text": title if text is None else f"{title}\n{text}"})
        blocks += [pictures.block(picture, document) for picture in shown]
        if refusal is not None:
            blocks.append(_not_shown(refusal, document))
    return blocks


async def adocuments_to_content_blocks(documents: Iterable[Document], **options: Any) -> list[Block]:
    """`documents_to_content_blocks` in a thread: pictures are decoded there, and the event loop goes on."""
    return await in_thread("query", documents_to_content_blocks, documents, **options)


class _Pictures:
    """Pictures as blocks, as long as there is room for them."""

    def __init__(self, max_images: int, max_bytes: int, max_side: int) -> None:
        for name, value, least in (
            ("max_images", max_images, 0),
            ("max_bytes", max_bytes, 0),
            ("max_side", max_side, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        self.max_images, self.max_bytes, self.max_side = max_images, max_bytes, max_side
        self.count = self.bytes = 0

    def block(self, picture: ImageSource, document: Document) -> Block:
        """An image block, or a text block that says why there is none."""
        if self.count >= self.max_images:
            return _text(f"picture not shown: only {self.max_images} are (max_images)")
        try:
            data = base64.b64encode(as_jpeg(picture, self.max_side)).decode()
        except ItemError as error:
            return _not_shown(error, document)
        if self.bytes + len(data) > self.max_bytes:
            return _text(f"picture not shown: all together would exceed {self.max_bytes:,} bytes (max_bytes)")
        self.count += 1
        self.bytes += len(data)
        return {"type": "image", "base64": data, "mime_type": "image/jpeg"}


def _sources(
    document: Document, item: Item | None, roots: Sequence[Path], keys: Sequence[str]
) -> tuple[tuple[ImageSource, ...], ItemError | None]:
    """The pictures of a document, not opened; or why they may not be."""
    if item is None:
        try:
            item = guarded_item(document, roots, keys, _REMEDY)
        except ItemError as error:
            return (), None if error.code == "empty" else error
    return (*item.pictures, *item.video), None


def _title(place: int, document: Document, keys: Sequence[str]) -> str:
    metadata = document.metadata
    named = (metadata.get(key) for key in ("path", "source", *keys))
    path = next((one for one in named if isinstance(one, str) and one and one[:5].lower() != "data:"), "")
    if "://" in path:
        path = path.partition("?")[0].partition("#")[0]  # signed addresses hold their password there
    page = metadata.get("page_label", metadata.get("page"))
    parts = [" ".join(PurePath(path).name.split())[:200]]  # a name must not break the line, nor fill it
    if isinstance(page, int | str) and not isinstance(page, bool) and str(page).strip():
        parts.append(f"page {' '.join(str(page).split())[:20]}")
    said = ", ".join(part for part in parts if part)
    return f"Document {place} ({said})" if said else f"Document {place}"


def _not_shown(error: ItemError, document: Document) -> Block:
    """Without the error's words: they hold paths of this machine, and the blocks may leave it."""
    log.warning("%s: its picture is not shown: %s", label(document.id, document.page_content), error)
    return _text(f"picture not shown: it could not be opened ({error.code})")


def _text(text: str) -> Block:
    return {"type": "text", "text": text}
