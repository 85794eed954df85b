"""Engines and the workflow decode, render and shrink pictures beside the event loop, never on its thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import QueryBundle
from llama_index.core.utils import get_tokenizer
from llama_index.indices.umr import MultimodalIndex, blocks
from llama_index.postprocessor.mllm_rerank import MLLMRerank, RetrieveRerankAnswer
from llama_talk import Scripted, asked, index_of, materials

from umr_plugins.testing import FakeReranker


async def by_query(index: MultimodalIndex, picture: Path) -> None:
    engine = index.as_query_engine(Scripted("x"), similarity_top_k=9)
    await engine.aquery(QueryBundle("boat", image_path=str(picture)))


async def by_synthesis(index: MultimodalIndex, picture: Path) -> None:
    engine = index.as_query_engine(Scripted("x"), similarity_top_k=9, streaming=True)
    query = QueryBundle("boat", image_path=str(picture))
    response = await engine.asynthesize(query, await engine.aretrieve(query))
    assert [piece async for piece in response.async_response_gen()] == ["x "]  # type: ignore[union-attr]


async def by_chat(index: MultimodalIndex, picture: Path) -> None:
    engine = index.as_chat_engine(llm=Scripted("x", "search", "y"), similarity_top_k=9)
    await engine.achat("boat", image=picture)  # type: ignore[call-arg]
    await engine.achat("and more", image=picture)  # type: ignore[call-arg]


async def by_stream(index: MultimodalIndex, picture: Path) -> None:
    engine = index.as_chat_engine(llm=Scripted("x"), similarity_top_k=9)
    response = await engine.astream_chat("boat", image=picture)  # type: ignore[call-arg]
    assert [piece async for piece in response.async_response_gen()] == ["x "]


async def by_workflow(index: MultimodalIndex, picture: Path) -> None:
    rerank = MLLMRerank(reranker=FakeReranker())
    workflow = RetrieveRerankAnswer(index.as_retriever(similarity_top_k=9), rerank, Scripted("x"))
    await workflow.run(question="boat", image=picture)


@pytest.mark.parametrize("ask", [by_query, by_synthesis, by_chat, by_stream, by_workflow])
async def test_no_picture_is_made_and_no_token_counted_on_the_loops_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any
) -> None:
    threads: dict[str, set[int]] = {"picture": set(), "tokens": set()}
    make, tokenizer = blocks.as_jpeg, get_tokenizer()

    def recorded(*arguments: Any) -> bytes:
        threads["picture"].add(threading.get_ident())
        return make(*arguments)

    def counted(text: str) -> list[int]:
        threads["tokens"].add(threading.get_ident())
        return list(tokenizer(text))

    monkeypatch.setattr(blocks, "as_jpeg", recorded)
    monkeypatch.setattr("llama_index.indices.umr.memory.get_tokenizer", lambda: counted)
    await ask(index_of(materials(tmp_path)), asked(tmp_path))
    for kind, seen in threads.items():
        assert seen, kind
        assert threading.get_ident() not in seen, kind
