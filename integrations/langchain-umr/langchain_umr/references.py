"""Documents of which nobody knows who wrote them, read as `Item`s without opening what they must not name.

Whoever can write to a vector database writes the metadata that comes back from it. A picture that a document
names is therefore read only from a data URI, or from a file below a folder that the user named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from langchain_core.documents import Document

from langchain_umr.inputs import IMAGE_KEYS, document_item, document_picture, is_stored_picture, to_item
from umr_plugins.errors import ItemError
from umr_plugins.types import ImageSource, Item, PageImage, as_item


def guarded_item(document: Document, roots: Sequence[Path], image_keys: Sequence[str] = IMAGE_KEYS) -> Item:
    """A document as it was embedded: its text, its picture, both fused, or a page of a PDF.

    The picture is what the metadata names under one of `image_keys`, else the file of `path` (and `page`) of
    a picture row that `UMRVectorStore` has returned. Where `modality` is `"image"`, the page content is the
    text layer of a page, which was not embedded and is left out.

    Args:
        document: any document; not changed.
        roots: absolute folders below which its picture may lie.
        image_keys: metadata keys that name a picture; the first that is set counts.

    Raises:
        ItemError: `unsupported` for a picture outside `roots` or behind a web address, or one that nothing
            names; `empty` without text and picture.
    """
    picture = document_picture(document, image_keys)
    if picture is None and is_stored_picture(document):
        picture = _stored_file(document, roots)
    elif isinstance(picture, str) and picture[:5].lower() != "data:":
        picture = _below(picture, roots)
    if picture is None:
        return document_item(document, image_keys)
    alone = document.metadata.get("modality") == "image"
    text = document.page_content if document.page_content.strip() and not alone else None
    return as_item(Item(text=text, image=picture))


def absolute_roots(value: Any) -> tuple[Path, ...]:
    """One folder or several as a tuple of absolute paths; raises `ValueError` for what is no path."""
    listed = [value] if isinstance(value, str | os.PathLike) else value
    if listed is None:
        return ()
    if not isinstance(listed, Iterable):
        raise ValueError(f"roots are folders, got {type(value).__name__}; pass roots=[folder]")
    roots = []
    for root in listed:
        if not isinstance(root, str | os.PathLike) or not os.fspath(root):
            raise ValueError(f"roots are folders, got {root!r}; name the folder that holds the pictures")
        roots.append(Path(root).expanduser().absolute())
    return tuple(roots)


def shown(query: object) -> object:
    """A query as traces hold it: pictures are counted, since their bytes would fill the trace."""
    if isinstance(query, str):
        return query
    try:
        item = to_item(query)
    except ItemError:
        return type(query).__name__
    return {"text": item.text, "pictures": len(item.pictures) + len(item.video)}


def _stored_file(document: Document, roots: Sequence[Path]) -> ImageSource | None:
    path, page = document.metadata.get("path"), document.metadata.get("page")
    if not isinstance(path, str) or not path:
        return None
    found = _below(path, roots)
    return PageImage(found, page) if isinstance(page, int) and not isinstance(page, bool) else found


def _below(reference: str, roots: Sequence[Path]) -> Path:
    """The file that a reference names, if it lies below one of the roots once every link is followed.

    A relative reference counts from each root in turn.
    """
    named = f"its picture {reference[:200]!r}"
    try:
        path = _path(reference)
        inside = []
        for root in roots:
            real = Path(os.path.realpath(root / path))
            if real.is_relative_to(os.path.realpath(root)):
                inside.append(real)
        existing = next((real for real in inside if real.exists()), None)
    except (OSError, ValueError) as error:
        raise ItemError("unsupported", f"{named} is no path of a file: {error}", stage="open") from None
    if inside:
        return existing or inside[0]
    folders = f"it is not below {[str(root) for root in roots]}" if roots else "no folder is allowed"
    raise ItemError(
        "unsupported",
        f"{named} may not be opened: {folders}. Metadata that comes back from a store may have been written "
        "by anyone; allow the folder that holds your pictures with MLLMReranker(roots=[folder])",
        stage="open",
    )


def _path(reference: str) -> Path:
    if "://" not in reference:
        return Path(reference)
    parts = urlsplit(reference)
    if parts.scheme.lower() == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    raise ValueError("web addresses are not followed; download the file and give its path")
