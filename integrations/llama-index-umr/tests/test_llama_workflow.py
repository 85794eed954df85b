"""`RetrieveRerankAnswer`: what the LLM is shown, and what comes back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.llms import MockLLM
from llama_index.core.llms.mock import MockLLMWithChatMemoryOfLastCall
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import BaseNode, ImageNode, MediaResource, Node, TextNode
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from llama_index.postprocessor.mllm_rerank import JudgedNode, MLLMRerank, RetrieveRerankAnswer
from llama_nodes import png, save
from llama_talk import seen
from PIL import Image

from umr_plugins.errors import BatchError, InputError
from umr_plugins.testing import FakeEncoder, FakeReranker


@pytest.fixture
def llm() -> MockLLMWithChatMemoryOfLastCall:
    return MockLLMWithChatMemoryOfLastCall(is_chat_model=True)


@pytest.fixture
def nodes(tmp_path: Path) -> list[BaseNode]:
    return [
        TextNode(id_="text", text="a red boat", metadata={"place": "Delft"}),
        ImageNode(id_="captioned", text="red", image_path=str(save(tmp_path, 1))),
        Node(
            id_="fused",
            text_resource=MediaResource(text="boat and more"),
            image_resource=MediaResource(path=save(tmp_path, 2)),
        ),
        ImageNode(id_="picture", image_path=str(save(tmp_path, 3))),
    ]


def make(nodes: list[BaseNode], llm: Any, **options: Any) -> RetrieveRerankAnswer:
    index = MultimodalIndex(nodes, embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64)))
    rerank = MLLMRerank(top_n=4, weight="pure", reranker=FakeReranker())
    return RetrieveRerankAnswer(index.as_retriever(similarity_top_k=9), rerank, llm, **options)


def shown(llm: MockLLMWithChatMemoryOfLastCall) -> list[str]:
    """The user's message, block by block; pictures as their size."""
    assert llm.last_chat_messages is not None
    system, user = llm.last_chat_messages
    assert (system.role, user.role) == (MessageRole.SYSTEM, MessageRole.USER)
    return seen(user)


