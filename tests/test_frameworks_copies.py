"""Every configured object of both adapters, copied and pickled: it does the same, or says what to do."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_umr import GMEEmbeddings, MLLMReranker, RerankingRetriever
from langchain_umr import UMRVectorStore as LangStore
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import KeepPictures, MultimodalIndex
from llama_index.postprocessor.mllm_rerank import MLLMRerank
from llama_index.vector_stores.umr import UMRVectorStore as LlamaStore

from umr_plugins.demo import FILES
from umr_plugins.errors import InputError
from umr_plugins.testing import FakeEncoder, FakeReranker

TEXTS = ["a red kite", "a blue boat", "a kite over a boat"]
PICTURE = str(FILES / "pictures" / "camel.png")
Use = Callable[[Any], Any]

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "two pickles": lambda one: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(one)))),
}


def embed_llama(model: Any) -> Any:
    return [model.get_query_embedding("kite"), model.get_fused_embedding("camel", PICTURE)]


def embed_lang(model: Any) -> Any:
    return [model.embed_query("kite"), model.embed_documents([{"text": "camel", "image": PICTURE}])[0]]


def rerank_llama(reranker: Any) -> Any:
    nodes = [NodeWithScore(node=TextNode(id_=text, text=text), score=0.5) for text in TEXTS]
    found = reranker.postprocess_nodes(nodes, query_str="kite boat")
    return [(each.node.node_id, each.score) for each in found]


def rerank_lang(reranker: Any) -> Any:
    found = reranker.compress_documents([Document(text) for text in TEXTS], "kite boat")
    return [(document.page_content, document.metadata["relevance_score"]) for document in found]


def split(parser: Any) -> Any:
    made = parser([LlamaDocument(id_="long", text="A sentence of six words here. " * 20)])
    return [node.text for node in made]


def query_llama(store: Any) -> Any:
    vector = FakeEncoder(dim=32).encode_queries(["a blue boat"])[0].tolist()
    found = store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=2))
    return [(node.text, score) for node, score in zip(found.nodes, found.similarities, strict=True)]


def retrieve_llama(retriever: Any) -> Any:
    return [(each.node.text, each.score) for each in retriever.retrieve("a blue boat")]


def query_lang(store: Any) -> Any:
    return [
        (each.page_content, score) for each, score in store.similarity_search_with_score("a blue boat", 2)
    ]


def retrieve_lang(retriever: Any) -> Any:
    return [(each.page_content, each.metadata) for each in retriever.invoke("a blue boat")]


def judge(model: Any) -> Any:
    from langchain_core.decisions import Noul

    state = {"query": "a kite", "document": "a red kite"}
    return model.invoke({"state": state, "questions": {"fits": Noul(instructions="?")}}).nouls["fits"].noul


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[LlamaStore, LangStore]]:
    """Both stores on one folder with three rows."""
    encoder = FakeEncoder(dim=32)
    llama = LlamaStore(GMEEmbedding(encoder=encoder), path=tmp_path / "db")
    with LangStore.from_texts(TEXTS, GMEEmbeddings.from_encoder(encoder), path=tmp_path / "db") as lang:
        yield llama, lang
    llama.close()


def check(made: Any, use: Use, way: str) -> Any:
    """The copy does what the original does; an original that does nothing proves nothing."""
    expected = use(made)
    assert expected
    other = WAYS[way](made)
    assert type(other) is type(made)
    assert use(other) == expected
    return other


NEEDS_NO_STORE: dict[str, tuple[Callable[[], Any], Use]] = {
    "GMEEmbedding": (lambda: GMEEmbedding("umr-tiny", dim=64), embed_llama),
    "GMEEmbedding of an encoder": (
        lambda: GMEEmbedding(encoder=FakeEncoder(), instruction="Find it."),
        embed_llama,
    ),
    "MLLMRerank": (lambda: MLLMRerank(reranker=FakeReranker(), top_n=2), rerank_llama),
    "KeepPictures": (lambda: KeepPictures(SentenceSplitter(chunk_size=30, chunk_overlap=3)), split),
    "GMEEmbeddings": (lambda: GMEEmbeddings(model="umr-tiny", dim=64), embed_lang),
    "GMEEmbeddings of an encoder": (
        lambda: GMEEmbeddings.from_encoder(FakeEncoder(), instruction="Find it."),
        embed_lang,
    ),
    "MLLMReranker": (lambda: MLLMReranker(reranker=FakeReranker(), top_n=2), rerank_lang),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NEEDS_NO_STORE)
def test_components_do_the_same_when_copied(name: str, way: str) -> None:
    make, use = NEEDS_NO_STORE[name]
    made = make()
    other = check(made, use, way)
    assert getattr(other, "instruction", None) == getattr(made, "instruction", None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["LlamaIndex store", "LangChain store", "StoreRetriever", "RerankingRetriever"]
)
def test_what_has_a_folder_does_the_same_when_copied(
    stores: tuple[LlamaStore, LangStore], name: str, way: str
) -> None:
    llama, lang = stores
    reranker = MLLMReranker(reranker=FakeReranker())
    made, use = {
        "LlamaIndex store": (llama, query_llama),
        "LangChain store": (lang, query_lang),
        "StoreRetriever": (lang.as_retriever(search_kwargs={"k": 2}), retrieve_lang),
        "RerankingRetriever": (RerankingRetriever(base=lang, reranker=reranker, k=2), retrieve_lang),
    }[name]
    other = check(made, use, way)  # type: ignore[operator]
    if name == "LlamaIndex store" and other is not made:
        other.close()
    if name == "LangChain store" and other is not made:
        other.close()


@pytest.mark.parametrize("way", WAYS)
def test_retrievers_of_an_index_do_the_same_when_copied(
    stores: tuple[LlamaStore, LangStore], way: str
) -> None:
    index = MultimodalIndex.from_vector_store(stores[0])
    check(index.as_retriever(similarity_top_k=2), retrieve_llama, way)


def test_stores_in_memory_say_that_they_cannot_be_pickled() -> None:
    with LangStore.from_texts(TEXTS, GMEEmbeddings.from_encoder(FakeEncoder(dim=32))) as lang:
        llama = LlamaStore(GMEEmbedding(encoder=FakeEncoder(dim=32)))
        for store in (lang, llama, lang.as_retriever(), RerankingRetriever(base=lang)):
            with pytest.raises(InputError, match=r"in memory can't be pickled.*path="):
                pickle.dumps(store)
        llama.close()


@pytest.mark.skipif(
    importlib.util.find_spec("langchain_core.decisions") is None, reason="langchain-core before 1.8"
)
@pytest.mark.parametrize("way", WAYS)
def test_a_judge_does_the_same_when_copied(way: str) -> None:
    from langchain_umr import JudgeModel

    check(JudgeModel(reranker=MLLMReranker(reranker=FakeReranker())), judge, way)


@pytest.mark.parametrize("name", ["GMEEmbedding", "GMEEmbeddings", "GMEEmbeddings of an encoder"])
def test_embedders_give_the_same_vectors_in_a_spawned_process(name: str) -> None:
    make, use = NEEDS_NO_STORE[name]
    made = make()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        vectors = pool.submit(use, made).result(timeout=250)
    assert np.allclose(vectors, use(made), rtol=0, atol=1e-6)
