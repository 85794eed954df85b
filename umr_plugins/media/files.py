"""Turns one file into items: a picture is one, a text several, a PDF one for each page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, Literal

from umr_plugins.errors import ItemError
from umr_plugins.media import images, pdf
from umr_plugins.media.split import split_text
from umr_plugins.media.text import decode_text
from umr_plugins.types import Item, PagesMode

FileKind = Literal["image", "pdf", "text"]

SUFFIXES: Final[dict[str, FileKind]] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".tif", ".tiff"), "image"),
    ".pdf": "pdf",
    **dict.fromkeys((".md", ".markdown", ".mdown", ".mkd", ".txt", ".text", ".rst", ".adoc", ".org"), "text"),
    **dict.fromkeys(
        (".tex", ".log", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".srt", ".vtt"), "text"
    ),
}
"""What is indexed, by lower-case suffix."""

_MARKDOWN: Final = frozenset({".md", ".markdown", ".mdown", ".mkd"})

_ADVICE: Final[dict[str, str]] = {
    **dict.fromkeys((".html", ".htm", ".xhtml"), "save the page as PDF or Markdown"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx", ".odp", ".epub"), "export it as PDF"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "export it as CSV or PDF"),
    **dict.fromkeys(
        (".heic", ".heif", ".avif", ".svg", ".psd", ".eps", ".jp2", ".jxl"), "convert it to PNG or JPEG"
    ),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"), "unpack it"),
}


@dataclass(frozen=True)
class FilePart:
    """One thing to embed out of a file, or why there is none.

    Args:
        part: position in the file from 0.
        page: page of a PDF from 1.
        item: what is embedded; None with an `error`.
        text: what is stored as text: the text itself, or a PDF page's text layer.
        headings: Markdown headings above the text, outermost first.
        error: why this page can't be embedded.
    """

    part: int
    page: int | None = None
    item: Item | None = None
    text: str | None = None
    headings: tuple[str, ...] = ()
    error: ItemError | None = None


def kind_of(name: str) -> FileKind | None:
    """`"image"`, `"pdf"`, `"text"` by the name's suffix, or None for what is not indexed."""
    return SUFFIXES.get(PurePath(name).suffix.lower())


def file_parts(
    path: Path, data: bytes, *, pages: PagesMode, count_tokens: Callable[[str], int], max_tokens: int = 512
) -> Iterator[FilePart]:
    """The parts of one file, one by one.

    A picture's header is checked here; its pixels are decoded when the item is encoded.

    Args:
        path: names the file; it is not opened.
        data: its bytes.
        pages: what of a PDF page is embedded. A fused page without text layer is embedded as picture; a
            text page without text layer has the error `no_text`.
        count_tokens: the model's counter.
        max_tokens: most tokens of one piece of text.

    Raises:
        ItemError: the whole file can't be embedded; its `name` is the path.
    """
    try:
        kind = kind_of(path.name)
        if kind is None:
            raise _unsupported(path)
        if kind == "image":
            images.check_image(data)
            yield FilePart(0, item=Item(image=data))
        elif kind == "pdf":
            yield from _pdf_parts(data, pages)
        else:
            yield from _text_parts(path, data, count_tokens, max_tokens)
    except ItemError as error:
        raise error.at(name=str(path)) from None


def _unsupported(path: Path) -> ItemError:
    suffix = path.suffix.lower()
    advice = _ADVICE.get(suffix, "see umr_plugins.media.files.SUFFIXES for what is")
    return ItemError(
        "unsupported",
        f"{suffix or 'files without a suffix'} {'is' if suffix else 'are'} not indexed; {advice}",
        stage="open",
    )


def _pdf_parts(data: bytes, mode: PagesMode) -> Iterator[FilePart]:
    for page in pdf.render_pages(data, images=mode != "text"):
        text, error = page.text or None, page.error
        item = None
        if error is None and mode == "text" and text is None:
            error = ItemError("no_text", 'the page has no text layer; use pages="image"', stage="decode")
        elif error is None:
            item = Item(text=text if mode != "image" else None, image=page.image)
        yield FilePart(page.number - 1, page.number, item, text, error=error)


def _text_parts(
    path: Path, data: bytes, count_tokens: Callable[[str], int], max_tokens: int
) -> Iterator[FilePart]:
    text = decode_text(data)
    markdown = path.suffix.lower() in _MARKDOWN
    for part, chunk in enumerate(split_text(text, count_tokens, max_tokens=max_tokens, markdown=markdown)):
        yield FilePart(part, item=Item(text=chunk.passage), text=chunk.passage, headings=chunk.headings)
