"""`MLLMReranker`: the same documents out as in, in a better order, whatever they hold."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from langchain_umr import MLLMReranker
from PIL import Image
from pydantic import ValidationError

from umr_plugins.errors import InputError, ItemError
from umr_plugins.testing import FakeReranker
from umr_plugins.types import Item, PageImage

ADDED = {"relevance_score", "rerank_model"}


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


def data_uri(color: str = "red") -> str:
    return "data:image/png;base64," + base64.b64encode(png(color)).decode()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for color in ("red", "blue"):
        (folder / f"{color}.png").write_bytes(png(color))
    return folder


@pytest.fixture
def judge() -> FakeReranker:
    return FakeReranker()


@pytest.fixture
def reranker(judge: FakeReranker, photos: Path) -> MLLMReranker:
    return MLLMReranker(reranker=judge, roots=photos)


@pytest.fixture
def mixed(photos: Path) -> list[Document]:
    """Text, picture, text with picture, and a picture in memory."""
    return [
        Document("a boat", id="boat", metadata={"n": 1, "tags": ["water"]}),
        Document("", id="blue", metadata={"image": "blue.png", "modality": "image"}),
        Document("a kite", id="fused", metadata={"image_uri": str(photos / "blue.png")}),
        Document("red kite", metadata={"nested": {"deep": [1, 2]}}),
        Document("", id="red", metadata={"image": data_uri("red")}),
    ]


def ids(found: list[Document]) -> list[str | None]:
    return [document.id for document in found]


def relevances(found: list[Document]) -> list[float | None]:
    return [document.metadata["relevance_score"] for document in found]


def own(document: Document) -> dict[str, Any]:
    return {key: value for key, value in document.metadata.items() if key not in ADDED}


class Recorder(BaseTracer):
    """Keeps the finished runs that have no parent."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


def tree(run: Run) -> Any:
    return (run.name, [tree(child) for child in run.child_runs])


def test_the_documents_are_the_same_and_only_their_order_changes(
    reranker: MLLMReranker, judge: FakeReranker, mixed: list[Document]
) -> None:
    before = copy.deepcopy(mixed)
    found = reranker.compress_documents(mixed, {"text": "red kite", "image": png("red")})
    assert ids(found) == [None, "red", "fused", "boat", "blue"]
    assert relevances(found) == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert mixed == before
    by_text = {(document.id, document.page_content): document for document in mixed}
    for document in found:
        given = by_text[(document.id, document.page_content)]
        assert document is not given
        assert document.metadata is not given.metadata
        assert own(document) == given.metadata
        assert document.metadata["rerank_model"] == "fake"
        assert type(document.metadata["relevance_score"]) is float
    [(_, judged)] = judge.calls
    assert [item.modality for item in judged] == ["text", "image", "fused", "text", "image"]


async def test_async_gives_the_same(reranker: MLLMReranker, mixed: list[Document]) -> None:
    found = reranker.compress_documents(mixed, "red kite")
    assert await reranker.acompress_documents(mixed, "red kite") == found
    assert await reranker.ainvoke({"query": "red kite", "documents": mixed}) == found


async def test_async_does_not_block_the_loop(mixed: list[Document]) -> None:
    loop_ran = threading.Event()

    class Waiting(FakeReranker):
        def rank(self, *args: Any, **kwargs: Any) -> Any:
            assert loop_ran.wait(10), "the event loop stood still"
            return super().rank(*args, **kwargs)

    reranker = MLLMReranker(reranker=Waiting())
    task = asyncio.create_task(reranker.acompress_documents(mixed[:1], "boat"))
    await asyncio.sleep(0)
    loop_ran.set()
    assert relevances(await task) == [1.0]


def test_top_n(judge: FakeReranker) -> None:
    documents = [Document(text) for text in ("a", "b", "c", "d", "e", "f kite")]
    assert MLLMReranker().top_n == 5
    for top_n, expected in ((None, 6), (1, 1), (2, 2), (9, 6)):
        found = MLLMReranker(reranker=judge, top_n=top_n).compress_documents(documents, "kite")
        assert len(found) == expected
        assert found[0].page_content == "f kite"
    for wrong in (0, -1, "many"):
        with pytest.raises(ValidationError, match="top_n"):
            MLLMReranker(top_n=wrong)  # type: ignore[arg-type]  # that is the mistake
    changed = MLLMReranker(reranker=judge)
    changed.top_n = 2
    assert len(changed.compress_documents(documents, "kite")) == 2
    with pytest.raises(ValidationError):
        changed.top_n = 0


