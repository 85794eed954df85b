"""`MultimodalChatEngine`: what the LLM sees, what is remembered, follow-ups, and `as_chat_engine`."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import PromptTemplate, QueryBundle, Settings, StorageContext
from llama_index.core.base.llms.types import AudioBlock, ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import (
    AgentChatResponse,
    BaseChatEngine,
    ChatMode,
    StreamingAgentChatResponse,
)
from llama_index.core.llms import MockLLM
from llama_index.core.llms.mock import MockLLMWithChatMemoryOfLastCall, MockLLMWithNonyieldingChatStream
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalChatEngine, MultimodalIndex
from llama_index.indices.umr.memory import PictureMemory, newest, tokens_of
from llama_index.postprocessor.mllm_rerank import MLLMRerank
from llama_nodes import png, save
from llama_stores import FlatStore
from llama_talk import Scripted, asked, index_of, materials, seen
from PIL import Image

from umr_plugins.errors import InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker

WAYS = ["chat", "achat", "stream_chat", "astream_chat"]
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def index(tmp_path: Path) -> MultimodalIndex:
    return index_of(materials(tmp_path))


async def talk(engine: BaseChatEngine, way: str, *message: Any, **options: Any) -> tuple[str, Any]:
    """The whole answer, and the response."""
    said = getattr(engine, way)(*message, **options)
    if way == "chat":
        assert type(said) is AgentChatResponse
        return str(said), said
    if way == "achat":
        said = await said
        return str(said), said
    if way == "stream_chat":
        assert type(said) is StreamingAgentChatResponse
        return "".join(said.response_gen), said
    said = await said
    return "".join([piece async for piece in said.async_response_gen()]), said


def history(engine: BaseChatEngine) -> list[tuple[str, list[str]]]:
    return [(message.role.value, seen(message)) for message in engine.chat_history]


# --- what the LLM sees --------------------------------------------------------------------------------------


@EVERY_WAY
async def test_the_llm_sees_both_documents_with_text_and_picture(index: MultimodalIndex, way: str) -> None:
    llm = MockLLMWithChatMemoryOfLastCall(is_chat_model=True)
    engine = index.as_chat_engine(llm=llm, similarity_top_k=2, system_prompt="Be kind.")
    assert type(engine) is MultimodalChatEngine
    text, response = await talk(engine, way, "boat and more")
    assert way in llm.last_called_chat_function
    assert llm.last_chat_messages is not None
    system, user = llm.last_chat_messages
    assert (system.role, user.role) == (MessageRole.SYSTEM, MessageRole.USER)
    assert (system.content or "").startswith("Be kind.\n\nAnswer the user's last message")
    blocks = seen(user)
    assert len(response.source_nodes) == 2
    assert [block for block in blocks if block.startswith("Document")] == ["Document 1", "Document 2"]
    assert blocks[-2:] == ["Question", "boat and more"]
    assert "boat and more" in text
    [source] = response.sources
    assert (source.tool_name, source.raw_input) == ("retriever", {"message": "boat and more"})
    assert source.raw_output == response.source_nodes


@EVERY_WAY
async def test_every_kind_of_picture_reaches_the_llm(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted("the answer")
    engine = index.as_chat_engine(llm=llm, similarity_top_k=9)
    text, response = await talk(engine, way, "boat", image=asked(tmp_path))
    assert text.strip() == "the answer"
    [[_, user]] = llm.calls
    blocks = seen(user)
    page = f"{tmp_path / 'report.pdf'}, page 1\n\nwords of the page"
    for words in ("a caption", "boat and more", page):
        assert blocks[blocks.index(words) + 1].startswith("<"), words
    assert blocks[-3:] == ["Question", "boat", "<30x20>"]
    assert len(response.source_nodes) == 4


@EVERY_WAY
async def test_the_conversation_is_kept_with_the_users_pictures_and_without_documents(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted("first answer", "a red boat again", "second answer")
    engine = index.as_chat_engine(llm=llm, similarity_top_k=9)
    await talk(engine, way, "what is it?", image=asked(tmp_path))
    first = [("user", ["what is it?", "<30x20>"]), ("assistant", ["first answer"])]
    assert history(engine) == first
    await talk(engine, way, "and again?")
    assert history(engine) == [*first, ("user", ["and again?"]), ("assistant", ["second answer"])]
    answering = llm.calls[-1]
    assert [(each.role.value, seen(each)) for each in answering[1:-1]] == first
    assert seen(answering[-1])[-2:] == ["Question", "and again?"]
    engine.reset()
    assert engine.chat_history == []
    llm.lines = ["fresh"]
    await talk(engine, way, "new")
    assert len(llm.calls[-1]) == 2


@EVERY_WAY
@pytest.mark.parametrize("form", ["bundle", "message", "block-path", "block-url", "keyword"])
async def test_a_message_has_many_forms(index: MultimodalIndex, tmp_path: Path, way: str, form: str) -> None:
    picture = asked(tmp_path)
    blocks = {
        "message": ImageBlock(image=picture.read_bytes()),
        "block-path": ImageBlock(path=picture),
        "block-url": ImageBlock(
            url=f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        ),
    }
    llm = Scripted("yes")
    judge = FakeReranker()
    engine = index.as_chat_engine(llm=llm, node_postprocessors=[MLLMRerank(reranker=judge)])
    if form == "bundle":
        await talk(engine, way, QueryBundle("this?", image_path=str(picture)))
    elif form == "keyword":
        await talk(engine, way, "this?", image=picture.read_bytes())
    else:
        await talk(engine, way, ChatMessage(blocks=[TextBlock(text="this?"), blocks[form]]))
    assert seen(llm.calls[0][-1])[-3:] == ["Question", "this?", "<30x20>"]
    assert history(engine)[0] == ("user", ["this?", "<30x20>"])
    [(query, _)] = judge.calls
    assert query.text == "this?"
    assert len(query.pictures) == 1


@EVERY_WAY
async def test_a_picture_alone_and_several_pictures_are_messages(
    index: MultimodalIndex, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm = Scripted("one", "two")
    engine = index.as_chat_engine(llm=llm, similarity_top_k=1)
    with caplog.at_level(logging.WARNING):
        await talk(engine, way, "", image=asked(tmp_path))
    assert caplog.text == ""
    assert seen(llm.calls[0][-1])[-2:] == ["Question", "<30x20>"]
    two = ChatMessage(blocks=[ImageBlock(image=png(2)), TextBlock(text="boat and more")])
    with caplog.at_level(logging.WARNING):
        _, response = await talk(engine, way, two, [], image=io.BytesIO(asked(tmp_path).read_bytes()))
    assert [each.node_id for each in response.source_nodes] == ["fused"]  # found with the first picture
    assert seen(llm.calls[1][-1])[-4:] == ["Question", "boat and more", "<8x6>", "<30x20>"]
    assert caplog.text.count("of 2 pictures, the first alone is searched with") == 1


@EVERY_WAY
async def test_bad_messages_are_refused_and_nothing_is_remembered(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted()
    engine = index.as_chat_engine(llm=llm)
    audio = ChatMessage(blocks=[AudioBlock(audio=b"RIFF")])
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, "message is empty"),
        (" \n", {}, "message is empty"),
        (QueryBundle(""), {}, "message is empty"),
        (QueryBundle("", embedding=[1.0] * 64), {}, "no LLM can see a vector"),
        (QueryBundle(None), {}, "query_str of a message is a text"),  # type: ignore[arg-type]
        (ChatMessage(blocks=[]), {}, "message is empty"),
        (ChatMessage(role="assistant", content="hi"), {}, "role 'assistant'"),
        (ChatMessage(blocks=[ImageBlock()]), {}, "no image, path or url"),
        (audio, {}, "AudioBlock"),
        (7, {}, "got int"),
        ("x", {"image": "https://example.org/a.png"}, "URL"),
        (ChatMessage(blocks=[ImageBlock(url="https://example.org/a.png")]), {}, "URL"),
        ("x", {"image": tmp_path / "gone.png"}, r"gone\.png"),
    ]
    for message, options, words in refused:
        with pytest.raises((InputError, ItemError), match=words):
            await talk(engine, way, message, **options)
    assert engine.chat_history == []
    assert llm.calls == []


@EVERY_WAY
async def test_a_query_of_as_query_keeps_its_picture(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted("yes", "yes", "yes")
    engine = index.as_chat_engine(llm=llm, condense=False)
    held = asked(tmp_path).read_bytes()
    for given in (held, Image.open(io.BytesIO(held))):
        await talk(engine, way, index._embed_model.as_query("boat", given))
        assert seen(llm.calls[-1][-1])[-3:] == ["Question", "boat", "<30x20>"]
    await talk(engine, way, QueryBundle("", custom_embedding_strs=["red", "boat"]))
    assert seen(llm.calls[-1][-1])[-2:] == ["Question", "red\nboat"]


@EVERY_WAY
async def test_documents_that_can_not_be_shown_are_not_nothing(tmp_path: Path, way: str) -> None:
    storage = StorageContext.from_defaults(vector_store=FlatStore(rows={}))
    gme = GMEEmbedding(encoder=FakeEncoder(dim=64))
    bare = [ImageNode(image_path=str(save(tmp_path, 1)))]
    llm = Scripted("well")
    engine = MultimodalIndex(bare, embed_model=gme, storage_context=storage).as_chat_engine(llm=llm)
    await talk(engine, way, "boat")
    assert seen(llm.calls[0][-1])[0].startswith("Documents were found (1), but none can be shown")


@EVERY_WAY
async def test_when_nothing_is_found_the_llm_is_told_so(index: MultimodalIndex, way: str) -> None:
    llm = Scripted("nothing there")
    none = SimilarityPostprocessor(similarity_cutoff=0.999)
    engine = index.as_chat_engine(llm=llm, node_postprocessors=[none])
    text, response = await talk(engine, way, "thanks!")
    assert text.strip() == "nothing there"
    assert response.source_nodes == []
    assert seen(llm.calls[0][-1]) == ["No documents were found.", "Question", "thanks!"]
    assert len(engine.chat_history) == 2


# --- follow-ups ---------------------------------------------------------------------------------------------


@EVERY_WAY
async def test_a_follow_up_is_searched_for_in_words_of_its_own(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    llm = Scripted("it is red", " boat and more \n", "two of them")
    judge = FakeReranker()
    engine = index.as_chat_engine(llm=llm, node_postprocessors=[MLLMRerank(reranker=judge)])
    await talk(engine, way, "what colour?", image=asked(tmp_path))
    text, response = await talk(engine, way, "and how many?", image=png(2))
    condensing, answering = llm.calls[1:]
    assert [each.role.value for each in condensing] == ["user", "assistant", "user"]
    assert seen(condensing[0]) == ["what colour?", "<30x20>"]
    assert seen(condensing[-1])[0].startswith("Rewrite the following message")
    assert seen(condensing[-1])[1:] == ["and how many?", "<8x6>"]
    query = judge.calls[-1][0]
    assert (query.text, query.image) == ("boat and more", png(2))
    assert response.sources[0].raw_input == {"message": "boat and more"}
    assert seen(answering[-1])[-3:] == ["Question", "and how many?", "<8x6>"]
    assert text.strip() == "two of them"


@EVERY_WAY
async def test_some_messages_are_searched_for_as_they_are(
    index: MultimodalIndex, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    fixed = index._embed_model.as_query("boat and more", tmp_path / "2.png")
    strings = QueryBundle("how many?", custom_embedding_strs=["words of the page"])
    before = [ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="hello")]
    llm = Scripted(*"12345")
    engine = index.as_chat_engine(llm=llm, similarity_top_k=1, chat_history=before)
    assert [each.node_id for each in (await talk(engine, way, fixed))[1].source_nodes] == ["fused"]
    await talk(engine, way, strings)
    await talk(engine, way, "", image=asked(tmp_path))
    assert len(llm.calls) == 3
    plain = index.as_chat_engine(llm=llm, chat_history=before, condense=False)
    _, response = await talk(plain, way, "how many?")
    assert response.sources[0].raw_input == {"message": "how many?"}
    silent = index.as_chat_engine(llm=Scripted(" ", "well"), chat_history=before)
    with caplog.at_level(logging.WARNING):
        _, response = await talk(silent, way, "how many?")
    assert response.sources[0].raw_input == {"message": "how many?"}
    assert "gave no search text" in caplog.text


# --- memory -------------------------------------------------------------------------------------------------


@EVERY_WAY
async def test_llama_indexs_own_memory_holds_the_conversation(
    index: MultimodalIndex, tmp_path: Path, way: str
) -> None:
    memory = ChatMemoryBuffer.from_defaults()
    chat = index.as_chat_engine(llm=Scripted("one", "two"), memory=memory, condense=False)
    await talk(chat, way, "first", image=asked(tmp_path))
    await talk(chat, way, "second")
    kept = [(each.role.value, seen(each)) for each in await memory.aget_all()]
    assert kept == [
        ("user", ["first", "<30x20>"]),
        ("assistant", ["one"]),
        ("user", ["second"]),
        ("assistant", ["two"]),
    ]
    with pytest.raises(InputError, match="either memory or chat_history"):
        index.as_chat_engine(llm=Scripted(), memory=memory, chat_history=[])


def test_the_default_memory_leaves_out_old_turns_and_counts_pictures(
    index: MultimodalIndex, tmp_path: Path
) -> None:
    llm = Scripted(*["answer"] * 20)
    engine = index.as_chat_engine(llm=llm, condense=False)
    for number in range(20):
        engine.chat(f"picture {number}", image=png(number))
    assert len(engine.chat_history) == 40
    sent = llm.calls[-1][1:-1]
    pictures = sum(isinstance(block, ImageBlock) for each in sent for block in each.blocks)
    window = llm.metadata.context_window
    assert 5 < pictures <= window // 256
    assert sent[0].role == MessageRole.USER
    assert seen(sent[-1]) == ["answer"]


@EVERY_WAY
async def test_documents_come_before_old_turns_and_nothing_outgrows_the_context(way: str) -> None:
    index = index_of([TextNode(text=f"page {number} " + "gear " * 600) for number in range(4)])
    llm = Scripted(*["answer " * 40] * 40)
    told = llm.metadata
    given = ChatMemoryBuffer.from_defaults(token_limit=3000)
    for memory, condense in ((None, False), (given, True)):
        engine = index.as_chat_engine(llm=llm, similarity_top_k=4, memory=memory, condense=condense)
        for _ in range(9):
            await talk(engine, way, "question word " * 40)
        assert len(llm.calls[-1]) > 4
    for sent in llm.calls:
        used = sum(tokens_of(message.blocks) for message in sent)
        assert used <= told.context_window - told.num_output
        if "Document 1" in seen(sent[-1]):
            assert "Document 4" in seen(sent[-1])
        assert [each.role.value for each in sent if each.role != "system"][0::2].count("assistant") == 0


def test_the_newest_messages_are_kept_from_one_of_the_users_on() -> None:
    def said(role: str, count: int) -> ChatMessage:
        return ChatMessage(role=role, content="gear " * count)

    first = said("system", 5)
    turns = [said("user", 10), said("assistant", 20), said("user", 10), said("assistant", 20)]
    last = tokens_of(turns[2].blocks) + tokens_of(turns[3].blocks)
    assert newest(turns, 2 * last) == turns
    assert newest(turns, 2 * last - 1) == turns[2:]
    assert newest(turns, last) == turns[2:]
    assert newest(turns, last - 1) == []
    assert newest(turns[1:], 2 * last) == turns[1:]  # as it was given, where all of it fits
    assert newest([first, *turns], last + tokens_of(first.blocks)) == [first, *turns[2:]]
    assert newest([first, *turns], 0) == [first]
    assert newest([], 10) == []


def test_every_message_of_a_long_conversation_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PictureMemory.from_defaults(
        [ChatMessage(role=role, content=f"{n} gears") for n in range(300) for role in ("user", "assistant")],
        token_limit=100,
    )
    counted: list[Any] = []

    def count(blocks: list[Any]) -> int:
        counted.append(blocks)
        return 5

    monkeypatch.setattr("llama_index.indices.umr.memory.tokens_of", count)
    assert [each.content for each in memory.get()] == [
        f"{n} gears" for n in range(290, 300) for _ in range(2)
    ]
    assert len(counted) == 21
    assert len(memory.get(initial_token_count=95)) == 0
    assert len(memory.get(initial_token_count=200)) == 0


@EVERY_WAY
async def test_a_given_history_takes_the_place_of_the_memory(index: MultimodalIndex, way: str) -> None:
    llm = Scripted("one", "two", "three")
    engine = index.as_chat_engine(llm=llm, condense=False)
    await talk(engine, way, "forgotten")
    given = [ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="hello")]
    await talk(engine, way, "next", given)
    assert [seen(each) for each in llm.calls[1][1:-1]] == [["hi"], ["hello"]]
    assert [said for _, said in history(engine)] == [["hi"], ["hello"], ["next"], ["two"]]
    assert len(given) == 2
    await talk(engine, way, "start", [])
    assert [said for _, said in history(engine)] == [["start"], ["three"]]


@EVERY_WAY
async def test_a_failing_llm_leaves_the_conversation_as_it_was(index: MultimodalIndex, way: str) -> None:
    error = ConnectionError("the LLM is away")
    llm = Scripted("fine", "search", error, error, "search", "half of an answer", error, "search", "at last")
    engine = index.as_chat_engine(llm=llm)
    await talk(engine, way, "first")
    before = history(engine)
    other = [ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="hello")]
    with pytest.raises(ConnectionError) as caught:  # while it answers
        await talk(engine, way, "second", other)
    assert caught.value is error
    with pytest.raises(ConnectionError):  # while it rewrites
        await talk(engine, way, "second")
    if "stream" in way:
        with pytest.raises(ConnectionError) as caught:  # in the middle of its answer
            await talk(engine, way, "second")
        assert caught.value is error
    else:
        llm.lines = ["search", "at last"]
    assert history(engine) == before
    await talk(engine, way, "second")
    assert history(engine) == [*before, ("user", ["second"]), ("assistant", ["at last"])]


async def test_a_cancelled_call_leaves_the_conversation_as_it_was(index: MultimodalIndex) -> None:
    llm = Scripted("never said")
    reached = asyncio.Event()

    async def wait() -> None:
        reached.set()
        await asyncio.Event().wait()

    llm.during = wait
    engine = index.as_chat_engine(llm=llm)
    call = asyncio.create_task(engine.achat("first"))
    await reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert engine.chat_history == []


async def test_a_turn_is_kept_whole_though_it_is_cancelled_while_it_is_written(
    index: MultimodalIndex,
) -> None:
    class Slow(ChatMemoryBuffer):
        async def aput_messages(self, messages: list[ChatMessage]) -> None:
            self.put(messages[0])
            reached.set()
            await go.wait()
            self.put(messages[1])
            done.set()

    reached, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    engine = index.as_chat_engine(llm=Scripted("said"), memory=Slow.from_defaults())
    call = asyncio.create_task(engine.achat("first"))
    await reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go.set()
    await asyncio.wait_for(done.wait(), 5)
    assert [said for _, said in history(engine)] == [["first"], ["said"]]


async def test_an_answer_of_nothing_in_a_coroutine_is_a_turn_too(index: MultimodalIndex) -> None:
    engine = index.as_chat_engine(llm=Scripted(""))
    text, _ = await talk(engine, "astream_chat", "well?")
    assert text == ""
    assert history(engine) == [("user", ["well?"]), ("assistant", [""])]


async def test_an_llm_that_fails_unheard_leaves_one_warning(
    index: MultimodalIndex, caplog: pytest.LogCaptureFixture
) -> None:
    engine = index.as_chat_engine(llm=Scripted("half of an answer", ConnectionError("the LLM is away")))
    with caplog.at_level(logging.WARNING):
        response = await engine.astream_chat("well?")
        task = response.awrite_response_to_history_task
        assert task is not None
        await asyncio.wait([task])
    assert task.exception() is None  # or the loop would report it when the task is forgotten
    assert [record.getMessage() for record in caplog.records] == [
        "the answer broke off and its turn is not kept: the LLM is away"
    ]
    assert engine.chat_history == []


def test_an_answer_of_nothing_is_a_turn_too(index: MultimodalIndex) -> None:
    engine = index.as_chat_engine(llm=MockLLMWithNonyieldingChatStream(is_chat_model=True))
    response = engine.stream_chat("well?")
    assert "".join(response.response_gen) == ""
    assert [role for role, _ in history(engine)] == ["user", "assistant"]


# --- which LLM, without one, and other modes ----------------------------------------------------------------


@EVERY_WAY
async def test_without_an_llm_the_passages_are_the_answer(
    index: MultimodalIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    engine = index.as_chat_engine(extractive=True, similarity_top_k=1)
    text, response = await talk(engine, way, "boat and more", image=tmp_path / "2.png")
    assert text == f"[1]\nboat and more\n[picture: {tmp_path / '2.png'}]"
    assert [each.node_id for each in response.source_nodes] == ["fused"]
    text, _ = await talk(engine, way, "boat and more", image=tmp_path / "2.png")
    assert text.startswith("[1]\nboat and more")
    assert len(engine.chat_history) == 4
    assert Settings._llm is None


def test_no_llm_is_ever_made_that_nobody_asked_for(
    index: MultimodalIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("an LLM was made")

    monkeypatch.setattr("llama_index.core.settings.resolve_llm", made)
    monkeypatch.setattr("llama_index.core.indices.base.resolve_llm", made)
    monkeypatch.setattr(Settings, "_llm", None)
    for mode in ("best", "context", "condense_plus_context", "condense_question", "simple"):
        with pytest.raises(InputError, match=r"Settings\.llm is not set"):
            index.as_chat_engine(mode)
    with pytest.raises(InputError, match="is no chat model"):
        index.as_chat_engine(llm=MockLLM())
    mine = Scripted("yes")
    monkeypatch.setattr(Settings, "_llm", mine)
    assert str(index.as_chat_engine().chat("hello")) == "yes"


@pytest.mark.parametrize("mode", ["best", "condense_plus_context", ChatMode.CONTEXT])
def test_modes_that_retrieve_are_ours(index: MultimodalIndex, mode: Any) -> None:
    llm = Scripted("one", "two", "three")
    engine = index.as_chat_engine(mode, llm=llm)
    assert type(engine) is MultimodalChatEngine
    engine.chat("first")
    engine.chat("second")
    assert len(llm.calls) == (2 if mode == ChatMode.CONTEXT else 3)


def test_the_other_modes_are_llama_indexs_own(index: MultimodalIndex, tmp_path: Path) -> None:
    memory = ChatMemoryBuffer.from_defaults()
    simple = index.as_chat_engine("simple", llm=Scripted("hello"), memory=memory, system_prompt="Be kind.")
    assert type(simple) is SimpleChatEngine
    assert str(simple.chat("hi")) == "hello"
    llm = Scripted("the answer")
    asking = index.as_chat_engine(
        ChatMode.CONDENSE_QUESTION, llm=llm, similarity_top_k=9, memory=ChatMemoryBuffer.from_defaults()
    )
    assert type(asking) is CondenseQuestionChatEngine
    response = asking.chat("red boat")
    assert (str(response), len(response.source_nodes)) == ("the answer", 4)
    assert sum(block.startswith("<") for block in seen(llm.calls[0][-1])) == 3
    told = {"extractive": True, "similarity_top_k": 1, "memory": ChatMemoryBuffer.from_defaults()}
    passages = index.as_chat_engine("condense_question", llm=Scripted(), **told)
    assert str(passages.chat("place: Delft\n\na red boat")) == "[1]\na red boat"


def test_a_prompt_for_follow_ups_may_be_a_template_without_variables(index: MultimodalIndex) -> None:
    llm = Scripted("one", "search", "two")
    engine = index.as_chat_engine(llm=llm, condense_prompt=PromptTemplate("Say it in Dutch."))
    engine.chat("first")
    engine.chat("second")
    assert seen(llm.calls[1][-1]) == ["Say it in Dutch.", "second"]
    for prompt in (PromptTemplate("x {question}"), 7):
        with pytest.raises(InputError, match="condense_prompt is a text or a template without variables"):
            index.as_chat_engine(llm=llm, condense_prompt=prompt)


def test_modes_and_options_that_there_are_not_are_refused(index: MultimodalIndex) -> None:
    llm = Scripted()
    with pytest.raises(InputError, match=r"no chat_mode 'contxt'; allowed are best, .*simple$"):
        index.as_chat_engine("contxt", llm=llm)
    for mode in (ChatMode.REACT, "openai"):
        with pytest.raises(InputError, match=r"no chat_mode .*as a tool"):
            index.as_chat_engine(mode, llm=llm)
    with pytest.raises(InputError, match=r"no option context_template; .*as_retriever"):
        index.as_chat_engine(llm=llm, context_template="{context_str}")
    with pytest.raises(InputError, match="no option similarity_top_k"):
        index.as_chat_engine("simple", llm=llm, similarity_top_k=3)
    with pytest.raises(InputError, match="no option memry"):
        index.as_chat_engine("condense_question", llm=llm, memry=None)


def test_callbacks_see_a_chat(index: MultimodalIndex) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    rerank = MLLMRerank(reranker=FakeReranker())
    engine = index.as_chat_engine(
        llm=Scripted("yes"), node_postprocessors=[rerank], callback_manager=CallbackManager([debug])
    )
    engine.chat("red boat")
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1
    assert rerank.callback_manager is engine.callback_manager  # type: ignore[attr-defined]


def test_a_source_tells_its_text_and_no_bytes(index: MultimodalIndex) -> None:
    response = index.as_chat_engine(llm=Scripted("yes"), similarity_top_k=9).chat("red boat")
    [source] = response.sources
    assert "boat and more" in source.content
    assert len(source.content) < 2000
    assert all(isinstance(each, NodeWithScore) for each in source.raw_output)
