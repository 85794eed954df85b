"""PDFs: pages come out, broken ones cost only themselves, no process stays behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from bad_inputs import BAD, encoded, hanging_pdf, picture, stream, text_pdf
from bad_inputs import pdf as build

from umr_plugins.errors import ItemError
from umr_plugins.media import pdf
from umr_plugins.media.pdf import PAGE_SIDE, render_page, render_pages


@pytest.fixture(autouse=True)
def no_child_stays() -> Iterator[None]:
    before = set(psutil.Process().children())  # such as Python's own, once some test has spawned processes
    yield
    assert set(psutil.Process().children()) <= before


def code_of(data: bytes | Path, **options: object) -> str:
    with pytest.raises(ItemError) as caught:
        list(render_pages(data, **options))  # type: ignore[arg-type]
    return caught.value.code


def test_pages_in_order(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(text_pdf("first", "", "third"))
    for source in (path, path.read_bytes()):
        pages = list(render_pages(source))
        assert [(page.number, page.text, page.error) for page in pages] == [
            (1, "first", None), (2, "", None), (3, "third", None),
        ]  # fmt: skip
        for page in pages:
            assert page.image is not None
            assert page.image.mode == "RGB"
            assert PAGE_SIDE <= max(page.image.size) <= PAGE_SIDE + 1
            assert page.image.getpixel((0, 0)) == (255, 255, 255)
            assert np.asarray(page.image).min() < 100


def test_some_pages_and_no_pictures():
    pages = list(render_pages(text_pdf("a", "b", "c"), pages=[3, 1], images=False))
    assert [(page.number, page.text, page.image) for page in pages] == [(3, "c", None), (1, "a", None)]
    assert code_of(text_pdf("a"), pages=[2]) == "no_pages"
    assert code_of(text_pdf("a"), pages=[0]) == "no_pages"


def test_one_page(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(text_pdf("first", "", "third"))
    first, third = render_page(path, 1), render_page(path, 3)
    assert first.size == third.size
    assert first.tobytes() != third.tobytes()


@pytest.mark.parametrize(
    "box",
    [
        "0 0 14400 14400",
        "0 0 0 0",
        "300 400 -300 -400",
        "0 0 1e30 5",
        "0 0 14400 1",
        "nan 0 x 1",
        "0 0 1e-9 1e-9",
    ],
)
def test_strange_page_sizes(box):
    (page,) = render_pages(text_pdf("a", box=b"[%b]" % box.encode()))
    if page.error is None:
        assert page.image is not None
        assert max(page.image.size) <= PAGE_SIDE + 1
    else:
        assert page.error.code in ("corrupt", "too_large")


def test_rotation_is_applied():
    (page,) = render_pages(text_pdf("a", entries=b"/Rotate 90"))
    assert page.image is not None
    assert page.image.width > page.image.height


@pytest.mark.parametrize(
    "name", [name for name in BAD if "pdf" in name and "hang" not in name and "named" not in name]
)
def test_refused_files(name, tmp_path):
    write, code = BAD[name]
    assert code_of(write(tmp_path).read_bytes()) == code


def test_a_picture_named_pdf_says_so():
    with pytest.raises(ItemError, match="looks like PNG"):
        render_pages(encoded(picture(), "PNG"))


def test_too_many_pages(monkeypatch):
    monkeypatch.setattr(pdf, "MAX_PAGES", 2)
    assert code_of(text_pdf("a", "b", "c")) == "too_large"


def test_cut_files_give_pages_or_typed_errors():
    whole = text_pdf("one", "two", "three")
    for end in range(60, len(whole), 150):
        try:
            assert all(
                page.error is None or page.error.code == "corrupt" for page in render_pages(whole[:end])
            )
        except ItemError as error:
            assert error.code in ("corrupt", "no_pages")  # noqa: PT017


def test_a_hanging_page_costs_only_itself(monkeypatch):
    monkeypatch.setattr(pdf, "PAGE_DEADLINE", 1.0)
    first, second = render_pages(hanging_pdf())
    assert first.error is not None
    assert (first.error.code, first.number) == ("timeout", 1)
    assert second.error is None
    assert second.image is not None


def test_the_file_has_a_deadline():
    pages = list(render_pages(hanging_pdf(), file_deadline=1.0))
    assert [page.error and page.error.code for page in pages] == ["timeout", "timeout"]


def test_the_caller_may_take_its_time():
    pages = []
    for page in render_pages(text_pdf("a", "b", "c"), file_deadline=2.0):
        time.sleep(1.0)
        pages.append(page)
    assert [page.error for page in pages] == [None] * 3


# Stands in for the reader, to end it at a chosen page.
CRASHING = """
import os, sys
from umr_plugins.media import pdf_child
whole = pdf_child._answer
def answer(document, number, side, images):
    if number in {numbers}:
        os.abort()
    return whole(document, number, side, images)
