"""Names the kind of a file from its first bytes, so that a wrong file gets a helpful refusal.

Only data and one look-up: no decoder is called here.
"""

from __future__ import annotations

import re
from typing import Final

PICTURES: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of the picture formats that are decoded; every other decoder stays shut."""

_STARTS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"%!PS", "PostScript or EPS"),
    (b"\xc5\xd0\xd3\xc6", "PostScript or EPS"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile (WMF)"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x01\x00", "Windows icon (ICO)"),
    (b"icns", "Apple icon (ICNS)"),
    (b"DDS ", "DirectDraw surface (DDS)"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"SIMPLE  =", "FITS"),
    (b"gimp xcf", "GIMP picture (XCF)"),
    (b"{\\rtf", "rich text (RTF)"),
    (b"PK\x03\x04", "ZIP archive or Office document"),
    (b"PK\x05\x06", "ZIP archive or Office document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office document"),
    (b"\x1f\x8b", "gzip archive"),
    (b"BZh", "bzip2 archive"),
    (b"\xfd7zXZ\x00", "xz archive"),
    (b"(\xb5/\xfd", "Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    (b"Rar!\x1a\x07", "RAR archive"),
    (b"SQLite format 3\x00", "SQLite database"),
    (b"\x7fELF", "program (ELF)"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"OggS", "Ogg sound or video"),
    (b"fLaC", "FLAC sound"),
    (b"ID3", "MP3 sound"),
    (b"\x93NUMPY", "NumPy array"),
    (b"version https://git-lfs.github.com/", "Git LFS pointer"),
)

_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
}
_RIFF: Final = {b"WEBP": "WEBP", b"AVI ": "AVI video", b"WAVE": "WAVE sound"}
_HTML: Final = re.compile(
    rb"<(!doctype\s+html|html|head|body|script|title|meta|div|p|h1)[\s>/]", re.IGNORECASE
)


def sniff(data: bytes) -> str | None:
    """The kind of file that `data` begins like, or None. Looks at the first kilobyte only."""
    head = data[:1024]
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "MP4 or QuickTime video")
    if head.startswith(b"BM") and head[6:10] == b"\x00\x00\x00\x00":
        return "BMP"
    if b"%PDF-" in head:
        return "PDF"
    return _markup(head)


def _markup(head: bytes) -> str | None:
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"<"):
        return None
    if _HTML.match(head):
        return "HTML"
    if b"<svg" in head.lower():
        return "SVG"
    return "XML" if head.startswith(b"<?xml") else None
