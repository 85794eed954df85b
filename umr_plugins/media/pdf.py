"""Pages of a PDF as pictures and text, drawn by a child process that may crash or hang.

Each page has a deadline and so has the file; the child is killed when one passes. A page that crashes or
hangs the child costs only itself: a new child goes on with the next page. Pages come one by one, while the
child draws the next; there are no temporary files.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from PIL import Image

from umr_plugins.errors import ItemCode, ItemError
from umr_plugins.media.folder import read_file
from umr_plugins.media.kinds import sniff
from umr_plugins.media.pipe import read_message, write_message
from umr_plugins.types import clean_text

PAGE_SIDE: Final = 1700
"""Pixels of a page's longer side: an A4 page has 2 million, twice what a model's 1,280 visual tokens show."""

MAX_PAGES: Final = 20_000
"""A PDF with more pages is refused."""

OPEN_DEADLINE = 60.0
"""Seconds for starting the child and opening the file."""

PAGE_DEADLINE = 20.0
"""Seconds for one page."""

FILE_DEADLINE = 300.0
"""Seconds for one file, besides one second for each page; the caller's own time does not count."""

MEMORY: Final = 4 * 1024**3
"""Bytes of address space that the child may take, where the system can limit it."""

_MOST: Final = 256 * 1024 * 1024  # bytes of one answer
_COMMAND: Final = ("-P", "-m", "umr_plugins.media.pdf_child")
_REASONS: Final[dict[str, str]] = {
    "no_pages": "the PDF has no pages",
    "encrypted": "the PDF needs a password; save a copy without one",
    "corrupt": "the PDF is damaged and can't be read; mend it or print it to a new PDF",
    "too_large": "it takes more memory than one PDF may; split it or print it to a new PDF",
}
_BROKEN_WORD: Final = re.compile("[\ufffe\x02](?:\r?\n)?")
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\uffff]")


@dataclass(frozen=True)
class Page:
    """One page: `number` from 1, RGB `image` (None if not asked for), cleaned text layer, or an `error`."""

    number: int
    image: Image.Image | None = None
    text: str = ""
    error: ItemError | None = None


def render_pages(
    source: bytes | Path,
    *,
    pages: Sequence[int] | None = None,
    images: bool = True,
    page_deadline: float | None = None,
    file_deadline: float | None = None,
) -> Iterator[Page]:
    """The pages of a PDF in order; what fails on one page is that page's `error`.

    Close the iterator, or exhaust it, to end the child process.

    Args:
        source: the PDF's bytes or path.
        pages: page numbers from 1; None for all.
        images: False for the text layer only, which is faster.
        page_deadline: seconds for a page; None means `PAGE_DEADLINE`.
        file_deadline: seconds for all; None means `FILE_DEADLINE` and one second for each page.

    Raises:
        ItemError: the whole file can't be read: `encrypted`, `no_pages` (or none with that number),
            `corrupt`, `timeout`, `too_large`, and for a path what `read_file` raises.
    """
    data = read_file(source, follow_link=True) if isinstance(source, Path) else source
    if not data:
        raise ItemError("empty", "the PDF has no bytes", stage="open")
    kind = sniff(data)
    if kind != "PDF":
        raise ItemError("corrupt", f"this is no PDF{f' but looks like {kind}' if kind else ''}", stage="open")
    each = PAGE_DEADLINE if page_deadline is None else page_deadline
    return _pages(data, pages, images, each, file_deadline)


def render_page(path: Path, number: int) -> Image.Image:
    """One page as an RGB picture; `number` counts from 1.

    Raises:
        ItemError: as `render_pages`, and the page's own error.
    """
    (page,) = render_pages(path, pages=[number])
    if page.error is not None or page.image is None:
        raise page.error or ItemError("corrupt", _REASONS["corrupt"], stage="decode")
    return page.image


