"""The child process that runs PDFium: `python -m umr_plugins.media.pdf_child`.

PDFium is native code that a file can crash or hang, and is not thread-safe; here it costs only this process.
Imports little, since a new one starts for every PDF. Messages (`pipe`):

- in: `{"pages": [1, 2] or null, "side": 1700, "images": true, "memory": bytes}` and the PDF;
- out: `{"count": n}` or `{"error": code}`; then for each page `{"page": n, "text": …, "size": [w, h]}` and
  the RGB pixels, or `{"page": n, "error": code}`.

It ends when its standard input does, so it never outlives the parent.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import threading
from typing import Any, BinaryIO

import pypdfium2
from PIL import Image

from umr_plugins.media.pipe import read_message, write_message

_PASSWORD, _SECURITY = 4, 5  # FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY
_COUNT_ZERO = re.compile(rb"/Count\s+0\b")
_PAGE = re.compile(rb"/Type\s*/Page\b")


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer the one request on `source`."""
    request, data = read_message(source, sys.maxsize)
    threading.Thread(target=_end_with, args=(source,), daemon=True).start()
    _limit(request["memory"])
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        code = "encrypted" if error.err_code in (_PASSWORD, _SECURITY) else "corrupt"
        # PDFium calls a file without pages broken.
        if code == "corrupt" and _COUNT_ZERO.search(data) and not _PAGE.search(data):
            code = "no_pages"
        write_message(sink, {"error": code})
        return
    except MemoryError:
        write_message(sink, {"error": "too_large"})
        return
    count = len(document)
    write_message(sink, {"count": count})
    with contextlib.suppress(pypdfium2.PdfiumError):
        document.init_forms()  # so that what was filled in is drawn
    for number in request["pages"] or range(1, count + 1):
        write_message(sink, *_answer(document, number, request["side"], request["images"]))


def _answer(document: Any, number: int, side: int, with_image: bool) -> tuple[dict[str, Any], bytes]:
    try:
        page = document[number - 1]
        text = page.get_textpage().get_text_range()
        if not with_image:
            return {"page": number, "text": text}, b""
        picture = render(page, side)
        return {"page": number, "text": text, "size": picture.size}, picture.tobytes()
    except MemoryError:
        return {"page": number, "error": "too_large"}, b""
    except Exception:
        return {"page": number, "error": "corrupt"}, b""


def render(page: Any, side: int) -> Image.Image:
    """The page as RGB, its longer side `side` pixels, whatever its size on paper.

    Raises:
        ValueError: the page has no area.
    """
    width, height = page.get_size()
    if not (math.isfinite(width * height) and min(width, height) > 0):
        raise ValueError("the page has no area")
    picture: Image.Image = page.render(scale=side / max(width, height)).to_pil()
    return picture.convert("RGB")


def _end_with(source: BinaryIO) -> None:
    """Ends this process when the parent is gone, however it went."""
    source.read(1)
    os._exit(0)


def _limit(memory: int) -> None:
    """Bounds memory, and forbids core dumps and files, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        with contextlib.suppress(OSError, ValueError):  # macOS does not take every limit
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, by closing our input
    serve(sys.stdin.buffer, sys.stdout.buffer)
