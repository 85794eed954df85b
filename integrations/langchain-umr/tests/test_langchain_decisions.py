"""`JudgeModel` where langchain-core has decision models, and a clear word where it has none."""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib
import importlib.util
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import langchain_umr
import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langchain_umr import MLLMReranker
from PIL import Image

from umr_plugins.errors import InputError, ItemError, MissingExtraError
from umr_plugins.testing import FakeReranker
from umr_plugins.types import Item

HAVE = importlib.util.find_spec("langchain_core.decisions") is not None
needs_decisions = pytest.mark.skipif(not HAVE, reason="langchain-core has decision models from 1.8 on")


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


BLOCK = {"type": "image", "base64": base64.b64encode(png()).decode(), "mime_type": "image/png"}
FITS = {"fits": {"type": "noul", "instructions": "Does the document show it?"}}


@pytest.fixture
def scorer() -> FakeReranker:
    return FakeReranker()


@pytest.fixture
def judge(scorer: FakeReranker) -> Any:
    return langchain_umr.JudgeModel(reranker=scorer)


def fits(judge: Any, query: Any, document: Any) -> float:
    answer = judge.invoke({"state": {"query": query, "document": document}, "questions": FITS})
    probability: float = answer.nouls["fits"].noul
    return probability


@pytest.mark.skipif(HAVE, reason="langchain-core has decision models")
def test_an_older_langchain_core_is_told_apart_from_a_wrong_name() -> None:
    with pytest.raises(MissingExtraError, match=r"installed is langchain-core 1\.\d+.*langchain-core>=1\.8"):
        from langchain_umr import JudgeModel  # noqa: F401
    with pytest.raises(ImportError, match="everything else"):
        importlib.import_module("langchain_umr.decisions")
    with pytest.raises(AttributeError, match="JudgeModle"):
        langchain_umr.JudgeModle  # noqa: B018
    assert "JudgeModel" not in langchain_umr.__all__, "import * must work"


@needs_decisions
def test_a_yes_no_question_is_answered_with_the_relevance(judge: Any, scorer: FakeReranker) -> None:
    from langchain_core.decisions import Noul, NoulCriteria

    asked = {
        "fits": Noul(instructions="Does it show it?"),
        "exact": Noul(instructions="Is it the same?", criteria=NoulCriteria(true="all words", false="few")),
    }
    answer = judge.invoke({"state": {"query": "red kite", "document": "a red boat"}, "questions": asked})
    assert {name: one.noul for name, one in answer.nouls.items()} == {"fits": 0.5, "exact": 0.5}
    assert answer.model == judge.model == "fake"
    assert scorer.calls == [
        (Item("red kite", instruction="Does it show it?"), [Item("a red boat")]),
        (Item("red kite", instruction="Is it the same?\nYes: all words\nNo: few"), [Item("a red boat")]),
    ]


