"""`MultimodalQueryEngine`, answers without an LLM, and what `as_query_engine` makes of its options."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import PromptTemplate, QueryBundle, Settings, StorageContext
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import TreeSummarize
from llama_index.core.schema import BaseNode, ImageNode, NodeWithScore, TextNode
from llama_index.embeddings.gme import GMEEmbedding, PageNode
from llama_index.indices.umr import MultimodalIndex, MultimodalQueryEngine
from llama_index.indices.umr.llms import chosen_llm
from llama_index.indices.umr.memory import tokens_of
from llama_index.indices.umr.passages import passages
from llama_index.postprocessor.mllm_rerank import MLLMRerank
from llama_nodes import png, save
from llama_stores import FlatStore
from llama_talk import Scripted, asked, index_of, materials, seen
from PIL import Image

from umr_plugins.errors import InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker


@pytest.fixture
def index(tmp_path: Path) -> MultimodalIndex:
    return index_of(materials(tmp_path))


async def ask(engine: BaseQueryEngine, query: Any, way: str) -> Any:
    return await engine.aquery(query) if way == "async" else engine.query(query)


WAYS = pytest.mark.parametrize("way", ["sync", "async"])


# --- what the LLM sees --------------------------------------------------------------------------------------


@WAYS
async def test_the_llm_sees_every_text_every_picture_and_the_users_own(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted("the answer")
    engine = index.as_query_engine(llm, similarity_top_k=9)
    assert type(engine) is MultimodalQueryEngine
    response = await ask(engine, QueryBundle("red boat", image_path=str(asked(tmp_path))), way)
    assert type(response) is Response
    assert str(response) == "the answer"
    [[system, user]] = llm.calls
    assert "numbered documents alone" in (system.content or "")
    blocks = seen(user)
    groups = {
        "text": ["place: Delft\n\na red boat"],
        "captioned": ["a caption", "<8x6>"],
        "fused": ["boat and more", "<8x6>"],
        "page": [f"{tmp_path / 'report.pdf'}, page 1\n\nwords of the page", _page(tmp_path)],
    }
    expected: list[str] = []
    for number, each in enumerate(response.source_nodes, 1):
        expected += [f"Document {number}", *groups.pop(each.node_id)]
    assert groups == {}
    assert blocks == [*expected, "Question", "red boat", "<30x20>"]
    assert response.metadata["text"] == {"place": "Delft"}


def _page(folder: Path, name: str = "report.pdf") -> str:
    from umr_plugins.media.images import load_image
    from umr_plugins.types import PageImage

    page = load_image(PageImage(folder / name, 1))
    page.thumbnail((1568, 1568))
    return f"<{page.width}x{page.height}>"


@WAYS
async def test_a_string_and_a_query_of_as_query_are_questions(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted(*"123456")
    engine = index.as_query_engine(llm, similarity_top_k=1)
    assert [each.node_id for each in (await ask(engine, "words of the page", way)).source_nodes] != []
    assert seen(llm.calls[0][-1])[-2:] == ["Question", "words of the page"]
    gme = index._embed_model
    fused = gme.as_query("boat and more", tmp_path / "2.png")
    assert [each.node_id for each in (await ask(engine, fused, way)).source_nodes] == ["fused"]
    assert seen(llm.calls[1][-1])[-3:] == ["Question", "boat and more", "<8x6>"]
    picture: Any = QueryBundle("", image_path=png(2))  # type: ignore[arg-type]  # any picture will do
    await ask(engine, picture, way)
    assert seen(llm.calls[2][-1])[-2:] == ["Question", "<8x6>"]
    held = asked(tmp_path).read_bytes()
    for number, given in enumerate((held, Image.open(io.BytesIO(held))), 3):
        judge = FakeReranker()
        rerank = MLLMRerank(reranker=judge)
        engine = index.as_query_engine(llm, similarity_top_k=1, node_postprocessors=[rerank])
        await ask(engine, gme.as_query("boat and more", given), way)
        assert seen(llm.calls[number][-1])[-3:] == ["Question", "boat and more", "<30x20>"]
        assert judge.calls[0][0].image == given
    await ask(engine, QueryBundle("", custom_embedding_strs=["a red", "boat"]), way)
    assert seen(llm.calls[5][-1])[-2:] == ["Question", "a red\nboat"]


@WAYS
async def test_a_question_of_nothing_is_refused_before_anything_runs(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted()
    engine = index.as_query_engine(llm)
    vector_only = QueryBundle("", embedding=index._embed_model.as_query(image=png(1)).embedding)
    for query in ("", " \n", QueryBundle(" "), vector_only):
        with pytest.raises(InputError, match="there is no question"):
            await ask(engine, query, way)
    with pytest.raises(InputError, match="query_str is a text, got None"):
        await ask(engine, QueryBundle(None), way)  # type: ignore[arg-type]
    with pytest.raises((ItemError, ValueError), match=r"gone\.png"):
        await ask(engine, QueryBundle("red", image_path=str(tmp_path / "gone.png")), way)
    assert llm.calls == []


@WAYS
async def test_nothing_found_asks_no_llm(index: MultimodalIndex, way: str) -> None:
    none = [SimilarityPostprocessor(similarity_cutoff=0.999)]
    for options in ({"llm": Scripted()}, {"extractive": True}):
        engine = index.as_query_engine(node_postprocessors=none, **options)
        response = await ask(engine, "nothing like it", way)
        assert (str(response), response.source_nodes) == ("Empty Response", [])


@WAYS
async def test_documents_that_can_not_be_shown_are_not_nothing(tmp_path: Path, way: str) -> None:
    storage = StorageContext.from_defaults(vector_store=FlatStore(rows={}))
    gme = GMEEmbedding(encoder=FakeEncoder(dim=64))
    pictures = [ImageNode(image_path=str(save(tmp_path, number))) for number in (1, 2)]
    index = MultimodalIndex(pictures, embed_model=gme, storage_context=storage)
    response = await ask(index.as_query_engine(Scripted()), "boat", way)
    assert str(response).startswith("Documents were found (2), but none can be shown: they have no text")
    assert response.source_nodes == []


@WAYS
async def test_pictures_without_text_come_with_what_is_known_of_them(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (80, 100), "blue").save(folder / "scan.pdf")
    save(folder, 3)
    gme = GMEEmbedding(encoder=FakeEncoder(dim=64))
    index = MultimodalIndex.from_folder(folder, embed_model=gme)
    hidden = ImageNode(image=base64.b64encode(png(5)).decode(), metadata={"title": "Figure 5", "secret": 1})
    hidden.excluded_llm_metadata_keys = ["secret"]
    index.insert_nodes([hidden, PageNode(page_path=str(folder / "scan.pdf"), page=1)])
    llm = Scripted("x")
    await ask(index.as_query_engine(llm, similarity_top_k=9), "gears", way)
    blocks = seen(llm.calls[0][-1])
    page = _page(folder, "scan.pdf")
    shown = sorted((blocks[at + 1], blocks[at + 2]) for at, each in enumerate(blocks) if each[:4] == "Docu")
    assert shown == sorted(
        [
            (f"path: {folder / '3.png'}", "<8x6>"),
            (f"path: {folder / 'scan.pdf'}\npage: 1", page),
            ("title: Figure 5", "<8x6>"),
            (f"{folder / 'scan.pdf'}, page 1", page),
        ]
    )


@WAYS
async def test_documents_beyond_the_context_are_left_out_and_the_llm_is_told(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = index_of([TextNode(text=f"page {number} " + "gear " * 1500) for number in range(4)])
    llm = Scripted("a", "b")
    engine = index.as_query_engine(llm, similarity_top_k=4)
    with caplog.at_level(logging.WARNING):
        response = await ask(engine, "gear", way)
    assert len(response.source_nodes) == 2
    sent = llm.calls[0]
    blocks = seen(sent[-1])
    assert blocks[-3:] == ["2 further documents were found and had no room here.", "Question", "gear"]
    assert "2 of 4 documents are left out" in caplog.text
    told = llm.metadata
    used = sum(tokens_of(message.blocks) for message in sent)
    assert used <= told.context_window - told.num_output
    long = index_of([TextNode(text="gear " * 5000), TextNode(text="gear and more")])
    response = await ask(long.as_query_engine(llm, similarity_top_k=2), "gear " * 5000, way)
    assert len(response.source_nodes) == 1  # the best one in any case


@WAYS
async def test_postprocessors_judge_with_the_users_picture(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    judge = FakeReranker()
    rerank = MLLMRerank(top_n=3, weight="pure", reranker=judge)
    engine = index.as_query_engine(Scripted("x"), similarity_top_k=9, node_postprocessors=[rerank])
    query = QueryBundle("boat", image_path=str(tmp_path / "1.png"))
    response = await ask(engine, query, way)
    assert {each.node_id for each in response.source_nodes} == {"text", "fused", "captioned"}
    [(question, _)] = judge.calls
    assert (question.text, question.image) == ("boat", tmp_path / "1.png")


def test_pictures_are_limited_in_number_and_size(index: MultimodalIndex, tmp_path: Path) -> None:
    llm = Scripted("x")
    query = QueryBundle("boat", image_path=str(asked(tmp_path)))
    index.as_query_engine(llm, similarity_top_k=9, max_pictures=1, max_side=15).query(query)
    [[_, user]] = llm.calls
    assert sum(text.startswith("<") for text in seen(user)[:-1]) == 1
    assert seen(user)[-1] == "<15x10>"
    with pytest.raises(InputError, match="max_pictures"):
        index.as_query_engine(llm, max_pictures=-1)


# --- streams, parts, events ---------------------------------------------------------------------------------


async def test_answers_come_piece_by_piece(index: MultimodalIndex) -> None:
    engine = index.as_query_engine(Scripted("one two three", "four five"), streaming=True)
    response = engine.query("red boat")
    assert isinstance(response, StreamingResponse)
    assert list(response.response_gen) == ["one ", "two ", "three "]
    response = await engine.aquery("red boat")
    assert isinstance(response, AsyncStreamingResponse)
    assert [piece async for piece in response.async_response_gen()] == ["four ", "five "]
    assert len(response.source_nodes) == 2
    extractive = index.as_query_engine(extractive=True, streaming=True, similarity_top_k=1)
    assert str(extractive.query("place: Delft\n\na red boat")) == "[1]\na red boat"
    pieces = (await extractive.aquery("place: Delft\n\na red boat")).async_response_gen()
    assert [piece async for piece in pieces] == ["[1]\na red boat"]


async def test_retrieval_and_synthesis_can_be_called_apart(index: MultimodalIndex) -> None:
    llm = Scripted("one", "two")
    engine = index.as_query_engine(llm, similarity_top_k=1)
    assert isinstance(engine, MultimodalQueryEngine)
    query = QueryBundle("place: Delft\n\na red boat")
    nodes = engine.retrieve(query)
    assert [each.node_id for each in nodes] == ["text"]
    assert [each.node_id for each in await engine.aretrieve(query)] == ["text"]
    assert engine.retriever.retrieve(query) == nodes
    further = [NodeWithScore(node=TextNode(id_="more", text="not shown"))]
    for response in (
        engine.synthesize(query, nodes, further),
        await engine.asynthesize(query, nodes, further),
    ):
        assert [each.node_id for each in response.source_nodes] == ["text", "more"]
    assert all("not shown" not in seen(call[-1]) for call in llm.calls)
    assert engine.get_prompts() == {}


class Recorder(BaseEventHandler):
    events: list[Any] = []  # noqa: RUF012  # a pydantic field

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)


@WAYS
async def test_both_event_systems_see_a_query(index: MultimodalIndex, tmp_path: Path, way: str) -> None:
    debug, recorder = LlamaDebugHandler(print_trace_on_end=False), Recorder(events=[])
    root = get_dispatcher()
    root.add_event_handler(recorder)
    rerank = MLLMRerank(reranker=FakeReranker())
    engine = index.as_query_engine(
        Scripted("x"), node_postprocessors=[rerank], callback_manager=CallbackManager([debug])
    )
    query = QueryBundle("red boat", image_path=str(asked(tmp_path)))
    try:
        response = await ask(engine, query, way)
    finally:
        root.event_handlers.remove(recorder)
    names = [type(event).__name__ for event in recorder.events]
    ours = [name for name in names if name.startswith(("Query", "Retrieval", "ReRank", "Synthesize"))]
    assert ours == [
        "QueryStartEvent",
        "RetrievalStartEvent",
        "RetrievalEndEvent",
        "ReRankStartEvent",
        "ReRankEndEvent",
        "SynthesizeStartEvent",
        "SynthesizeEndEvent",
        "QueryEndEvent",
    ]
    assert recorder.events[names.index("QueryEndEvent")].response == response
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE):
        [(before, after)] = debug.get_event_pairs(kind)
        assert before.payload == {EventPayload.QUERY_STR: "red boat"}
        assert after.payload == {EventPayload.RESPONSE: response}
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


# --- without an LLM -----------------------------------------------------------------------------------------


def test_an_answer_without_an_llm_is_the_numbered_passages(
    index: MultimodalIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    engine = index.as_query_engine(extractive=True, similarity_top_k=9)
    first, second = engine.query("red boat"), engine.query("red boat")
    assert str(first) == str(second)
    assert Settings._llm is None
    parts = str(first).split("\n\n")
    expected = {
        "text": "a red boat",
        "captioned": f"a caption\n[picture: {tmp_path / '1.png'}]",
        "fused": f"boat and more\n[picture: {tmp_path / '2.png'}]",
        "page": f"words of the page\n[picture: {tmp_path / 'report.pdf'}#page=1]",
    }
    places = {"page": f" {tmp_path / 'report.pdf'}, page 1"}
    for number, (part, each) in enumerate(zip(parts, first.source_nodes, strict=True), 1):
        heading, _, rest = part.partition("\n")
        assert (heading, rest) == (f"[{number}]{places.get(each.node_id, '')}", expected.pop(each.node_id))
    assert expected == {}
    picture = index._embed_model.as_query(image=png(2))  # its vector is enough here
    assert len(engine.query(picture).source_nodes) == 4
    with pytest.raises(InputError, match="asks no LLM"):
        index.as_query_engine(Scripted(), extractive=True)


def test_passages_name_file_and_page_and_cut_visibly(tmp_path: Path) -> None:
    nodes: list[BaseNode] = [
        TextNode(text="x" * 30, metadata={"path": "/a/report.pdf", "page": 2}),
        TextNode(text="short", metadata={"file_path": "/a/note.md", "page_label": "iv"}),
        TextNode(text="  "),
        ImageNode(image=base64.b64encode(png(1)).decode(), metadata={"file_name": "photo.png"}),
        ImageNode(image_url="https://example.org/a.png"),
        PageNode(page_path="/gone.pdf", page=7),
    ]
    text, shown = passages([NodeWithScore(node=node) for node in nodes], 10)
    assert [each.node for each in shown] == [nodes[0], nodes[1], *nodes[3:]]
    parts = text.split("\n\n")
    assert parts[0] == "[1] /a/report.pdf, page 2\nxxxxxxxxxx […] (the first 10 of 30 characters)"
    assert parts[1] == "[2] /a/note.md, page iv\nshort"
    assert parts[2].startswith("[3] photo.png\n[picture: <image sha256:")
    assert parts[3].startswith("[4]\n[picture that can't be read: the picture is a URL")
    assert parts[4] == "[5] /gone.pdf, page 7\n[picture: /gone.pdf#page=7]"
    with pytest.raises(InputError, match="passage_length"):
        index_of([]).as_query_engine(extractive=True, passage_length=0)


# --- which LLM ----------------------------------------------------------------------------------------------


def test_no_llm_is_ever_made_that_nobody_asked_for(
    index: MultimodalIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("an LLM was made")

    monkeypatch.setattr("llama_index.core.settings.resolve_llm", made)
    monkeypatch.setattr("llama_index.core.indices.base.resolve_llm", made)
    monkeypatch.setattr(Settings, "_llm", None)
    for make in (
        index.as_query_engine,
        lambda: index.as_query_engine(response_mode="tree_summarize"),
        lambda: index.as_query_engine(multimodal=True),
        lambda: MultimodalQueryEngine(index.as_retriever()),
        lambda: chosen_llm(None),
    ):
        with pytest.raises(InputError, match=r"Settings\.llm is not set.*extractive=True"):
            make()
    mine = Scripted("x")
    monkeypatch.setattr(Settings, "_llm", mine)
    assert chosen_llm(None) is mine
    assert str(index.as_query_engine().query("red")) == "x"


def test_names_and_strangers_as_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[str] = []

    def resolve(llm: Any) -> Any:
        asked_for.append(llm)
        return MockLLM()

    monkeypatch.setattr("llama_index.indices.umr.llms.resolve_llm", resolve)
    assert isinstance(chosen_llm("local:model"), MockLLM)
    assert asked_for == ["local:model"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="llm is a int"):
        chosen_llm(7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the name 'gpt-4'; LlamaIndex knows 'default' and 'local:PATH'"):
        chosen_llm("gpt-4")


def test_an_llm_that_does_not_chat_is_refused(index: MultimodalIndex) -> None:
    with pytest.raises(InputError, match=r"MockLLM is no chat model.*extractive=True"):
        index.as_query_engine(MockLLM())


# --- options ------------------------------------------------------------------------------------------------


def test_options_of_llama_indexs_own_engine_make_that_one(index: MultimodalIndex) -> None:
    for options in (
        {"llm": MockLLM(), "response_mode": "tree_summarize"},
        {"llm": Scripted(*"xxx"), "multimodal": True},
        {"response_synthesizer": TreeSummarize(llm=MockLLM())},
    ):
        engine = index.as_query_engine(similarity_top_k=3, **options)
        assert type(engine) is RetrieverQueryEngine
        assert engine.retriever.similarity_top_k == 3
        assert len(engine.query("red boat").source_nodes) == 3


def _pictures(llm: Scripted) -> int:
    return sum(isinstance(part, ImageBlock) for call in llm.calls for each in call for part in each.blocks)


def test_llama_indexs_own_engine_shows_pictures_of_our_store_only_unless_it_is_asked_to(
    index: MultimodalIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = Scripted(*"xxxxx")
    index.as_query_engine(llm, similarity_top_k=9, response_mode="compact").query("red boat")
    assert _pictures(llm) > 0
    llm = Scripted(*"xxxxx")
    index.as_query_engine(llm, similarity_top_k=9, use_async=True, multimodal=False).query("red boat")
    assert _pictures(llm) == 0
    storage = StorageContext.from_defaults(vector_store=FlatStore(rows={}))
    other = MultimodalIndex(materials(tmp_path), embed_model=index._embed_model, storage_context=storage)
    assert caplog.text == ""
    for options, shown, said in (({}, False, 1), ({"multimodal": True}, True, 0)):
        caplog.clear()
        llm = Scripted(*"xxxxx")
        other.as_query_engine(llm, similarity_top_k=9, response_mode="compact", **options).query("red boat")
        assert (_pictures(llm) > 0) == shown
        assert caplog.text.count("shows no pictures here; multimodal=True") == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_pictures": "8"}, "max_pictures must be a whole number of at least 0, got '8'"),
        ({"max_pictures": 1.5}, "max_pictures .* got 1.5"),
        ({"max_side": 100.5}, "max_side .* got 100.5"),
        ({"passage_length": 10.5}, "passage_length .* got 10.5"),
        ({"prompt": PromptTemplate("x")}, "prompt is a text"),
        ({"node_postprocessors": ["x"]}, "list of node postprocessors"),
        ({"node_postprocessors": SimilarityPostprocessor()}, "list of node postprocessors"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_at_once(
    index: MultimodalIndex, options: dict[str, Any], words: str
) -> None:
    for make in (index.as_query_engine, index.as_chat_engine):
        with pytest.raises(InputError, match=words):
            make(llm=Scripted(), **options)


def test_options_that_nothing_knows_or_that_do_not_go_together_are_refused(index: MultimodalIndex) -> None:
    with pytest.raises(InputError, match=r"no option similarity_topk; it takes .*similarity_top_k"):
        index.as_query_engine(Scripted(), similarity_topk=3)
    with pytest.raises(InputError, match=r"response_mode make it .* does not know roots"):
        index.as_query_engine(Scripted(), response_mode="compact", roots=["photos"])


def test_retriever_options_reach_the_retriever(index: MultimodalIndex) -> None:
    engine = index.as_query_engine(Scripted("x"), similarity_top_k=1, doc_ids=["none such"])
    assert str(engine.query("red boat")) == "Empty Response"
