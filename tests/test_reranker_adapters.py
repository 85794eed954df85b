"""Both adapters over a true checkpoint: what they judge equals `Reranker` on the same items."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_umr import MLLMReranker
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.mllm_rerank import MLLMRerank
from PIL import Image

from umr_plugins.reranker import Reranker
from umr_plugins.types import Item

FIRST = [0.4, 0.3, 0.2, 0.1]


@pytest.fixture
def picture(tmp_path: Path, photo: Image.Image) -> Path:
    photo.resize((112, 84)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def expected(qwen2_vl_folder: Path, picture: Path) -> dict[int, float]:
    """Score by place: a text, a picture, a picture with its text, and a picture that is gone."""
    gone = picture.with_name("gone.png")
    items = [Item("a river"), Item(image=picture), Item("a caption", picture), Item(image=gone)]
    reranker = Reranker(qwen2_vl_folder, dtype="float32")
    ranked = reranker.rank(Item("a fox", picture), items, first_stage=FIRST)
    assert [each.index for each in ranked if each.error] == [3]
    return {each.index: each.score for each in ranked}


def test_llama_index(qwen2_vl_folder: Path, picture: Path, expected: dict[int, float]) -> None:
    nodes = [
        TextNode(text="a river", id_="0"),
        ImageNode(image_path=str(picture), id_="1"),
        ImageNode(image_path=str(picture), text="a caption", id_="2"),
        ImageNode(image_path=str(picture.with_name("gone.png")), id_="3"),
    ]
    given = [NodeWithScore(node=node, score=score) for node, score in zip(nodes, FIRST, strict=True)]
    rerank = MLLMRerank(str(qwen2_vl_folder), dtype="float32", top_n=4, roots=[picture.parent])
    query = QueryBundle("a fox", image_path=str(picture))
    found = rerank.postprocess_nodes(given, query)
    assert {int(each.node_id): each.score for each in found} == pytest.approx(expected, abs=1e-5)
    again = asyncio.run(rerank.apostprocess_nodes(given, query))
    assert [(each.node_id, each.score) for each in again] == [(each.node_id, each.score) for each in found]


def test_langchain(qwen2_vl_folder: Path, picture: Path, expected: dict[int, float]) -> None:
    documents = [
        Document("a river", id="0"),
        Document("", id="1", metadata={"image": str(picture)}),
        Document("a caption", id="2", metadata={"image": str(picture)}),
        Document("", id="3", metadata={"image": str(picture.with_name("gone.png"))}),
    ]
    rerank = MLLMReranker(
        model=str(qwen2_vl_folder), dtype="float32", top_n=4, roots=[picture.parent], weight=None
    )
    request = {"query": {"text": "a fox", "image": str(picture)}, "documents": documents, "scores": FIRST}
    found = rerank.invoke(request)
    scores = {
        int(each.id or 0): FIRST[int(each.id or 0)] + each.metadata["relevance_score"]
        for each in found
        if each.metadata["relevance_score"] is not None
    }
    assert scores == pytest.approx({place: expected[place] for place in (0, 1, 2)}, abs=1e-5)
    assert [each.id for each in found if "rerank_error" in each.metadata] == ["3"]
    again = asyncio.run(rerank.ainvoke(request))
    assert [each.id for each in again] == [each.id for each in found]
