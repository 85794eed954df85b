"""Opens a picture from whatever names it, safely: the only door for pictures.

A few formats only, the size checked from the header before anything is decoded, orientation applied, and
an RGB result in every mode (`modes`). A broken file is refused with a code, never half decoded. Animations
and multi-page TIFFs give their first frame. Sides more than 200 times longer than the other are padded
with white to 200:1, the most that the models take (after shrinking to a long side of `LONGEST_STRIP`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from PIL import ExifTags, Image

from umr_plugins.errors import ItemError
from umr_plugins.media import folder, tar
from umr_plugins.media.kinds import PICTURES, sniff
from umr_plugins.media.modes import to_rgb
from umr_plugins.media.quiet import quiet_pillow
from umr_plugins.types import ImageSource, PageImage, TarImage

MAX_PIXELS: Final = 40_000_000
"""Larger pictures are refused; a 300-dpi A3 scan has 17 million pixels."""

MAX_ASPECT: Final = 200
"""Longest side over shortest of a picture that comes back."""

LONGEST_STRIP: Final = 20_000
"""Pixels of the long side to which a picture beyond `MAX_ASPECT` is shrunk before it is padded."""

_ALLOWED: Final = "JPEG, PNG, WebP, GIF, BMP and TIFF are read"
_SCHEME: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LAZY = threading.Lock()  # a PIL.Image that a user opened decodes itself on first use, once


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as a new RGB image (uint8), upright, transparency on white.

    Safe to call from several threads. The result holds no file open.

    Args:
        source: `PIL.Image`, path, encoded bytes, `PageImage`, `TarImage`, or a string: a path, `file://`
            path or data URI. A path that is a link is followed, since the user named it.
        max_pixels: refuse pictures whose header says more.

    Raises:
        ItemError: `unsupported`, `corrupt`, `too_large`, `empty`, `unreadable`, `not_a_file`; for a
            `PageImage` also what `umr_plugins.media.pdf.render_page` raises.
    """
    if isinstance(source, PageImage):
        from umr_plugins.media.pdf import render_page

        return _strip(render_page(source.path, source.page))
    if isinstance(source, Image.Image):
        with _pillow("decode"):
            _check_size(source, max_pixels)
            _finish(source)
            return _strip(to_rgb(_upright(source)))
    data = read_source(source)
    with _open(data, max_pixels) as image, _pillow("decode"):
        image.load()
        return _strip(to_rgb(_upright(image)))


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Check format and size of an encoded picture from its header, without decoding it.

    Raises:
        ItemError: `unsupported`, `corrupt`, `too_large` or `empty`.
    """
    _open(data, max_pixels).close()


def content_key(source: ImageSource) -> bytes:
    """32 bytes that are equal for the same picture content and differ otherwise.

    SHA-256 of the encoded bytes, so a file, its bytes and its data URI agree. For a `PIL.Image`: of mode,
    size, palette, transparency, orientation and pixels (pixels alone collide). For a `PageImage`: of the
    file's bytes and the page.

    Raises:
        ItemError: as `read_source`; `corrupt` for a `PIL.Image` that can't be decoded.
    """
    if isinstance(source, PageImage):
        return hashlib.sha256(b"page\0%d\0" % source.page + content_key(source.path)).digest()
    if not isinstance(source, Image.Image):
        return hashlib.sha256(read_source(source)).digest()
    with _pillow("decode"):
        _check_size(source, sys.maxsize)
        _finish(source)
        palette, clear = source.getpalette(), source.info.get("transparency")
        parts = (source.mode, source.size, palette, clear, _orientation(source))
        return hashlib.sha256(b"pil\0" + repr(parts).encode() + b"\0" + source.tobytes()).digest()


def read_source(source: ImageSource) -> bytes:
    """The encoded bytes of a picture given as path, member of a tar, bytes or string.

    Raises:
        ItemError: `unsupported` for URLs and for sources without encoded bytes; `corrupt` for a data URI
            that is not base64; `unreadable`, `not_a_file`, `too_large`, `empty`.
    """
    if isinstance(source, str):
        source = _from_string(source)
    if isinstance(source, Path):
        return folder.read_file(source, follow_link=True)
    if isinstance(source, TarImage):
        return tar.read_member(source.path, source.member)
    if isinstance(source, io.BytesIO):
        source = source.getvalue()
    if not isinstance(source, bytes | bytearray | memoryview):
        raise ItemError(
            "unsupported",
            "a picture is a PIL.Image, Path, bytes, PageImage, TarImage, or a str with a path or data URI; "
            f"got {type(source).__name__}",
            stage="open",
        )
    data = bytes(source)
    if not data:
        raise ItemError("empty", "the picture has no bytes", stage="open")
    if len(data) > folder.MAX_BYTES:
        raise ItemError(
            "too_large", f"it has {len(data):,} bytes; at most {folder.MAX_BYTES:,} are read", stage="open"
        )
    return data


def _from_string(text: str) -> Path | bytes:
    if text[:5].lower() == "data:":
        return _data_uri(text)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return Path(text)
    if scheme[1].lower() == "file":
        parts = urlsplit(text)
        if parts.netloc in ("", "localhost"):
            return Path(url2pathname(parts.path))
    raise ItemError(
        "unsupported",
        f"got a {scheme[1]}:// address; URLs are off for now. Download the file and give its path",
        stage="open",
    )


def _data_uri(text: str) -> bytes:
    header, comma, body = text.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ItemError(
            "unsupported", "only base64 data URIs are read: data:image/png;base64,…", stage="open"
        )
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError):
        raise ItemError("corrupt", "the data URI is not valid base64", stage="open") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with only its header read and checked."""
    if not data:
        raise ItemError("empty", "the picture has no bytes", stage="open")
    kind = sniff(data)
    if kind not in PICTURES:
        raise _refusal(kind)
    with _pillow("open"):
        image = Image.open(io.BytesIO(data), formats=PICTURES)
        _check_size(image, max_pixels)
        return image


