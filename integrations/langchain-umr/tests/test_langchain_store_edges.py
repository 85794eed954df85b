"""`UMRVectorStore` at its edges: large calls, odd metadata, several pictures, pickles, all retrievers."""

from __future__ import annotations

import base64
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage
from langchain_umr import GMEEmbeddings, MLLMReranker, RerankingRetriever, UMRVectorStore
from PIL import Image

from umr_plugins.errors import BatchError, FingerprintError, IndexLockedError, InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker
from umr_plugins.types import Item


def png(color: str = "red", size: tuple[int, int] = (30, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def block(color: str) -> dict[str, str]:
    return {"type": "image", "base64": base64.b64encode(png(color)).decode(), "mime_type": "image/png"}


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def store(encoder: FakeEncoder) -> Iterator[UMRVectorStore]:
    with UMRVectorStore(GMEEmbeddings.from_encoder(encoder)) as made:
        yield made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for color in ("red", "blue"):
        (folder / f"{color}.png").write_bytes(png(color, (112, 84)))
    return folder


def ids(found: list[Document]) -> list[str | None]:
    return [document.id for document in found]


# --- rows -------------------------------------------------------------------------------------------------


def test_ten_thousand_texts_from_a_generator_in_one_call(store: UMRVectorStore) -> None:
    added = store.add_texts(f"text {n}" for n in range(10_000))
    assert len(set(added)) == 10_000
    assert store.index.count() == 10_000
    for n in (0, 5_461, 9_999):
        assert store.similarity_search(f"text {n}", k=1)[0].id == added[n]
    store.delete(added[100:])
    assert store.index.ids() == added[:100]


KEPT = [
    {"list": ["a", "b"], "none": None, "nested": {"deep": [1, {"x": True}]}, "empty": [], "mixed": [1, "a"]},
    {"umlaut ä": "ß", "float": 1.5, "large": 2**80, "numpy float": np.float64(2.5)},
]


def test_metadata_of_every_json_kind_come_back_as_they_were(store: UMRVectorStore) -> None:
    store.add_documents([Document("kite", id=str(n), metadata=one) for n, one in enumerate(KEPT)])
    assert [one.metadata for one in store.get_by_ids(["0", "1"])] == KEPT
    store.add_documents([Document("kite", id="0", metadata={"pair": (1, 2)})])
    assert store.get_by_ids(["0"])[0].metadata == {"pair": [1, 2]}, "replaced as a whole; a tuple is a list"


REFUSED: list[tuple[dict[Any, Any], str]] = [
    ({"a": b"x"}, "key 'a' is a bytes"),
    ({"a": np.float32(1)}, "key 'a' is a float32; .*numpy numbers into int or float"),
    ({"a": {"b": np.int64(1)}}, "key 'a', key 'b' is a int64"),
    ({"a": np.ones(2)}, "key 'a' is a ndarray"),
    ({"a": float("nan")}, "key 'a' is nan"),
    ({"a": {1, 2}}, "key 'a' is a set"),
    ({"a": {1: 2}}, "keys must be strings, got 1"),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED)
def test_other_metadata_name_their_document_before_anything_is_embedded(
    store: UMRVectorStore, encoder: FakeEncoder, metadata: dict[Any, Any], message: str
) -> None:
    documents = [Document("fine"), Document("kite", id="k", metadata=metadata)]
    for on_error in ("raise", "skip"):
        with pytest.raises(InputError, match=f"document 'k': metadata 1.*{message}"):
            store.add_documents(documents, on_error=on_error)  # type: ignore[arg-type]  # both are allowed
    with pytest.raises(InputError, match=message):
        store.add_items(["kite"], [metadata])
    assert encoder.calls == []
    assert store.index.count() == 0


def test_metadata_that_hold_themselves_are_refused(store: UMRVectorStore) -> None:
    round_: dict[str, Any] = {}
    round_["again"] = round_
    with pytest.raises(InputError, match=r"metadata 0.*(nested|refers)"):
        store.add_items(["kite"], [round_])


def test_lists_in_metadata_can_be_filtered_on(store: UMRVectorStore) -> None:
    store.add_texts(
        ["a", "b", "c"],
        [{"tags": ["x", "y"]}, {"tags": ["y"], "n": 1}, {}],
        ids=["a", "b", "c"],
    )
    for where, expected in (
        ({"tags": {"$contains": "y"}}, {"a", "b"}),
        ({"tags": {"$contains": "x"}}, {"a"}),
        ({"tags": {"$not_contains": "y"}}, {"c"}),
        ({"$or": [{"tags": {"$contains": "x"}}, {"n": 1}]}, {"a", "b"}),
    ):
        assert set(ids(store.similarity_search("a", k=9, filter=where))) == expected


def test_documents_come_in_the_order_of_the_ids(store: UMRVectorStore) -> None:
    store.add_texts(list("abcdef"), ids=list("abcdef"))
    assert ids(store.get_by_ids(list("eacfbd"))) == list("eacfbd")
    assert ids(store.get_by_ids(["f", "gone", "a", "f"])) == ["f", "a"]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("https://example.org/a.png", "URLs are off"),
        ("gone.png", "can't be read"),
        ("aGVsbG8gd29ybGQ=", "can't be read"),
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", "no picture"),
        ("data:image/png;base64,@@@", "not valid base64"),
        (["gone.png", 3], "or a list of them, got int"),
        ([""], "got an empty str"),
        ({"a": 1}, "got dict"),
        (np.ones(2), "got ndarray"),
    ],
)
def test_a_picture_that_is_none_names_its_document(store: UMRVectorStore, picture: Any, message: str) -> None:
    with pytest.raises(BatchError, match=rf"document 'k': .*{message}"):
        store.add_documents([Document("fine"), Document("kite", id="k", metadata={"image": picture})])
    assert store.index.count() == 0