@needs_decisions
@pytest.mark.parametrize(
    "document",
    [
        BLOCK,
        [{"type": "text", "text": "kite"}, BLOCK],
        HumanMessage(content=[{"type": "text", "text": "kite"}, BLOCK]),
        {"text": "kite", "image": png()},
        {"image": "red.png"},
        {"images": ["red.png", "blue.png"]},
        Document("kite", metadata={"image": "red.png"}),
    ],
)
def test_documents_with_pictures_of_every_form(scorer: FakeReranker, tmp_path: Path, document: Any) -> None:
    for color in ("red", "blue"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    judge = langchain_umr.JudgeModel(reranker=MLLMReranker(reranker=scorer, roots=tmp_path))
    assert fits(judge, [{"type": "text", "text": "anything"}, BLOCK], document) == 1.0
    assert fits(judge, "anything", document) == 0.0


@needs_decisions
def test_files_that_a_document_names_lie_below_a_root(
    judge: Any, scorer: FakeReranker, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    for document in (
        {"text": "kite", "image": str(secret)},
        {"images": [png(), str(secret)]},
        {"video": [str(secret)]},
        secret,
        Document("kite", metadata={"image": str(secret)}),
        Document("", metadata={"path": str(secret), "modality": "image"}),
    ):
        with pytest.raises(ItemError, match=r"the document: .*may not be opened.*roots"):
            fits(judge, "kite", document)
    with pytest.raises(ItemError, match=r"the query: .*may not be opened.*roots"):
        fits(judge, Document("", metadata={"image": str(secret)}), "kite")
    assert scorer.calls == []
    assert fits(judge, {"image": str(secret)}, BLOCK) == 1.0, "a query is the user's own"


@needs_decisions
def test_what_cannot_be_judged_is_an_error_and_no_probability(judge: Any) -> None:
    with pytest.raises(ItemError, match=r"the document: .*refuses poison"):
        fits(judge, "kite", "poison")
    for query, document, name in (("", "kite", "query"), ("kite", " ", "document")):
        with pytest.raises(ItemError, match=rf"the {name}: .*empty"):
            fits(judge, query, document)
    with pytest.raises(ItemError, match=r"the document: .*not followed"):
        fits(judge, "kite", [{"type": "image", "url": "https://example.org/a.png"}])


@needs_decisions
def test_other_questions_and_states_are_refused_by_name(judge: Any, scorer: FakeReranker) -> None:
    from langchain_core.decisions import Box, Choice, Noul, Score

    state = {"query": "kite", "document": "kite"}
    for question in (
        Score(instructions="how much", criteria=["little", "much"]),
        Choice(instructions="which", criteria={"a": None}),
        Box(instructions="where"),
    ):
        with pytest.raises(InputError, match=f"the question 'q' is a {type(question).__name__}.*only Noul"):
            judge.invoke({"state": state, "questions": {"q": question}})
    for wrong, message in (
        ({"q": Noul(instructions={"json": 1})}, "asked in words"),
        ({"q": Noul(instructions=" ")}, "asked in words"),
        ({"q": {"type": "noul", "instructions": "x", "criteria": {"true": [1]}}}, "asked in words"),
        ({"q": {"type": "maybe"}}, "the question 'q' is none of"),
        ({}, "no question"),
    ):
        with pytest.raises(InputError, match=message):
            judge.invoke({"state": state, "questions": wrong})
    for given in ("kite", {"query": "kite"}, {**state, "more": 1}, [state]):
        with pytest.raises(InputError, match=r"state must be \{\"query\""):
            judge.invoke({"state": given, "questions": FITS})
    assert scorer.calls == []


@needs_decisions
def test_it_is_named_after_its_reranker_and_loads_nothing_before_use() -> None:
    assert langchain_umr.JudgeModel().model == "Qwen/Qwen2-VL-2B-Instruct"
    assert langchain_umr.JudgeModel(reranker=MLLMReranker(model="some/model")).model == "some/model"
    assert langchain_umr.JudgeModel(model="mine", reranker=FakeReranker()).model == "mine"
    with pytest.raises(ValueError, match="rank"):
        langchain_umr.JudgeModel(reranker="some/model")
    with pytest.raises(ValueError, match="top_n"):
        langchain_umr.JudgeModel(top_n=3)


@needs_decisions
def test_copies_and_pickles_answer_alike(judge: Any) -> None:
    for other in (copy.deepcopy(judge), judge.model_copy(deep=True), pickle.loads(pickle.dumps(judge))):
        assert other == judge
        assert fits(other, "red kite", "a red boat") == 0.5


@needs_decisions
async def test_chains_batches_async_and_traces(judge: Any) -> None:
    class Recorder(BaseTracer):
        runs: list[Run]

        def _persist_run(self, run: Run) -> None:
            self.runs.append(run)

    recorder = Recorder()
    recorder.runs = []
    chain = (
        RunnableLambda(lambda text: {"state": {"query": "red kite", "document": text}, "questions": FITS})
        | judge
        | (lambda answer: answer.nouls["fits"].noul)
    )
    assert chain.batch(["a red boat", "red kite", "sand"]) == [0.5, 1.0, 0.0]
    assert await chain.ainvoke("a red boat", {"callbacks": [recorder]}) == 0.5
    run = next(one for one in recorder.runs[0].child_runs if one.run_type == "llm")
    assert run.extra["metadata"]["ls_provider"] == "umr"
    assert run.extra["metadata"]["ls_model_name"] == "fake"


@needs_decisions
async def test_async_does_not_block_the_loop() -> None:
    loop_ran = threading.Event()

    class Waiting(FakeReranker):
        def rank(self, *args: Any, **kwargs: Any) -> Any:
            assert loop_ran.wait(10), "the event loop stood still"
            return super().rank(*args, **kwargs)

    judge = langchain_umr.JudgeModel(reranker=Waiting())
    task = asyncio.create_task(judge.ainvoke({"state": {"query": "a", "document": "a"}, "questions": FITS}))
    await asyncio.sleep(0)
    loop_ran.set()
    assert (await task).nouls["fits"].noul == 1.0
