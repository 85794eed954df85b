"""Many coroutines at once: nothing heavy on the event loop, one forward pass at a time, the sync answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import chromadb
import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_umr import GMEEmbeddings, UMRVectorStore
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import ImageDocument, ImageNode, QueryBundle, TextNode
from llama_index.embeddings.gme import GMEEmbedding, PageNode, pages, worker
from llama_index.indices.umr import MultimodalIndex, identity
from llama_index.vector_stores.chroma import ChromaVectorStore
from PIL import ImageFile

from umr_plugins.demo import FILES
from umr_plugins.embedder import Embedder
from umr_plugins.encoding import engine
from umr_plugins.index.chroma import Projection
from umr_plugins.index.ledger import Ledger

MANY = 64
K = 5
PICTURES = [str(path) for path in sorted((FILES / "pictures").glob("*.png"))[::5]]
TEXTS = [f"{Path(path).stem.replace('-', ' ')} number {n}" for n, path in enumerate(PICTURES * 3)][:MANY]
KINDS = get_args(worker.Work)
SEARCHED = {"encode_queries", "forward", "query", "stored"}


@dataclass
class Watch:
    """Which threads entered which function, and how many forward passes ran at once at the most."""

    threads: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    running: int = 0
    most: int = 0

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **options: Any) -> Any:
            self.threads[name].add(threading.get_ident())
            return call(*args, **options)

        return entered

    def alone(self, call: Callable[..., Any]) -> Callable[..., Any]:
        lock = threading.Lock()

        def counted(*args: Any) -> Any:
            with lock:
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                return call(*args)
            finally:
                with lock:
                    self.running -= 1

        return counted


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    for owner, name in (
        (Embedder, "encode_queries"),  # waits for the model, on whose thread the forward passes run
        (Embedder, "encode_documents"),
        (Projection, "query"),
        (Projection, "upsert"),
        (Ledger, "stored"),
        (Ledger, "put"),
        (ImageFile.ImageFile, "load"),
        (identity, "content_key"),
        (pages, "load_image"),
        (SentenceSplitter, "_parse_nodes"),
        *((ChromaVectorStore, method) for method in ("add", "query", "get_nodes", "delete_nodes", "delete")),
    ):
        monkeypatch.setattr(owner, name, made.wrap(name, getattr(owner, name)))
    monkeypatch.setattr(engine, "_forward", made.wrap("forward", made.alone(engine._forward)))
    return made


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many items that Chroma is asked, and not the ledger scanned."""
    path = tmp_path_factory.mktemp("async") / "db"
    with UMRVectorStore(GMEEmbeddings(model="umr-tiny"), path) as store:
        store.add_texts([f"note {n} on {text}" for n, text in enumerate(TEXTS)])
        store.add_images(PICTURES)
    return path