def test_a_folder_of_another_length_of_vectors_is_refused(tmp_path: Path) -> None:
    UMRVectorStore.from_texts(["kite"], DeterministicFakeEmbedding(size=6), path=tmp_path / "db").close()
    with pytest.raises(FingerprintError):
        UMRVectorStore(DeterministicFakeEmbedding(size=8), path=tmp_path / "db")


# --- several pictures -------------------------------------------------------------------------------------


def test_a_list_of_pictures_is_one_row_and_comes_back(store: UMRVectorStore, photos: Path) -> None:
    pictures = [str(photos / "red.png"), str(photos / "blue.png")]
    store.add_documents([Document("kite", id="two", metadata={"image": pictures, "n": 1})])
    store.add_documents([Document("", id="alone", metadata={"image_uri": pictures[:1]})])
    two, alone = store.get_by_ids(["two", "alone"])
    assert two.metadata == {"image": pictures, "n": 1, "modality": "fused"}
    assert alone.metadata == {"image_uri": pictures[:1], "modality": "image"}
    same = Item("kite", images=(photos / "red.png", photos / "blue.png"))
    turned = {"text": "kite", "images": pictures[::-1]}
    [(best, score)] = store.similarity_search_with_score(same, k=1)
    assert (best.id, score) == ("two", pytest.approx(1, abs=1e-5))
    assert store.similarity_search_with_score(two, k=1)[0][1] == pytest.approx(1, abs=1e-5)
    assert store.similarity_search_with_score(turned, k=1)[0][1] < 0.99
    judge = FakeReranker()
    MLLMReranker(reranker=judge, roots=photos).compress_documents([two], "kite")
    assert judge.calls[0][1] == [same]


def test_two_blocks_of_pictures_are_one_query(store: UMRVectorStore, encoder: FakeEncoder) -> None:
    store.add_items([{"text": "kite", "images": [png("red"), png("blue")]}], ids=["two"])
    blocks = [{"type": "text", "text": "kite"}, block("red"), block("blue")]
    for query in (blocks, HumanMessage(content=blocks)):  # type: ignore[arg-type]  # dicts
        [(best, score)] = store.similarity_search_with_score(query, k=1)
        assert (best.id, score) == ("two", pytest.approx(1, abs=1e-5))


def test_a_model_of_one_picture_refuses_two_by_the_documents_name(photos: Path) -> None:
    two = {"image": [str(photos / "red.png"), str(photos / "blue.png")]}
    with UMRVectorStore(GMEEmbeddings(model="umr-tiny")) as store:
        with pytest.raises(BatchError, match=r"document 'k': .*one picture per item"):
            store.add_documents([Document("kite", id="k", metadata=two)])
        documents = [Document("fine", id="fine"), Document("kite", metadata=two)]
        assert store.add_documents(documents, on_error="skip") == ["fine"]
        with pytest.raises(ItemError, match="one picture per item"):
            store.similarity_search([block("red"), block("blue")])


