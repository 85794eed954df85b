"""`MultimodalIndex` over stores that are not ours, in query engines, and with the defaults of `Settings`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import MockEmbedding, QueryBundle, Settings, StorageContext
from llama_index.core.llms import MockLLM
from llama_index.core.schema import ImageNode, IndexNode, MetadataMode, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.embeddings.gme.nodes import node_picture
from llama_index.indices.umr import MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import Kind, kinds, save
from llama_stores import FlatStore

from umr_plugins.errors import FingerprintError, InputError
from umr_plugins.media.images import content_key
from umr_plugins.testing import FakeEncoder


@pytest.fixture
def gme() -> GMEEmbedding:
    return GMEEmbedding(encoder=FakeEncoder(dim=64))


def check(index: MultimodalIndex, given: list[Kind], gme: GMEEmbedding) -> None:
    retriever = index.as_retriever(similarity_top_k=1)
    for kind in given:
        query = gme.as_query(kind.item.text, kind.item.image)  # type: ignore[arg-type]
        [found] = retriever.retrieve(query)
        assert [node.node_id for node in asyncio.run(retriever.aretrieve(query))] == [found.node_id]
        assert found.node_id == kind.name
        assert type(found.score) is float
        assert found.node.get_content(MetadataMode.NONE) == kind.node.get_content(MetadataMode.NONE)
        picture = node_picture(found.node)
        assert (picture is None) == (kind.item.image is None), kind.name
        if picture is not None and kind.item.image is not None:
            assert content_key(picture) == content_key(kind.item.image)


@pytest.mark.parametrize("use_async", [False, True])
def test_a_flat_store_keeps_every_kind(gme: GMEEmbedding, tmp_path: Path, use_async: bool) -> None:
    given = kinds(tmp_path)
    store = FlatStore()
    index = MultimodalIndex.from_vector_store(store, embed_model=gme)
    nodes = [kind.node for kind in given]
    if use_async:
        asyncio.run(index.ainsert_nodes(nodes))
    else:
        index.insert_nodes(nodes)
    check(index, given, gme)
    check(MultimodalIndex.from_vector_store(store, embed_model=gme), given, gme)
    index.delete_ref_doc("document-fused")
    assert "document-fused" not in store.rows
    assert len(store.rows) == len(given) - 1


def test_the_simple_store_keeps_every_kind(gme: GMEEmbedding, tmp_path: Path) -> None:
    given = kinds(tmp_path)
    index = MultimodalIndex.from_vector_store(SimpleVectorStore(), embed_model=gme)
    index.insert_nodes([kind.node for kind in given])
    check(index, given, gme)


def test_the_simple_store_opens_again_with_its_docstore(gme: GMEEmbedding, tmp_path: Path) -> None:
    given = kinds(tmp_path)
    storage = StorageContext.from_defaults()
    index = MultimodalIndex([kind.node for kind in given], embed_model=gme, storage_context=storage)
    storage.persist(str(tmp_path / "kept"))
    again = StorageContext.from_defaults(persist_dir=str(tmp_path / "kept"))
    struct = again.index_store.get_index_struct(index.index_id)
    check(MultimodalIndex(index_struct=struct, embed_model=gme, storage_context=again), given, gme)
    with pytest.raises(InputError, match="docstore"):
        MultimodalIndex.from_vector_store(again.vector_store, embed_model=gme)


def test_a_query_engine_answers_a_query_with_a_picture(gme: GMEEmbedding, tmp_path: Path) -> None:
    photo = save(tmp_path, 1)
    index = MultimodalIndex(
        [TextNode(text="words", id_="t"), ImageNode(image_path=str(photo), id_="i")], embed_model=gme
    )
    engine = index.as_query_engine(llm=MockLLM(is_chat_model=True), similarity_top_k=1)
    query = QueryBundle("", image_path=str(photo))
    assert [node.node_id for node in engine.query(query).source_nodes] == ["i"]
    assert [node.node_id for node in asyncio.run(engine.aquery("words")).source_nodes] == ["t"]


def test_objects_behind_index_nodes_are_returned(gme: GMEEmbedding) -> None:
    whole = TextNode(text="the whole table", id_="whole")
    index = MultimodalIndex(objects=[IndexNode(text="summary", index_id="table", obj=whole)], embed_model=gme)
    assert index.as_retriever().retrieve("summary")[0].node_id == "whole"


def test_the_default_model_is_gme(monkeypatch: pytest.MonkeyPatch) -> None:
    import umr_plugins.embedder

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        umr_plugins.embedder, "shared_embedder", lambda **options: asked.append(options) or FakeEncoder()
    )
    monkeypatch.setattr(Settings, "_embed_model", None)
    index = MultimodalIndex([TextNode(text="a")])
    assert {options["model"] for options in asked} == {"Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"}
    assert index.as_retriever().retrieve("a")[0].score == pytest.approx(1.0, abs=1e-5)


def test_settings_are_followed_or_refused(gme: GMEEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_embed_model", gme)
    assert MultimodalIndex([TextNode(text="a")])._embed_model is gme
    monkeypatch.setattr(Settings, "_embed_model", MockEmbedding(embed_dim=3))
    with pytest.raises(InputError, match=r"Settings\.embed_model is MockEmbedding"):
        MultimodalIndex([TextNode(text="a")])
    with pytest.raises(InputError, match="embed_model is MockEmbedding"):
        MultimodalIndex([TextNode(text="a")], embed_model=MockEmbedding(embed_dim=3))


def test_a_folder_brings_its_own_model(
    gme: GMEEmbedding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import umr_plugins.embedder

    recorded = FakeEncoder(dim=64)
    recorded.name = "umr-tiny"
    monkeypatch.setattr(umr_plugins.embedder, "shared_embedder", lambda **options: recorded)
    monkeypatch.setattr(Settings, "_embed_model", None)
    made = MultimodalIndex(
        [TextNode(text="a")], path=tmp_path / "db", embed_model=GMEEmbedding(encoder=recorded)
    )
    made.vector_store.close()
    again = MultimodalIndex(path=tmp_path / "db")
    assert again._embed_model.model_name == "umr-tiny"
    assert again.as_retriever().retrieve("a")[0].score == pytest.approx(1.0, abs=1e-5)
    again.vector_store.close()


def test_a_store_of_another_model_is_refused(gme: GMEEmbedding) -> None:
    store = UMRVectorStore(gme)
    store.add(gme.embed_nodes([TextNode(text="a")]))
    other = GMEEmbedding(encoder=FakeEncoder(dim=64, name="other"))
    with pytest.raises(FingerprintError):
        MultimodalIndex.from_vector_store(store, embed_model=other)
