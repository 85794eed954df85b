"""Pages show what they are given and nothing else: no markup from texts, no file outside the roots."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from umr_plugins import html
from umr_plugins.types import Item, PageImage

EVIL = "<script>alert(1)</script> \"quoted\" 'single' & \x1b[31mred\x00 \ud800"


class Tags(HTMLParser):
    """Collects tags, attribute names and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]


def png(folder: Path, name: str = "a.png", size: tuple[int, int] = (600, 300)) -> Path:
    path = folder / name
    Image.new("RGB", size, "teal").save(path)
    return path


def test_texts_can_not_become_markup(tmp_path: Path) -> None:
    card = html.card(Item(text=EVIL), [], title=EVIL, note=EVIL, kind=EVIL)
    body = html.query(Item(text=EVIL, instruction=EVIL), []) + html.grid([card]) + html.paragraph(EVIL)
    page = html.write(tmp_path / "deep" / "page.html", EVIL, body).read_text(encoding="utf-8")
    found = Tags(page)
    assert "script" not in found.tags
    assert found.sources == []
    assert "\x1b" not in page
    assert "\x00" not in page
    assert "&lt;script&gt;" in page


def test_a_page_forbids_loading_anything() -> None:
    assert "default-src 'none'" in html._POLICY


def test_a_picture_becomes_a_small_data_uri(tmp_path: Path) -> None:
    shown = html.picture(Item(image=png(tmp_path)), [tmp_path])
    [source] = Tags(shown).sources
    head, _, data = source.partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (240, 120)


def test_files_outside_the_roots_are_not_opened(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    inside.mkdir()
    outside.mkdir()
    secret = png(outside)
    (inside / "link.png").symlink_to(secret)
    for source in (
        secret,
        inside / ".." / "in-not" / "a.png",
        inside / "link.png",
        str(secret),
        PageImage(secret, 1),
    ):
        assert not html.may_open(source, [inside])
        shown = html.picture(Item(image=source), [inside])
        assert Tags(shown).sources == []
        assert "not opened" in shown
    assert html.may_open(png(inside), [inside])


def test_pictures_in_memory_are_always_shown(tmp_path: Path) -> None:
    data = png(tmp_path).read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, uri, Image.new("L", (5, 5))):
        assert len(Tags(html.picture(Item(image=source), [])).sources) == 1


def test_a_broken_picture_says_why_and_breaks_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    shown = html.card(Item(text="still here", image=broken), [tmp_path], title="broken.png")
    assert "be shown: " in shown
    assert "still here" in shown


def test_long_texts_are_cut() -> None:
    card = html.card(Item(text="word " * 500), [], title="t")
    [words] = re.findall(r'class="words">([^<]*)<', card)
    assert len(words) <= 220
    assert words.endswith("…")


@pytest.mark.parametrize("columns", [(0,), (0, 1)])
def test_numbers_are_aligned_as_numbers(columns: tuple[int, ...]) -> None:
    page = html.table(["name", "x"], [["a", "1"]], words=columns)
    assert page.count("class=number") == (2 if columns == (0,) else 0)