def _pages(
    data: bytes, wanted: Sequence[int] | None, images: bool, each: float, total: float | None
) -> Iterator[Page]:
    child = _Child(data, wanted, images)
    try:
        count = child.open()
        numbers = _numbers(wanted, count)
        left = FILE_DEADLINE + len(numbers) if total is None else total
        lost: ItemError | None = None
        for done, number in enumerate(numbers, 1):
            if lost is not None or left <= 0:
                yield Page(number, error=lost or _timeout(f"the file's {len(numbers)} pages took too long"))
                continue
            started = time.monotonic()
            page = child.page(number, min(each, left))
            left -= time.monotonic() - started
            yield page
            if child.ended and done < len(numbers):
                child.close()
                try:
                    child = _Child(data, numbers[done:], images)
                    child.open()
                except ItemError as error:
                    lost = error
    finally:
        child.close()


def _numbers(wanted: Sequence[int] | None, count: int) -> Sequence[int]:
    if count < 1:
        raise ItemError("no_pages", "the PDF has no pages", stage="open")
    if count > MAX_PAGES:
        raise ItemError(
            "too_large", f"the PDF has {count:,} pages; at most {MAX_PAGES:,} are read", stage="open"
        )
    if wanted is None:
        return range(1, count + 1)
    missing = [number for number in wanted if not 1 <= number <= count]
    if missing:
        raise ItemError("no_pages", f"the PDF has pages 1 to {count}, not {missing[:5]}", stage="open")
    return wanted


class _Child:
    """One child process with one PDF."""

    def __init__(self, data: bytes, pages: Sequence[int] | None, images: bool) -> None:
        self.ended = False
        self._data = data
        self._request = {
            "pages": pages and list(pages),
            "side": PAGE_SIDE,
            "images": images,
            "memory": MEMORY,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # The parent's own path: a package found through it must be found by the child as well.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(str(Path(part).absolute()) for part in sys.path),
                },
            )
        except OSError as error:
            raise ItemError(
                "unreadable", f"the process that reads PDFs can't be started ({error.strerror})", stage="open"
            ) from None

    def open(self) -> int:
        """Send the file; the number of its pages."""
        answer, _ = self._receive(OPEN_DEADLINE, "opening the file", send=True)
        if "error" in answer:
            raise _refused(answer["error"], "open")
        return int(answer["count"])

    def page(self, number: int, deadline: float) -> Page:
        """The next page, which is `number`."""
        try:
            answer, pixels = self._receive(deadline, f"page {number}")
            if "error" in answer:
                raise _refused(answer["error"], "decode")
            image = Image.frombytes("RGB", tuple(answer["size"]), pixels) if pixels else None
            return Page(number, image, _clean(answer["text"]))
        except ItemError as error:
            return Page(number, error=error)

    def _receive(self, deadline: float, doing: str, send: bool = False) -> tuple[dict[str, Any], bytes]:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(deadline, expire)
        timer.daemon = True
        timer.start()
        answer: tuple[dict[str, Any], bytes] | None = None
        try:
            if send:
                write_message(cast("BinaryIO", self._process.stdin), self._request, self._data)
            answer = read_message(cast("BinaryIO", self._process.stdout), _MOST)
        except (EOFError, ValueError, OSError):
            answer = None
        finally:
            timer.cancel()
            timer.join()  # after this it has either fired or never will
        if answer is not None and not expired.is_set():
            return answer
        self.ended = True
        self._process.kill()
        if expired.is_set():
            raise _timeout(f"{doing} took more than {deadline:g} seconds")
        if self._process.wait() == 1 and send:
            raise ItemError(
                "unreadable",
                "the process that reads PDFs does not start; is pypdfium2 installed?",
                stage="open",
            )
        raise ItemError(
            "corrupt", f"{doing} made the PDF reader crash; print it to a new PDF", stage="decode"
        )

    def close(self) -> None:
        """End the process and take its exit status, so that no zombie stays."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                cast("BinaryIO", stream).close()
        self._process.wait()


def _refused(code: ItemCode, stage: str) -> ItemError:
    return ItemError(code, _REASONS[code], stage="open" if stage == "open" else "decode")


def _timeout(reason: str) -> ItemError:
    return ItemError("timeout", f"{reason}; print it to a new PDF", stage="decode")


def _clean(text: str) -> str:
    """Joins words broken at a line's end, drops control characters and lone surrogates."""
    text = _BROKEN_WORD.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return (clean_text(_CONTROLS.sub(" ", text)) or "").strip()
