"""One folder under LlamaIndex, LangChain, the core and the command line: the same rows, the same answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_umr import GMEEmbeddings, UMRVectorStore
from llama_index.core.schema import ImageNode, MediaResource, Node, NodeRelationship, QueryBundle, TextNode
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.embeddings.gme import GMEEmbedding, item_of
from llama_index.indices.umr import MultimodalIndex
from PIL import Image

from umr_plugins.cli.main import main
from umr_plugins.demo import FILES
from umr_plugins.demo.queries import load_cards, load_queries
from umr_plugins.embedder import Embedder, shared_embedder
from umr_plugins.errors import FingerprintError, StorageError
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item

K = 10
Answers = list[tuple[str, float]]
Search = Callable[[Item], Answers]


# --- the sample corpus, indexed through one, asked through all ------------------------------------------


def queries() -> list[Item]:
    """Texts, pictures and both."""
    found = load_queries()
    picked = [query.item for query in found if query.type != "text_to_page"][::9]
    assert {item.modality for item in picked} == {"text", "image", "fused"}
    return picked


def corpus() -> list[Path]:
    """A note, a picture and a photograph of every kind there is, and a PDF."""
    pictures = sorted((FILES / "pictures").glob("*.png"))[::8]
    return [
        FILES / "guide.pdf",
        *pictures,
        *sorted(FILES.rglob("*.md"))[::3],
        *sorted(FILES.rglob("*.jpg"))[::4],
    ]


@contextmanager
def through_llama_index(db: Path) -> Iterator[tuple[MultimodalIndex, Search]]:
    model = GMEEmbedding("umr-tiny")
    index = MultimodalIndex(path=db, embed_model=model)

    def search(item: Item) -> Answers:
        image = None if item.image is None else str(item.image)
        found = index.as_retriever(similarity_top_k=K).retrieve(QueryBundle(item.text or "", image))
        return [(each.node.node_id, each.get_score()) for each in found]

    yield index, search
    index.vector_store.client.close()


@contextmanager
def through_langchain(db: Path) -> Iterator[tuple[UMRVectorStore, Search]]:
    store = UMRVectorStore(GMEEmbeddings(model="umr-tiny"), db)

    def search(item: Item) -> Answers:
        image = None if item.image is None else str(item.image)
        found = store.similarity_search_with_score({"text": item.text, "image": image}, K)
        return [(document.id or "", score) for document, score in found]

    with store:
        yield store, search


@contextmanager
def through_core(db: Path) -> Iterator[tuple[Index, Search]]:
    with Index(db, shared_embedder("umr-tiny")) as index:
        yield index, lambda item: [(hit.id, hit.score) for hit in index.search(item, K)]


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str]) -> Any:
    @contextmanager
    def through_command_line(db: Path) -> Iterator[tuple[None, Search]]:
        def search(item: Item) -> Answers:
            words = ["search", "--db", str(db), "-k", str(K), "--json"]
            words += [] if item.text is None else [item.text]
            words += [] if item.image is None else ["--image", str(item.image)]
            capsys.readouterr()
            assert main(words) == 0
            return [(row["id"], row["score"]) for row in json.loads(capsys.readouterr().out)]

        yield None, search

    return through_command_line


@dataclass
class Made:
    """An index folder and the answers that its maker gave before closing it."""

    by: str
    db: Path
    answers: list[Answers]


@pytest.fixture(scope="module", params=["LlamaIndex", "LangChain"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    db = tmp_path_factory.mktemp(request.param) / "db"
    names, cards = load_cards()
    if request.param == "LlamaIndex":
        with through_llama_index(db) as (index, search):
            index.insert_files(corpus())
            nodes = []
            for name, card in zip(names, cards, strict=True):
                picture = MediaResource(data=base64.b64encode(card.image))
                nodes.append(
                    Node(id_=name, text_resource=MediaResource(text=card.text), image_resource=picture)
                )
            index.insert_nodes(nodes)
            return Made(request.param, db, [search(item) for item in queries()])
    with through_langchain(db) as (store, search):
        store.add_files(corpus())
        store.add_items(cards, ids=names)
        return Made(request.param, db, [search(item) for item in queries()])


def check_same(answers: list[Answers], expected: list[Answers]) -> None:
    for ours, theirs in zip(answers, expected, strict=True):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert np.allclose([score for _, score in ours], [score for _, score in theirs], rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["LlamaIndex", "LangChain", "core", "command line"])
def test_a_folder_made_through_one_gives_every_other_the_same_answers(
    made: Made, way: str, command_line: Any
) -> None:
    opened = {
        "LlamaIndex": through_llama_index,
        "LangChain": through_langchain,
        "core": through_core,
        "command line": command_line,
    }
    assert all(len(each) == K for each in made.answers)
    assert len({tuple(each) for each in made.answers}) == len(made.answers)
    with opened[way](made.db) as (_, search):
        check_same([search(item) for item in queries()], made.answers)


def test_both_may_have_a_folder_open_at_once(made: Made) -> None:
    with through_llama_index(made.db) as (index, ask_llama), through_langchain(made.db) as (store, ask_lang):
        check_same([ask_lang(item) for item in queries()], [ask_llama(item) for item in queries()])
        store.add_texts(["a zebra on a unicycle"], ids=["late"])
        question = Item("a zebra on a unicycle")
        assert ask_llama(question)[0][0] == "late"
        index.delete_nodes(["late"])
        assert ask_lang(question)[0][0] != "late"
        index.vector_store.client.close()
        assert ask_lang(question)
        with pytest.raises(StorageError, match="closed"):
            ask_llama(question)


def test_no_vector_is_made_twice(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = Embedder.encode_documents

    def counted(self: Embedder, items: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(items))
        return encode(self, items, *args, **options)

    monkeypatch.setattr(Embedder, "encode_documents", counted)
    with through_llama_index(made.db) as (index, _):
        index.insert_files(corpus())
    with through_langchain(made.db) as (store, _):
        store.add_files(corpus())
        names, cards = load_cards()
        assert store.index.count() > 60
        store.add_items(cards, ids=names)
    # Cards that LlamaIndex wrote came with vectors of their own, which say nothing about their content.
    assert sum(calls) == (len(cards) if made.by == "LlamaIndex" else 0)


# --- rows: what one writes, the other reads -------------------------------------------------------------


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 9), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photo_file(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(png("red"))
    return path


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder(dim=32)


@dataclass
class Both:
    """One index in memory of this process, under both names."""

    llama: MultimodalIndex
    lang: UMRVectorStore

    def node(self, name: str) -> Any:
        [found] = self.llama.vector_store.get_nodes([name])
        return found

    def document(self, name: str) -> Document:
        [found] = self.lang.get_by_ids([name])
        return found

    def nodes_like(self, query: Any, **options: Any) -> list[str]:
        found = self.llama.as_retriever(similarity_top_k=K, **options).retrieve(query)
        return [each.node.node_id for each in found]

    def documents_like(self, query: Any, **options: Any) -> list[str]:
        return [document.id or "" for document in self.lang.similarity_search(query, K, **options)]


@pytest.fixture
def both(encoder: FakeEncoder, tmp_path: Path) -> Iterator[Both]:
    model = GMEEmbedding(encoder=encoder)
    index = MultimodalIndex(path=tmp_path / "db", embed_model=model)
    with UMRVectorStore(GMEEmbeddings.from_encoder(encoder), tmp_path / "db") as store:
        yield Both(index, store)
    index.vector_store.client.close()


def pixels(picture: Any) -> bytes:
    return bytes(Image.open(io.BytesIO(picture)).convert("RGB").tobytes())


def test_nodes_are_documents_with_text_metadata_and_picture(both: Both, photo_file: Path) -> None:
    source = Document(page_content="").id or "book"
    both.llama.insert_nodes(
        [
            TextNode(
                id_="text",
                text="a boat",
                metadata={"lang": "nl", "year": 1900, "tags": ["sea"]},
                excluded_embed_metadata_keys=["lang", "year", "tags"],
                relationships={NodeRelationship.SOURCE: TextNode(id_=source).as_related_node_info()},
            ),
            ImageNode(id_="path", image_path=str(photo_file), metadata={"lang": "en"}),
            ImageNode(id_="bytes", image=base64.b64encode(png("blue")).decode()),
            Node(
                id_="fused",
                text_resource=MediaResource(text="a green field"),
                image_resource=MediaResource(data=png("green")),
            ),
        ]
    )
    text = both.document("text")
    assert text.page_content == "a boat"
    # The source of a node is a metadata key of ours, so that filters can ask for it.
    assert text.metadata == {"lang": "nl", "year": 1900, "tags": ["sea"], "ref_doc_id": source}
    by_path = both.document("path")
    assert by_path.page_content == ""
    assert by_path.metadata == {"lang": "en", "modality": "image", "path": str(photo_file)}
    assert both.document("bytes").metadata == {"modality": "image"}
    fused = both.document("fused")
    assert (fused.page_content, fused.metadata) == ("a green field", {"modality": "fused"})
    kept = both.lang.stored_items([both.document("bytes"), fused])
    assert [pixels(item.image) for item in kept if item] == [pixels(png("blue")), pixels(png("green"))]
    assert both.documents_like({"image": png("blue")})[0] == "bytes"
    assert both.documents_like({"text": "a green field", "image": png("green")})[0] == "fused"
    assert both.documents_like(fused)[0] == "fused"


def test_metadata_that_a_node_embeds_stands_in_the_page_content(both: Both) -> None:
    both.llama.insert_nodes([TextNode(id_="noted", text="a boat", metadata={"place": "Delft"})])
    found = both.document("noted")
    assert found.page_content == "place: Delft\n\na boat"  # what was embedded
    assert found.metadata == {"place": "Delft"}
    assert both.node("noted").text == "a boat"


def test_documents_are_nodes_with_text_metadata_and_picture(both: Both, photo_file: Path) -> None:
    both.lang.add_documents(
        [
            Document("a boat", metadata={"lang": "nl", "tags": ["sea"], "deep": {"a": [1, None]}}, id="text"),
            Document("a red flag", metadata={"image": str(photo_file)}, id="fused"),
            Document("", metadata={"image_uri": str(photo_file), "lang": "en"}, id="path"),
        ]
    )
    both.lang.add_items([Item(image=png("blue")), Item("sea", png("navy"))], ids=["bytes", "fused-bytes"])
    text = both.node("text")
    assert type(text) is TextNode
    assert text.text == "a boat"
    assert text.metadata == {"lang": "nl", "tags": ["sea"], "deep": {"a": [1, None]}}
    for name, said, picture in (
        ("fused", "a red flag", photo_file),
        ("path", None, photo_file),
        ("bytes", None, png("blue")),
        ("fused-bytes", "sea", png("navy")),
    ):
        node = both.node(name)
        assert isinstance(node, ImageNode)
        assert node.text == (said or "")
        shown = item_of(node)
        assert shown.image == picture
    assert both.node("path").metadata["lang"] == "en"
    assert both.nodes_like(QueryBundle("", png("blue")))[0] == "bytes"  # type: ignore[arg-type]
    assert both.nodes_like("a boat")[0] == "text"


def rows(both: Both, through: str) -> None:
    metadatas: list[dict[str, Any]] = [
        {"year": 2019, "lang": "en", "tags": ["red", "blue"], "good": True},
        {"year": 2021, "lang": "nl", "tags": ["red"], "score": 0.5},
        {"year": 2023, "lang": "en", "tags": ["green"], "good": False},
        {},
    ]
    names = ["a", "b", "c", "d"]
    if through == "LangChain":
        both.lang.add_texts([f"row {name}" for name in names], metadatas, ids=names)
        return
    nodes = [
        TextNode(id_=name, text=f"row {name}", metadata=metadata)
        for name, metadata in zip(names, metadatas, strict=True)
    ]
    both.llama.insert_nodes(nodes)


FILTERS: list[tuple[tuple[str, str, Any], dict[str, Any], set[str]]] = [
    (("lang", "==", "en"), {"lang": "en"}, {"a", "c"}),
    (("lang", "!=", "en"), {"lang": {"$ne": "en"}}, {"b", "d"}),
    (("year", ">=", 2021), {"year": {"$gte": 2021}}, {"b", "c"}),
    (("year", "<", 2021), {"year": {"$lt": 2021}}, {"a"}),
    (("score", "<", 1), {"score": {"$lt": 1}}, {"b"}),
    (("lang", "in", ["nl", "de"]), {"lang": {"$in": ["nl", "de"]}}, {"b"}),
    (("lang", "nin", ["nl"]), {"lang": {"$nin": ["nl"]}}, {"a", "c", "d"}),
    (("tags", "contains", "red"), {"tags": {"$contains": "red"}}, {"a", "b"}),
]


@pytest.mark.parametrize("through", ["LlamaIndex", "LangChain"])
@pytest.mark.parametrize(("llama", "lang", "names"), FILTERS, ids=lambda value: str(value)[:30])
def test_filters_select_the_same_rows(
    both: Both, through: str, llama: tuple[str, str, Any], lang: dict[str, Any], names: set[str]
) -> None:
    rows(both, through)
    filters = MetadataFilters.from_dicts([dict(zip(("key", "operator", "value"), llama, strict=True))])
    assert set(both.nodes_like("row", filters=filters)) == names
    assert both.documents_like("row", filter=lang) == both.nodes_like("row", filters=filters)


def test_deletes_and_replacements_are_seen_on_both_sides(both: Both) -> None:
    rows(both, "LlamaIndex")
    both.lang.delete(["a"])
    assert both.llama.vector_store.get_nodes(["a"]) == []
    both.llama.delete_nodes(["b"])
    assert both.lang.get_by_ids(["b"]) == []
    both.lang.add_documents([Document("new words", metadata={"lang": "fr"}, id="c")])
    assert (both.node("c").text, both.node("c").metadata) == ("new words", {"lang": "fr"})
    both.llama.insert_nodes([TextNode(id_="d", text="newer words")])
    assert (both.document("d").page_content, both.document("d").metadata) == ("newer words", {})
    assert sorted(both.documents_like("words")) == sorted(both.nodes_like("words")) == ["c", "d"]
    both.llama.vector_store.clear()
    assert both.documents_like("words") == []


def test_deleting_a_source_removes_its_rows_for_the_other(both: Both) -> None:
    both.lang.add_texts(["one", "two"], [{"ref_doc_id": "book"}, {}], ids=["1", "2"])
    both.llama.delete_ref_doc("book")
    assert [document.id for document in both.lang.get_by_ids(["1", "2"])] == ["2"]


def test_a_document_written_back_keeps_what_was_embedded(both: Both, encoder: FakeEncoder) -> None:
    both.llama.insert_nodes(
        [
            Node(
                id_="fused",
                text_resource=MediaResource(text="sea"),
                image_resource=MediaResource(data=png("navy")),
            )
        ]
    )
    [before] = both.lang.index.vectors(["fused"])
    document = both.document("fused")
    document.metadata["seen"] = True
    both.lang.add_documents([document])
    [after] = both.lang.index.vectors(["fused"])
    assert np.allclose(before, after, atol=1e-6)
    assert both.node("fused").metadata["seen"] is True
    assert item_of(both.node("fused")) == Item("sea", png("navy"))


def test_a_node_has_the_first_of_several_pictures_and_says_how_many(both: Both, photo_file: Path) -> None:
    named = [str(photo_file), str(photo_file.with_name("blue.png"))]
    photo_file.with_name("blue.png").write_bytes(png("blue"))
    both.lang.add_documents([Document("two", metadata={"image": named}, id="two")])
    node = both.node("two")
    assert isinstance(node, ImageNode)
    assert item_of(node) == Item("two", photo_file)
    assert node.metadata == {"image": named, "modality": "fused", "pictures": 2}
    assert [len(item.pictures) for item in both.lang.stored_items([both.document("two")]) if item] == [2]


@pytest.mark.parametrize("first", ["LlamaIndex", "LangChain"])
def test_another_model_is_refused_by_both(tmp_path: Path, first: str) -> None:
    one, other = FakeEncoder(dim=32), FakeEncoder(dim=32, name="another")
    if first == "LlamaIndex":
        index = MultimodalIndex(
            [TextNode(text="a")], path=tmp_path / "db", embed_model=GMEEmbedding(encoder=one)
        )
        index.vector_store.client.close()
    else:
        UMRVectorStore.from_texts(["a"], GMEEmbeddings.from_encoder(one), path=tmp_path / "db").close()
    with pytest.raises(FingerprintError):
        UMRVectorStore(GMEEmbeddings.from_encoder(other), tmp_path / "db")
    with pytest.raises(FingerprintError):
        MultimodalIndex(path=tmp_path / "db", embed_model=GMEEmbedding(encoder=other))
