"""`GMEEmbeddings` in LangChain's own Chroma store, and what comes back from there."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.errors import InvalidArgumentError
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_umr import (
    GMEEmbeddings,
    MLLMReranker,
    RerankingRetriever,
    UMRVectorStore,
    documents_to_content_blocks,
)
from PIL import Image

from umr_plugins.errors import BatchError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker
from umr_plugins.types import Item

# Both are Chroma's own: collections that LangChain makes are read in a deprecated way, and a cosine of a hair
# more than 1 is no relevance to LangChain.
pytestmark = [
    pytest.mark.filterwarnings("ignore:legacy embedding function config:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Relevance scores must be between:UserWarning"),
]

COSINE: dict[str, Any] = {"hnsw": {"space": "cosine"}}


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for color in ("red", "blue"):
        (folder / f"{color}.png").write_bytes(png(color))
    return folder


def made(embeddings: GMEEmbeddings, name: str = "chroma-test", **options: Any) -> Chroma:
    options.setdefault("client", chromadb.EphemeralClient())
    return Chroma(name, embeddings, collection_configuration=COSINE, **options)  # type: ignore[arg-type]  # a dict


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def embeddings(encoder: FakeEncoder) -> GMEEmbeddings:
    return GMEEmbeddings.from_encoder(encoder)


@pytest.fixture
def chroma(embeddings: GMEEmbeddings) -> Iterator[Chroma]:
    store = made(embeddings)
    yield store
    store.delete_collection()


def ids(found: list[Document]) -> list[str | None]:
    return [document.id for document in found]


BLOCK = {"type": "image", "base64": base64.b64encode(png()).decode(), "mime_type": "image/png"}


def test_texts_documents_and_pictures_are_found_by_queries_of_every_form(
    chroma: Chroma, encoder: FakeEncoder, photos: Path
) -> None:
    chroma.add_texts(["kite", "boat"], [{"n": 1}, {"n": 2}], ids=["kite", "boat"])
    chroma.add_documents([Document("reef", id="reef")])
    chroma.add_images(uris=[str(photos / "red.png")], ids=["red"])
    retriever = chroma.as_retriever(search_kwargs={"k": 1})
    queries: list[tuple[Any, str]] = [
        ("boat", "boat"),
        ({"text": "boat"}, "boat"),
        ([{"type": "text", "text": "reef"}], "reef"),
        ({"image": str(photos / "red.png")}, "red"),
        ([BLOCK], "red"),
        (Document("", metadata={"image": str(photos / "red.png")}), "red"),
    ]
    for query, expected in queries:
        assert ids(chroma.similarity_search(query, k=1)) == [expected]
        assert ids(retriever.invoke(query)) == [expected]
        [(_, distance)] = chroma.similarity_search_with_score(query, k=1)
        [(_, relevance)] = chroma.similarity_search_with_relevance_scores(query, k=1)
        assert distance == pytest.approx(0, abs=1e-5)
        assert relevance == pytest.approx(1, abs=1e-5)
    assert ids(chroma.similarity_search_by_image(str(photos / "red.png"), k=1)) == ["red"]
    fused = {"text": "boat", "image": str(photos / "red.png")}
    assert len(retriever.invoke(fused)) == 1  # type: ignore[arg-type]  # passes through
    assert encoder.calls[-1] == ("query", [Item(**fused)], None)  # type: ignore[arg-type]


async def test_async_searches(chroma: Chroma, photos: Path) -> None:
    await chroma.aadd_texts(["kite", "boat"], ids=["kite", "boat"])
    chroma.add_images(uris=[str(photos / "blue.png")], ids=["blue"])
    retriever = chroma.as_retriever(search_kwargs={"k": 1})
    assert ids(await retriever.ainvoke("boat")) == ["boat"]
    assert ids(await retriever.ainvoke({"image": png("blue")})) == ["blue"]  # type: ignore[arg-type]  # passes through
    mmr = chroma.as_retriever(search_type="mmr", search_kwargs={"k": 2, "fetch_k": 3})
    assert len(await mmr.ainvoke({"image": png("blue")})) == 2  # type: ignore[arg-type]


def test_relevance_is_the_cosine_that_our_own_store_gives(chroma: Chroma, embeddings: GMEEmbeddings) -> None:
    texts = ["kite", "boat", "reef"]
    chroma.add_texts(texts, ids=texts)
    with UMRVectorStore(embeddings) as store:
        store.add_texts(texts, ids=texts)
        ours = {one.id: score for one, score in store.similarity_search_with_score("sail", k=3)}
    theirs = {one.id: 1 - distance for one, distance in chroma.similarity_search_with_score("sail", k=3)}
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_one_bad_picture_names_its_file_and_adds_nothing(chroma: Chroma, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BatchError, match=r"item 1: .*no picture"):
        chroma.add_images(uris=[str(photos / "red.png"), str(photos / "bad.png")])
    with pytest.raises(ItemError, match="URLs are off"):
        chroma.similarity_search({"image": "https://example.org/a.png"})  # type: ignore[arg-type]  # passes through
    assert chroma.get()["ids"] == []


def test_pictures_of_chroma_come_back_as_base64_and_are_pictures_here(chroma: Chroma, photos: Path) -> None:
    chroma.add_images(uris=[str(photos / "red.png")], metadatas=[{"n": 1}], ids=["red"])
    chroma.add_texts(["red kite"], ids=["kite"])
    found = chroma.similarity_search({"image": png()}, k=2)  # type: ignore[arg-type]  # passes through
    assert found[0].page_content == BLOCK["base64"]
    blocks = documents_to_content_blocks(found)
    assert [block["type"] for block in blocks] == ["text", "image", "text"]
    assert [block["text"] for block in blocks if "text" in block] == ["Document 1", "Document 2\nred kite"]
    judge = FakeReranker()
    reranker = MLLMReranker(reranker=judge)
    best = reranker.compress_documents(found, {"image": png()})
    assert [(one.id, one.metadata["relevance_score"]) for one in best] == [("red", 1.0), ("kite", 0.0)]
    assert [item.modality for item in judge.calls[0][1]] == ["image", "text"]
    again = chroma.similarity_search(found[0], k=1)  # type: ignore[arg-type]  # more like this
    assert ids(again) == ["red"]


def test_documents_of_chroma_move_into_our_store_without_base64(
    chroma: Chroma, embeddings: GMEEmbeddings, photos: Path
) -> None:
    chroma.add_images(uris=[str(photos / "red.png")], metadatas=[{"n": 1}], ids=["red"])
    chroma.add_texts(["kite"], [{"n": 2}], ids=["kite"])
    with UMRVectorStore(embeddings) as store:
        store.add_documents(chroma.get_by_ids(["red", "kite"]))
        assert store.get_by_ids(["red", "kite"]) == [
            Document("", id="red", metadata={"n": 1, "modality": "image"}),
            Document("kite", id="kite", metadata={"n": 2}),
        ]
        assert ids(store.similarity_search_by_image(photos / "red.png", k=1)) == ["red"]


def test_pictures_named_in_metadata_are_reranked_and_shown_below_a_root(chroma: Chroma, photos: Path) -> None:
    chroma.add_documents(
        [
            Document("a kite", id="below", metadata={"image": "blue.png"}),
            Document("a boat", id="outside", metadata={"image": "/etc/hostname"}),
        ]
    )
    reranker = MLLMReranker(reranker=FakeReranker(), roots=[photos])
    found = RerankingRetriever(base=chroma, reranker=reranker, k=2).invoke({"image": png("blue")})  # type: ignore[arg-type]
    scores = {one.id: one.metadata["relevance_score"] for one in found}
    assert scores == {"below": 1.0, "outside": None}
    shown = documents_to_content_blocks(found, roots=[photos])
    assert sorted(block["type"] for block in shown) == ["image", "text", "text", "text"]
    assert "/etc" not in str([block.get("text") for block in shown])


def test_a_collection_on_disk_and_one_made_without_langchain_open_again(
    embeddings: GMEEmbeddings, tmp_path: Path
) -> None:
    client = chromadb.PersistentClient(str(tmp_path / "db"))
    made(embeddings, client=client).add_texts(["kite", "boat"], ids=["kite", "boat"])
    assert ids(made(embeddings, client=client).similarity_search("boat", k=1)) == ["boat"]
    native = client.create_collection("native", configuration=COSINE, embedding_function=None)  # type: ignore[arg-type]
    texts = ["reef", "sail"]
    native.add(ids=texts, documents=texts, embeddings=embeddings.embed_documents(texts))  # type: ignore[arg-type]
    assert ids(made(embeddings, "native", client=client).similarity_search("sail", k=1)) == ["sail"]


def test_a_collection_of_another_dimension_is_refused_by_chroma(chroma: Chroma) -> None:
    chroma.add_texts(["kite"])
    assert chroma.embeddings is not None
    longer = GMEEmbeddings.from_encoder(FakeEncoder(dim=32))
    other = made(longer, client=chroma._client)
    for use in (lambda: other.add_texts(["boat"]), lambda: other.similarity_search("kite")):
        with pytest.raises(InvalidArgumentError, match=rf"16, got {longer.dimension}"):
            use()