def test_one_document_none_and_a_thousand(reranker: MLLMReranker, judge: FakeReranker) -> None:
    assert relevances(reranker.compress_documents([Document("kite")], "kite")) == [1.0]
    judge.calls.clear()
    assert reranker.compress_documents([], "kite") == []
    assert reranker.invoke({"query": "", "documents": ()}) == []
    assert judge.calls == []
    many = [Document("kite" if n % 100 == 7 else f"text {n}", id=str(n)) for n in range(1000)]
    everything = reranker.model_copy(update={"top_n": None}).compress_documents(many, "kite")
    best = [str(n) for n in range(1000) if n % 100 == 7]
    assert ids(everything) == best + [str(n) for n in range(1000) if str(n) not in best]
    assert len(judge.calls) == 1


def test_ties_keep_the_order_of_the_first_stage(reranker: MLLMReranker) -> None:
    texts = ["c kite", "a", "b kite", "d", "a kite"]
    found = reranker.compress_documents([Document(text) for text in texts], "kite")
    assert [one.page_content for one in found] == ["c kite", "b kite", "a kite", "a", "d"]


BLOCK = {"type": "image", "base64": base64.b64encode(png()).decode(), "mime_type": "image/png"}
QUERIES: dict[str, Any] = {
    "mapping": {"text": "kite", "image": png()},
    "item": Item("kite", png()),
    "blocks": [{"type": "text", "text": "kite"}, BLOCK],
    "message": HumanMessage(content=[{"type": "text", "text": "kite"}, BLOCK]),
    "document": Document("kite", metadata={"image": data_uri()}),
}


@pytest.mark.parametrize("form", QUERIES)
def test_queries_of_every_form(reranker: MLLMReranker, mixed: list[Document], form: str) -> None:
    query = QUERIES[form]
    found = reranker.compress_documents(mixed, query)
    assert ids(found)[:3] == ["fused", None, "red"]
    assert relevances(found) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert reranker.invoke({"query": query, "documents": mixed}) == found


