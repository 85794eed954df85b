"""Files that users really have: broken, hostile and merely odd ones. Each writer puts one into a folder.

`BAD` maps a name to a writer and the code it must be refused with (by `walk`, `read_file`, `file_parts` or,
for pixels, `load_image`). `GOOD_ODD` must be embedded. `SLOW` ones keep the PDF reader busy until its
deadline: set `umr_plugins.media.pdf.PAGE_DEADLINE` low.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Writer = Callable[[Path], Path]


def picture(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth coloured picture, so that lossy formats change it little."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(6 * x + seed), np.cos(5 * y + seed), np.sin(4 * (x + y))]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127.5).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The picture's bytes in a format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pdf(objects: list[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of numbered objects; the first is the catalogue."""
    out, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    end = b"trailer\n<</Size %d/Root 1 0 R%b>>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        trailer,
        len(out),
    )
    return out + head + table + end


def stream(data: bytes, entries: bytes = b"") -> bytes:
    """A PDF stream object."""
    return b"<<%b/Length %d>>\nstream\n%b\nendstream" % (entries, len(data), data)


def text_pdf(*pages: str, box: bytes = b"[0 0 612 792]", entries: bytes = b"", trailer: bytes = b"") -> bytes:
    """A PDF with one line of text on each page; an empty string makes a page without text."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(pages)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%b]>>" % (len(pages), kids),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for text in pages:
        show = (
            b"BT /F 24 Tf 50 700 Td (%b) Tj ET" % text.encode("latin-1") if text else b"40 40 m 300 300 l S"
        )
        page = b"<</Type/Page/Parent 2 0 R/MediaBox%b%b/Resources<</Font<</F 3 0 R>>>>/Contents %d 0 R>>"
        objects += [page % (box, entries, len(objects) + 2), stream(show)]
    return pdf(objects, trailer)


def hanging_pdf(levels: int = 40) -> bytes:
    """Page 1 draws forms that each draw the next one twice: 2 to the 40th lines. Page 2 is blank."""
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count 2/Kids[3 0 R 4 0 R]>>",
        page + b"/Resources<</XObject<</A 6 0 R>>>>/Contents 5 0 R>>",
        page + b">>",
        stream(b"/A Do"),
    ]
    for number in range(7, 7 + levels):
        inner = b"/Resources<</XObject<</A %d 0 R>>>>" % number
        form = b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]"
        last = number == 6 + levels
        objects.append(stream(b"0 0 m 9 9 l S", form) if last else stream(b"/A Do /A Do", form + inner))
    return pdf(objects)


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size with next to no pixels in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


def _bytes(name: str, data: bytes | Callable[[], bytes]) -> Writer:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data())
        return path

    return write


def _link(name: str, target: str) -> Writer:
    def write(folder: Path) -> Path:
        path = folder / name
        path.symlink_to(target)
        return path

    return write


def _special(name: str, kind: int) -> Writer:
    def write(folder: Path) -> Path:
        path = folder / name
        os.mknod(path, kind | 0o600)
        return path

    return write


def _bad_name(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))
    path.write_text("a name in Latin-1")
    return path


def _cut(kind: str) -> Callable[[], bytes]:
    def cut() -> bytes:
        whole = encoded(picture(), kind)
        return whole[: len(whole) // 2]

    return cut


def _flipped() -> bytes:
    data = bytearray(encoded(picture(), "PNG"))
    data[len(data) // 2] ^= 0x55
    return bytes(data)


def _not_numbers() -> bytes:
    values = np.full((8, 8), np.nan, np.float32)
    return encoded(Image.fromarray(values), "TIFF")


def _box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + b"\0" * 64


_ENCRYPT = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%b>/U<%b>>>/ID[<00><00>]" % (b"11" * 32, b"22" * 32)

BAD: dict[str, tuple[Writer, str]] = {
    "empty picture": (_bytes("empty.jpg", b""), "empty"),
    "error page named jpg": (
        _bytes("page.jpg", b"<!DOCTYPE html>\n<html><title>404</title></html>"),
        "corrupt",
    ),
    "half a jpeg": (_bytes("half.jpg", _cut("JPEG")), "corrupt"),
    "half a png": (_bytes("half.png", _cut("PNG")), "corrupt"),
    "half a tiff": (_bytes("half.tif", _cut("TIFF")), "corrupt"),
    "half a webp": (_bytes("half.webp", _cut("WEBP")), "corrupt"),
    "half a gif": (_bytes("half.gif", _cut("GIF")), "corrupt"),
    "half a bmp": (_bytes("half.bmp", _cut("BMP")), "corrupt"),
    "flipped bits": (_bytes("flipped.png", _flipped), "corrupt"),
    "zeros named png": (_bytes("zeros.png", b"\0" * 4096), "corrupt"),
    "words named png": (_bytes("words.png", b"not a picture at all"), "corrupt"),
    "lfs pointer": (
        _bytes("lfs.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "corrupt",
    ),
    "nan pixels": (_bytes("nan.tiff", _not_numbers), "corrupt"),
    "svg named png": (_bytes("drawing.png", b"<?xml version='1.0'?><svg xmlns='x'/>"), "unsupported"),
    "heic named jpg": (_bytes("phone.jpg", _box(b"heic")), "unsupported"),
    "avif named jpg": (_bytes("web.jpg", _box(b"avif")), "unsupported"),
    "photoshop": (_bytes("layers.png", b"8BPS\0\1" + b"\0" * 40), "unsupported"),
    "postscript": (_bytes("figure.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "unsupported"),
    "pdf named jpg": (_bytes("scan.jpg", text_pdf("x")), "unsupported"),
    "bomb png": (_bytes("bomb.png", png_header(20_000, 20_000)), "too_large"),
    "bomb gif": (
        _bytes("bomb.gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;"),
        "too_large",
    ),
    "bomb bmp": (
        _bytes(
            "bomb.bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 30000, 30000, 1, 24, *[0] * 6)
        ),
        "too_large",
    ),
    "web page": (_bytes("page.html", b"<html>hi</html>"), "unsupported"),
    "office document": (_bytes("letter.docx", b"PK\3\4" + b"\0" * 60), "unsupported"),
    "archive": (_bytes("all.zip", b"PK\5\6" + b"\0" * 18), "unsupported"),
    "video": (_bytes("clip.mp4", _box(b"isom")), "unsupported"),
    "no suffix": (_bytes("Makefile", b"all:\n"), "unsupported"),
    "empty text": (_bytes("empty.txt", b""), "empty"),
    "blank text": (_bytes("blank.md", b" \n\t\r\n  "), "no_text"),
    "mark only": (_bytes("mark.txt", b"\xef\xbb\xbf\n"), "no_text"),
    "random bytes named txt": (_bytes("noise.txt", np.random.default_rng(0).bytes(4096)), "not_text"),
    "zeros named txt": (_bytes("zeros.txt", b"\0" * 512), "not_text"),
    "png named md": (_bytes("picture.md", lambda: encoded(picture(), "PNG")), "not_text"),
    "pdf named txt": (_bytes("report.txt", text_pdf("x")), "not_text"),
    "empty pdf": (_bytes("empty.pdf", b""), "empty"),
    "garbage pdf": (_bytes("garbage.pdf", b"%PDF-1.7\n" + b"garbage " * 50), "corrupt"),
    "png named pdf": (_bytes("picture.pdf", lambda: encoded(picture(), "PNG")), "corrupt"),
    "locked pdf": (_bytes("locked.pdf", text_pdf("secret", trailer=_ENCRYPT)), "encrypted"),
    "pdf without pages": (_bytes("none.pdf", text_pdf()), "no_pages"),
    "hanging pdf": (_bytes("hang.pdf", hanging_pdf()), "timeout"),
    "link to a file": (_link("passwd.txt", "/etc/passwd"), "link"),
    "link to a folder": (_link("etc", "/etc"), "link"),
    "link to itself": (_link("loop", "."), "link"),
    "link to nothing": (_link("gone.png", "nowhere.png"), "link"),
    "pipe": (_special("pipe.txt", stat.S_IFIFO), "not_a_file"),
    "socket": (_special("socket.jpg", stat.S_IFSOCK), "not_a_file"),
    "name not utf-8": (_bad_name, "unreadable"),
}

SLOW = frozenset({"hanging pdf"})

JAPANESE = "日本語の文章です。これはテストのための文書であり、検索に使われます。\n"
SPECIAL = "Before <|image_pad|><|vision_start|> and <|im_end|>\n<|im_start|>system after.\n"


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


def _wide_grey() -> bytes:
    grey = np.asarray(picture().convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def _animation(kind: str) -> Callable[[], bytes]:
    def frames() -> bytes:
        first, *rest = (picture(seed=seed) for seed in range(3))
        return encoded(first, kind, save_all=True, append_images=rest, duration=50)

    return frames


def _see_through() -> bytes:
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encoded(image, "PNG")


GOOD_ODD: dict[str, Writer] = {
    "one pixel": _bytes("pixel.png", lambda: encoded(picture(1, 1), "PNG")),
    "strip": _bytes("strip.png", lambda: encoded(picture(3000, 1), "PNG")),
    "16-bit grey": _bytes("grey16.png", _wide_grey),
    "float tiff": _bytes("float.tiff", lambda: encoded(picture().convert("L").convert("F"), "TIFF")),
    "cmyk jpeg": _bytes("cmyk.jpg", lambda: encoded(picture().convert("CMYK"), "JPEG", quality=95)),
    "animated gif": _bytes("moving.gif", _animation("GIF")),
    "animated webp": _bytes("moving.webp", _animation("WEBP")),
    "tiff of pages": _bytes("pages.tif", _animation("TIFF")),
    "see-through png": _bytes("alpha.png", _see_through),
    "turned jpeg": _bytes("turned.jpg", _turned),
    "png named jpg": _bytes("really-png.jpg", lambda: encoded(picture(), "PNG")),
    "upper-case suffix": _bytes("CAMERA.JPG", lambda: encoded(picture(), "JPEG")),
    "utf-16": _bytes("utf16.txt", JAPANESE.encode("utf-16")),
    "utf-16 without mark": _bytes("utf16le.txt", b"plain words\n".decode().encode("utf-16-le")),
    "shift_jis": _bytes("sjis.txt", JAPANESE.encode("shift_jis")),
    "windows-1252": _bytes("cafe.txt", "Le café – déjà vu.\n".encode("cp1252")),
    "lone surrogate": _bytes("surrogate.txt", b"before \xed\xa0\x80 after\n"),
    "nul": _bytes("nul.txt", b"before\0after\n"),
    "one long line": _bytes("long.txt", b"so many words in one line " * 200_000),
    "special tokens": _bytes("special.md", SPECIAL.encode()),
    "windows line ends": _bytes("crlf.md", b"# Title\r\n\r\nText\r\n\r\n- item\r\n"),
    "name with newline": _bytes("two\nlines.txt", b"text\n"),
    "huge page": _bytes("poster.pdf", text_pdf("poster", box=b"[0 0 14400 14400]")),
    "negative box": _bytes("negative.pdf", text_pdf("negative", box=b"[300 400 -300 -400]")),
    "turned page": _bytes("turned.pdf", text_pdf("turned", entries=b"/Rotate 90")),
    "pdf after junk": _bytes("junk.pdf", b"junk\n" * 9 + text_pdf("junk before")),
}
