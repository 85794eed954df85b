"""Files become nodes: pictures, texts, and PDF pages whose picture is rendered when it is asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from llama_index.core import StorageContext
from llama_index.core.base.llms.generic_utils import image_node_to_image_block
from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, TextNode
from llama_index.embeddings.gme import GMEEmbedding, PageNode, item_of
from llama_index.indices.umr import MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import png
from PIL import Image

from umr_plugins.errors import InputError
from umr_plugins.media.pdf import render_pages
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item, PageImage


@pytest.fixture
def gme() -> GMEEmbedding:
    return GMEEmbedding(encoder=FakeEncoder(dim=64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture, a text, a PDF of two pages, and a broken picture."""
    root = tmp_path / "files"
    root.mkdir()
    (root / "photo.png").write_bytes(png(1))
    (root / "note.txt").write_text("a short note")
    pages = [Image.new("RGB", (80, 100), color) for color in ("red", "blue")]
    pages[0].save(root / "report.pdf", save_all=True, append_images=pages[1:])
    (root / "broken.png").write_bytes(png(2)[:40])
    return root


def by_file(index: MultimodalIndex) -> dict[tuple[str, int | None], BaseNode]:
    nodes = index.vector_store.get_nodes()
    return {(Path(node.metadata["path"]).name, node.metadata.get("page")): node for node in nodes}


def check(index: MultimodalIndex, folder: Path) -> None:
    nodes = by_file(index)
    assert set(nodes) == {("photo.png", None), ("note.txt", None), ("report.pdf", 1), ("report.pdf", 2)}
    note, photo, page = nodes["note.txt", None], nodes["photo.png", None], nodes["report.pdf", 2]
    assert type(note) is TextNode
    assert note.text == "a short note"
    assert note.metadata == {"path": str(folder / "note.txt")}
    assert type(photo) is ImageNode
    assert photo.image_path == str(folder / "photo.png")
    assert photo.metadata == {"path": str(folder / "photo.png"), "modality": "image"}
    assert type(page) is PageNode
    assert page.metadata == {"path": str(folder / "report.pdf"), "page": 2, "modality": "image"}
    assert page.page_image == PageImage(folder / "report.pdf", 2)


