"""`MLLMRerank`: what comes out for any list of nodes, events, coroutines, copies, and inside an engine."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import QueryBundle
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, Node, NodeWithScore, TextNode
from llama_index.embeddings.gme import GMEEmbedding, PageNode
from llama_index.indices.umr import MultimodalIndex
from llama_index.postprocessor.mllm_rerank import JudgedNode, MLLMRerank
from llama_nodes import kinds, png, save

from umr_plugins.errors import InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker
from umr_plugins.types import PageImage


@pytest.fixture
def judge() -> FakeReranker:
    return FakeReranker()


@pytest.fixture
def rerank(judge: FakeReranker, tmp_path: Path) -> MLLMRerank:
    return MLLMRerank(top_n=100, reranker=judge, roots=[tmp_path])


def scored(nodes: Sequence[BaseNode], scores: Sequence[float | None] | None = None) -> list[NodeWithScore]:
    scores = scores or [0.9 - 0.01 * place for place in range(len(nodes))]
    return [NodeWithScore(node=node, score=score) for node, score in zip(nodes, scores, strict=True)]


def texts(*words: str) -> list[BaseNode]:
    return [TextNode(id_=f"n{place}", text=text) for place, text in enumerate(words)]


def ids(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [each.node_id for each in nodes]


def judged(nodes: Sequence[NodeWithScore]) -> list[JudgedNode]:
    assert all(type(each) is JudgedNode for each in nodes)
    return [each for each in nodes if isinstance(each, JudgedNode)]


# --- what comes out ---------------------------------------------------------------------------------------


def test_every_kind_of_node_is_judged_as_what_it_is(
    rerank: MLLMRerank, judge: FakeReranker, tmp_path: Path
) -> None:
    all_kinds = kinds(tmp_path)
    given = scored([kind.node for kind in all_kinds])
    out = judged(rerank.postprocess_nodes(given, query_str="both"))
    [(_, items)] = judge.calls
    assert items == [kind.item for kind in all_kinds]
    assert sorted(ids(out)) == sorted(ids(given))
    assert out[0].node_id == "node-fused"
    assert out[0].relevance == 1.0
    assert all(each.error is None for each in out)


def test_nothing_that_was_given_changes(rerank: MLLMRerank, tmp_path: Path) -> None:
    given = scored([kind.node for kind in kinds(tmp_path)])
    given.append(
        NodeWithScore(node=ImageNode(id_="gone", image_path="gone.png", metadata={"a": 1}), score=0.1)
    )
    bundle = QueryBundle("a caption", image_path=str(tmp_path / "3.png"))
    before = [each.model_dump() for each in given]
    hashes = {each.node_id: each.node.hash for each in given}
    seen = {each.node_id: each.node.get_content(MetadataMode.ALL) for each in given}
    asked = copy.deepcopy(bundle)
    out = rerank.postprocess_nodes(given, query_bundle=bundle)
    assert [each.model_dump() for each in given] == before
    assert bundle == asked
    assert {id(each) for each in out}.isdisjoint(id(each) for each in given)
    assert {each.node_id: each.node.hash for each in out} == hashes
    assert {each.node_id: each.node.get_content(MetadataMode.ALL) for each in out} == seen
    assert {each.node_id: each.metadata for each in out} == {each.node_id: each.metadata for each in given}


def test_relevance_and_both_scores_are_beside_the_node(judge: FakeReranker) -> None:
    given = scored(texts("grey cat", "red dog", "red cat"), [0.3, 0.2, 0.1])
    out = judged(MLLMRerank(weight=0.5, reranker=judge).postprocess_nodes(given, query_str="red cat"))
    assert [(each.node_id, each.relevance, each.retrieval_score) for each in out] == [
        ("n2", 1.0, 0.1),
        ("n0", 0.5, 0.3),
        ("n1", 0.5, 0.2),
    ]
    assert [each.score for each in out] == pytest.approx([0.6, 0.55, 0.45])
    assert all(type(each.score) is float for each in out)
    dumped = json.loads(json.dumps(out[0].to_dict()))
    assert (dumped["class_name"], dumped["relevance"], dumped["error"]) == ("JudgedNode", 1.0, None)


def test_pure_ignores_the_first_stage(judge: FakeReranker) -> None:
    given = scored(texts("grey cat", "red cat"), [0.9, -0.9])
    pure = MLLMRerank(weight="pure", reranker=judge).postprocess_nodes(given, query_str="red cat")
    assert [(each.node_id, each.score) for each in pure] == [("n1", 1.0), ("n0", 0.5)]
    none = MLLMRerank(weight=0, reranker=judge).postprocess_nodes(given, query_str="red cat")
    assert ids(none) == ["n0", "n1"]


@pytest.mark.parametrize(("top_n", "expected"), [(1, ["n2"]), (2, ["n2", "n0"]), (9, ["n2", "n0", "n1"])])
def test_top_n_is_a_limit(judge: FakeReranker, top_n: int, expected: list[str]) -> None:
    given = scored(texts("a", "a", "b"))
    out = MLLMRerank(top_n=top_n, reranker=judge).postprocess_nodes(given, query_str="b")
    assert ids(out) == expected


def test_one_node_and_none(rerank: MLLMRerank, judge: FakeReranker) -> None:
    assert ids(rerank.postprocess_nodes(scored(texts("a")), query_str="b")) == ["n0"]
    assert rerank.postprocess_nodes([], query_str="b") == []
    assert len(judge.calls) == 1


def test_a_thousand_nodes_are_one_call(rerank: MLLMRerank, judge: FakeReranker) -> None:
    given = scored(texts(*(f"word{place}" for place in range(1000))), [0.5] * 1000)
    out = MLLMRerank(top_n=1000, reranker=judge).postprocess_nodes(given, query_str="word777")
    assert ids(out) == ["n777", *(f"n{place}" for place in range(1000) if place != 777)]
    assert len(judge.calls) == 1


def test_ties_keep_the_order_of_the_first_stage(rerank: MLLMRerank) -> None:
    out = rerank.postprocess_nodes(scored(texts(*"abcd"), [0.1, 0.7, 0.7, 0.2]), query_str="z")
    assert ids(out) == ["n1", "n2", "n3", "n0"]
    assert ids(rerank.postprocess_nodes(scored(texts(*"abcd"), [None] * 4), query_str="z")) == [
        "n0",
        "n1",
        "n2",
        "n3",
    ]


def test_without_all_scores_relevance_alone_counts(rerank: MLLMRerank) -> None:
    given = scored([*texts("a", "b"), TextNode(id_="bad", text="")], [0.9, None, None])
    out = judged(rerank.postprocess_nodes(given, query_str="b"))
    assert [(each.node_id, each.score, each.retrieval_score) for each in out] == [
        ("n1", 1.0, None),
        ("n0", 0.0, 0.9),
        ("bad", 0.0, None),
    ]


def test_scores_of_another_scale_are_brought_to_ours(rerank: MLLMRerank) -> None:
    given = scored([*texts("b", "a"), ImageNode(id_="bad")], [10.0, 30.0, 20.0])
    out = judged(rerank.postprocess_nodes(given, query_str="b"))
    assert [(each.node_id, each.score) for each in out] == [("n1", 1.0), ("bad", 0.5), ("n0", 1.0)]


# --- what can't be judged ---------------------------------------------------------------------------------


def test_what_can_not_be_judged_keeps_its_rank(rerank: MLLMRerank, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [
        TextNode(id_="far", text="something else"),
        ImageNode(id_="missing", image_path="missing.png"),
        TextNode(id_="near", text="red cat"),
        TextNode(id_="empty", text=" "),
        ImageNode(id_="url", image_url="https://example.org/a.png"),
        TextNode(id_="refused", text="poison"),
        TextNode(id_="half", text="red"),
    ]
    with caplog.at_level(logging.WARNING):
        out = judged(rerank.postprocess_nodes(scored(nodes), query_str="red cat"))
    assert ids(out) == ["near", "missing", "half", "empty", "url", "refused", "far"]
    errors = {each.node_id: each.error for each in out if each.error is not None}
    assert sorted(errors) == ["empty", "missing", "refused", "url"]
    assert all(each.relevance is None for each in out if each.error is not None)
    assert "item 1: node missing: " in errors["missing"]
    assert "[unreadable]" in errors["missing"]
    assert "item 5: node refused: " in errors["refused"]
    [record] = [each for each in caplog.records if each.name.startswith("llama_index")]
    assert record.getMessage().startswith("4 of 7 nodes could not be judged")
    assert "node missing" in record.getMessage()


def test_rank_is_kept_before_top_n_applies(judge: FakeReranker) -> None:
    nodes = [ImageNode(id_="bad"), *texts("a", "b")]
    out = MLLMRerank(top_n=2, reranker=judge).postprocess_nodes(scored(nodes), query_str="b")
    assert ids(out) == ["bad", "n1"]


def test_a_list_of_which_nothing_can_be_judged(rerank: MLLMRerank, judge: FakeReranker) -> None:
    nodes = [ImageNode(id_="b"), ImageNode(id_="a")]
    assert ids(rerank.postprocess_nodes(scored(nodes, [0.1, 0.2]), query_str="x")) == ["a", "b"]
    assert judge.calls == []


def test_a_path_in_metadata_is_never_opened(rerank: MLLMRerank, judge: FakeReranker, tmp_path: Path) -> None:
    path = str(save(tmp_path, 1))
    metadata = {"file_path": path, "path": path, "image_path": path}
    node = TextNode(text="words", metadata=metadata, excluded_embed_metadata_keys=list(metadata))
    rerank.postprocess_nodes(scored([node]), query_str="x")
    [(_, [item])] = judge.calls
    assert item.pictures == ()
    assert item.text == "words"


# --- queries ----------------------------------------------------------------------------------------------


def test_text_picture_and_instruction_make_one_query(judge: FakeReranker, tmp_path: Path) -> None:
    picture = save(tmp_path, 1)
    rerank = MLLMRerank(instruction="Same colour.", reranker=judge)
    rerank.postprocess_nodes(scored(texts("a")), query_bundle=QueryBundle("red", image_path=str(picture)))
    rerank.postprocess_nodes(scored(texts("a")), query_bundle=QueryBundle("", image_path=str(picture)))
    rerank.postprocess_nodes(scored(texts("a")), query_str="red")
    asked = [(query.text, query.image, query.instruction) for query, _ in judge.calls]
    assert asked == [
        ("red", picture, "Same colour."),
        (None, picture, "Same colour."),
        ("red", None, "Same colour."),
    ]


def test_the_query_of_as_query_is_judged_with_its_picture(rerank: MLLMRerank, judge: FakeReranker) -> None:
    query = GMEEmbedding(encoder=FakeEncoder()).as_query("red", png(1))
    rerank.postprocess_nodes(scored(texts("a")), query_bundle=query)
    rerank.postprocess_nodes(
        scored(texts("a")), query_bundle=QueryBundle("", custom_embedding_strs=["one", "two"])
    )
    assert [(asked.text, asked.image) for asked, _ in judge.calls] == [("red", png(1)), ("one\ntwo", None)]


def test_a_picture_finds_its_like(rerank: MLLMRerank, tmp_path: Path) -> None:
    nodes: list[BaseNode] = [*texts("a"), ImageNode(id_="same", image_path=str(save(tmp_path, 2)))]
    query = GMEEmbedding(encoder=FakeEncoder()).as_query(image=save(tmp_path, 2))
    assert ids(rerank.postprocess_nodes(scored(nodes), query_bundle=query)) == ["same", "n0"]


@pytest.mark.parametrize("nodes", [[], scored(texts("a"))])
def test_no_query_is_refused(rerank: MLLMRerank, nodes: list[NodeWithScore]) -> None:
    with pytest.raises(InputError, match="query_bundle=QueryBundle"):
        rerank.postprocess_nodes(nodes)
    with pytest.raises(InputError, match="empty"):
        rerank.postprocess_nodes(nodes, query_str=" \n")
    vector_only = QueryBundle("", embedding=[1.0])
    with pytest.raises(InputError, match="vector alone"):
        rerank.postprocess_nodes(nodes, query_bundle=vector_only)


def test_a_missing_query_picture_is_named(rerank: MLLMRerank, judge: FakeReranker) -> None:
    for place in ("gone.png", "https://example.org/a.png"):
        with pytest.raises(ItemError, match=r"gone\.png|URL"):
            rerank.postprocess_nodes(scored(texts("a")), query_bundle=QueryBundle("a", image_path=place))
        with pytest.raises(ItemError, match=r"gone\.png|URL"):
            asyncio.run(
                rerank.apostprocess_nodes(scored(texts("a")), query_bundle=QueryBundle("a", image_path=place))
            )
    assert judge.calls == []


# --- coroutines -------------------------------------------------------------------------------------------


def test_sync_and_async_agree(rerank: MLLMRerank, tmp_path: Path) -> None:
    given = scored([*(kind.node for kind in kinds(tmp_path)), ImageNode(id_="bad")])
    bundle = QueryBundle("a caption", image_path=str(tmp_path / "4.png"))
    out = rerank.postprocess_nodes(given, query_bundle=bundle)
    same = asyncio.run(rerank.apostprocess_nodes(given, query_bundle=bundle))
    assert [each.model_dump() for each in judged(same)] == [each.model_dump() for each in judged(out)]


class SlowReranker(FakeReranker):
    """Waits in the model until it is told to go on; counts calls at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.go = threading.Event(), threading.Event()
        self.inside = self.most = 0

    def rank(self, *arguments: Any, **options: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.started.set()
        assert self.go.wait(10), "the event loop stood still"
        self.inside -= 1
        return super().rank(*arguments, **options)


def test_the_event_loop_goes_on_and_one_list_is_judged_at_a_time() -> None:
    judge = SlowReranker()
    rerank = MLLMRerank(reranker=judge)

    async def main() -> list[list[NodeWithScore]]:
        calls = [rerank.apostprocess_nodes(scored(texts("a", "b")), query_str="b") for _ in range(3)]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)
        judge.go.set()
        return list(await asyncio.gather(*tasks))

    assert [ids(out) for out in asyncio.run(main())] == [["n1", "n0"]] * 3
    assert judge.most == 1