def test_a_model_of_several_pictures_fuses_them(photos: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoints.write_qwen_vl(tmp_path, "qwen3_vl")
    pictures = [str(photos / "red.png"), str(photos / "blue.png")]
    with UMRVectorStore(GMEEmbeddings(model=checkpoint, dtype="float32")) as store:
        store.add_documents([Document("kite", id="k", metadata={"image": pictures})])
        vectors = store.index.vectors(["k"])
    embeddings = GMEEmbeddings(model=checkpoint, dtype="float32")
    assert vectors[0] == pytest.approx(
        embeddings.embed_items([{"text": "kite", "images": pictures}])[0], abs=1e-5
    )
    assert (
        np.abs(vectors[0] - embeddings.embed_items([{"text": "kite", "image": pictures[0]}])[0]).max() > 1e-4
    )


def test_page_content_that_is_a_picture_as_base64_is_that_picture(
    store: UMRVectorStore, encoder: FakeEncoder
) -> None:
    encoded = base64.b64encode(png("red")).decode()
    store.add_documents([Document(encoded, id="a", metadata={"n": 1}), Document(f"see {encoded}", id="b")])
    assert store.get_by_ids(["a"]) == [Document("", id="a", metadata={"n": 1, "modality": "image"})]
    assert store.get_by_ids(["b"])[0].page_content == f"see {encoded}"
    assert [item.modality for item in encoder.calls[0][1]] == ["image", "text"]
    embeddings = GMEEmbeddings.from_encoder(encoder)
    assert embeddings.embed_query(Document(encoded)) == embeddings.embed_query({"image": png("red")})
    assert embeddings.embed_query(encoded) != embeddings.embed_query({"image": png("red")}), "a str is text"


# --- copies and pickles -----------------------------------------------------------------------------------


def test_a_store_in_memory_is_shared_by_copies_and_cannot_be_pickled(store: UMRVectorStore) -> None:
    store.add_texts(["kite"], ids=["a"])
    retriever = RerankingRetriever(base=store, reranker=MLLMReranker(reranker=FakeReranker()))
    for one in (copy.copy(store), copy.deepcopy(store), copy.deepcopy(retriever).base.vectorstore):
        assert one is store
    assert ids(retriever.model_copy(deep=True).invoke("kite")) == ["a"]
    for object_ in (store, store.as_retriever(), retriever):
        with pytest.raises(InputError, match=r"in memory can't be pickled.*path="):
            pickle.dumps(object_)


def test_a_store_in_a_folder_is_opened_again(
    encoder: FakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embeddings = GMEEmbeddings.from_encoder(encoder, instruction="find it")
    with UMRVectorStore(embeddings, path="db", collection="mine", image_key="scan") as store:
        store.add_texts(["kite", "boat"], ids=["a", "b"])
        retriever = RerankingRetriever(
            base=store.as_retriever(search_kwargs={"k": 2}),
            reranker=MLLMReranker(reranker=FakeReranker()),
            k=1,
        )
        data = pickle.dumps([store, store.as_retriever(), retriever])
        monkeypatch.chdir("/")
        again, plain, reranking = pickle.loads(data)
        assert again.index is not store.index
        assert (again.image_keys, again.instruction, again.embeddings) == (("scan",), "find it", embeddings)
        assert ids(plain.invoke("boat"))[0] == "b"
        assert ids(reranking.invoke("kite")) == ids(retriever.invoke("kite")) == ["a"]
    assert again.get_by_ids(["a"])[0].page_content == "kite", "closing the first closed the other"
    for one in (again, plain.vectorstore, reranking.base.vectorstore):
        one.close()


def test_a_pickle_in_another_process_opens_the_folder_when_it_is_free(tmp_path: Path) -> None:
    code = (
        "import pickle, sys; store = pickle.loads(sys.stdin.buffer.read());"
        "print(store.similarity_search('kite', k=1)[0].id)"
    )
    with UMRVectorStore(FakeEncoder(), path=tmp_path / "db") as store:
        store.add_texts(["kite", "boat"], ids=["a", "b"])
        data = pickle.dumps(store)
        held = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
        assert IndexLockedError.__name__ in held.stderr.decode()
    free = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
    assert free.stdout.decode().strip() == "a", free.stderr.decode()


# --- retrievers -------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "similarity": {"k": 1},
    "mmr": {"k": 1, "fetch_k": 4},
    "similarity_score_threshold": {"k": 4, "score_threshold": 0.99},
}
FORMS: dict[str, tuple[Any, str]] = {
    "text": ("sail", "sail"),
    "mapping": ({"text": "kite", "image": png("red")}, "fused"),
    "blocks": ([{"type": "text", "text": "kite"}, block("red")], "fused"),
    "message": (HumanMessage(content=[block("red")]), "picture"),  # type: ignore[list-item]  # a dict
    "document": (Document("sail"), "sail"),
    "picture": ({"image": png("red")}, "picture"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_retriever_takes_queries_of_every_form(
    store: UMRVectorStore, kind: str, form: str
) -> None:
    store.add_texts(["kite", "sail", "reef"], ids=["kite", "sail", "reef"])
    store.add_items([{"image": png("red")}, {"text": "kite", "image": png("red")}], ids=["picture", "fused"])
    query, expected = FORMS[form]
    retriever = store.as_retriever(search_type=kind, search_kwargs=KINDS[kind])
    assert ids(retriever.invoke(query)) == [expected]
    assert ids(await retriever.ainvoke(query)) == [expected]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_row_is_searched_for_as_what_was_embedded(store: UMRVectorStore, kind: str) -> None:
    store.add_items([{"image": png("red")}, "kite"], ids=["picture", "kite"])
    [row] = store.get_by_ids(["picture"])
    retriever = store.as_retriever(search_type=kind, search_kwargs=KINDS[kind])
    assert ids(retriever.invoke(row)) == ids(await retriever.ainvoke(row)) == ["picture"]  # type: ignore[arg-type]
