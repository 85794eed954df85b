"""`UMRVectorStore`: every way of searching."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_umr import GMEEmbeddings, UMRVectorStore
from PIL import Image

from umr_plugins.errors import InputError, ItemError, UMRError
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item

TEXTS = ["kite", "boat", "sail", "reef", "buoy", "mast"]


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return path


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def store(encoder: FakeEncoder, photo: Path) -> Iterator[UMRVectorStore]:
    with UMRVectorStore(GMEEmbeddings.from_encoder(encoder, instruction="find the part")) as made:
        made.add_texts(TEXTS, [{"n": n, "even": n % 2 == 0} for n in range(6)], ids=TEXTS)
        made.add_items([photo, {"text": "kite", "image": photo}], ids=["picture", "fused"])
        yield made


def ids(found: list[Document]) -> list[str | None]:
    return [document.id for document in found]


def test_queries_of_every_form_find_their_own_content(store: UMRVectorStore, photo: Path) -> None:
    block = {"type": "image", "base64": base64.b64encode(png()).decode(), "mime_type": "image/png"}
    forms: list[tuple[Any, str]] = [
        ("sail", "sail"),
        ({"text": "sail"}, "sail"),
        (Item("sail"), "sail"),
        (HumanMessage("sail"), "sail"),
        (Document("sail"), "sail"),
        ({"image": str(photo)}, "picture"),
        (photo, "picture"),
        ([block], "picture"),
        ({"text": "kite", "image": png()}, "fused"),
        ([{"type": "text", "text": "kite"}, block], "fused"),
        (HumanMessage(content=[{"type": "text", "text": "kite"}, block]), "fused"),
        (Document("kite", metadata={"image": "data:image/png;base64," + block["base64"]}), "fused"),
    ]
    retriever = store.as_retriever(search_kwargs={"k": 1})
    for query, expected in forms:
        [(found, score)] = store.similarity_search_with_score(query, k=1)
        assert (found.id, score) == (expected, pytest.approx(1, abs=1e-5)), query
        assert ids(retriever.invoke(query)) == [expected]


def test_scores_are_cosines_best_first(store: UMRVectorStore, encoder: FakeEncoder) -> None:
    found = store.similarity_search_with_score("sail", k=8)
    assert len(found) == 8
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    query = encoder.encode_queries(["sail"])[0]  # type: ignore[index]  # on_error="raise" gives an array
    boat = encoder.encode_documents(["boat"])[0]  # type: ignore[index]
    assert dict(zip(ids([one for one, _ in found]), scores, strict=True))["boat"] == pytest.approx(
        float(query @ boat), abs=1e-5
    )
    assert ids(store.similarity_search("sail", k=8)) == ids([one for one, _ in found])


def test_relevance_scores_lie_between_0_and_1_without_a_warning(store: UMRVectorStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relevant = store.similarity_search_with_relevance_scores("sail", k=8)
        above = store.similarity_search_with_relevance_scores("sail", k=8, score_threshold=0.9)
    cosines = store.similarity_search_with_score("sail", k=8)
    assert min(score for _, score in cosines) < 0
    for (document, relevance), (same, cosine) in zip(relevant, cosines, strict=True):
        assert document == same
        assert relevance == pytest.approx((1 + cosine) / 2)
        assert 0 <= relevance <= 1
    assert ids([one for one, _ in above]) == ["sail"]


def test_search_by_vector(store: UMRVectorStore) -> None:
    vector = [3 * value for value in store.embeddings.embed_query("sail")]  # type: ignore[union-attr]
    expected = store.similarity_search_with_score("sail", k=3)
    assert store.similarity_search_by_vector(vector, k=3) == [one for one, _ in expected]
    for (_, score), (_, cosine) in zip(
        store.similarity_search_by_vector_with_score(np.array(vector), k=3), expected, strict=True
    ):
        assert score == pytest.approx(cosine, abs=1e-5)
    [(_, relevance)] = store.similarity_search_by_vector_with_relevance_scores(vector, k=1)
    assert relevance == pytest.approx(1, abs=1e-5)
    with pytest.raises(UMRError, match="16 dimensions"):
        store.similarity_search_by_vector([1.0, 2.0])


def test_search_by_image(store: UMRVectorStore, photo: Path) -> None:
    for source in (str(photo), photo, png(), "data:image/png;base64," + base64.b64encode(png()).decode()):
        assert ids(store.similarity_search_by_image(source, k=1)) == ["picture"]
    [(_, score)] = store.similarity_search_by_image_with_score(photo, k=1)
    [(_, relevance)] = store.similarity_search_by_image_with_relevance_score(photo, k=1)
    assert (score, relevance) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert store.similarity_search_by_image(photo, k=1, filter={"n": 0})[0].id == "kite"


def test_filters(store: UMRVectorStore) -> None:
    assert set(ids(store.similarity_search("sail", k=9, filter={"even": True}))) == {"kite", "sail", "buoy"}
    assert ids(store.similarity_search("sail", k=9, filter={"n": {"$gte": 5}})) == ["mast"]
    assert len(store.similarity_search("sail", k=9, filter={})) == 8
    assert len(store.similarity_search("sail", k=9, filter=None)) == 8
    assert set(
        ids(store.similarity_search("sail", k=9, filter={"modality": {"$in": ["image", "fused"]}}))
    ) == {
        "picture",
        "fused",
    }
    assert store.similarity_search("sail", filter={"n": 99}) == []
    with pytest.raises(InputError, match="where"):
        store.similarity_search("sail", filter=lambda document: True)  # type: ignore[arg-type]


def test_k(store: UMRVectorStore) -> None:
    assert len(store.similarity_search("sail")) == 4
    assert len(store.similarity_search("sail", k=100)) == 8
    vector = store.embeddings.embed_query("sail")  # type: ignore[union-attr]
    assert store.similarity_search("sail", k=0) == []
    assert store.similarity_search_with_score("sail", k=0) == []
    assert store.similarity_search_with_relevance_scores("sail", k=0) == []
    assert store.similarity_search_by_vector(vector, k=0) == []
    assert store.max_marginal_relevance_search("sail", k=0) == []
    assert store.max_marginal_relevance_search_by_vector(vector, k=0) == []
    for k in (-1, 2.0, True, "4"):
        with pytest.raises(InputError, match="whole number"):
            store.similarity_search("sail", k=k)  # type: ignore[arg-type]  # that is the mistake


def test_unknown_arguments_are_refused_and_not_dropped(store: UMRVectorStore) -> None:
    for search in (
        store.similarity_search,
        store.similarity_search_with_score,
        store.max_marginal_relevance_search,
    ):
        with pytest.raises(InputError, match="filters"):
            search("sail", filters={"n": 1})
    retriever = store.as_retriever(search_kwargs={"score_threshold": 0.5})
    with pytest.raises(InputError, match="score_threshold"):
        retriever.invoke("sail")


def test_the_instruction_goes_with_queries(store: UMRVectorStore, encoder: FakeEncoder) -> None:
    def instructions(search: Any, **arguments: Any) -> list[str | None]:
        encoder.calls.clear()
        search("sail", **arguments)
        assert [role for role, _, _ in encoder.calls] == ["query"]
        return [instruction for _, _, instruction in encoder.calls]

    for search in (
        store.similarity_search,
        store.similarity_search_with_score,
        store.max_marginal_relevance_search,
    ):
        assert instructions(search) == ["find the part"]
        assert instructions(search, instruction="find another") == ["find another"]


def test_a_query_that_cannot_be_embedded(store: UMRVectorStore, tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="poison"):
        store.similarity_search("poison")
    with pytest.raises(ItemError, match=r"gone.png|no such file|not found|does not exist"):
        store.similarity_search({"image": str(tmp_path / "gone.png")})
    with pytest.raises(ItemError, match="empty"):
        store.similarity_search("")
    with pytest.raises(ItemError, match="not followed"):
        store.similarity_search([{"type": "image", "url": "https://example.org/a.png"}])


def test_diverse_results(encoder: FakeEncoder) -> None:
    class Plane(FakeEncoder):
        """Texts are angles in degrees."""

        def _vector(self, item: Item) -> Any:
            angle = np.deg2rad(float(item.text or 0))
            return np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)

    with UMRVectorStore.from_texts(["5", "6", "7", "-30", "170"], Plane(dim=2)) as store:

        def texts(**arguments: Any) -> list[str]:
            return [one.page_content for one in store.max_marginal_relevance_search("0", **arguments)]

        assert texts(k=3, lambda_mult=1.0) == ["5", "6", "7"]
        assert texts(k=2, lambda_mult=0.5) == ["5", "-30"]
        assert texts(k=2, lambda_mult=0.0) == ["5", "170"]
        assert texts(k=2, lambda_mult=0.0, fetch_k=3) == ["5", "7"]
        assert texts(k=4, fetch_k=1, lambda_mult=1.0) == ["5", "6", "7", "-30"]
        assert len(texts(k=9)) == 5
        by_vector = store.max_marginal_relevance_search_by_vector([1.0, 0.0], k=2, lambda_mult=0.5)
        assert [one.page_content for one in by_vector] == ["5", "-30"]
        with pytest.raises(InputError, match="lambda_mult"):
            texts(lambda_mult=2)
        with pytest.raises(InputError, match="fetch_k"):
            texts(fetch_k=-1)
        retriever = store.as_retriever(search_type="mmr", search_kwargs={"k": 2, "fetch_k": 5})
        assert [one.page_content for one in retriever.invoke("0")] == ["5", "-30"]


def test_retrievers(store: UMRVectorStore, photo: Path) -> None:
    assert store._get_retriever_tags() == ["UMRVectorStore", "GMEEmbeddings"]
    threshold = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.99, "k": 8}
    )
    assert ids(threshold.invoke({"text": "kite", "image": str(photo)})) == ["fused"]
    filtered = store.as_retriever(search_kwargs={"filter": {"n": 3}})
    assert ids(filtered.invoke("sail")) == ["reef"]
    chain = RunnableLambda(lambda question: {"text": question, "image": str(photo)}) | store.as_retriever()
    assert ids(chain.invoke("kite"))[0] == "fused"
    assert [ids(found)[0] for found in store.as_retriever().batch(["sail", "reef"])] == ["sail", "reef"]


async def test_async_searches_agree_with_the_others(store: UMRVectorStore, photo: Path) -> None:
    vector = store.embeddings.embed_query("sail")  # type: ignore[union-attr]
    assert await store.asimilarity_search("sail", k=2) == store.similarity_search("sail", k=2)
    assert await store.asimilarity_search_with_score("sail", k=2) == store.similarity_search_with_score(
        "sail", k=2
    )
    assert await store.asimilarity_search_by_vector(vector) == store.similarity_search_by_vector(vector)
    assert await store.asimilarity_search_by_image(photo) == store.similarity_search_by_image(photo)
    assert await store.asimilarity_search_with_relevance_scores(
        "sail"
    ) == store.similarity_search_with_relevance_scores("sail")
    assert await store.amax_marginal_relevance_search("sail") == store.max_marginal_relevance_search("sail")
    assert await store.amax_marginal_relevance_search_by_vector(
        vector
    ) == store.max_marginal_relevance_search_by_vector(vector)
    assert await store.as_retriever().ainvoke({"image": str(photo)}) == store.similarity_search(
        {"image": photo}
    )


async def test_an_async_search_does_not_block_the_loop() -> None:
    loop_ran = threading.Event()

    class Waiting(FakeEncoder):
        def encode_queries(self, *args: Any, **kwargs: Any) -> Any:
            assert loop_ran.wait(10), "the event loop stood still"
            return super().encode_queries(*args, **kwargs)

    with UMRVectorStore.from_texts(["kite"], Waiting()) as store:
        task = asyncio.create_task(store.asimilarity_search("kite"))
        await asyncio.sleep(0)
        loop_ran.set()
        assert [one.page_content for one in await task] == ["kite"]