async def test_the_llm_sees_every_text_and_picture_under_its_number(
    nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.png"
    Image.new("RGB", (30, 20), "red").save(asked)
    response = await make(nodes[:3], llm).run(question="red boat", image=asked)
    assert response.source_nodes[0].node_id == "text"
    blocks = shown(llm)
    assert blocks[:2] == ["Document 1", "place: Delft\n\na red boat"]
    captioned = blocks.index("red")
    fused = blocks.index("boat and more")
    assert blocks[captioned + 1] == blocks[fused + 1] == "<8x6>"
    assert [block for block in blocks if block.startswith("Document ")] == [
        "Document 1",
        "Document 2",
        "Document 3",
    ]
    assert blocks[-3:] == ["Question", "red boat", "<30x20>"]
    assert len(blocks) == 2 + 3 + 3 + 3


async def test_the_answer_comes_with_its_sources(
    nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall
) -> None:
    response = await make(nodes, llm).run(question="red boat")
    assert "red boat" in response.response
    assert len(response.source_nodes) == 4
    assert all(isinstance(each, JudgedNode) for each in response.source_nodes)
    assert response.source_nodes[0].relevance == 1.0
    assert response.metadata["text"]["place"] == "Delft"


async def test_a_picture_alone_is_a_question(
    nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall, tmp_path: Path
) -> None:
    workflow = make(nodes, llm)
    for image in (tmp_path / "3.png", str(tmp_path / "3.png"), png(3)):
        response = await workflow.run(image=image)
        assert response.source_nodes[0].node_id == "picture"
        assert shown(llm)[:2] == ["Document 1", "<8x6>"]
        assert shown(llm)[-2:] == ["Question", "<8x6>"]


async def test_pictures_are_limited_in_number_and_size(
    nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall, tmp_path: Path
) -> None:
    asked = tmp_path / "3.png"
    response = await make(nodes, llm, max_pictures=1, max_side=4).run(question="red", image=asked)
    blocks = shown(llm)
    assert blocks[-1] == "<4x3>"
    assert blocks[:-1].count("<4x3>") == 1
    assert {"red", "boat and more", "place: Delft\n\na red boat"} <= set(blocks)
    none = await make(nodes, llm, max_pictures=0).run(question="red")
    # A picture without text is nothing that the LLM was shown, so it is no source.
    assert sorted(each.node_id for each in none.source_nodes) == ["captioned", "fused", "text"]
    assert len(response.source_nodes) >= 3


async def test_a_file_that_is_no_picture_never_reaches_the_llm(
    llm: MockLLMWithChatMemoryOfLastCall, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes: list[BaseNode] = [
        ImageNode(id_="stays", text="red", image_path=str(save(tmp_path, 1))),
        ImageNode(id_="goes", image_path=str(save(tmp_path, 2))),
    ]
    workflow = make(nodes, llm)
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_text("secret words")
    with caplog.at_level(logging.WARNING):
        response = await workflow.run(question="red")
    assert [each.node_id for each in response.source_nodes] == ["stays"]
    assert shown(llm) == ["Document 1", "red", "Question", "red"]
    assert "node goes" in caplog.text


async def test_any_postprocessor_will_do_and_nothing_found_is_no_answer(
    nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall
) -> None:
    workflow = make(nodes, llm)
    workflow.reranker = SimilarityPostprocessor(similarity_cutoff=0.99)
    response = await workflow.run(question="place: Delft\n\na red boat")
    assert [each.node_id for each in response.source_nodes] == ["text"]
    llm.reset_memory()
    response = await workflow.run(question="nothing like it")
    assert (response.response, response.source_nodes) == ("Empty Response", [])
    assert llm.last_chat_messages is None


async def test_bad_questions_are_refused(nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall) -> None:
    workflow = make(nodes, llm)
    for empty in ({}, {"question": " "}, {"query": "a typing mistake"}):
        with pytest.raises(InputError, match="run\\(question="):
            await workflow.run(**empty)
    for options, words in (
        ({"question": "red", "imag": "x.png"}, "a question has no imag; "),
        ({"question": 5}, "the question is a int"),
        ({"question": None}, "there is no question"),
    ):
        with pytest.raises(InputError, match=words):
            await workflow.run(**options)
    with pytest.raises(BatchError, match=r"gone\.png"):
        await workflow.run(question="red", image="gone.png")


async def test_neither_a_reranker_nor_an_llm_is_needed(
    nodes: list[BaseNode], llm: MockLLMWithChatMemoryOfLastCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = MultimodalIndex(nodes, embed_model=GMEEmbedding(encoder=FakeEncoder(dim=64)))
    retriever = index.as_retriever(similarity_top_k=9)
    response = await RetrieveRerankAnswer(retriever, llm=llm).run(question="red boat")
    assert len(response.source_nodes) == 4
    assert not any(isinstance(each, JudgedNode) for each in response.source_nodes)
    response = await RetrieveRerankAnswer(retriever, extractive=True).run(
        question="place: Delft\n\na red boat"
    )
    assert response.response.startswith("[1]\na red boat\n\n[2]")
    assert len(response.source_nodes) == 4
    monkeypatch.setattr(Settings, "_llm", None)
    with pytest.raises(InputError, match=r"Settings\.llm is not set"):
        RetrieveRerankAnswer(retriever)
    assert Settings._llm is None
    monkeypatch.setattr(Settings, "_llm", llm)
    llm.reset_memory()
    await RetrieveRerankAnswer(retriever).run(question="red boat")
    assert llm.last_chat_messages is not None


def test_an_llm_that_would_lose_pictures_is_refused(nodes: list[BaseNode]) -> None:
    with pytest.raises(InputError, match="is_chat_model"):
        make(nodes, MockLLM())
    with pytest.raises(InputError, match="max_pictures"):
        make(nodes, MockLLM(is_chat_model=True), max_pictures=-1)
