"""How long an event loop stands still while 64 queries run at once, with umr-tiny on the sample corpus.

python bench_async.py [--queries 64] [--background 300] [--rounds 4] [--only WORD] [--stacks MS] [--out FILE]

A heartbeat coroutine sleeps for one millisecond at a time; a gap is the time between two of its beats. Every
route of both adapters is measured idle and while nodes are embedded in the background, after warm-up, and
cold in a fresh process that has not loaded the model (nor imported torch). A full garbage collection stops
every thread of a Python process, some 0.3 s with torch and both frameworks imported: its time is given beside
the gaps, and the third way of measuring takes what is loaded out of the collector's sight with gc.freeze().
The peers are an embedding class that calls the same model as the frameworks' own local integrations do: on
the loop (LlamaIndex), in the loop's executor (LangChain), over their own Chroma stores. --stacks prints what
ran in every thread whenever the loop was late by so many milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_umr import GMEEmbeddings, UMRVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import ImageNode, Node, QueryBundle, TextNode
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex

from umr_plugins.demo import FILES
from umr_plugins.demo.queries import load_queries

MODEL = "umr-tiny"
BINS = (2, 5, 10, 20, 50, 100, 200, 500)
"""Upper ends of the histogram's bins, in milliseconds."""

Ask = Callable[[int], Awaitable[Any]]
Background = Callable[[], Awaitable[Any]]
Round = dict[str, Any]
"""`gaps` and the longest full `collection` in milliseconds, and `seconds`."""


class Heartbeat:
    """Records the gaps between its beats, and full garbage collections, in milliseconds."""

    def __init__(self, stacks: float | None = None) -> None:
        self.gaps: list[float] = []
        self.collections: list[float] = []
        self._stacks = stacks
        self._last = time.perf_counter()

    async def __aenter__(self) -> Heartbeat:
        self._stop = False
        self._last = time.perf_counter()
        self._task = asyncio.create_task(self._beat())
        gc.callbacks.append(self._collected)
        if self._stacks is not None:
            loop = threading.get_ident()
            threading.Thread(target=self._watch, args=(loop,), daemon=True).start()
        return self

    async def __aexit__(self, *unused: object) -> None:
        self._stop = True
        await self._task
        gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif info["generation"] == 2:
            self.collections.append((time.perf_counter() - self._began) * 1000)

    async def _beat(self) -> None:
        while not self._stop:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.gaps.append((now - self._last) * 1000)
            self._last = now

    def _watch(self, loop: int) -> None:
        assert self._stacks is not None
        while not self._stop:
            time.sleep(0.002)
            late = (time.perf_counter() - self._last) * 1000
            if late < self._stacks:
                continue
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            print(f"--- late by {late:.0f} ms", file=sys.stderr)
            for ident, frame in sys._current_frames().items():
                if ident != threading.get_ident():
                    where = "".join(traceback.format_stack(frame)[-4:])
                    print(f"[{'LOOP ' * (ident == loop)}{names.get(ident)}]\n{where}", file=sys.stderr)
            time.sleep(0.02)


def questions(count: int) -> list[dict[str, Any]]:
    """Texts, pictures and both by number; no two texts are equal, so that no answer is known already."""
    texts = [query.item.text for query in load_queries() if query.item.text]
    pictures = [str(path) for path in sorted(FILES.rglob("*.png"))]
    return [
        {"text": f"{texts[n % len(texts)]} {n}", "image": pictures[n % len(pictures)]} for n in range(count)
    ]


def nodes(count: int) -> list[Any]:
    """Documents for the background: two texts for every picture and every picture with text."""
    words = " ".join(path.read_text("utf-8") for path in sorted(FILES.rglob("*.md"))).split()
    pictures = [str(path) for path in sorted(FILES.rglob("*.png"))]
    made: list[Any] = []
    for n in range(count):
        text = " ".join(words[(17 * n) % 2000 :][:60]) + f" {time.perf_counter_ns()}"
        picture = pictures[n % len(pictures)]
        if n % 4 == 2:
            made.append(ImageNode(image_path=picture))
        elif n % 4 == 3:
            made.append(Node(text_resource={"text": text}, image_resource={"path": picture}))
        else:
            made.append(TextNode(text=text))
    return made


def fill(folder: Path) -> None:
    """Index the sample corpus, in a process of its own that goes away again."""
    index = MultimodalIndex.from_folder(FILES, embed_model=GMEEmbedding(MODEL), path=folder)
    index.vector_store.client.close()


# --- routes ---------------------------------------------------------------------------------------------


class OnLoop(BaseEmbedding):
    """LlamaIndex's interface on a model as its local integrations have it: coroutines call the model."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return GMEEmbedding(MODEL)._get_query_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return GMEEmbedding(MODEL)._get_text_embedding(text)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return GMEEmbedding(MODEL)._get_text_embeddings(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._get_text_embeddings(texts)


class InExecutor(Embeddings):
    """LangChain's interface on a model with nothing but the two methods it asks for."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return GMEEmbeddings(model=MODEL).embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        return GMEEmbeddings(model=MODEL).embed_query(text)


