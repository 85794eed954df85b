"""Turns the bytes of a text file into clean text, whatever its encoding.

A byte-order mark decides; else UTF-8 (a few broken bytes in it cost only themselves); else UTF-16 or UTF-32
by the pattern of zero bytes; else Windows-1252 if all that is not ASCII looks like Western letters; else a
guess by charset_normalizer. Bytes that are no text are refused. NUL and other control characters become
spaces (no two words are glued), all line ends become newlines, lone surrogates become U+FFFD.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

from charset_normalizer import from_bytes

from umr_plugins.errors import ItemError
from umr_plugins.media.kinds import sniff
from umr_plugins.types import clean_text

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Without this list a guess can fall on rare encodings that differ in one letter.
_GUESSES: Final = [
    *(
        "utf_16_le",
        "utf_16_be",
        "cp932",
        "euc_jp",
        "iso2022_jp",
        "gb18030",
        "big5",
        "cp949",
        "euc_kr",
        "cp1252",
    ),
    *(
        "cp1250",
        "iso8859_2",
        "cp1251",
        "koi8_r",
        "iso8859_5",
        "cp866",
        "cp1253",
        "cp1254",
        "cp1255",
        "cp1256",
    ),
    *("cp1257", "cp874", "cp437", "cp850", "mac_roman"),
]
_SAMPLE: Final = 64 * 1024  # bytes that an encoding is guessed from
_READABLE: Final = frozenset({"HTML", "XML", "SVG"})
_UNREADABLE: Final = frozenset({"PDF", "rich text (RTF)", "PostScript or EPS", "Git LFS pointer"})
_CONTROLS: Final = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_MOST_CONTROLS: Final = 0.05
_LINE_ENDS: Final = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_HIGH: Final = re.compile(rb"[\x80-\xff]+")
# The letters and marks of French, German, Spanish, Portuguese, Italian, Dutch and the Nordic languages.
_WESTERN: Final = re.compile(
    rb"[\x80\x85\x91-\x97\x99\xa0\xa1\xa3\xa7\xa9\xab\xae\xb0\xb7\xbb\xbf\xc0-\xcf\xd1-\xd6\xd8-\xdc\xdf-\xef"
    rb"\xf1-\xf6\xf8-\xfc]{1,2}"
)


def decode_text(data: bytes, name: str | None = None) -> str:
    """The text in `data`, cleaned.

    Args:
        data: the file's bytes.
        name: put into errors.

    Raises:
        ItemError: `empty` without bytes, `no_text` if there are only blanks, `not_text` if this is no text.
    """
    if not data:
        raise ItemError("empty", "the file has no bytes", stage="decode", name=name)
    decoded = None if _is_other_kind(data) else _decode(data)
    if decoded is None or len(_CONTROLS.findall(decoded)) > max(_MOST_CONTROLS * len(decoded), 4):
        kind = sniff(data) or "binary data"
        raise ItemError(
            "not_text", f"this is {kind}, not text; save it as UTF-8 text", stage="decode", name=name
        )
    text = clean_text(_LINE_ENDS.sub("\n", _CONTROLS.sub(" ", decoded))) or ""
    if not text.strip():
        raise ItemError("no_text", "the file holds only blanks", stage="decode", name=name)
    return text


def _is_other_kind(data: bytes) -> bool:
    kind = sniff(data)
    if kind is None or kind in _READABLE:
        return False
    if kind == "PDF" and not data.startswith(b"%PDF-"):
        return False  # a text about PDFs
    # A text may begin with "ID3" or "BZh" by chance; a file of that kind has control bytes as well.
    return kind in _UNREADABLE or any(byte < 9 or 13 < byte < 32 for byte in data[:1024])


def _decode(data: bytes) -> str | None:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    wide = _wide(data)
    if wide is not None:
        return wide
    for attempt in (_utf8, _western, _guessed):
        text = attempt(data)
        if text is not None:
            return text
    return None


def _wide(data: bytes) -> str | None:
    """UTF-32 or UTF-16 without a mark, by where the zero bytes are."""
    head = data[: 4 * 1024]
    if b"\0" not in head:
        return None
    zeros = [head[start::4].count(0) / max(1, len(head[start::4])) for start in range(4)]
    patterns = {
        "utf-32-le": zeros[0] < 0.1 and zeros[3] == 1 and zeros[2] > 0.5,
        "utf-32-be": zeros[3] < 0.1 and zeros[0] == 1 and zeros[1] > 0.5,
        "utf-16-le": max(zeros[0], zeros[2]) < 0.1 and min(zeros[1], zeros[3]) > 0.4,
        "utf-16-be": max(zeros[1], zeros[3]) < 0.1 and min(zeros[0], zeros[2]) > 0.4,
    }
    for encoding, fits in patterns.items():
        if fits:
            return data.decode(encoding, "replace")
    return None


def _utf8(data: bytes) -> str | None:
    """UTF-8; with broken bytes only where whole letters beyond ASCII outnumber them by far."""
    try:
        # Halves of surrogate pairs, as some programs write them; `clean_text` joins or replaces them.
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    whole = sum(map(len, re.findall("[^\x00-\x7f\ufffd]+", text)))
    return text if whole >= 20 * broken else None


def _western(data: bytes) -> str | None:
    """Windows-1252, when all that is not ASCII stands alone and is a Western letter or mark."""
    if all(_WESTERN.fullmatch(run) for run in _HIGH.findall(data)):
        return data.decode("cp1252", "replace")
    return None


def _guessed(data: bytes) -> str | None:
    best = from_bytes(data[:_SAMPLE], cp_isolation=_GUESSES).best()
    return None if best is None else data.decode(best.encoding, "replace")
