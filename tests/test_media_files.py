"""Files to items: every bad file gets its code, every odd one its parts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from bad_inputs import BAD, GOOD_ODD, SLOW, encoded, picture, text_pdf

from umr_plugins.errors import ItemError
from umr_plugins.media import pdf
from umr_plugins.media.files import FilePart, file_parts, kind_of
from umr_plugins.media.folder import read_file, walk
from umr_plugins.media.images import load_image
from umr_plugins.types import PagesMode


def words(text: str) -> int:
    return len(text.split())


def index(root: Path, pages: PagesMode = "image") -> tuple[list[FilePart], list[ItemError]]:
    """What an index does with a folder: all parts with their pictures opened, and all errors."""
    parts: list[FilePart] = []
    errors: list[ItemError] = []
    for found in walk(root):
        if isinstance(found, ItemError):
            errors.append(found)
            continue
        try:
            data = read_file(found.path, root=root)
            for part in file_parts(found.path, data, pages=pages, count_tokens=words):
                if part.error is not None:
                    errors.append(part.error)
                    continue
                assert part.item is not None
                for image in part.item.pictures:
                    assert load_image(image).mode == "RGB"
                parts.append(part)
        except ItemError as error:
            errors.append(error)
    return parts, errors


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_code(name, tmp_path, monkeypatch):
    if name in SLOW:
        monkeypatch.setattr(pdf, "PAGE_DEADLINE", 1.0)
    write, code = BAD[name]
    path = write(tmp_path)
    assert path.is_symlink() or path.exists()
    _, errors = index(tmp_path)
    assert [error.code for error in errors] == [code]
    assert errors[0].reason
    str(errors[0]).encode()  # can be printed and stored
    assert "0x" not in errors[0].reason


def test_at_least_25_kinds_of_bad_files_and_all_but_model_codes():
    assert len(BAD) >= 25
    codes = {code for _, code in BAD.values()}
    assert codes == {
        "empty", "unreadable", "not_a_file", "link", "unsupported", "corrupt", "too_large", "timeout",
        "encrypted", "no_pages", "no_text", "not_text",
    }  # fmt: skip


@pytest.mark.parametrize("name", GOOD_ODD)
def test_an_odd_file_is_embedded(name, tmp_path):
    GOOD_ODD[name](tmp_path)
    parts, errors = index(tmp_path)
    assert errors == []
    assert parts


def test_bad_files_cost_only_themselves(tmp_path):
    for write in GOOD_ODD.values():
        write(tmp_path)
    good, _ = index(tmp_path)
    for name, (write, _code) in BAD.items():
        if name not in SLOW:
            write(tmp_path)
    parts, errors = index(tmp_path)
    assert [(part.part, part.text) for part in parts] == [(part.part, part.text) for part in good]
    assert len(errors) == len(BAD) - len(SLOW)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JPG", "image"),
        ("a.b.tiff", "image"),
        ("x.PDF", "pdf"),
        ("n.md", "text"),
        ("n.html", None),
        ("README", None),
    ],
)
def test_kind_by_suffix(name, kind):
    assert kind_of(name) == kind


def test_advice_for_what_is_not_indexed():
    with pytest.raises(ItemError, match="export it as PDF") as caught:
        list(file_parts(Path("a.docx"), b"PK", pages="image", count_tokens=words))
    assert (caught.value.code, caught.value.name) == ("unsupported", "a.docx")


def test_picture_is_one_item_of_its_own_bytes():
    data = encoded(picture(), "PNG")
    (part,) = file_parts(Path("a.png"), data, pages="image", count_tokens=words)
    assert part.item is not None
    assert (part.part, part.page, part.item.image, part.text) == (0, None, data, None)


@pytest.mark.parametrize(
    ("mode", "texts", "pictures", "codes"),
    [
        ("image", [None, None], [1, 1], []),
        ("fused", ["first page", None], [1, 1], []),
        ("text", ["first page"], [0], ["no_text"]),
    ],
)
def test_what_of_a_page_is_embedded(mode, texts, pictures, codes):
    data = text_pdf("first page", "")
    parts = list(file_parts(Path("a.pdf"), data, pages=mode, count_tokens=words))
    assert [(part.part, part.page, part.text) for part in parts] == [(0, 1, "first page"), (1, 2, None)]
    items = [part.item for part in parts if part.item is not None]
    assert [item.text for item in items] == texts
    assert [len(item.pictures) for item in items] == pictures
    assert [part.error.code for part in parts if part.error] == codes


def test_text_keeps_its_headings():
    data = b"# Guide\n\nIntro.\n\n## Install\n\n" + b"Run it now. " * 40
    parts = list(file_parts(Path("a.md"), data, pages="image", count_tokens=words, max_tokens=50))
    assert [part.headings for part in parts[:2]] == [("Guide",), ("Guide", "Install")]
    assert parts[-1].text is not None
    assert parts[-1].text.startswith("Guide > Install\n\nRun it now.")
    assert all(words(part.text or "") <= 50 for part in parts)
    assert [part.part for part in parts] == list(range(len(parts)))
    assert all(part.item is not None and part.item.text == part.text for part in parts)


def test_a_real_socket_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.txt")
        with pytest.raises(ItemError) as caught:
            read_file(Path("s.txt"))
    assert caught.value.code == "not_a_file"
