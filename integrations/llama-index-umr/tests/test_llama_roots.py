"""Which files a node may have opened: the mark of nodes that we vouch for, and the user's folders."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import StorageContext
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.base.response.schema import Response
from llama_index.core.llms.mock import MockLLMWithChatMemoryOfLastCall
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MediaResource,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.embeddings.gme import GMEEmbedding, PageNode
from llama_index.embeddings.gme.roots import allowed_item, allowed_picture, vouch, vouched
from llama_index.indices.umr import MultimodalChatEngine, MultimodalIndex, MultimodalQueryEngine
from llama_index.postprocessor.mllm_rerank import JudgedNode, MLLMRerank, RetrieveRerankAnswer
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import kinds, png, save
from llama_stores import FlatStore
from PIL import Image

from umr_plugins.errors import InputError, ItemError
from umr_plugins.testing import FakeEncoder, FakeReranker
from umr_plugins.types import Item, PageImage


def gme() -> GMEEmbedding:
    return GMEEmbedding(encoder=FakeEncoder(dim=64))


def named(path: Path) -> list[BaseNode]:
    """One node of every kind that names a file."""
    return [
        ImageNode(id_="image", text="a word", image_path=str(path)),
        Node(
            id_="fused",
            text_resource=MediaResource(text="a word"),
            image_resource=MediaResource(path=path),
        ),
        PageNode(id_="page", text="a word", page_path=str(path), page=1),
    ]


# --- the mark ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(3))
def test_a_node_that_we_vouch_for_may_have_its_file_opened(place: int, tmp_path: Path) -> None:
    node = named(save(tmp_path, 1))[place]
    with pytest.raises(ItemError, match=rf"node {node.node_id}: .*1\.png.*roots=\[folder\]"):
        allowed_picture(node)
    with pytest.raises(ItemError, match=rf"node {node.node_id}: .*1\.png.*roots=\[folder\]"):
        allowed_item(node)
    vouch(node)
    assert allowed_picture(node) == allowed_item(node).image
    assert allowed_picture(node) in (tmp_path / "1.png", PageImage(tmp_path / "1.png", 1))


@pytest.mark.parametrize("place", range(3))
def test_the_mark_is_neither_dumped_nor_compared_nor_shown(place: int, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    marked, plain = named(path)[place], named(path)[place]
    vouch(marked)
    assert marked == plain
    assert plain == marked
    assert marked.hash == plain.hash
    assert marked.model_dump() == plain.model_dump()
    assert marked.model_dump_json() == plain.model_dump_json()
    assert marked.to_dict() == plain.to_dict()
    assert repr(marked) == repr(plain)
    wrapped = NodeWithScore(node=marked, score=0.5)
    assert wrapped.node is marked
    assert wrapped.to_dict() == NodeWithScore(node=plain, score=0.5).to_dict()


def test_copies_and_changed_metadata_keep_the_mark(tmp_path: Path) -> None:
    node = named(save(tmp_path, 1))[0]
    vouch(node)
    node.metadata = {"a": 1}
    node.embedding = [1.0]
    for same in (node, node.model_copy(), copy.copy(node), copy.deepcopy(node)):
        assert allowed_picture(same) == tmp_path / "1.png"


def test_a_changed_file_loses_the_mark(tmp_path: Path) -> None:
    image, fused, page = named(save(tmp_path, 1))
    for node in (image, fused, page):
        vouch(node)
    assert isinstance(image, ImageNode)
    assert isinstance(fused, Node)
    assert fused.image_resource is not None
    assert isinstance(page, PageNode)
    image.image_path = str(save(tmp_path, 2))
    fused.image_resource.path = save(tmp_path, 2)
    page.page = 2
    for node in (image, fused, page, image.model_copy()):
        with pytest.raises(ItemError, match="may not be opened"):
            allowed_picture(node)


@pytest.mark.parametrize("key", ["_umr_vouched", "__dict__", "vouched"])
def test_no_json_and_no_pickle_brings_the_mark(key: str, tmp_path: Path) -> None:
    path = str(save(tmp_path, 1))
    forged = {key: {"_umr_vouched": path} if key == "__dict__" else path}
    marked = ImageNode(image_path=path)
    vouch(marked)
    made: list[BaseNode] = [
        ImageNode.from_dict(marked.to_dict() | forged),
        ImageNode.model_validate(marked.model_dump() | forged),
        ImageNode.from_json(json.dumps(json.loads(marked.to_json()) | forged)),
        ImageNode(image_path=path, **forged),  # type: ignore[arg-type]
        ImageNode(image_path=path, metadata=forged, extra_info=forged),
        pickle.loads(pickle.dumps(marked)),
    ]
    for node in made:
        with pytest.raises(ItemError, match="may not be opened"):
            allowed_picture(node)


def test_pictures_in_the_node_itself_need_no_permission() -> None:
    inside = base64.b64encode(png(1)).decode()
    assert allowed_picture(ImageNode(image=inside)) == png(1)
    assert allowed_picture(Node(image_resource=MediaResource(data=png(1)))) == png(1)
    uri = f"data:image/png;base64,{inside}"
    assert allowed_picture(ImageNode(image_path=uri)) == uri
    assert allowed_picture(TextNode(text="no picture")) is None
    assert allowed_item(TextNode(text="no picture")).text == "no picture"
    node = ImageNode(image=inside)
    vouch(node)
    assert not [value for value in node.__dict__.values() if isinstance(value, bytes)]  # no second copy
    remote = ImageNode(id_="n", image_url="https://example.org/a.png")
    vouch(remote)
    with pytest.raises(ItemError, match=r"node n: .*URL"):
        allowed_picture(remote)


def test_files_below_a_root_may_be_opened_and_no_others(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    red, secret = save(photos, 1), save(tmp_path, 2)
    (photos / "link.png").symlink_to(secret)
    for node in named(red):
        assert allowed_picture(node, [photos]) in (red, PageImage(red, 1))
        assert allowed_picture(node, str(tmp_path)) in (red, PageImage(red, 1))
    assert allowed_picture(ImageNode(image_path="1.png"), [tmp_path / "none", photos]) == red
    assert allowed_item(PageNode(page_path="1.png", page=3), [photos]).image == PageImage(red, 3)
    for path in (str(secret), "link.png", "../2.png", str(photos / ".." / "2.png")):
        for node in named(Path(path)):
            with pytest.raises(ItemError, match="may not be opened"):
                allowed_picture(node, [photos])


# --- who is vouched for -----------------------------------------------------------------------------------


def test_what_was_just_embedded_and_what_our_store_returns_is_vouched_for(tmp_path: Path) -> None:
    given = [kind.node for kind in kinds(tmp_path)]
    gme().embed_nodes(given)
    index = MultimodalIndex([kind.node for kind in kinds(tmp_path)], embed_model=gme(), path=tmp_path / "db")
    back = index.as_retriever(similarity_top_k=20).retrieve("a text")
    again = MultimodalIndex(path=tmp_path / "db", embed_model=gme())
    reloaded = again.as_retriever(similarity_top_k=20).retrieve("a text")
    for nodes in (given, [each.node for each in back], [each.node for each in reloaded]):
        assert len(nodes) == len(given)
        for node in nodes:
            allowed_item(node)
            allowed_picture(node)


def test_a_vector_that_was_given_vouches_for_nothing(tmp_path: Path) -> None:
    node = ImageNode(image_path=str(save(tmp_path, 1)), embedding=[1.0] * 64)
    gme().embed_nodes([node])
    with pytest.raises(ItemError, match="may not be opened"):
        allowed_picture(node)


def test_our_store_vouches_for_no_file_that_it_was_not_vouched_for(tmp_path: Path) -> None:
    store = UMRVectorStore(gme(), path=tmp_path / "db")
    given = named(save(tmp_path, 1))
    for number, node in enumerate(given):
        node.embedding = [1.0 + number] * 64
    embedded = named(tmp_path / "1.png")[:1]
    embedded[0].id_ = "embedded"  # type: ignore[attr-defined]
    inside = ImageNode(id_="inside", image=base64.b64encode(png(3)).decode(), embedding=[1.0] * 64)
    store.add([*given, *gme().embed_nodes(embedded), inside])
    store.index.add([Item(image=tmp_path / "1.png")], ids=["core"])
    store.close()
    again = UMRVectorStore(gme(), path=tmp_path / "db")
    nodes = {node.node_id: node for node in again.get_nodes()}
    opened = {"embedded", "inside", "core"}
    assert {name for name, node in nodes.items() if vouched(node)} == opened
    for node in given:
        with pytest.raises(ItemError, match="may not be opened"):
            allowed_picture(nodes[node.node_id])
    copied = UMRVectorStore(gme())
    for node in nodes.values():
        node.embedding = [1.0] * 64
    copied.add([*nodes.values()])  # from store to store, what is vouched for stays so, and no more
    assert {node.node_id for node in copied.get_nodes() if vouched(node)} == opened


def test_what_another_store_gave_back_is_not_vouched_for_in_ours(tmp_path: Path) -> None:
    foreign = FlatStore(rows={})
    path = str(save(tmp_path, 1))
    foreign.add([ImageNode(id_="theirs", text="red boat", image_path=path, embedding=[1.0] * 64)])
    [node] = foreign.query(VectorStoreQuery(query_embedding=[1.0] * 64)).nodes or []
    node.embedding = [1.0] * 64
    index = MultimodalIndex([node], embed_model=gme())
    llm = MockLLMWithChatMemoryOfLastCall(is_chat_model=True)
    index.as_query_engine(llm).query("red boat")
    assert llm.last_chat_messages is not None
    assert not any(isinstance(block, ImageBlock) for block in llm.last_chat_messages[-1].blocks)


# --- rerankers and engines over a store that anyone may have written to -------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> MultimodalIndex:
    """An index over another store, into which somebody has written the paths of two files."""
    photos = tmp_path / "photos"
    photos.mkdir()
    nodes: list[BaseNode] = [
        ImageNode(id_="mine", text="red boat", image_path=str(save(photos, 1))),
        ImageNode(id_="theirs", text="red boat of theirs", image_path=str(save(tmp_path, 2))),
        ImageNode(id_="bare", image_path=str(save(tmp_path, 3))),
    ]
    storage = StorageContext.from_defaults(vector_store=SimpleVectorStore())
    return MultimodalIndex(nodes, embed_model=gme(), storage_context=storage)


def test_the_reranker_keeps_a_node_that_it_may_not_open_at_its_rank(
    store: MultimodalIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = store.as_retriever(similarity_top_k=9).retrieve("red boat")
    judge = FakeReranker()
    with caplog.at_level(logging.WARNING):
        out = MLLMRerank(reranker=judge).postprocess_nodes(found, query_str="red boat")
    assert judge.calls == []
    assert [each.node_id for each in out] == [each.node_id for each in found]
    for each in out:
        assert isinstance(each, JudgedNode)
        assert each.relevance is None
        assert f"node {each.node_id}: its picture" in (each.error or "")
        assert "roots=[folder]" in (each.error or "")
    assert "3 of 3 nodes could not be judged" in caplog.text
    rerank = MLLMRerank(reranker=judge, roots=[tmp_path / "photos"])
    out = rerank.postprocess_nodes(found, query_str="red boat")
    assert {each.node_id for each in out if _error(each) is None} == {"mine"}
    [(_, [item])] = judge.calls
    assert item.image == tmp_path / "photos" / "1.png"


def _error(each: NodeWithScore) -> str | None:
    assert isinstance(each, JudgedNode)
    return each.error


def test_the_rerankers_roots_are_dumped_copied_and_pickled(tmp_path: Path) -> None:
    rerank = MLLMRerank(roots=tmp_path)
    assert rerank.roots == (str(tmp_path),)
    assert MLLMRerank(roots=[str(tmp_path)]).to_dict() == rerank.to_dict()
    for again in (
        MLLMRerank.from_dict(json.loads(json.dumps(rerank.to_dict()))),
        pickle.loads(pickle.dumps(rerank)),
        copy.deepcopy(rerank),
    ):
        assert again.roots == (str(tmp_path),)
    assert MLLMRerank().roots == ()
    with pytest.raises(InputError, match="roots"):
        MLLMRerank(roots=[""])


Ask = Callable[[MultimodalIndex, MockLLMWithChatMemoryOfLastCall, Sequence[Path]], Any]


async def by_workflow(index: MultimodalIndex, llm: Any, roots: Sequence[Path]) -> Any:
    workflow = RetrieveRerankAnswer(index.as_retriever(similarity_top_k=9), llm=llm, roots=roots)
    return await workflow.run(question="red boat")


async def by_query_engine(index: MultimodalIndex, llm: Any, roots: Sequence[Path]) -> Any:
    return await index.as_query_engine(llm, similarity_top_k=9, roots=roots).aquery("red boat")


async def by_chat_engine(index: MultimodalIndex, llm: Any, roots: Sequence[Path]) -> Any:
    return await index.as_chat_engine(llm=llm, similarity_top_k=9, roots=roots).achat("red boat")


@pytest.mark.parametrize("ask", [by_workflow, by_query_engine, by_chat_engine])
async def test_engines_show_the_text_of_such_a_node_and_never_send_its_picture(
    store: MultimodalIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture, ask: Any
) -> None:
    for roots, sent in (([], 0), ([tmp_path / "photos"], 1), ([tmp_path], 3)):
        llm = MockLLMWithChatMemoryOfLastCall(is_chat_model=True)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            response = await ask(store, llm, roots)
        assert llm.last_chat_messages is not None
        blocks = llm.last_chat_messages[-1].blocks
        texts = [block.text for block in blocks if not isinstance(block, ImageBlock)]
        assert {"red boat", "red boat of theirs"} <= set(texts)
        assert sum(isinstance(block, ImageBlock) for block in blocks) == sent
        assert caplog.text.count("may not be opened") == 3 - sent
        # A picture that is not shown, without a text, is no source.
        assert len(response.source_nodes) == (3 if sent == 3 else 2)


def test_the_users_own_picture_needs_no_root(store: MultimodalIndex, tmp_path: Path) -> None:
    llm = MockLLMWithChatMemoryOfLastCall(is_chat_model=True)
    asked = save(tmp_path, 7)
    engine = MultimodalQueryEngine(store.as_retriever(), llm)
    response = engine.query(QueryBundle("red boat", image_path=str(asked)))
    assert isinstance(response, Response)
    chat = MultimodalChatEngine(store.as_retriever(), llm)
    chat.chat("red boat", image=asked)
    assert llm.last_chat_messages is not None
    [picture] = [block for block in llm.last_chat_messages[-1].blocks if isinstance(block, ImageBlock)]
    assert Image.open(io.BytesIO(picture.resolve_image().read())).format == "JPEG"