def close_to(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    same = [name for name, _ in found] == [name for name, _ in expected]
    return same and np.allclose([s for _, s in found], [s for _, s in expected], rtol=0, atol=1e-5)


async def all_at_once(watch: Watch, ask: Callable[[int], Awaitable[Any]], expected: set[str]) -> list[Any]:
    """The answers of `MANY` coroutines; the functions of `expected` ran, and none of any on this thread."""
    watch.threads.clear()
    answers = await asyncio.gather(*(ask(n) for n in range(MANY)))
    assert expected <= set(watch.threads)
    for name, threads in watch.threads.items():
        assert threading.get_ident() not in threads, name
    assert watch.most == 1
    return answers


def asked(kind: str, n: int) -> tuple[str | None, str | None]:
    """Text and picture of a query."""
    return (
        None if kind == "picture" else TEXTS[n],
        None if kind == "text" else PICTURES[n % len(PICTURES)],
    )


@pytest.mark.parametrize("kind", ["text", "picture", "fused"])
async def test_llama_index_retrievers_leave_the_loop_alone(db: Path, watch: Watch, kind: str) -> None:
    index = MultimodalIndex(path=db, embed_model=GMEEmbedding("umr-tiny"))
    retriever = index.as_retriever(similarity_top_k=K)

    def query(n: int) -> QueryBundle:
        text, picture = asked(kind, n)
        return QueryBundle(text or "", picture)

    def told(found: list[Any]) -> list[tuple[str, float]]:
        return [(each.node.node_id, each.get_score()) for each in found]

    expected = [told(retriever.retrieve(query(n))) for n in range(MANY)]
    decoded = set() if kind == "text" else {"load"}
    found = await all_at_once(watch, lambda n: retriever.aretrieve(query(n)), SEARCHED | decoded)
    assert all(close_to(told(each), one) for each, one in zip(found, expected, strict=True))
    assert len({tuple(each) for each in expected}) > 10
    index.vector_store.client.close()


@pytest.mark.parametrize("kind", ["text", "picture", "fused"])
@pytest.mark.parametrize("through", ["store", "retriever"])
async def test_langchain_searches_leave_the_loop_alone(
    db: Path, watch: Watch, kind: str, through: str
) -> None:
    with UMRVectorStore(GMEEmbeddings(model="umr-tiny"), db) as store:
        retriever = store.as_retriever(search_kwargs={"k": K})

        def query(n: int) -> Any:
            text, picture = asked(kind, n)
            return text if kind == "text" else {"text": text, "image": picture}

        def names(found: list[Document]) -> list[str | None]:
            return [document.id for document in found]

        expected = [names(store.similarity_search(query(n), K)) for n in range(MANY)]
        ask: Callable[[int], Awaitable[Any]] = lambda n: retriever.ainvoke(query(n))  # noqa: E731
        if through == "store":
            ask = lambda n: store.asimilarity_search(query(n), K)  # noqa: E731
        decoded = set() if kind == "text" else {"load"}
        found = await all_at_once(watch, ask, SEARCHED | decoded)
        assert [names(each) for each in found] == expected


@pytest.mark.parametrize("framework", ["LlamaIndex", "LangChain"])
async def test_query_embeddings_leave_the_loop_alone(watch: Watch, framework: str) -> None:
    if framework == "LlamaIndex":
        llama = GMEEmbedding("umr-tiny")
        expected = [llama.get_query_embedding(text) for text in TEXTS]
        found = await all_at_once(
            watch, lambda n: llama.aget_query_embedding(TEXTS[n]), {"encode_queries", "forward"}
        )
    else:
        lang = GMEEmbeddings(model="umr-tiny")
        expected = [lang.embed_query(text) for text in TEXTS]
        found = await all_at_once(watch, lambda n: lang.aembed_query(TEXTS[n]), {"encode_queries", "forward"})
    assert np.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("framework", ["LlamaIndex", "LangChain"])
async def test_adding_and_searching_at_once_leave_the_loop_alone(
    tmp_path: Path, watch: Watch, framework: str
) -> None:
    every = SEARCHED - {"query"} | {"encode_documents", "put", "upsert", "load"}
    if framework == "LlamaIndex":
        index = MultimodalIndex(path=tmp_path / "db", embed_model=GMEEmbedding("umr-tiny"))
        index.insert_nodes([TextNode(text="not empty, as below")])
        retriever = index.as_retriever(similarity_top_k=K)

        async def add_node_or_search(n: int) -> Any:
            if n % 2:
                return await retriever.aretrieve(TEXTS[n])
            node = ImageNode(image_path=PICTURES[n % len(PICTURES)]) if n % 4 else TextNode(text=TEXTS[n])
            return await index.ainsert_nodes([node])

        await all_at_once(watch, add_node_or_search, every)
        assert index.vector_store.client.count() == 1 + MANY // 2
        index.vector_store.client.close()
        return
    with UMRVectorStore(GMEEmbeddings(model="umr-tiny"), tmp_path / "db") as store:
        store.add_texts(["not empty: searching nothing asks no model"])

        async def add_or_search(n: int) -> Any:
            if n % 2:
                return await store.asimilarity_search(TEXTS[n], K)
            if n % 4:
                return await store.aadd_images([PICTURES[n % len(PICTURES)]], ids=[str(n)])
            return await store.aadd_documents([Document(TEXTS[n])])

        await all_at_once(watch, add_or_search, every)
        assert store.index.count() == 1 + MANY // 2


async def test_documents_over_another_store_leave_the_loop_alone(tmp_path: Path, watch: Watch) -> None:
    collection = chromadb.PersistentClient(str(tmp_path)).create_collection(
        "papers", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    index = MultimodalIndex.from_vector_store(
        ChromaVectorStore(chroma_collection=collection), embed_model=GMEEmbedding("umr-tiny")
    )
    retriever = index.as_retriever(similarity_top_k=K)

    async def change_or_search(n: int) -> Any:
        name = str(n % 8)
        if n % 4 == 0:
            return await index.arefresh_ref_docs([ImageDocument(id_=name, image_path=PICTURES[n % 3])])
        if n % 4 == 1:
            return await index.ainsert(LlamaDocument(id_=name, text=TEXTS[n]))
        if n % 4 == 2:
            return await retriever.aretrieve(TEXTS[n])
        if n % 8 == 3:
            return await index.adelete_ref_doc(name)
        guide = str(FILES / "guide.pdf")
        return await index.ainsert_nodes([PageNode(id_="p", page_path=guide, page=1, text="")])

    entered = {
        "content_key",
        "load_image",
        "_parse_nodes",
        "add",
        "query",
        "get_nodes",
        "delete_nodes",
        "delete",
    }
    await all_at_once(watch, change_or_search, entered)
    assert collection.count() == 5  # documents 0, 1, 4 and 5, and the page


async def test_each_kind_of_work_has_one_thread() -> None:
    def thread() -> int:
        time.sleep(0.01)
        return threading.get_ident()

    used = [set(await asyncio.gather(*(worker.in_worker(work, thread) for _ in range(8)))) for work in KINDS]
    assert [len(threads) for threads in used] == [1] * len(KINDS)
    assert len(set.union(*used)) == len(KINDS)
