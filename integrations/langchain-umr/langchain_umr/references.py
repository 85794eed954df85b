"""Documents of which nobody knows who wrote them, read as `Item`s without opening what they must not name.

Whoever can write to a vector database writes the metadata that comes back from it. A picture that a document
names is therefore read only from a data URI, or from a file below a folder that the user named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from langchain_core.documents import Document

from langchain_umr.inputs import (
    IMAGE_KEYS,
    document_item,
    document_pictures,
    document_text,
    is_stored_picture,
    make_item,
    to_item,
)
from umr_plugins.errors import ItemError
from umr_plugins.media.roots import below
from umr_plugins.types import ImageSource, Item, PageImage, TarImage

REMEDY = "MLLMReranker(roots=[folder])"


def guarded_item(
    document: Document,
    roots: Sequence[Path],
    image_keys: Sequence[str] = IMAGE_KEYS,
    remedy: str = REMEDY,
) -> Item:
    """A document as it was embedded: its text, its picture, both fused, or a page of a PDF.

    The picture is what the metadata names under one of `image_keys`, else the file of `path` (and `page`) of
    a picture row that `UMRVectorStore` has returned. Where `modality` is `"image"`, the page content is the
    text layer of a page, which was not embedded and is left out.

    Args:
        document: any document; not changed.
        roots: absolute folders below which its picture may lie.
        image_keys: metadata keys that name a picture; the first that is set counts.
        remedy: the call that allows a folder, for messages.

    Raises:
        ItemError: `unsupported` for a picture outside `roots` or behind a web address, or one that nothing
            names; `empty` without text and picture.
    """
    pictures = tuple(_allowed(one, roots, remedy) for one in document_pictures(document, image_keys))
    if not pictures and is_stored_picture(document):
        pictures = _stored_file(document, roots, remedy)
    if not pictures:
        return document_item(document, image_keys)
    alone = document.metadata.get("modality") == "image"
    return make_item(None if alone else document_text(document), pictures)


def guarded_pictures(item: Item, roots: Sequence[Path], remedy: str = REMEDY) -> Item:
    """The same item, if every picture that it names lies below one of `roots` or comes along with it.

    Raises:
        ItemError: `unsupported` for any other picture.
    """
    return replace(
        item,
        image=None if item.image is None else _allowed(item.image, roots, remedy),
        images=tuple(_allowed(one, roots, remedy) for one in item.images),
        video=tuple(_allowed(one, roots, remedy) for one in item.video),
    )


def shown(query: object) -> object:
    """A query as traces hold it: pictures are counted, since their bytes would fill the trace."""
    if isinstance(query, str):
        return query
    try:
        item = to_item(query)
    except ItemError:
        return type(query).__name__
    return {"text": item.text, "pictures": len(item.pictures) + len(item.video)}


def _stored_file(document: Document, roots: Sequence[Path], remedy: str) -> tuple[ImageSource, ...]:
    path, page = document.metadata.get("path"), document.metadata.get("page")
    if not isinstance(path, str) or not path:
        return ()
    found = _below(path, roots, remedy)
    return (PageImage(found, page) if isinstance(page, int) and not isinstance(page, bool) else found,)


def _allowed(picture: ImageSource, roots: Sequence[Path], remedy: str) -> ImageSource:
    """Where it is named; what is in memory can be looked at in any case."""
    if isinstance(picture, PageImage | TarImage):
        return replace(picture, path=_below(str(picture.path), roots, remedy))
    named = isinstance(picture, Path) or (isinstance(picture, str) and picture[:5].lower() != "data:")
    return _below(str(picture), roots, remedy) if named else picture


def _below(reference: str, roots: Sequence[Path], remedy: str) -> Path:
    return below(reference, roots, origin="Metadata", remedy=remedy)