def _refusal(kind: str | None) -> ItemError:
    if kind is None:
        return ItemError("corrupt", f"this is no picture that can be read; {_ALLOWED}", stage="open")
    if kind in ("HTML", "XML", "Git LFS pointer"):
        help_ = (
            "fetch the real file (git lfs pull)" if kind == "Git LFS pointer" else "was an error page saved?"
        )
        return ItemError("corrupt", f"this looks like {kind}, not a picture; {help_}", stage="open")
    if kind == "PDF":
        return ItemError(
            "unsupported", "this is a PDF; give PageImage(path, page) for one page", stage="open"
        )
    return ItemError("unsupported", f"this is {kind}; {_ALLOWED}, so convert it", stage="open")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ItemError("empty", f"the picture has no pixels ({width} x {height})", stage="open")
    if width * height > max_pixels:
        raise ItemError(
            "too_large",
            f"the picture is {width} x {height}, {width * height:,} pixels; at most {max_pixels:,} are "
            "decoded. Scale it down",
            stage="open",
        )


def _finish(image: Image.Image) -> None:
    with _LAZY:
        image.load()


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken camera data say nothing about the pixels
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _strip(image: Image.Image) -> Image.Image:
    """Pads a picture that is too long and narrow for the models."""
    width, height = image.size
    if max(width, height) <= MAX_ASPECT * min(width, height):
        return image
    scale = min(1.0, LONGEST_STRIP / max(width, height))
    if scale < 1:
        image = image.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX
        )
        width, height = image.size
    shortest = -(-max(width, height) // MAX_ASPECT)
    padded = Image.new("RGB", (max(width, shortest), max(height, shortest)), "white")
    padded.paste(image, ((padded.width - width) // 2, (padded.height - height) // 2))
    return padded


@contextmanager
def _pillow(stage: str) -> Iterator[None]:
    """Turns whatever a decoder raises into `ItemError`, without its words: they can hold addresses."""
    with quiet_pillow():
        try:
            yield
        except ItemError:
            raise
        except MemoryError:
            raise ItemError("too_large", "there is not enough memory to decode it", stage="decode") from None
        except Image.DecompressionBombError:
            raise ItemError(
                "too_large",
                "the header says far more pixels than are ever decoded; scale it down",
                stage="open",
            ) from None
        except Exception:
            raise ItemError(
                "corrupt",
                "the picture is damaged or cut short and can't be decoded; mend or replace it",
                stage="open" if stage == "open" else "decode",
            ) from None