def test_a_cancelled_call_harms_no_other() -> None:
    judge = SlowReranker()
    rerank = MLLMRerank(reranker=judge)

    async def main() -> list[NodeWithScore]:
        running, waiting, last = (
            asyncio.create_task(rerank.apostprocess_nodes(scored(texts("a", "b")), query_str=query))
            for query in ("running", "waiting", "b")
        )
        await asyncio.to_thread(judge.started.wait, 10)
        running.cancel()
        waiting.cancel()
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        judge.go.set()
        return await last

    assert ids(asyncio.run(main())) == ["n1", "n0"]
    assert [query.text for query, _ in judge.calls] == ["running", "b"]


# --- events -----------------------------------------------------------------------------------------------


class Recorder(BaseEventHandler):
    events: list[Any] = []  # noqa: RUF012  # a pydantic field

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)


@pytest.fixture
def recorder() -> Any:
    recorder, root = Recorder(events=[]), get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_both_event_systems_see_it(judge: FakeReranker, recorder: Recorder, way: str, tmp_path: Path) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    rerank = MLLMRerank(top_n=1, reranker=judge, callback_manager=CallbackManager([debug]))
    given, bundle = scored(texts("a", "b")), QueryBundle("b", image_path=str(save(tmp_path, 1)))
    if way == "sync":
        out = rerank.postprocess_nodes(given, query_bundle=bundle)
    else:
        out = asyncio.run(rerank.apostprocess_nodes(given, query_bundle=bundle))
    start, end = recorder.events
    assert (start.query, start.top_n, start.model_name) == (bundle, 1, "fake")
    assert ids(start.nodes) == ["n0", "n1"]
    assert end.nodes == out
    assert type(end.nodes[0]) is JudgedNode
    [(before, after)] = debug.get_event_pairs(CBEventType.RERANKING)
    assert before.payload is not None
    assert before.payload[EventPayload.MODEL_NAME] == "fake"
    assert before.payload[EventPayload.QUERY_STR] == "b"
    assert before.payload[EventPayload.TOP_K] == 1
    assert after.payload == {EventPayload.NODES: out}


