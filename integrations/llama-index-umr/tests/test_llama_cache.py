"""Vectors in a key-value store: the key tells texts, pictures, models and roles apart."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import numpy as np
import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import ImageNode, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from llama_nodes import kinds, png, save

from umr_plugins.errors import BatchError
from umr_plugins.testing import FakeEncoder


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


def documents(encoder: FakeEncoder) -> int:
    return sum(len(items) for role, items, _ in encoder.calls if role == "document")


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_second_run_of_a_pipeline_embeds_nothing_again(
    encoder: FakeEncoder, tmp_path: Path, way: str
) -> None:
    cache = SimpleKVStore()
    found = []
    for _ in range(2):
        gme = GMEEmbedding(encoder=encoder, embeddings_cache=cache)
        steps = IngestionPipeline(transformations=[gme], disable_cache=True)
        nodes = [kind.node for kind in kinds(tmp_path)]
        out = steps.run(nodes=nodes) if way == "sync" else asyncio.run(steps.arun(nodes=nodes))
        found.append([node.embedding for node in out])
        cache = SimpleKVStore.from_dict(cache.to_dict())  # as a file would keep it
    assert documents(encoder) == 13
    assert found[0] == found[1]


def test_every_way_to_embed_a_document_uses_the_cache(encoder: FakeEncoder, tmp_path: Path) -> None:
    gme = GMEEmbedding(encoder=encoder, embeddings_cache=SimpleKVStore())
    plain = GMEEmbedding(encoder=FakeEncoder())
    photo = str(save(tmp_path, 1))
    for _ in range(2):
        assert gme.get_text_embedding("a") == plain.get_text_embedding("a")
        assert gme.get_text_embedding_batch(["a", "b"]) == plain.get_text_embedding_batch(["a", "b"])
        assert gme.get_image_embedding(photo) == plain.get_image_embedding(photo)
        assert gme.get_fused_embedding("a", photo) == plain.get_fused_embedding("a", photo)
        assert asyncio.run(gme.aget_text_embedding("b")) == plain.get_text_embedding("b")
    assert documents(encoder) == 4


def test_another_text_picture_or_model_is_another_key(encoder: FakeEncoder, tmp_path: Path) -> None:
    cache = SimpleKVStore()
    gme = GMEEmbedding(encoder=encoder, embeddings_cache=cache)
    photo = save(tmp_path, 1)
    first = [gme.get_image_embedding(str(photo)), gme.get_fused_embedding("a", str(photo))]
    photo.write_bytes(png(2))
    second = [gme.get_image_embedding(str(photo)), gme.get_fused_embedding("b", str(photo))]
    assert first[0] != second[0]
    assert first[1] != second[1]
    other = FakeEncoder(name="other")
    GMEEmbedding(encoder=other, embeddings_cache=cache).get_image_embedding(str(photo))
    assert documents(other) == 1


def test_a_query_never_gets_the_vector_of_a_document(encoder: FakeEncoder) -> None:
    gme = GMEEmbedding(encoder=encoder, embeddings_cache=SimpleKVStore())
    gme.get_text_embedding("same")
    gme.get_query_embedding("same")
    assert [role for role, _, _ in encoder.calls] == ["document", "query"]


def test_bad_items_are_named_by_their_place_among_all(encoder: FakeEncoder) -> None:
    gme = GMEEmbedding(encoder=encoder, embeddings_cache=SimpleKVStore())
    gme.get_text_embedding("known")
    with pytest.raises(BatchError) as caught:
        gme.get_text_embedding_batch(["known", "fine", "", "poison", "known"])
    assert [error.index for error in caught.value.errors] == [2, 3]
    nodes = [TextNode(text="known"), ImageNode(id_="gone", image_path="gone.png"), TextNode(text="new")]
    kept = gme.embed_nodes(nodes, on_error="skip")
    assert [node.get_content() for node in kept] == ["known", "new"]
    expected = [GMEEmbedding(encoder=FakeEncoder()).get_text_embedding(text) for text in ("known", "new")]
    assert [node.embedding for node in kept] == expected


def test_an_index_works_with_a_cached_model(encoder: FakeEncoder, tmp_path: Path) -> None:
    gme = GMEEmbedding(encoder=encoder, embeddings_cache=SimpleKVStore())
    for name in ("one", "two"):
        index = MultimodalIndex([TextNode(text="a", id_="a")], embed_model=gme, path=tmp_path / name)
        assert index.as_retriever().retrieve("a")[0].score == pytest.approx(1.0, abs=1e-5)
        index.vector_store.close()
    assert documents(encoder) == 1


def test_the_cache_is_neither_dumped_nor_pickled(encoder: FakeEncoder) -> None:
    cache = SimpleKVStore()
    gme = GMEEmbedding(encoder=encoder, embeddings_cache=cache)
    gme.get_text_embedding("a")
    assert gme.to_dict()["embeddings_cache"] is None
    again = pickle.loads(pickle.dumps(gme))
    np.testing.assert_array_equal(again.get_text_embedding("a"), gme.get_text_embedding("a"))
    assert again.model_copy()._vectors is None
    assert gme.model_copy()._vectors is cache


def test_another_instruction_is_another_key(encoder: FakeEncoder) -> None:
    cached = GMEEmbedding(encoder=encoder, embeddings_cache=SimpleKVStore()).encoder
    for instruction in (None, "one", "two", "one"):
        cached.encode_documents(["a"], instruction)
    assert documents(encoder) == 3
