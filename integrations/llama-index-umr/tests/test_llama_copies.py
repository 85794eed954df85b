"""Pickles, deep copies, dumps and persisted storage of everything that LlamaIndex may want to copy."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.node_parser import (
    HierarchicalNodeParser,
    MarkdownNodeParser,
    SentenceSplitter,
    TokenTextSplitter,
)
from llama_index.core.schema import BaseNode, Document, ImageDocument, TextNode, TransformComponent
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import KeepPictures, MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import kinds, save

from umr_plugins.errors import InputError
from umr_plugins.testing import FakeEncoder

Copy = Callable[[Any], Any]
COPIES: dict[str, Copy] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
    "dict": lambda thing: type(thing).from_dict(json.loads(json.dumps(thing.to_dict()))),
}


@pytest.fixture
def gme() -> GMEEmbedding:
    return GMEEmbedding(encoder=FakeEncoder(dim=16))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    "parser",
    [
        SentenceSplitter(chunk_size=30, chunk_overlap=3),
        TokenTextSplitter(chunk_size=30, chunk_overlap=3),
        HierarchicalNodeParser.from_defaults(chunk_sizes=[300, 60]),
    ],
    ids=lambda parser: parser.class_name(),
)
def test_a_copy_of_keep_pictures_splits_as_the_first(
    parser: TransformComponent, way: str, tmp_path: Path
) -> None:
    words = " ".join(f"Word{number} is here. Second sentence of it." for number in range(90))

    def split(step: KeepPictures) -> list[tuple[str, str]]:
        documents: list[BaseNode] = [
            Document(text=words),
            ImageDocument(text=words, image_path=str(save(tmp_path, 1))),
        ]
        return [(type(node).__name__, node.get_content()) for node in step(documents)]

    step = KeepPictures(parser)
    if way == "dict" and not isinstance(parser, SentenceSplitter | TokenTextSplitter):
        data = json.loads(json.dumps(step.to_dict()))
        with pytest.raises(InputError, match="pass it as"):
            KeepPictures.from_dict(data)
        again = KeepPictures.from_dict(data, parser=parser)
    else:
        again = COPIES[way](step)
    assert type(again.parser) is type(parser)
    assert split(again) == split(step)
    assert len(split(again)) > 2


class Own(TransformComponent):
    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        return nodes


def test_a_parser_that_no_dict_holds_is_asked_for() -> None:
    for parser in (
        Own(),
        MarkdownNodeParser(),
        SentenceSplitter(id_func=lambda number, document: f"{document.node_id}-{number}"),
    ):
        data = KeepPictures(parser).to_dict()
        with pytest.raises(InputError, match="pass it as"):
            KeepPictures.from_dict(data)
        assert KeepPictures.from_dict(data, parser=parser).parser is parser


@pytest.mark.parametrize("way", [*COPIES, "copy"])
def test_a_copy_of_a_store_in_a_folder_is_the_same_store(gme: GMEEmbedding, tmp_path: Path, way: str) -> None:
    store = UMRVectorStore(gme, path=tmp_path / "db", collection="mine")
    store.add(gme.embed_nodes([TextNode(id_="x", text="a")]))
    again = copy.copy(store) if way == "copy" else COPIES[way](store)
    assert [node.node_id for node in again.get_nodes()] == ["x"]
    again.add(gme.embed_nodes([TextNode(id_="y", text="b")]))
    assert [node.node_id for node in store.get_nodes()] == ["x", "y"]
    if way != "dict":  # which has no model, and a fake one can't be made from a name
        assert again.embedding.get_text_embedding("a") == gme.get_text_embedding("a")
    again.close()
    store.close()


@pytest.mark.parametrize("way", COPIES)
def test_a_store_in_memory_does_not_lose_its_rows_in_silence(gme: GMEEmbedding, way: str) -> None:
    store = UMRVectorStore(gme)
    store.add(gme.embed_nodes([TextNode(text="a")]))
    with pytest.raises(InputError, match="path="):
        COPIES[way](store)
    if way != "dict":
        with pytest.raises(InputError, match="path="):
            COPIES[way](MultimodalIndex.from_vector_store(store, embed_model=gme).as_retriever())


def test_a_store_under_a_relative_path_is_found_from_another_folder(
    gme: GMEEmbedding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = UMRVectorStore(gme, path="db")
    store.add(gme.embed_nodes([TextNode(id_="x", text="a")]))
    dump = pickle.dumps(store)
    store.close()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(dump)
    assert [node.node_id for node in again.get_nodes()] == ["x"]
    again.close()


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copy_of_a_retriever_finds_the_same(gme: GMEEmbedding, tmp_path: Path, way: str) -> None:
    given = kinds(tmp_path)
    index = MultimodalIndex([kind.node for kind in given], embed_model=gme, path=tmp_path / "db")
    retriever = index.as_retriever(similarity_top_k=3)
    again = COPIES[way](retriever)
    for kind in given:
        query = gme.as_query(kind.item.text, kind.item.image)  # type: ignore[arg-type]
        expected = [(hit.node_id, hit.score) for hit in retriever.retrieve(query)]
        assert [(hit.node_id, hit.score) for hit in again.retrieve(query)] == expected
        assert expected[0][0] == kind.name
    again._vector_store.close()
    index.vector_store.close()


def test_a_persisted_storage_context_opens_our_store_again(gme: GMEEmbedding, tmp_path: Path) -> None:
    store = UMRVectorStore(gme, path=tmp_path / "db")
    storage = StorageContext.from_defaults(vector_store=store)
    index = MultimodalIndex([TextNode(id_="x", text="a")], embed_model=gme, storage_context=storage)
    storage.persist(str(tmp_path / "kept"))
    store.close()
    again = StorageContext.from_defaults(
        persist_dir=str(tmp_path / "kept"), vector_store=UMRVectorStore(gme, path=tmp_path / "db")
    )
    stock = load_index_from_storage(again, embed_model=gme)
    assert type(stock) is VectorStoreIndex  # as the README says
    assert [hit.node_id for hit in stock.as_retriever().retrieve("a")] == ["x"]
    struct = again.index_store.get_index_struct(index.index_id)
    mine = MultimodalIndex(index_struct=struct, storage_context=again)
    assert [hit.node_id for hit in mine.as_retriever().retrieve("a")] == ["x"]
    again.vector_store.close()