def llama_routes(folder: Path, asked: list[dict[str, Any]]) -> dict[str, Ask]:
    """LlamaIndex: the index's retriever and the embedding."""
    model = GMEEmbedding(MODEL)
    retriever = MultimodalIndex(path=folder, embed_model=model).as_retriever(similarity_top_k=10)

    def bundle(n: int, text: bool, image: bool) -> QueryBundle:
        return QueryBundle(asked[n]["text"] if text else "", asked[n]["image"] if image else None)

    return {
        "LlamaIndex retriever, text": lambda n: retriever.aretrieve(asked[n]["text"]),
        "LlamaIndex retriever, picture": lambda n: retriever.aretrieve(bundle(n, False, True)),
        "LlamaIndex retriever, fused": lambda n: retriever.aretrieve(bundle(n, True, True)),
        "LlamaIndex aget_query_embedding": lambda n: model.aget_query_embedding(asked[n]["text"]),
    }


def lang_routes(folder: Path, asked: list[dict[str, Any]]) -> dict[str, Ask]:
    """LangChain: the store, its retriever and the embeddings."""
    model = GMEEmbeddings(model=MODEL)
    store = UMRVectorStore(model, folder)
    retriever = store.as_retriever(search_kwargs={"k": 10})
    return {
        "LangChain asimilarity_search, text": lambda n: store.asimilarity_search(asked[n]["text"], 10),
        "LangChain asimilarity_search, picture": lambda n: store.asimilarity_search(
            {"image": asked[n]["image"]}, 10
        ),
        "LangChain asimilarity_search, fused": lambda n: store.asimilarity_search(asked[n], 10),
        "LangChain retriever ainvoke, fused": lambda n: retriever.ainvoke(asked[n]),
        "LangChain aembed_query": lambda n: model.aembed_query(asked[n]["text"]),
    }


def peer_routes(asked: list[dict[str, Any]]) -> dict[str, Ask]:
    """The frameworks' own stores over the same model, with embeddings that do no more than they must."""
    import chromadb
    from langchain_chroma import Chroma
    from llama_index.core import StorageContext
    from llama_index.vector_stores.chroma import ChromaVectorStore

    texts = [node.get_content() for node in nodes(300) if type(node) is TextNode]
    collection = chromadb.EphemeralClient().create_collection("peer")
    context = StorageContext.from_defaults(vector_store=ChromaVectorStore(chroma_collection=collection))
    index = VectorStoreIndex(
        [TextNode(text=text) for text in texts], storage_context=context, embed_model=OnLoop()
    )
    retriever, store = index.as_retriever(similarity_top_k=10), Chroma("peer2", InExecutor())
    store.add_texts(texts)
    return {
        "peer: LlamaIndex, model on the loop": lambda n: retriever.aretrieve(asked[n]["text"]),
        "peer: LangChain, model in the executor": lambda n: store.asimilarity_search(asked[n]["text"], 10),
    }


def cold_routes(folder: Path, asked: list[dict[str, Any]]) -> dict[str, Ask]:
    """Each loads the model with its first use; what has no async constructor is made in a thread."""
    opened: dict[str, Any] = {}
    lock = asyncio.Lock()

    async def once(make: Callable[[], Any]) -> Any:
        async with lock:
            if "it" not in opened:
                opened["it"] = await asyncio.to_thread(make)
        return opened["it"]

    async def llama(n: int) -> Any:
        return await (await once(lambda: MultimodalIndex(path=folder).as_retriever())).aretrieve(
            asked[n]["text"]
        )

    async def lang(n: int) -> Any:
        return await (await once(lambda: UMRVectorStore(path=folder))).asimilarity_search(asked[n]["text"])

    gme, gmes = GMEEmbedding(MODEL), GMEEmbeddings(model=MODEL)
    return {
        "LlamaIndex aget_query_embedding": lambda n: gme.aget_query_embedding(asked[n]["text"]),
        "LlamaIndex MultimodalIndex(path)": llama,
        "LangChain aembed_query": lambda n: gmes.aembed_query(asked[n]["text"]),
        "LangChain UMRVectorStore(path)": lang,
    }


# --- measuring ------------------------------------------------------------------------------------------


async def measure(ask: Ask, count: int, background: Background | None, stacks: float | None) -> Round:
    """What happens on the loop while `count` queries (and the background) run."""
    await asyncio.sleep(0.05)
    began = time.perf_counter()
    async with Heartbeat(stacks) as heart:
        work = [ask(n) for n in range(count)]
        if background is not None:
            work.append(background())
        await asyncio.gather(*work)
    return {
        "gaps": heart.gaps,
        "collection": max(heart.collections, default=0.0),
        "seconds": time.perf_counter() - began,
    }


