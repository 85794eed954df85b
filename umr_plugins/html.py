"""Self-contained HTML pages that show items: texts escaped, pictures as small data URIs, nothing loaded.

Pictures are opened through `umr_plugins.media` only, and a path only where it lies under a root that the
user named: what comes back from a store is not trusted.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from umr_plugins.errors import ItemError
from umr_plugins.media.images import load_image
from umr_plugins.types import ImageSource, Item, PageImage, TarImage

SIDE = 240
"""Longest side of a thumbnail, in pixels (shown at up to half of it, for sharp screens)."""

# A page may show what it brings along and nothing else, whatever the texts in it hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@lru_cache(maxsize=1)
def _style() -> str:
    return Path(__file__).with_name("html.css").read_text(encoding="utf-8")


def escape(text: object) -> str:
    """Text as HTML: markup escaped, control characters replaced, lone surrogates made valid."""
    shown = "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in str(text)
    )
    return html.escape(shown)


def write(target: Path, title: str, body: str) -> Path:
    """Write a whole page; `body` is HTML. Folders above `target` are created."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_style()}</style></head>'
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    page = f"{head}<body><main>{body}</main></body></html>\n"
    target.write_bytes(page.encode("utf-8", "replace"))
    return target


def paragraph(text: str, kind: str = "") -> str:
    """An escaped paragraph of class `kind`."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """A table of ready HTML cells; columns numbered in `words` are aligned left, the rest as numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        parts = (
            f"<{tag}{'' if column in words else ' class=number'}>{cell}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    heading = line([escape(cell) for cell in head], "th")
    return f'<div class="scroll"><table><thead>{heading}</thead><tbody>{body}</tbody></table></div>'


def grid(cards: Iterable[str]) -> str:
    """Cards side by side, as many as fit."""
    return f'<div class="grid">{"".join(cards)}</div>'


def card(
    item: Item, roots: Sequence[Path], *, title: str, note: str = "", hint: str = "", kind: str = ""
) -> str:
    """One item: its picture or page, or the beginning of its text; its name, a note, a hint on hovering."""
    shown = picture(item, roots)
    words = f'<div class="words">{escape(_cut(item.text, 220))}</div>' if item.text else ""
    inside = shown + (words if item.text and (not shown or not _is_page(item)) else "")
    name = escape(title)
    caption = (
        f'<figcaption><b title="{escape(hint or title)}">{name}</b><span>{escape(note)}</span></figcaption>'
    )
    return f'<figure class="card {escape(kind)}"><div class="body">{inside}</div>{caption}</figure>'


def query(item: Item, roots: Sequence[Path]) -> str:
    """What was asked: its picture and its words."""
    words = f"<q>{escape(item.text)}</q>" if item.text else ""
    instruction = paragraph(f"Instruction: {item.instruction}", "quiet") if item.instruction else ""
    return f'<div class="query">{picture(item, roots)}<div>{words}{instruction}</div></div>'


def picture(item: Item, roots: Sequence[Path]) -> str:
    """The item's first picture as an `img`, or a word on why it can't be shown; empty without one."""
    if not item.pictures:
        return ""
    source = item.pictures[0]
    if not may_open(source, roots):
        return paragraph("picture outside the indexed folders: not opened", "missing")
    try:
        if isinstance(source, PageImage):  # its upper part fills the card, so that its headline can be read
            return f'<img alt="" class="page" src="{thumbnail(source, 2 * SIDE)}">'
        return f'<img alt="" src="{thumbnail(source)}">'
    except ItemError as error:
        return paragraph(f"picture can't be shown: {error.reason}", "missing")


def may_open(source: ImageSource, roots: Sequence[Path]) -> bool:
    """Whether a stored picture may be opened: pictures in memory always, files only under `roots`.

    Links are resolved first, so that one inside a root can't lead out of it.
    """
    if isinstance(source, PageImage | TarImage):
        source = source.path
    if isinstance(source, str):
        if source.startswith("data:"):
            return True
        source = Path(source)
    if not isinstance(source, Path):
        return True
    real = Path(os.path.realpath(source))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def thumbnail(source: ImageSource, side: int = SIDE) -> str:
    """The picture as a small data URI.

    Raises:
        ItemError: it can't be opened or decoded.
    """
    image = load_image(source)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _is_page(item: Item) -> bool:
    return any(isinstance(source, PageImage) for source in item.pictures)


def _cut(text: str | None, length: int) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