def test_a_query_that_cannot_be_judged_is_one_clear_error(
    reranker: MLLMReranker, mixed: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(ItemError, match=r"the query: .*gone\.png: .*\[unreadable\]"):
        reranker.compress_documents(mixed, {"text": "kite", "image": str(tmp_path / "gone.png")})
    with pytest.raises(ItemError, match=r"the query: .*empty"):
        reranker.compress_documents(mixed, "  ")
    with pytest.raises(ItemError, match="not followed"):
        reranker.compress_documents(mixed, [{"type": "image", "url": "https://example.org/a.png"}])
    with pytest.raises(ItemError, match=r"the query: .*corrupt|the query: .*no picture"):
        reranker.compress_documents(mixed, {"image": b"no picture"})


def test_the_instruction_goes_with_the_query(judge: FakeReranker) -> None:
    reranker = MLLMReranker(reranker=judge, instruction="find the part")
    reranker.compress_documents([Document("kite")], "kite")
    reranker.compress_documents([Document("kite")], {"text": "kite", "instruction": "its own"})
    assert [query.instruction for query, _ in judge.calls] == ["find the part", "its own"]
    assert judge.calls[0][1][0].instruction is None


def test_what_cannot_be_judged_keeps_its_place(
    reranker: MLLMReranker, caplog: pytest.LogCaptureFixture
) -> None:
    documents = [
        Document("boat", id="0"),
        Document("  ", id="blank"),
        Document("poison", id="poison"),
        Document("kite", id="gone", metadata={"image": "gone.png"}),
        Document("kite", id="4", metadata={"rerank_error": "of an earlier run"}),
    ]
    before = copy.deepcopy(documents)
    with caplog.at_level(logging.WARNING):
        found = reranker.compress_documents(documents, "kite")
    assert ids(found) == ["4", "blank", "poison", "gone", "0"]
    assert relevances(found) == [1.0, None, None, None, 0.0]
    reasons = [document.metadata.get("rerank_error") for document in found]
    assert reasons[0] is None
    assert reasons[4] is None
    assert [
        reason is not None and word in reason
        for reason, word in zip(reasons[1:4], ("[empty]", "refuses poison", "gone.png"), strict=True)
    ] == [True] * 3
    assert documents == before
    [record] = caplog.records
    assert "3 of 5 documents" in record.getMessage()
    for document in reranker.model_copy(update={"top_n": 2}).compress_documents(documents, "kite"):
        assert document.id in ("4", "blank")


def test_only_unjudgeable_documents(reranker: MLLMReranker, judge: FakeReranker) -> None:
    found = reranker.compress_documents([Document(" ", id="a"), Document("", id="b")], "kite")
    assert (ids(found), relevances(found)) == (["a", "b"], [None, None])
    assert judge.calls == []


def test_first_stage_scores_of_the_metadata_count(judge: FakeReranker) -> None:
    documents = [
        Document("boat", id="near", metadata={"score": 0.9}),
        Document(" ", id="blank", metadata={"score": 0.95}),
        Document("red kite", id="relevant", metadata={"score": 0.1}),
        Document("red boat", id="half", metadata={"score": 0.5}),
    ]

    def order(given: list[Document] = documents, **options: Any) -> list[str | None]:
        return ids(MLLMReranker(reranker=judge, **options).compress_documents(given, "red kite"))

    assert order() == ["blank", "relevant", "half", "near"]
    assert order(weight=0.5) == ["blank", "near", "half", "relevant"]
    assert order(weight="pure") == ["blank", "relevant", "half", "near"]
    assert order(score_key=None) == ["relevant", "blank", "half", "near"]
    assert order(score_key="other") == ["relevant", "blank", "half", "near"]
    documents[3].metadata["score"] = None
    assert order(weight=0.5) == ["relevant", "blank", "half", "near"]
    step = MLLMReranker(reranker=judge, weight=0.5)
    given = {"query": "red kite", "documents": documents[:1] + documents[2:]}
    assert ids(step.invoke({**given, "scores": [0.1, 0.2, 0.9]})) == ["half", "relevant", "near"]
    with pytest.raises(InputError, match="scores needs one per document"):
        step.invoke({**given, "scores": [0.1]})
    for wrong in (-1, float("nan"), "all"):
        with pytest.raises(ValidationError, match="weight"):
            MLLMReranker(weight=wrong)  # type: ignore[arg-type]  # that is the mistake


# --- pictures that documents name -------------------------------------------------------------------------


def why(reranker: MLLMReranker, metadata: dict[str, Any], text: str = "kite") -> str | None:
    """Why a document with that metadata was not judged."""
    [found] = reranker.compress_documents([Document(text, metadata=metadata)], "kite")
    reason: str | None = found.metadata.get("rerank_error")
    return reason


def test_files_outside_the_roots_are_never_opened(
    reranker: MLLMReranker, judge: FakeReranker, photos: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    (photos / "link.png").symlink_to(secret)
    (photos / "outside").symlink_to(tmp_path)
    (tmp_path / "photos-not").mkdir()
    (tmp_path / "photos-not" / "red.png").write_bytes(png())
    names = [
        str(secret),
        f"file://{secret}",
        "../secret.png",
        str(photos / ".." / "secret.png"),
        "link.png",
        "outside/secret.png",
        str(tmp_path / "photos-not" / "red.png"),
        "file://host/red.png",
        "https://example.org/red.png",
        "red.png\0",
    ]
    for name in names:
        for key in ("image", "image_uri", "image_path"):
            assert "[unsupported]" in (why(reranker, {key: name}) or ""), name
        for modality in ("image", "fused"):
            assert "[unsupported]" in (why(reranker, {"path": name, "modality": modality}) or ""), name
            assert "[unsupported]" in (
                why(reranker, {"path": name, "page": 1, "modality": modality}) or ""
            ), name
    assert judge.calls == []
    with pytest.raises(ItemError, match="roots"):
        reranker.compress_documents([Document("kite")], Document("", metadata={"image": str(secret)}))
    nowhere = MLLMReranker(reranker=judge)
    assert "roots=[folder]" in (why(nowhere, {"image": str(photos / "red.png")}) or "")
    assert judge.calls == []


def test_files_below_a_root_are_judged(
    reranker: MLLMReranker, judge: FakeReranker, photos: Path, tmp_path: Path
) -> None:
    red = photos / "red.png"
    (photos / "inner.png").symlink_to(red)
    for name in (str(red), "red.png", f"file://{red}", "./red.png", "inner.png"):
        assert why(reranker, {"image": name}) is None, name
        assert judge.calls[-1][1] == [Item("kite", red)]
    two = MLLMReranker(reranker=judge, roots=[tmp_path / "none", photos])
    assert why(two, {"image": "blue.png"}) is None
    assert why(MLLMReranker(reranker=judge, image_key=()), {"image": "/etc/hostname"}) is None
    assert judge.calls[-1][1] == [Item("kite")]
    assert why(MLLMReranker(reranker=judge, image_key="thumb", roots=photos), {"thumb": "red.png"}) is None
    assert judge.calls[-1][1] == [Item("kite", red)]
    for wrong in ("", [""], 7, [7]):
        with pytest.raises(ValidationError, match="roots"):
            MLLMReranker(roots=wrong)  # type: ignore[arg-type]  # that is the mistake


def test_rows_of_a_store_are_judged_as_they_were_embedded(
    reranker: MLLMReranker, judge: FakeReranker, photos: Path
) -> None:
    red, guide = photos / "red.png", photos / "guide.pdf"
    rows = [
        ({"path": str(red), "modality": "fused"}, Item("kite", red)),
        ({"path": str(red), "modality": "image"}, Item(None, red)),
        ({"path": str(guide), "page": 3, "modality": "image"}, Item(None, PageImage(guide, 3))),
        ({"path": str(guide), "page": 3, "modality": "fused"}, Item("kite", PageImage(guide, 3))),
        ({"path": str(guide), "page": 3}, Item("kite")),
        ({"path": "/etc/hostname"}, Item("kite")),
    ]
    for metadata, expected in rows:
        why(reranker, metadata)
        assert judge.calls[-1][1] == [expected], metadata
    assert "holds no picture" in (why(reranker, {"modality": "image"}) or "")


# --- chains, traces, configuration ------------------------------------------------------------------------


def test_a_step_of_a_chain(reranker: MLLMReranker, mixed: list[Document]) -> None:
    found = reranker.compress_documents(mixed, "red kite")
    chain = {"query": RunnablePassthrough(), "documents": RunnableLambda(lambda _: mixed)} | reranker
    assert chain.invoke("red kite") == found
    assert (chain | RunnableLambda(len)).invoke("red kite") == 5
    assert reranker.invoke(("red kite", tuple(mixed))) == found
    assert reranker.invoke({"query": "red kite", "documents": iter(mixed), "history": []}) == found
    assert chain.batch(["red kite", "boat"]) == [found, reranker.compress_documents(mixed, "boat")]
    assert list(chain.stream("red kite")) == [found]
    configurable = reranker.configurable_fields(top_n=ConfigurableField(id="n"))
    given = {"query": "red kite", "documents": mixed}
    assert configurable.invoke(given, {"configurable": {"n": 2}}) == found[:2]


async def test_async_batches(reranker: MLLMReranker, mixed: list[Document]) -> None:
    given = [{"query": query, "documents": mixed} for query in ("red kite", "boat")]
    assert await reranker.abatch(given) == reranker.batch(given)


def test_wrong_input_says_what_is_right(reranker: MLLMReranker) -> None:
    for wrong in ({"question": "kite", "documents": []}, "kite", None):
        with pytest.raises(InputError, match="query"):
            reranker.invoke(wrong)
    for documents in (["kite"], "kite", Document("kite"), 3):
        with pytest.raises(InputError, match="list of Documents"):
            reranker.compress_documents(documents, "kite")  # type: ignore[arg-type]  # that is the mistake
    with pytest.raises(InputError, match="top"):
        reranker.invoke({"query": "kite", "documents": []}, top=3)


async def test_traces(reranker: MLLMReranker, mixed: list[Document]) -> None:
    recorder = Recorder()
    reranker.compress_documents(mixed, "kite", callbacks=[recorder])
    await reranker.acompress_documents(mixed, "kite", callbacks=[recorder])
    chain = RunnableLambda(lambda query: {"query": query, "documents": mixed}) | reranker
    chain.invoke("kite", {"callbacks": [recorder]})
    await chain.ainvoke("kite", {"callbacks": [recorder]})
    chained = ("RunnableSequence", [("RunnableLambda", []), ("rerank", [])])
    assert [tree(run) for run in recorder.runs] == [("rerank", []), ("rerank", []), chained, chained]
    assert recorder.runs[0].inputs == {"query": "kite", "documents": mixed}
    assert recorder.runs[0].outputs == {"output": reranker.compress_documents(mixed, "kite")}
    with pytest.raises(ItemError):
        reranker.compress_documents(mixed, "", callbacks=[recorder])
    assert "empty" in (recorder.runs[-1].error or "")


def test_traces_hold_no_picture_of_the_query(reranker: MLLMReranker) -> None:
    recorder = Recorder()
    query = [{"type": "text", "text": "kite"}, BLOCK]
    reranker.compress_documents([Document("kite")], query, callbacks=[recorder])
    assert recorder.runs[0].inputs["query"] == {"text": "kite", "pictures": 1}


def test_copies_and_pickles_share_the_ready_reranker(mixed: list[Document]) -> None:
    class Locked(FakeReranker):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    judge = Locked()
    reranker = MLLMReranker(reranker=judge, top_n=2)
    copies = [
        reranker.model_copy(),
        reranker.model_copy(deep=True),
        reranker.model_copy(update={"top_n": 3}, deep=True),
        copy.copy(reranker),
        copy.deepcopy(reranker),
        pickle.loads(pickle.dumps(reranker)),
    ]
    for each in copies:
        assert each.scorer is judge
        assert len(each.compress_documents(mixed, "kite")) == (3 if each.top_n == 3 else 2)
    assert copies[0] == reranker
    other = FakeReranker("other")
    assert reranker.model_copy(update={"reranker": other}).scorer is other


def test_a_pickle_in_another_process() -> None:
    code = (
        "import pickle, sys; from langchain_core.documents import Document;"
        "reranker = pickle.loads(sys.stdin.buffer.read());"
        "print(reranker.compress_documents([Document('boat'), Document('kite')], 'kite')[0].page_content)"
    )
    given = pickle.dumps(MLLMReranker(reranker=FakeReranker()))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "kite"


def test_dumps_hold_the_configuration_and_no_model(judge: FakeReranker, photos: Path) -> None:
    reranker = MLLMReranker(reranker=judge, roots=[photos])
    assert "reranker" not in reranker.model_dump()
    assert "FakeReranker" not in repr(reranker)
    assert not MLLMReranker.is_lc_serializable()
    assert reranker.to_json()["type"] == "not_implemented"
    options = {
        "model": "some/model",
        "top_n": 3,
        "weight": "pure",
        "answers": ("Yes", "No"),
        "dtype": "float32",
    }
    assert pickle.loads(pickle.dumps(MLLMReranker(**options))) == MLLMReranker(**options)


def test_the_model_is_asked_for_with_the_options_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Module:
        @staticmethod
        def shared_reranker(**options: Any) -> FakeReranker:
            asked.append(options)
            return FakeReranker()

    monkeypatch.setitem(sys.modules, "umr_plugins.reranker", Module)  # type: ignore[arg-type]  # it acts as one
    reranker = MLLMReranker(top_n=3, weight=0.5, instruction="find the part", calibrate=True, device="cpu")
    assert asked == []
    reranker.compress_documents([Document("kite")], "kite")
    pickle.loads(pickle.dumps(reranker)).compress_documents([Document("kite")], "kite")
    MLLMReranker().compress_documents([Document("kite")], "kite")
    expected = {"model": "Qwen/Qwen2-VL-2B-Instruct", "calibrate": True, "device": "cpu"}
    assert asked == [expected, expected, {"model": "Qwen/Qwen2-VL-2B-Instruct"}]


def test_wrong_options() -> None:
    with pytest.raises(ValidationError, match="rank"):
        MLLMReranker(reranker="Qwen/Qwen2-VL-2B-Instruct")
    with pytest.raises(ValidationError, match=r"no options of a model.*device"):
        MLLMReranker(reranker=FakeReranker(), device="cpu")
    with pytest.raises(ValidationError, match="top_k"):
        MLLMReranker(top_k=3)  # type: ignore[call-arg]  # that is the mistake
    assert isinstance(MLLMReranker(), BaseDocumentCompressor)
