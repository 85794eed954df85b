"""Ten thousand nodes in one call."""

from __future__ import annotations

import numpy as np
import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode, TextNode
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore

from umr_plugins.testing import FakeEncoder

MANY = 10_000


@pytest.mark.slow
@pytest.mark.parametrize("way", ["index", "pipeline"])
def test_ten_thousand_nodes_in_one_call_are_all_found(way: str) -> None:
    encoder = FakeEncoder(dim=32)
    gme = GMEEmbedding(encoder=encoder)
    nodes: list[BaseNode] = [TextNode(id_=f"n{number}", text=f"text {number}") for number in range(MANY)]
    if way == "index":
        index = MultimodalIndex(nodes, embed_model=gme)
    else:
        store = UMRVectorStore(gme)
        IngestionPipeline(transformations=[gme], vector_store=store, disable_cache=True).run(nodes=nodes)
        index = MultimodalIndex.from_vector_store(store)
    assert sum(len(items) for _, items, _ in encoder.calls) == MANY
    names = [f"n{number}" for number in range(MANY)]
    assert index.vector_store.index.ids() == names
    expected = np.stack(
        [encoder._vector(items[at]) for _, items, _ in encoder.calls for at in range(len(items))]
    )
    np.testing.assert_allclose(index.vector_store.index.vectors(names), expected, atol=1e-6)
    retriever = index.as_retriever(similarity_top_k=1)
    for number in range(0, MANY, 487):
        [found] = retriever.retrieve(f"text {number}")
        assert (found.node_id, round(found.score or 0, 4)) == (f"n{number}", 1.0)
