"""`documents_to_content_blocks`: what a chat model gets to see of found documents."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import logging
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_umr import (
    UMRVectorStore,
    adocuments_to_content_blocks,
    content_blocks,
    documents_to_content_blocks,
)
from PIL import Image

from umr_plugins.errors import InputError
from umr_plugins.testing import FakeEncoder


def png(color: str = "red", size: tuple[int, int] = (30, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def data_uri(color: str = "red") -> str:
    return "data:image/png;base64," + base64.b64encode(png(color)).decode()


COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0), "white": (255, 255, 255)}


def seen(blocks: list[dict[str, Any]]) -> list[str]:
    """Texts as they are; pictures as `<color>`, decoded."""
    found = []
    for block in blocks:
        if block["type"] == "text":
            assert set(block) == {"type", "text"}
            found.append(block["text"])
            continue
        assert {**block, "base64": ""} == {"type": "image", "base64": "", "mime_type": "image/jpeg"}
        image = Image.open(io.BytesIO(base64.b64decode(block["base64"])))
        assert image.format == "JPEG"
        at = image.getpixel((image.width // 2, image.height // 2))
        near = {name: sum(abs(a - b) for a, b in zip(at, one, strict=True)) for name, one in COLORS.items()}  # type: ignore[arg-type]  # RGB
        found.append(f"<{min(near, key=near.__getitem__)}>")
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for color in COLORS:
        (folder / f"{color}.png").write_bytes(png(color))
    return folder


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> Iterator[UMRVectorStore]:
    with UMRVectorStore(FakeEncoder()) as made:
        yield made


def test_text_pictures_and_both_in_order_with_labels(photos: Path) -> None:
    documents = [
        Document("A kite needs wind.", metadata={"source": "notes/kites.txt"}),
        Document("", metadata={"image": str(photos / "red.png")}),
        Document("A blue kite.", metadata={"image_uri": "blue.png", "page": 3}),
        Document("Two.", metadata={"image": ["lime.png", "white.png"]}),
        Document("", metadata={"image": data_uri("blue")}),
        Document("  ", metadata={"n": 1}),
    ]
    before = copy.deepcopy(documents)
    blocks = documents_to_content_blocks(iter(documents), roots=photos)
    assert seen(blocks) == [
        "Document 1 (kites.txt)\nA kite needs wind.",
        "Document 2 (red.png)",
        "<red>",
        "Document 3 (blue.png, page 3)\nA blue kite.",
        "<blue>",
        "Document 4\nTwo.",
        "<lime>",
        "<white>",
        "Document 5",
        "<blue>",
        "Document 6\n(it has neither text nor picture)",
    ]
    assert documents == before
    assert documents_to_content_blocks([]) == []


def test_rows_of_our_own_store_show_what_was_added(
    store: UMRVectorStore, photos: Path, tmp_path: Path
) -> None:
    pages = [Image.new("RGB", (200, 280), color) for color in ("white", "blue")]
    pages[0].save(tmp_path / "report.pdf", save_all=True, append_images=pages[1:])
    store.add_files([tmp_path / "report.pdf"])
    store.add_items(
        [
            Image.new("RGB", (30, 20), "red"),
            {"text": "a lime kite", "image": photos / "lime.png"},
            {"text": "both", "images": [photos / "red.png", png("blue")]},
        ],
        ids=["memory", "file", "two"],
    )
    store.add_texts(["A kite."], ids=["text"])
    page = next(one for one in store.get_by_ids(store.index.ids()) if one.metadata.get("page") == 2)
    found = [page, *store.get_by_ids(["memory", "file", "two", "text"])]
    blocks = documents_to_content_blocks(found, store=store)
    assert seen(blocks) == [
        "Document 1 (report.pdf, page 2)",
        "<blue>",
        "Document 2",
        "<red>",
        "Document 3 (lime.png)\na lime kite",
        "<lime>",
        "Document 4\nboth",
        "<red>",
        "<blue>",
        "Document 5\nA kite.",
    ]


def test_pages_of_pdfs_and_files_below_a_root_need_no_store(store: UMRVectorStore, tmp_path: Path) -> None:
    Image.new("RGB", (200, 280), "blue").save(tmp_path / "report.pdf")
    store.add_files([tmp_path / "report.pdf"])
    found = store.get_by_ids(store.index.ids())
    assert seen(documents_to_content_blocks(found, roots=[tmp_path])) == [
        "Document 1 (report.pdf, page 1)",
        "<blue>",
    ]


def test_pictures_outside_the_roots_are_named_and_never_opened(
    store: UMRVectorStore, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    (photos / "link.png").symlink_to(secret)
    store.add_items(["decoy"], [{"path": str(secret), "modality": "image"}], ids=["decoy"])
    decoy = store.get_by_ids(["decoy"])
    named = [
        {"image": str(secret)},
        {"image": "../secret.png"},
        {"image": "link.png"},
        {"image": ["red.png", str(secret)]},
        {"path": str(secret), "modality": "image"},
        {"path": str(secret), "modality": "fused", "page": 1},
        {"image": "https://example.org/a.png"},
        {"modality": "image"},
    ]
    for metadata in named:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            blocks = documents_to_content_blocks([Document("kite", metadata=metadata)], roots=photos)
        assert [block["type"] for block in blocks] == ["text", "text"], metadata
        assert blocks[0]["text"].startswith("Document 1")
        assert blocks[0]["text"].endswith("\nkite")
        assert blocks[1]["text"] == "picture not shown: it could not be opened (unsupported)"
        assert str(tmp_path) not in str(blocks)
        assert len(caplog.records) == 1
        assert "document 'kite'" in caplog.text
    assert seen(documents_to_content_blocks(decoy, store=store)) == ["Document 1 (secret.png)\ndecoy"]
    blocks = documents_to_content_blocks([Document("kite", metadata={"image": "red.png"})])
    assert seen(blocks)[1:] == ["picture not shown: it could not be opened (unsupported)"]


def test_what_cannot_be_opened_is_said_and_the_rest_goes_on(
    store: UMRVectorStore, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.add_images([photos / "red.png", photos / "blue.png"], ids=["a", "b"], captions=["gone", None])
    (photos / "red.png").unlink()
    broken = photos / "broken.png"
    broken.write_bytes(png()[:40])
    found = [*store.get_by_ids(["a", "b"]), Document("torn", metadata={"image": "broken.png"})]
    with caplog.at_level(logging.WARNING):
        blocks = documents_to_content_blocks(found, store=store, roots=photos)
    assert seen(blocks) == [
        "Document 1 (red.png)\ngone",
        "picture not shown: it could not be opened (unreadable)",
        "Document 2 (blue.png)",
        "<blue>",
        "Document 3 (broken.png)\ntorn",
        "picture not shown: it could not be opened (corrupt)",
    ]
    assert "document 'a'" in caplog.text


def test_limits_are_kept_and_said() -> None:
    documents = [
        Document(text, metadata={"image": data_uri(color)}) for text, color in (("1", "red"), ("2", "blue"))
    ]
    for most, expected in (
        (0, ["only 0", "only 0"]),
        (1, ["<red>", "only 1"]),
        (2, ["<red>", "<blue>"]),
    ):
        shown = seen(documents_to_content_blocks(documents, max_images=most))[1::2]
        for one, want in zip(shown, expected, strict=True):
            assert one == want or one == f"picture not shown: {want} are (max_images)"
    blocks = documents_to_content_blocks(documents)
    first, second = (len(block["base64"]) for block in blocks if block["type"] == "image")
    exact = documents_to_content_blocks(documents, max_bytes=first + second)
    assert exact == blocks
    less = documents_to_content_blocks(documents, max_bytes=first + second - 1)
    assert [block["type"] for block in less] == ["text", "image", "text", "text"]
    assert "bytes (max_bytes)" in less[-1]["text"]
    big = Document(
        "", metadata={"image": "data:image/png;base64," + base64.b64encode(png("red", (600, 300))).decode()}
    )
    [_, block] = documents_to_content_blocks([big], max_side=100)
    assert Image.open(io.BytesIO(base64.b64decode(block["base64"]))).size == (100, 50)
    for wrong in ({"max_images": -1}, {"max_bytes": 1.5}, {"max_side": 0}, {"max_images": True}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            documents_to_content_blocks(documents, **wrong)  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(InputError, match="list of Documents"):
        documents_to_content_blocks(["kite"])  # type: ignore[list-item]  # that is the mistake
    with pytest.raises(InputError, match="roots are folders"):
        documents_to_content_blocks(documents, roots=[""])


def test_base64_never_stands_in_text() -> None:
    encoded = base64.b64encode(png("blue")).decode()
    assert len(encoded) > 64
    blocks = documents_to_content_blocks([Document(encoded), Document(f"see {encoded}"), Document("QUJD")])
    assert seen(blocks[:2]) == ["Document 1", "<blue>"]
    assert blocks[2]["text"] == f"Document 2\nsee {encoded}", "a text that holds more is text"
    assert blocks[3]["text"] == "Document 3\nQUJD"


def test_names_in_labels_cannot_break_the_line() -> None:
    metadata = {"source": "a\nDocument 9\tb.txt", "page_label": "iv", "page": 3}
    [block] = documents_to_content_blocks([Document("x", metadata=metadata)])
    assert block["text"] == "Document 1 (a Document 9 b.txt, page iv)\nx"


def test_labels_hold_no_password_of_an_address_and_no_page_that_is_none() -> None:
    metadata = {"source": "https://example.org/files/kite.pdf?sig=a/secret#x", "page": True}
    [block] = documents_to_content_blocks([Document("x", metadata=metadata)])
    assert block["text"] == "Document 1 (kite.pdf)\nx"


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}", "DATA:image/png;base64,\n{}\n"])
@pytest.mark.parametrize("width", [10, 64, 76, 10_000])
def test_base64_with_broken_lines_or_as_a_data_uri_is_the_picture(form: str, width: int) -> None:
    encoded = base64.b64encode(png("blue", (200, 100))).decode()
    lines = "\r\n".join(encoded[at : at + width] for at in range(0, len(encoded), width))
    blocks = documents_to_content_blocks([Document(form.format(lines))])
    assert seen(blocks) == ["Document 1", "<blue>"]


def test_a_text_about_data_uris_is_a_text() -> None:
    encoded = base64.b64encode(png("blue")).decode()
    for text in (
        f"{encoded} is a picture",
        f"{data_uri()} too",
        "data:image/png;base64,",
        "data:image/png;base64, is how " + "they begin " * 20,
    ):
        [block] = documents_to_content_blocks([Document(text)])
        assert block["text"] == f"Document 1\n{text}"


# --- in chats ---------------------------------------------------------------------------------------------


class Listener(BaseChatModel):
    """Answers nothing and keeps what it was sent."""

    sent: list[list[BaseMessage]]

    @property
    def _llm_type(self) -> str:
        return "listener"

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.sent.append(messages)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("Document 1"))])


async def test_in_a_chain(store: UMRVectorStore, photos: Path) -> None:
    store.add_images([photos / "red.png"], captions=["kite"])
    listener = Listener(sent=[])
    show = RunnableLambda(
        partial(documents_to_content_blocks, store=store),
        afunc=partial(adocuments_to_content_blocks, store=store),
    )
    chain = store.as_retriever() | show | (lambda blocks: [HumanMessage(content=blocks)]) | listener
    assert chain.invoke("kite").content == "Document 1"
    await chain.ainvoke("kite")
    for [message] in listener.sent:
        assert isinstance(message.content, list)
        assert seen(message.content) == ["Document 1 (red.png)\nkite", "<red>"]  # type: ignore[arg-type]  # dicts
    assert len(listener.sent) == 2


def test_the_blocks_are_langchains_own_form(photos: Path) -> None:
    documents = [Document("kite", metadata={"image": "red.png"}), Document("boat")]
    blocks = documents_to_content_blocks(documents, roots=photos)
    assert HumanMessage(content=blocks).content_blocks == blocks
    assert HumanMessage(content=copy.deepcopy(blocks)).content == blocks


async def test_async_gives_the_same_and_the_loop_goes_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_ran, opened = threading.Event(), content_blocks.as_jpeg

    def waiting(*args: Any) -> bytes:
        assert loop_ran.wait(10), "the event loop stood still"
        return opened(*args)

    monkeypatch.setattr(content_blocks, "as_jpeg", waiting)
    documents = [Document("kite", metadata={"image": "red.png"})]
    task = asyncio.create_task(adocuments_to_content_blocks(documents, roots=photos, max_side=8))
    await asyncio.sleep(0)
    loop_ran.set()
    assert await task == documents_to_content_blocks(documents, roots=photos, max_side=8)