def test_no_start_without_an_end(rerank: MLLMRerank, recorder: Recorder) -> None:
    assert rerank.postprocess_nodes([], query_str="a") == []
    with pytest.raises(InputError):
        rerank.postprocess_nodes(scored(texts("a")))
    assert recorder.events == []


# --- options, dumps, copies -------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "model": "some/model",
    "top_n": 3,
    "weight": 0.25,
    "instruction": "Same colour.",
    "prompt": "judge",
    "answers": ("Yes", "No"),
    "domain": "news",
    "calibrate": True,
    "device": "cpu",
    "dtype": "float32",
    "min_image_tokens": 4,
    "max_image_tokens": 64,
    "max_images": 1,
    "max_length": 128,
    "max_batch_tokens": 1024,
    "revision": "main",
    "adapter": "adapter",
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the shared rerankers were asked for, which are fakes here."""
    made: list[dict[str, Any]] = []

    def shared_reranker(model: str, **options: Any) -> FakeReranker:
        made.append({"model": model, **options})
        return FakeReranker(model)

    module = types.ModuleType("umr_plugins.reranker")
    module.shared_reranker = shared_reranker  # type: ignore[attr-defined]
    module.Reranker = type("Reranker", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umr_plugins.reranker", module)
    return made


def test_the_default_is_a_real_model_that_loads_on_first_use(made: list[dict[str, Any]]) -> None:
    rerank = MLLMRerank()
    assert (rerank.model, rerank.top_n, rerank.weight) == ("Qwen/Qwen2-VL-2B-Instruct", 5, None)
    assert made == []
    rerank.postprocess_nodes(scored(texts("a")), query_str="a")
    _ = MLLMRerank(calibrate=False, top_n=2, weight=1.0).reranker  # options that load no other model
    assert made.pop() == made[0]
    assert made == [{"model": "Qwen/Qwen2-VL-2B-Instruct"}]


@pytest.mark.parametrize("weight", [None, 0.25, "pure"])
def test_options_survive_a_dump_and_reach_the_model(made: list[dict[str, Any]], weight: Any) -> None:
    rerank = MLLMRerank(**(OPTIONS | {"weight": weight}))
    data = rerank.to_dict()
    assert data["class_name"] == MLLMRerank.class_name() == "MLLMRerank"
    assert {name: data[name] for name in OPTIONS} == OPTIONS | {"weight": weight}
    again = MLLMRerank.from_dict(json.loads(json.dumps(data)))
    assert again.to_dict() == data
    _ = again.reranker
    own = {"top_n", "weight", "instruction"}
    assert made == [{name: value for name, value in OPTIONS.items() if name not in own}]


def test_a_dump_names_a_given_reranker_but_does_not_hold_it(judge: FakeReranker) -> None:
    data = MLLMRerank(top_n=2, reranker=judge).to_dict()
    assert data["model"] == "fake"
    assert "FakeReranker" not in str(data)
    judge.config = {"model": "other", "max_length": 64, "unknown": 1}  # type: ignore[attr-defined]
    data = MLLMRerank(reranker=judge).to_dict()
    assert (data["model"], data["max_length"]) == ("other", 64)


def test_copies_share_the_model(judge: FakeReranker, made: list[dict[str, Any]]) -> None:
    rerank = MLLMRerank(reranker=judge)
    assert copy.deepcopy(rerank).reranker is judge
    assert copy.copy(rerank).reranker is judge
    changed = rerank.model_copy(update={"top_n": 1, "instruction": "Other."})
    assert ids(changed.postprocess_nodes(scored(texts("a", "b")), query_str="b")) == ["n1"]
    assert judge.calls[-1][0].instruction == "Other."
    assert made == []
    assert rerank.model_copy(update={"max_length": 9}).reranker is not judge
    assert made == [{"model": "fake", "max_length": 9}]


def test_a_pickle_holds_options_and_a_foreign_reranker(
    rerank: MLLMRerank, made: list[dict[str, Any]]
) -> None:
    again = pickle.loads(pickle.dumps(rerank))
    assert again.to_dict() == rerank.to_dict()
    assert ids(again.postprocess_nodes(scored(texts("a", "b")), query_str="b")) == ["n1", "n0"]
    assert made == []
    # A Reranker is never pickled where its own options are enough to make it again.
    own = sys.modules["umr_plugins.reranker"].Reranker()
    own.score = own.rank = lambda *arguments: []  # no function like this can be pickled
    own.config = {"model": "some/model", "max_length": 8, "prompt": "judge"}
    named = pickle.dumps(MLLMRerank(reranker=own))
    assert pickle.loads(named).reranker.model == "some/model"
    assert made == [{"model": "some/model", "max_length": 8, "prompt": "judge"}]
    named = pickle.dumps(MLLMRerank(**OPTIONS))
    assert len(named) < 2000
    assert pickle.loads(named).to_dict() == MLLMRerank(**OPTIONS).to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_n": 0}, "top_n"),
        ({"top_n": None}, "top_n"),
        ({"top_n": 2.5}, "top_n"),
        ({"weight": -1}, "weight"),
        ({"weight": "all"}, "weight"),
        ({"prompt": object()}, "prompt"),
        ({"reranker": object()}, "PairScorer"),
        ({"reranker": FakeReranker(), "model": "m", "max_length": 3}, "model, max_length"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MLLMRerank(**options)
    with pytest.raises(TypeError, match="topn"):
        MLLMRerank(topn=3)  # type: ignore[call-arg]


# --- inside LlamaIndex ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sync", "async"])
def test_inside_a_query_engine(judge: FakeReranker, tmp_path: Path, way: str) -> None:
    gme = GMEEmbedding(encoder=FakeEncoder(dim=64))
    nodes = [*(kind.node for kind in kinds(tmp_path)), *texts("one blue boat", "two boats")]
    index = MultimodalIndex(nodes, embed_model=gme)
    engine = RetrieverQueryEngine.from_args(
        index.as_retriever(similarity_top_k=20),
        llm=MockLLM(),
        node_postprocessors=[MLLMRerank(top_n=2, reranker=judge)],
    )
    query = QueryBundle("blue boat", image_path=str(tmp_path / "6.png"))
    response = asyncio.run(engine.aquery(query)) if way == "async" else engine.query(query)
    # The same picture as the query's is fully relevant to the fake, and so are the same words.
    assert sorted(ids(response.source_nodes)) == ["n0", "node-fused"]
    assert [each.relevance for each in judged(response.source_nodes)] == [1.0, 1.0]
    [(asked, items)] = judge.calls
    assert (asked.text, asked.image) == ("blue boat", tmp_path / "6.png")
    assert len(items) == len(nodes)


def test_pages_are_judged_without_a_rendered_copy_in_the_node(
    rerank: MLLMRerank, judge: FakeReranker, tmp_path: Path
) -> None:
    page = PageNode(id_="page", page_path="report.pdf", page=2, text="the blue boat")
    out = judged(rerank.postprocess_nodes(scored([page]), query_str="boat"))
    [(_, [item])] = judge.calls
    assert item.image == PageImage(tmp_path / "report.pdf", 2)
    assert item.text == "the blue boat"
    assert page._rendered is None
    assert "report.pdf" in (out[0].error or "")  # there is no such file


def test_it_is_a_postprocessor_with_the_parameter_names_of_the_base(rerank: MLLMRerank) -> None:
    assert isinstance(rerank, BaseNodePostprocessor)
    given = scored([Node(id_="n", text_resource={"text": "a"})])  # type: ignore[arg-type]
    assert ids(rerank._postprocess_nodes(nodes=given, query_bundle=QueryBundle("a"))) == ["n"]
    call = rerank._apostprocess_nodes(nodes=given, query_bundle=QueryBundle("a"))
    assert ids(asyncio.run(call)) == ["n"]