def report_of(name: str, rounds: list[Round]) -> dict[str, Any]:
    """Largest gap of every round and the histogram of all gaps; prints one line of the table."""
    largest = [round(max(each["gaps"]), 1) for each in rounds]
    every = [gap for each in rounds for gap in each["gaps"]]
    found = {
        "largest_gap_ms": largest,
        "largest_collection_ms": [round(each["collection"], 1) for each in rounds],
        "median_ms": round(median(largest), 1),
        "most_ms": max(largest),
        "seconds": round(median(each["seconds"] for each in rounds), 2),
        "histogram_ms": {
            f"{low}-{high}": sum(low < gap <= high for gap in every)
            for low, high in pairwise((0, *BINS, math.inf))
        },
    }
    collected = f"collections {found['largest_collection_ms']}" if max(found["largest_collection_ms"]) else ""
    print(
        f"{name:60}{found['median_ms']:8.1f}{found['most_ms']:8.1f}{found['seconds']:7.2f} s  {largest} "
        f"{collected}",
        flush=True,
    )
    return found


async def warm(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All warm routes: idle, beside the background, and beside it with a frozen heap."""
    asked = questions(arguments.queries)
    model, on_loop, in_executor = GMEEmbedding(MODEL), OnLoop(), InExecutor()
    routes = llama_routes(folder, asked) | lang_routes(folder, asked) | peer_routes(asked)

    def background(name: str) -> Background:
        made = nodes(arguments.background)  # made now, not while the heart beats
        texts = [TextNode(text=node.get_content() or node.node_id) for node in made]
        if name.startswith("peer: LlamaIndex"):
            return partial(on_loop.acall, texts)
        if name.startswith("peer"):
            return partial(in_executor.aembed_documents, [node.text for node in texts])
        return partial(model.aembed_nodes, made)

    results: dict[str, Any] = {}
    for mode in ("idle", "embedding", "embedding, frozen"):
        for name, ask in routes.items():
            if arguments.only not in name:
                continue
            await asyncio.gather(*(ask(n) for n in range(8)))
            if mode == "embedding, frozen":
                gc.collect()
                gc.freeze()
            rounds = []
            for _ in range(arguments.rounds):
                beside = None if mode == "idle" else background(name)
                rounds.append(await measure(ask, arguments.queries, beside, arguments.stacks))
            gc.unfreeze()
            results[f"{name} ({mode})"] = report_of(f"{name} ({mode})", rounds)
    return results


def cold(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cold routes, each round in a process of its own."""
    results = {}
    for name in cold_routes(folder, []):
        if arguments.only not in name:
            continue
        command = [sys.executable, __file__, "--cold", name, "--db", str(folder)]
        command += ["--queries", str(arguments.queries)]
        if arguments.stacks is not None:
            command += ["--stacks", str(arguments.stacks)]
        rounds = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(arguments.rounds)
        ]
        results[f"{name} (cold)"] = report_of(f"{name} (cold)", rounds)
    return results


async def _cold(arguments: argparse.Namespace) -> Round:
    ask = cold_routes(arguments.db, questions(arguments.queries))[arguments.cold]
    assert "torch" not in sys.modules
    return await measure(ask, arguments.queries, None, arguments.stacks)


def main() -> None:
    """Index the sample corpus, measure every route, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--background", type=int, default=300, help="nodes embedded beside the queries")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", default="", help="routes whose name holds this")
    parser.add_argument("--no-cold", action="store_true")
    parser.add_argument("--no-warm", action="store_true")
    parser.add_argument("--stacks", type=float, metavar="MS")
    parser.add_argument("--db", type=Path, help="folder of the index; a temporary one by default")
    parser.add_argument("--cold", help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("umr_plugins").setLevel(logging.ERROR)
    if arguments.fill:
        fill(arguments.db)
        return
    if arguments.cold is not None:
        print(json.dumps(asyncio.run(_cold(arguments))))
        return
    folder = arguments.db or Path(tempfile.mkdtemp()) / "db"
    if not folder.exists():
        subprocess.run([sys.executable, __file__, "--fill", "--db", str(folder)], check=True)
    print(f"{'largest gap in ms':60}{'median':>8}{'most':>8}{'time':>9}  every round", flush=True)
    routes = {} if arguments.no_cold else cold(arguments, folder)
    if not arguments.no_warm:
        routes |= asyncio.run(warm(arguments, folder))
    import torch

    report = {
        "arguments": {name: getattr(arguments, name) for name in ("queries", "background", "rounds")},
        "model": MODEL,
        "routes": routes,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {
            name: version(name)
            for name in ("torch", "chromadb", "llama-index-core", "langchain-core", "langchain-chroma")
        }
        | {"python": platform.python_version()},
        "switch_interval_ms": sys.getswitchinterval() * 1000,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
