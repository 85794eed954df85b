"""Async calls: whose threads they wait in, and who waits for whom."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_umr import GMEEmbeddings, MLLMReranker, RerankingRetriever, UMRVectorStore
from PIL import Image

from umr_plugins.testing import FakeEncoder, FakeReranker


class Closed(ThreadPoolExecutor):
    """Takes nothing."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{function} went to the event loop's own threads")


async def test_nothing_waits_in_the_event_loops_own_threads(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(Closed())
    photo = tmp_path / "photo.png"
    Image.new("RGB", (30, 20), "red").save(photo)
    store = await UMRVectorStore.afrom_texts(["kite"], FakeEncoder(), [{"n": 1}], ids=["a"])
    vector = store.embeddings.embed_query("kite")  # type: ignore[union-attr]
    assert await store.aadd_texts(["boat"], [{"n": 2}], ids=["b"]) == ["b"]
    assert await store.aadd_documents([Document("sail", id="c")]) == ["c"]
    assert await store.aadd_items(["reef"], ids=["d"]) == ["d"]
    assert await store.aadd_images([photo], ids=["e"]) == ["e"]
    assert (await store.aadd_files([photo])).items == 1
    assert (await store.aadd_folder(tmp_path)).refused == ()
    searches: list[Any] = [
        await store.asearch("kite", "similarity", k=1),
        await store.asearch("kite", "mmr", k=1),
        await store.asimilarity_search("kite", 1, {"n": 1}),
        [one for one, _ in await store.asimilarity_search_with_score("kite", k=1)],
        [
            one
            for one, _ in await store.asimilarity_search_with_relevance_scores("kite", 1, score_threshold=0.9)
        ],
        await store.asimilarity_search_by_vector(vector, k=1),
        await store.amax_marginal_relevance_search("kite", k=1),
        await store.amax_marginal_relevance_search_by_vector(vector, k=1),
        await store.aget_by_ids(["a"]),
        await store.as_retriever(search_kwargs={"k": 1}).ainvoke("kite"),
        await store.as_retriever(search_type="mmr", search_kwargs={"k": 1}).ainvoke("kite"),
    ]
    assert searches == [[Document("kite", id="a", metadata={"n": 1})]] * len(searches)
    reranking = RerankingRetriever(base=store, reranker=MLLMReranker(reranker=FakeReranker()))
    assert await reranking.ainvoke("kite")
    assert (await store.asimilarity_search_by_image(photo, k=1))[0].metadata["modality"] == "image"
    assert await store.adelete(["a", "e"]) is True
    assert await store.adelete(filter={"n": 2}) is True
    assert not {"a", "b", "e"} & set(store.index.ids())
    other = await UMRVectorStore.afrom_documents([Document("kite", id="a")], FakeEncoder())
    assert other.index.ids() == ["a"]
    for one in (store, other):
        one.close()


async def test_queries_do_not_wait_for_bulk_work() -> None:
    answered = threading.Event()

    class Busy(FakeEncoder):
        def encode_documents(self, *args: Any, **kwargs: Any) -> Any:
            assert answered.wait(20), "no query was answered meanwhile"
            return super().encode_documents(*args, **kwargs)

    class Judging(FakeReranker):
        def rank(self, *args: Any, **kwargs: Any) -> Any:
            assert answered.wait(20), "no query was answered meanwhile"
            return super().rank(*args, **kwargs)

    embeddings = GMEEmbeddings.from_encoder(Busy())
    reranker = MLLMReranker(reranker=Judging())
    bulk = [asyncio.create_task(embeddings.aembed_documents(["kite"])) for _ in range(40)]
    judged = [asyncio.create_task(reranker.acompress_documents([Document("a")], "b")) for _ in range(40)]
    await asyncio.sleep(0)
    assert len(await embeddings.aembed_query("kite")) == 16
    answered.set()
    assert len(await asyncio.gather(*bulk, *judged)) == 80
