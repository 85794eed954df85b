"""Text in any encoding comes out clean; what is no text is refused."""

from __future__ import annotations

import os

import pytest
from bad_inputs import JAPANESE
from hypothesis import given
from hypothesis import strategies as st

from umr_plugins.errors import ItemError
from umr_plugins.media.text import decode_text

SAMPLES = {
    "cp1252": "Le café était fermé; « déjà vu », naïve façade – l’été à Zürich, 5 € für Öl.\n",
    "latin-1": "Año nuevo, coração, smørrebrød, Größe.\n",
    "shift_jis": JAPANESE,
    "euc_jp": JAPANESE,
    "gb18030": "这是一个用于测试的中文文档，我们要检索它的内容。\n",
    "big5": "這是一個用於測試的中文文件，我們要檢索它的內容。\n",
    "euc_kr": "이것은 검색을 위한 한국어 문서입니다. 시험용입니다.\n",
    "koi8_r": "Это русский текст для проверки кодировки документа.\n",
    "cp1251": "Это русский текст для проверки кодировки документа.\n",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy v noci.\n",
    "cp1253": "Αυτό είναι ένα ελληνικό κείμενο για δοκιμή.\n",
}
WIDE = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


def code_of(data: bytes) -> str:
    with pytest.raises(ItemError) as caught:
        decode_text(data, "a.txt")
    assert caught.value.name == "a.txt"
    return caught.value.code


@pytest.mark.parametrize("encoding", SAMPLES)
@pytest.mark.parametrize("times", [1, 30])
def test_old_encodings(encoding, times):
    text = SAMPLES[encoding] * times
    assert decode_text(text.encode(encoding)) == text


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("text", ["plain words\nand more\n", JAPANESE, "Grüße 🎉\n"])
def test_unicode_encodings(encoding, text):
    assert decode_text(text.encode(encoding)) == text


@pytest.mark.parametrize("text", ["caf\xe9", "\xbfQu\xe9?", "na\xefve"])
def test_a_short_western_text(text):
    assert decode_text(text.encode("cp1252")) == text


def test_a_broken_byte_in_utf8_costs_only_itself():
    data = (JAPANESE * 3).encode()
    assert decode_text(data + b"\xff") == JAPANESE * 3 + "\ufffd"
    assert decode_text(data[:-2]).startswith(JAPANESE * 2)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\0b", "a b"),
        (b"\x1b[1mlog\x1b[0m line", " [1mlog [0m line"),
        (b"a\r\nb\rc\x0cd\xc2\x85e\xe2\x80\xa8f", "a\nb\nc\nd\ne\nf"),
        (b"a\tb", "a\tb"),
        (b"x \xed\xa0\x80 y", "x \ufffd y"),
        (b"x \xed\xa0\xbc\xed\xbe\x89 y", "x 🎉 y"),
        (b"%PDF- is how a PDF begins"[1:], "PDF- is how a PDF begins"),
        (b"ID3 tags are found in MP3 files", "ID3 tags are found in MP3 files"),
        (b"<html><b>as text</b>", "<html><b>as text</b>"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "<?xml version='1.0'?>"),
    ],
)
def test_cleaning(data, text):
    assert decode_text(data) == text


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"), (b"\n \t", "no_text"), (b"\xff\xfe", "no_text"), (b"\0" * 99, "not_text"),
        (b"\x89PNG\r\n\x1a\n\0\0", "not_text"), (b"%PDF-1.4 ascii", "not_text"),
        (b"\x7fELF\2\1\1\0", "not_text"),
        (b"{\\rtf1 hello}", "not_text"), (bytes(range(256)) * 4, "not_text"),
    ],
)  # fmt: skip
def test_refusals(data, code):
    assert code_of(data) == code


def test_random_bytes_are_no_text():
    assert {code_of(os.urandom(2048)) for _ in range(20)} == {"not_text"}


@given(st.binary(max_size=400))
def test_any_bytes_give_clean_text_or_a_typed_error(data):
    try:
        text = decode_text(data)
    except ItemError as error:
        assert error.code in ("empty", "no_text", "not_text")  # noqa: PT017
        return
    text.encode()
    assert text.strip()
    assert "\0" not in text
    assert "\r" not in text


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
def test_utf8_is_exact(text):
    data = text.encode()
    if text.strip() and not data.startswith((b"\xef\xbb\xbf", b"%PDF-", b"%!PS", b"{\\rtf")):
        assert decode_text(data) == text