def test_a_folder_becomes_an_index(gme: GMEEmbedding, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = MultimodalIndex.from_folder(folder, embed_model=gme)
    check(index, folder)
    assert index.report is not None
    assert [refused.path.name for refused in index.report.refused] == ["broken.png"]
    assert "broken.png" in caplog.text


def test_files_become_nodes(gme: GMEEmbedding, folder: Path) -> None:
    index = MultimodalIndex(embed_model=gme)
    index.insert_files([folder / "photo.png", folder / "note.txt"])
    asyncio.run(index.ainsert_files([str(folder / "report.pdf")]))
    check(index, folder)


def test_a_second_run_embeds_nothing_again(folder: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    gme = GMEEmbedding(encoder=encoder)
    index = MultimodalIndex.from_folder(folder, embed_model=gme, path=tmp_path / "db")
    index.vector_store.close()
    calls = len(encoder.calls)
    (folder / "note.txt").unlink()
    again = MultimodalIndex.from_folder(folder, embed_model=gme, path=tmp_path / "db")
    assert again.report is not None
    assert (again.report.indexed, again.report.unchanged, again.report.removed) == (0, 2, 1)
    assert len(encoder.calls) == calls
    again.vector_store.close()


def test_cleared_files_can_be_inserted_again(gme: GMEEmbedding, folder: Path) -> None:
    index = MultimodalIndex.from_folder(folder, embed_model=gme)
    index.vector_store.clear()
    assert index.vector_store.get_nodes() == []
    index.insert_folder(folder)
    check(index, folder)


def test_pages_are_found_by_picture_text_and_beside_other_nodes(gme: GMEEmbedding, folder: Path) -> None:
    index = MultimodalIndex([TextNode(text="a note of mine", id_="mine")], embed_model=gme)
    index.insert_folder(folder)
    retriever = index.as_retriever(similarity_top_k=1)
    photo = retriever.retrieve(gme.as_query(image=folder / "photo.png"))[0]
    assert photo.metadata["path"] == str(folder / "photo.png")
    assert photo.score == pytest.approx(1.0, abs=1e-5)
    [*_, page] = [part.image for part in render_pages(folder / "report.pdf")]
    assert retriever.retrieve(gme.as_query(image=page))[0].metadata["page"] == 2
    assert retriever.retrieve("a short note")[0].metadata["path"] == str(folder / "note.txt")
    assert retriever.retrieve("a note of mine")[0].node_id == "mine"
    assert retriever.retrieve("a note of mine")[0].metadata == {}


def test_a_page_is_rendered_when_its_picture_is_asked_for(
    gme: GMEEmbedding, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_index.embeddings.gme.pages as pages

    rendered: list[object] = []
    load = pages.load_image
    monkeypatch.setattr(pages, "load_image", lambda source: rendered.append(source) or load(source))
    index = MultimodalIndex.from_folder(folder, embed_model=gme)
    node = by_file(index)["report.pdf", 2]
    assert isinstance(node, PageNode)
    assert node.to_dict()["image"] is None
    assert len(node.hash) == 64
    assert item_of(node).image == node.page_image
    assert rendered == []
    picture = Image.open(node.resolve_image())
    assert picture.convert("RGB").getpixel((5, 5)) == pytest.approx((0, 0, 255), abs=3)
    [block] = [b for b in node.get_content_blocks(MetadataMode.NONE) if b.block_type == "image"]
    assert block.image == image_node_to_image_block(node).image
    assert rendered == [node.page_image]
    assert node.to_dict()["image"] is None


def test_a_retrieved_page_can_be_stored_again(gme: GMEEmbedding, folder: Path, tmp_path: Path) -> None:
    page = by_file(MultimodalIndex.from_folder(folder, embed_model=gme))["report.pdf", 1]
    assert isinstance(page, PageNode)
    query = gme.as_query(image=page.page_image)
    [own] = MultimodalIndex([page], embed_model=gme).as_retriever().retrieve(query)
    assert type(own.node) is PageNode
    assert own.metadata == page.metadata
    stock = MultimodalIndex([page], embed_model=gme, storage_context=StorageContext.from_defaults())
    [found] = stock.as_retriever().retrieve(query)
    assert type(found.node) is ImageNode
    assert found.node.image == page.image


@pytest.mark.parametrize(("pages", "kind"), [("image", PageNode), ("text", None), ("fused", PageNode)])
def test_the_part_of_a_page_that_is_embedded_can_be_chosen(
    gme: GMEEmbedding, folder: Path, pages: str, kind: type | None
) -> None:
    index = MultimodalIndex(embed_model=gme)
    report = index.insert_files([folder / "report.pdf"], pages=pages)  # type: ignore[arg-type]
    nodes = index.vector_store.get_nodes()
    if kind is None:  # these pages have no text
        assert nodes == []
        assert {refused.code for refused in report.refused} == {"no_text"}
    else:
        assert [type(node) for node in nodes] == [kind, kind]


def test_files_go_into_our_own_store_only(gme: GMEEmbedding, folder: Path) -> None:
    index = MultimodalIndex(embed_model=gme, storage_context=StorageContext.from_defaults())
    with pytest.raises(InputError, match="SimpleVectorStore"):
        index.insert_folder(folder)


def test_rows_that_were_added_without_llama_index_are_nodes_too(gme: GMEEmbedding, tmp_path: Path) -> None:
    store = UMRVectorStore(gme)
    items = [Item("words"), Item(image=png(3)), Item("both", Image.new("RGB", (9, 9), "green"))]
    store.index.add(items, ids=["t", "i", "f"], metadatas=[{"n": 1}, None, None])
    text, image, fused = store.get_nodes(["t", "i", "f"])
    assert (type(text), text.metadata) == (TextNode, {"n": 1})
    assert (type(image), image.metadata) == (ImageNode, {"modality": "image"})
    assert image.resolve_image().getvalue() == png(3)
    assert (fused.text, fused.metadata) == ("both", {"modality": "fused"})
