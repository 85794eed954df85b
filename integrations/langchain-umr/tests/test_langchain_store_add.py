"""`UMRVectorStore`: what is added, replaced, deleted, and what comes back."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_umr import GMEEmbeddings, UMRVectorStore
from PIL import Image

from umr_plugins.errors import BatchError, FingerprintError, InputError, ItemError
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item, PageImage


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def store(encoder: FakeEncoder) -> Iterator[UMRVectorStore]:
    with UMRVectorStore(GMEEmbeddings.from_encoder(encoder)) as made:
        yield made


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return path


def everything(store: UMRVectorStore) -> list[Document]:
    return sorted(store.get_by_ids(list(store.index.ids())), key=lambda document: document.page_content)


def test_documents_come_back_as_they_were(store: UMRVectorStore) -> None:
    documents = [
        Document("kite", metadata={"n": 1, "nested": {"a": [1, None]}}, id="a"),
        Document("  boat\n", metadata={}, id="b"),
    ]
    assert store.add_documents(documents) == ["a", "b"]
    assert sorted(store.get_by_ids(["a", "b"]), key=lambda one: str(one.id)) == documents


def test_adding_an_id_again_replaces_text_and_all_metadata(store: UMRVectorStore) -> None:
    store.add_documents([Document("kite", metadata={"old": 1}, id="a")])
    store.add_documents([Document("boat", metadata={"new": 2}, id="a")])
    assert everything(store) == [Document("boat", metadata={"new": 2}, id="a")]


def test_ids_of_the_call_win_over_ids_of_the_documents(store: UMRVectorStore) -> None:
    assert store.add_documents([Document("kite", id="mine")], ids=["theirs"]) == ["theirs"]


def test_without_ids_the_same_call_twice_adds_nothing_and_equal_rows_are_kept(store: UMRVectorStore) -> None:
    texts, metadatas = ["foot", "foot", "foot"], [{"page": 1}, {"page": 2}, {"page": 2}]
    first = store.add_texts(texts, metadatas)
    assert len(set(first)) == 3
    assert store.add_texts(texts, metadatas) == first
    assert sorted(one.metadata["page"] for one in everything(store)) == [1, 2, 2]


def test_missing_ids_are_filled_beside_given_ones(store: UMRVectorStore) -> None:
    ids = store.add_documents([Document("kite", id="a"), Document("boat")])
    assert ids[0] == "a"
    assert store.get_by_ids([ids[1]]) == [Document("boat", id=ids[1])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": ["a", "a"]}, "more than once: \\['a'\\]"),
        ({"ids": ["a"]}, "got 1 for 2"),
        ({"ids": [1, 2]}, "ids must be str or None, got 1"),
        ({"metadatas": [{}]}, "got 1 for 2"),
        ({"metadata": [{}, {}]}, "unknown arguments \\['metadata'\\]"),
    ],
)
def test_calls_that_make_no_sense_are_refused_before_anything_is_added(
    store: UMRVectorStore, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        store.add_texts(["kite", "boat"], **arguments)
    assert everything(store) == []


def test_text_where_a_list_belongs_is_refused(store: UMRVectorStore, photo: Path) -> None:
    with pytest.raises(InputError, match="texts is a list"):
        store.add_texts("kite")
    with pytest.raises(InputError, match=r"texts\[0\] is a dict"):
        store.add_texts([{"text": "kite"}])  # type: ignore[list-item]  # that is the mistake
    with pytest.raises(InputError, match="uris is a list"):
        store.add_images(str(photo))
    with pytest.raises(InputError, match="paths is a list"):
        store.add_files(str(photo))


def test_generators_and_empty_lists(store: UMRVectorStore) -> None:
    assert len(store.add_texts(text for text in ("kite", "boat"))) == 2
    assert len(store.add_documents(Document(text) for text in ("sail", "reef"))) == 2
    assert store.add_texts([]) == store.add_documents([]) == store.add_images([]) == store.add_items([]) == []
    assert len(everything(store)) == 4


def test_a_document_with_a_picture_is_fused_and_without_text_it_is_the_picture(
    store: UMRVectorStore, photo: Path
) -> None:
    for key in ("image", "image_uri", "image_path"):
        document = Document("kite", metadata={key: str(photo), "n": 1}, id=key)
        store.add_documents([document])
        [found] = store.get_by_ids([key])
        assert found == Document("kite", metadata={key: str(photo), "n": 1, "modality": "fused"}, id=key)
    store.add_documents([Document("", metadata={"image": str(photo)}, id="alone")])
    assert store.get_by_ids(["alone"]) == [
        Document("", metadata={"image": str(photo), "modality": "image"}, id="alone")
    ]
    [(best, score), *_] = store.similarity_search_with_score({"text": "kite", "image": str(photo)})
    assert best.metadata["modality"] == "fused"
    assert score == pytest.approx(1, abs=1e-5)


def test_the_metadata_key_of_pictures_can_be_chosen(photo: Path) -> None:
    encoder = FakeEncoder()
    with UMRVectorStore(encoder, image_key="scan") as store:
        store.add_documents([Document("kite", metadata={"scan": str(photo), "image": 7})])
        [found] = everything(store)
    assert found.metadata == {"scan": str(photo), "image": 7, "modality": "fused"}


def test_a_dead_path_names_the_document_and_nothing_is_added(store: UMRVectorStore, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.png")
    documents = [
        Document("fine"),
        Document("kite", metadata={"image": gone}, id="k1"),
        Document("a boat without an id", metadata={"image": gone}),
        Document("", id="nothing"),
    ]
    with pytest.raises(BatchError, match="document 'k1'") as caught:
        store.add_documents(documents[:3])
    assert [error.index for error in caught.value.errors] == [1, 2]
    assert "document 'a boat without an id'" in str(caught.value)
    assert everything(store) == []
    with pytest.raises(BatchError, match=r"document 'nothing'.*empty"):
        store.add_documents(documents)
    assert len(store.add_documents(documents, on_error="skip")) == 1
    assert [one.page_content for one in everything(store)] == ["fine"]


def test_pictures_by_path_have_their_path_and_never_base64(store: UMRVectorStore, photo: Path) -> None:
    ids = store.add_images(
        [str(photo), photo], metadatas=[{"n": 1}, None], ids=["a", "b"], captions=[None, "kite"]
    )
    assert ids == ["a", "b"]
    assert store.get_by_ids(["a"]) == [
        Document("", metadata={"n": 1, "path": str(photo), "modality": "image"}, id="a")
    ]
    assert store.get_by_ids(["b"]) == [
        Document("kite", metadata={"path": str(photo), "modality": "fused"}, id="b")
    ]


def test_pictures_in_memory(store: UMRVectorStore) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    store.add_images([uri], ids=["uri"])
    store.add_items(
        [Image.new("RGB", (8, 8), "green"), {"text": "kite", "image": png()}, "text"],
        metadatas=[{"n": 1}, None, None],
        ids=["pil", "bytes", "text"],
    )
    assert {one.id: (one.page_content, one.metadata) for one in everything(store)} == {
        "uri": ("", {"modality": "image"}),
        "pil": ("", {"n": 1, "modality": "image"}),
        "bytes": ("kite", {"modality": "fused"}),
        "text": ("text", {}),
    }
    for query, found in ((uri, "uri"), (png("blue"), "uri")):
        assert store.similarity_search_by_image(query, k=1)[0].id == found
    with pytest.raises(ItemError, match="add_items"):
        GMEEmbeddings.from_encoder(FakeEncoder()).embed_query(Document("x", metadata={"image": png()}))


def test_a_document_among_items_brings_its_id_and_metadata(store: UMRVectorStore) -> None:
    kite, boat = Document("kite", metadata={"n": 1}, id="k"), Document("boat", metadata={"n": 2}, id="b")
    assert store.add_items([kite, boat, "sail"], metadatas=[None, {"n": 3}, None], ids=[None, "c", "s"]) == [
        "k",
        "c",
        "s",
    ]
    assert store.get_by_ids(["k", "c", "s"]) == [
        kite,
        Document("boat", metadata={"n": 3}, id="c"),
        Document("sail", id="s"),
    ]
    store.add_items([store.get_by_ids(["k"])[0]])
    assert store.get_by_ids(["k"]) == [kite]


def test_a_found_picture_can_be_searched_for_and_given_back(store: UMRVectorStore, photo: Path) -> None:
    store.add_items([{"image": png("blue")}, {"text": "kite", "image": photo}, "boat"], ids=["a", "b", "c"])
    for key in ("a", "b"):
        [document] = store.get_by_ids([key])
        [(best, score)] = store.similarity_search_with_score(document, k=1)
        assert (best.id, score) == (key, pytest.approx(1, abs=1e-5))
        document.metadata["tag"] = "seen"
        store.add_documents([document])
        [again] = store.get_by_ids([key])
        assert again == document
        assert store.similarity_search_with_score(again, k=1)[0][1] == pytest.approx(1, abs=1e-5)


def test_files_come_back_with_path_and_page(
    encoder: FakeEncoder, store: UMRVectorStore, photo: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("# Kites\n\nThey fly.\n")
    pages = [Image.new("RGB", (100, 140), color) for color in ("white", "gray")]
    pages[0].save(tmp_path / "report.pdf", save_all=True, append_images=pages[1:])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    report = store.add_files([str(photo), notes, tmp_path / "report.pdf", broken])
    assert (report.indexed, report.items) == (3, 4)
    assert [Path(refused.path).name for refused in report.refused] == ["broken.png"]
    found = {
        (Path(one.metadata["path"]).name, one.metadata.get("page"), one.metadata.get("modality")): one
        for one in everything(store)
    }
    assert set(found) == {
        ("photo.png", None, "image"),
        ("notes.md", None, None),
        ("report.pdf", 1, "image"),
        ("report.pdf", 2, "image"),
    }
    assert "They fly." in found["notes.md", None, None].page_content
    assert found["photo.png", None, "image"].page_content == ""
    assert store.add_files([photo]).unchanged == 1
    encoder.calls.clear()
    store.similarity_search(found["report.pdf", 2, "image"], k=1)
    assert encoder.calls == [("query", [Item(image=PageImage(tmp_path / "report.pdf", 2))], None)]


def test_a_folder_is_followed(store: UMRVectorStore, tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "a.txt").write_text("kite")
    (folder / "b.png").write_bytes(png())
    assert store.add_folder(folder).items == 2
    (folder / "a.txt").unlink()
    assert store.add_folder(str(folder)).removed == 1
    assert [Path(one.metadata["path"]).name for one in everything(store)] == ["b.png"]


def test_delete_by_ids_by_filter_and_all(store: UMRVectorStore) -> None:
    store.add_texts(["a", "b", "c", "d"], [{"n": 1}, {"n": 1}, {"n": 2}, {"n": 2}], ids=["a", "b", "c", "d"])
    assert store.delete([]) is True
    assert store.delete(["a", "gone"]) is True
    assert sorted(store.index.ids()) == ["b", "c", "d"]
    store.delete(filter={"n": 1})
    assert sorted(store.index.ids()) == ["c", "d"]
    with pytest.raises(InputError, match="ids is a list"):
        store.delete("c")
    with pytest.raises(InputError, match="where"):
        store.delete(where={"n": 2})
    assert sorted(store.index.ids()) == ["c", "d"]
    store.delete()
    assert list(store.index.ids()) == []


def test_get_by_ids_passes_over_what_is_not_there(store: UMRVectorStore) -> None:
    store.add_texts(["kite"], ids=["a"])
    assert [one.id for one in store.get_by_ids(["gone", "a", "a"])] == ["a"]
    with pytest.raises(InputError, match="ids is a list"):
        store.get_by_ids("a")


def test_a_folder_keeps_everything_and_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with UMRVectorStore.from_texts(["kite"], FakeEncoder(), ids=["a"], path=path) as store:
        expected = everything(store)
    with UMRVectorStore(FakeEncoder(), path=str(path)) as store:
        assert everything(store) == expected
        assert store.similarity_search("kite") == expected
    with pytest.raises(FingerprintError):
        UMRVectorStore(FakeEncoder(name="other"), path=path)
    with UMRVectorStore(path=path) as store:
        assert store.embeddings is None
        assert store.get_by_ids(["a"]) == expected


def test_an_embedding_or_a_folder_is_needed() -> None:
    with pytest.raises(InputError, match="give an embedding"):
        UMRVectorStore()
    with pytest.raises(InputError, match="got str"):
        UMRVectorStore("umr-tiny")  # type: ignore[arg-type]  # that is the mistake


def test_from_texts_and_documents_and_a_failing_one_gives_its_folder_free(
    tmp_path: Path, photo: Path
) -> None:
    documents = [Document("kite", metadata={"image": str(photo)}, id="a"), Document("boat", id="b")]
    with UMRVectorStore.from_documents(iter(documents), FakeEncoder()) as store:
        assert [one.metadata.get("modality") for one in store.get_by_ids(["a", "b"])] == ["fused", None]
    with UMRVectorStore.from_texts(iter(["kite"]), FakeEncoder(), [{"n": 1}], ids=["a"]) as store:
        assert everything(store) == [Document("kite", metadata={"n": 1}, id="a")]
    with pytest.raises(BatchError):
        UMRVectorStore.from_texts(["poison"], FakeEncoder(), path=tmp_path / "db")
    with UMRVectorStore(FakeEncoder(name="other"), path=tmp_path / "db") as store:
        assert everything(store) == []


async def test_async_ways_of_adding(photo: Path, tmp_path: Path) -> None:
    store = await UMRVectorStore.afrom_documents((one for one in [Document("kite", id="a")]), FakeEncoder())
    await store.aadd_texts(["boat"], ids=["b"])
    await store.aadd_documents([Document("sail", id="c")])
    await store.aadd_images([photo], ids=["d"])
    await store.aadd_items([photo], ids=["e"])
    assert (await store.aadd_files([photo])).items == 1
    await store.adelete(["a"])
    assert {"b", "c", "d", "e"} <= set(store.index.ids())
    assert [one.id for one in await store.aget_by_ids(["c"])] == ["c"]
    assert (await store.aadd_folder(tmp_path)).refused == ()
    other = await UMRVectorStore.afrom_texts(["kite"], FakeEncoder(), ids=["a"])
    assert list(other.index.ids()) == ["a"]
    store.close()
    other.close()


def test_langchains_index_function(store: UMRVectorStore) -> None:
    records = InMemoryRecordManager(namespace="test")
    records.create_schema()
    documents = [Document(text, metadata={"source": text}) for text in ("kite", "boat")]

    def run(docs: list[Document]) -> dict[str, int]:
        return dict(index(docs, records, store, cleanup="full", source_id_key="source", key_encoder="sha256"))

    assert run(documents)["num_added"] == 2
    assert run(documents)["num_skipped"] == 2
    assert run(documents[:1])["num_deleted"] == 1
    assert [one.page_content for one in everything(store)] == ["kite"]


def test_any_embeddings_work_for_text_and_refuse_pictures(photo: Path) -> None:
    with UMRVectorStore(DeterministicFakeEmbedding(size=6)) as store:
        store.add_texts(["kite", "boat"])
        assert store.similarity_search_with_score("boat", k=1)[0][1] == pytest.approx(1, abs=1e-5)
        with pytest.raises(BatchError, match="DeterministicFakeEmbedding embeds text only"):
            store.add_images([photo])
        with pytest.raises(ItemError, match="embeds text only"):
            store.similarity_search({"image": str(photo)})
        with pytest.raises(ItemError, match="takes no instruction"):
            store.similarity_search("kite", instruction="find")
        with pytest.raises(BatchError, match=r"document 'both'.*text only"):
            store.add_documents([Document("kite", metadata={"image": str(photo)}, id="both")])
        assert len(everything(store)) == 2


def test_foreign_embeddings_of_another_model_are_another_fingerprint(tmp_path: Path) -> None:
    class Named(DeterministicFakeEmbedding):
        model: str = "one"

    UMRVectorStore.from_texts(["kite"], Named(size=6), path=tmp_path / "db").close()
    UMRVectorStore(Named(size=6), path=tmp_path / "db").close()
    with pytest.raises(FingerprintError):
        UMRVectorStore(Named(size=6, model="two"), path=tmp_path / "db")


@pytest.mark.parametrize("bad", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_foreign_vector_that_points_nowhere_is_refused(bad: list[float]) -> None:
    class Broken(DeterministicFakeEmbedding):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [bad for _ in texts]

    with (
        UMRVectorStore(Broken(size=2)) as store,
        pytest.raises((ItemError, BatchError), match="zero or not finite"),
    ):
        store.add_texts(["kite"])