pdf_child._answer = answer
pdf_child.serve(sys.stdin.buffer, sys.stdout.buffer)
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(pdf, "_COMMAND", ("-c", script))


def test_a_crashing_page_costs_only_itself(monkeypatch):
    stand_in(monkeypatch, CRASHING.replace("{numbers}", "(1, 3)"))
    pages = list(render_pages(text_pdf("a", "b", "c", "d")))
    assert [page.error and page.error.code for page in pages] == ["corrupt", None, "corrupt", None]
    assert [page.text for page in pages] == ["", "b", "", "d"]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("import os; os.abort()", "corrupt"),
        ("import nothing_of_that_name", "unreadable"),
        ("import sys; sys.stdin.buffer.read(9); sys.stdout.buffer.write(b'\\xff' * 99)", "corrupt"),
        ("import sys; sys.stdout.buffer.write(b'\\2\\0\\0\\0[]')", "corrupt"),
    ],
)
def test_a_reader_that_does_not_start(script, code, monkeypatch):
    stand_in(monkeypatch, script)
    assert code_of(text_pdf("a" * 200_000)) == code


def test_a_reader_that_never_answers(monkeypatch):
    stand_in(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(pdf, "OPEN_DEADLINE", 0.5)
    assert code_of(text_pdf("a" * 200_000)) == "timeout"


def test_a_reader_that_can_not_start_again(monkeypatch):
    stand_in(monkeypatch, CRASHING.replace("{numbers}", "(1,)"))
    pages = render_pages(text_pdf("a", "b", "c"))
    errors = []
    start = pdf._Child.__init__

    def once(self: pdf._Child, data: bytes, wanted: object, images: bool) -> None:
        if wanted:
            raise ItemError("unreadable", "no more processes", stage="open")
        start(self, data, None, images)

    monkeypatch.setattr(pdf._Child, "__init__", once)
    errors = [page.error and page.error.code for page in pages]
    assert errors == ["corrupt", "unreadable", "unreadable"]


GREEDY = """
import sys
from umr_plugins.media import pdf_child
whole, pages = pdf_child.render, []
def render(page, side):
    pages.append(page)
    if len(pages) == 1:
        bytearray(2 * 1024**3)
    return whole(page, side)
pdf_child.render = render
pdf_child.serve(sys.stdin.buffer, sys.stdout.buffer)
"""


def test_memory_is_limited(monkeypatch):
    stand_in(monkeypatch, GREEDY)
    monkeypatch.setattr(pdf, "MEMORY", 1024**3)
    pages = list(render_pages(text_pdf("a", "b")))
    assert [page.error and page.error.code for page in pages] == ["too_large", None]


def test_a_picture_of_many_pixels_inside_a_page():
    image = b"/Type/XObject/Subtype/Image/Width 60000/Height 60000/ColorSpace/DeviceRGB/BitsPerComponent 8"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count 2/Kids[3 0 R 4 0 R]>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</XObject<</A 5 0 R>>>>/Contents 6 0 R>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>",
        stream(b"\0" * 999, image),
        stream(b"9 0 0 9 0 0 cm /A Do"),
    ]
    first, second = render_pages(build(objects))
    assert first.error is None or first.error.code in ("too_large", "corrupt", "timeout")
    assert second.error is None


def test_leaving_early_ends_the_child():
    pages = render_pages(text_pdf(*"abcdef"))
    assert next(pages).text == "a"
    pages.close()  # type: ignore[attr-defined]


def test_the_child_dies_with_its_parent(tmp_path):
    path = tmp_path / "hang.pdf"
    path.write_bytes(hanging_pdf())
    script = (
        "import pathlib, sys, threading\nfrom umr_plugins.media import pdf\n"
        "child = pdf._Child(pathlib.Path(sys.argv[1]).read_bytes(), None, True)\n"
        "child.open()\nprint(child._process.pid, flush=True)\nchild.page(1, 600)"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(600):
        if not alive(pid):
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return re.search(r"State:\s+Z", status) is None


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("exam\ufffeple", "example"),
        ("exam\x02\r\nple", "example"),
        ("a\0b\r\nc\rd", "a b\nc\nd"),
        ("\ud800 x \uffff", "\ufffd x"),
        ("\r\n text \r\n", "text"),
    ],
)
def test_text_layer_is_cleaned(raw, clean):
    assert pdf._clean(raw) == clean
