"""`GMEEmbeddings`: what goes in, what comes out, and how the object survives copying."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_umr import GMEEmbeddings
from PIL import Image
from pydantic import ValidationError

from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def embeddings(encoder: FakeEncoder) -> GMEEmbeddings:
    return GMEEmbeddings.from_encoder(encoder, instruction="find the part")


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return path


def encoded(color: str = "red") -> str:
    return base64.b64encode(png(color)).decode()


def test_the_default_is_the_real_model_and_nothing_is_loaded_before_use() -> None:
    assert GMEEmbeddings().config == {"model": "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"}


def test_vectors_are_lists_of_python_floats_of_unit_length(embeddings: GMEEmbeddings) -> None:
    [one, two] = embeddings.embed_documents(["kite", "boat"])
    assert type(one) is list
    assert {type(value) for value in one + two} == {float}
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert embeddings.dimension == len(one)


def test_only_queries_get_the_instruction(encoder: FakeEncoder, embeddings: GMEEmbeddings) -> None:
    embeddings.embed_query("kite")
    embeddings.embed_documents(["kite", "boat"])
    embeddings.embed_items(["kite"], role="query")
    assert [(role, len(items), instruction) for role, items, instruction in encoder.calls] == [
        ("query", 1, "find the part"),
        ("document", 2, None),
        ("query", 1, "find the part"),
    ]


def test_documents_of_every_form(encoder: FakeEncoder, embeddings: GMEEmbeddings, photo: Path) -> None:
    picture = Image.new("RGB", (9, 9))
    vectors = embeddings.embed_documents(
        [
            "kite",
            {"text": "kite", "image": str(photo)},
            Item(image=photo),
            Document("kite", metadata={"image_uri": str(photo)}),
            photo,
            picture,
            [{"type": "text", "text": "kite"}],
        ]
    )
    assert len(vectors) == 7
    [(_, items, _)] = encoder.calls
    assert [item.modality for item in items] == ["text", "fused", "image", "fused", "image", "image", "text"]


RED = encoded()
BLOCKS: dict[str, Any] = {
    "v1": {"type": "image", "base64": RED, "mime_type": "image/png"},
    "v1 without mime type": {"type": "image", "base64": RED},
    "v1 data URI": {"type": "image", "url": f"data:image/png;base64,{RED}"},
    "v0": {"type": "image", "source_type": "base64", "data": RED, "mime_type": "image/png"},
    "v0 data URI": {"type": "image", "source_type": "url", "url": f"data:image/png;base64,{RED}"},
    "OpenAI": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED}"}},
    "OpenAI, bare string": {"type": "image_url", "image_url": f"data:image/png;base64,{RED}"},
    "Anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED}},
}


@pytest.mark.parametrize("form", BLOCKS)
def test_every_form_of_image_block_is_the_same_picture(embeddings: GMEEmbeddings, form: str) -> None:
    block = BLOCKS[form]
    alone = embeddings.embed_query({"image": png()})
    fused = embeddings.embed_query({"text": "kite", "image": png()})
    blocks = [{"type": "text", "text": "kite"}, block]
    assert embeddings.embed_query(block) == alone
    assert embeddings.embed_query(blocks) == fused
    assert embeddings.embed_query(["kite", block]) == fused
    assert embeddings.embed_query(HumanMessage(content=blocks)) == fused
    assert embeddings.embed_query({"role": "user", "content": blocks}) == fused
    assert alone != fused


def test_a_message_or_block_of_text_is_that_text(embeddings: GMEEmbeddings) -> None:
    plain = embeddings.embed_query("kite")
    assert embeddings.embed_query(HumanMessage("kite")) == plain
    assert embeddings.embed_query({"type": "text", "text": "kite"}) == plain
    assert embeddings.embed_query({"text": "kite", "image": None}) == plain


def test_a_document_is_a_query_with_its_picture(embeddings: GMEEmbeddings, photo: Path) -> None:
    fused = embeddings.embed_query({"text": "kite", "image": photo})
    for key in ("image", "image_uri", "image_path"):
        assert embeddings.embed_query(Document("kite", metadata={key: str(photo)})) == fused
    alone = embeddings.embed_query(Document("", metadata={"image": str(photo)}))
    assert [alone] == embeddings.embed_image(uris=[photo])


@pytest.mark.parametrize(
    "address",
    ["https://example.org/a.png", "http://127.0.0.1/a.png", "/etc/hostname", "file:///etc/hostname"],
)
@pytest.mark.parametrize(
    "form", [lambda a: {"type": "image", "url": a}, lambda a: {"type": "image_url", "image_url": {"url": a}}]
)
def test_addresses_in_blocks_are_never_followed(embeddings: GMEEmbeddings, form: Any, address: str) -> None:
    with pytest.raises(ItemError, match="not followed") as caught:
        embeddings.embed_query([form(address)])
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    "query", [{"image": "https://a/b.png"}, Document("", metadata={"image": "http://a/b"})]
)
def test_web_addresses_of_pictures_are_refused(embeddings: GMEEmbeddings, query: Any) -> None:
    with pytest.raises(ItemError, match="URLs are off"):
        embeddings.embed_query(query)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ([], "empty"),
        ({"text": "", "image": None}, "empty"),
        (None, "NoneType"),
        (7, "int"),
        (b"bytes", "Item\\(image="),
        ({"query": "kite"}, "unknown item fields \\['query'\\]"),
        ([{"type": "audio", "base64": "AA=="}], "'audio' can't be embedded"),
        ([{"type": "image", "file_id": "f1"}], "\\['file_id', 'type'\\]"),
        ([{"type": "image", "base64": "not base64"}], "base64"),
        ([["nested"]], "content blocks are"),
        (Document("kite", metadata={"image": 3}), "metadata\\['image'\\] must be a path"),
        (Document("kite", metadata={"modality": "image"}), "the document holds no picture"),
        ("poison", "refuses poison"),
    ],
)
def test_a_query_that_cannot_be_embedded_says_why(
    embeddings: GMEEmbeddings, query: Any, message: str
) -> None:
    with pytest.raises(ItemError, match=message):
        embeddings.embed_query(query)


def test_one_error_lists_every_bad_document(embeddings: GMEEmbeddings, tmp_path: Path) -> None:
    with pytest.raises(BatchError) as caught:
        embeddings.embed_documents(["good", "poison", {"image": tmp_path / "gone.png"}])
    assert [error.index for error in caught.value.errors] == [1, 2]
    with pytest.raises(BatchError) as caught:
        embeddings.embed_documents(["good", "", 3])
    assert [(error.index, error.code) for error in caught.value.errors] == [(1, "empty"), (2, "unsupported")]


def test_one_thing_where_a_list_belongs_is_refused(embeddings: GMEEmbeddings, photo: Path) -> None:
    with pytest.raises(ItemError, match="give a list"):
        embeddings.embed_documents("kite")
    for uris in (str(photo), photo, png()):
        with pytest.raises(InputError, match="uris is a list"):
            embeddings.embed_image(uris=uris)  # type: ignore[arg-type]  # that is the mistake


def test_nothing_in_nothing_out_without_the_model() -> None:
    assert GMEEmbeddings(model="no/such/model").embed_documents([]) == []
    assert GMEEmbeddings(model="no/such/model").embed_image(uris=[]) == []


def test_image_methods_take_every_picture_source(embeddings: GMEEmbeddings, photo: Path) -> None:
    data = photo.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    vectors = embeddings.embed_image(uris=[str(photo), photo, data, uri])
    assert vectors == [vectors[0]] * 4
    assert embeddings.embed_images(uris=[photo]) == vectors[:1]
    assert embeddings.embed_items([{"image": photo}]) == vectors[:1]


async def test_async_twins_make_one_call_and_do_not_block_the_loop(encoder: FakeEncoder, photo: Path) -> None:
    loop_ran = threading.Event()

    class Waiting(FakeEncoder):
        def encode_documents(self, *args: Any, **kwargs: Any) -> Any:
            assert loop_ran.wait(10), "the event loop stood still"
            return super().encode_documents(*args, **kwargs)

    waiting = Waiting()
    embeddings = GMEEmbeddings.from_encoder(waiting)
    task = asyncio.create_task(embeddings.aembed_documents(["a", "b", "c"]))
    await asyncio.sleep(0)
    loop_ran.set()
    assert await task == embeddings.embed_documents(["a", "b", "c"])
    assert len(waiting.calls) == 2
    assert await embeddings.aembed_query("a") == embeddings.embed_query("a")
    assert await embeddings.aembed_image(uris=[photo]) == embeddings.embed_image(uris=[photo])
    assert await embeddings.aembed_images(uris=[photo]) == embeddings.embed_image(uris=[photo])
    assert await embeddings.aembed_items(["a"], role="query") == embeddings.embed_items(["a"], role="query")


class Locked(FakeEncoder):
    """As a real model: neither copied nor pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda one: one.model_copy(),
        lambda one: one.model_copy(deep=True),
        lambda one: pickle.loads(pickle.dumps(one)),
    ],
    ids=["copy", "deepcopy", "model_copy", "model_copy deep", "pickle"],
)
def test_copies_and_pickles_share_the_model(copied: Any) -> None:
    encoder = Locked()
    with pytest.raises(TypeError):
        pickle.dumps(encoder)
    embeddings = GMEEmbeddings.from_encoder(encoder, instruction="find")
    other = copied(embeddings)
    assert other == embeddings
    assert other.encoder is encoder
    assert other.embed_query("kite") == embeddings.embed_query("kite")


def test_a_pickle_brings_an_encoder_that_can_be_pickled_along(encoder: FakeEncoder) -> None:
    embeddings = GMEEmbeddings.from_encoder(encoder)
    vector, data = embeddings.embed_query("kite"), pickle.dumps(embeddings)
    del embeddings
    assert pickle.loads(data).embed_query("kite") == vector


def test_other_options_ask_for_another_model(monkeypatch: pytest.MonkeyPatch, encoder: FakeEncoder) -> None:
    asked = []

    def shared(**config: Any) -> FakeEncoder:
        asked.append(config)
        return FakeEncoder(dim=config["dim"])

    monkeypatch.setattr("umr_plugins.embedder.shared_embedder", shared)
    embeddings = GMEEmbeddings.from_encoder(encoder)
    assert embeddings.model_copy(update={"instruction": "find"}).encoder is encoder
    assert embeddings.model_copy(update={"dim": 8}).dimension == 8
    assert asked == [{"model": "fake", "dim": 8}]


def test_the_model_comes_from_the_shared_cache(monkeypatch: pytest.MonkeyPatch, encoder: FakeEncoder) -> None:
    asked = []

    def shared(**config: Any) -> FakeEncoder:
        asked.append(config)
        return encoder

    monkeypatch.setattr("umr_plugins.embedder.shared_embedder", shared)
    embeddings = GMEEmbeddings(
        model=Path("checkpoints/mine"),
        device="cpu",
        dim=8,
        max_image_tokens=256,
        positions="mrope",
        instruction="find",
    )
    assert asked == []
    embeddings.embed_query("kite")
    assert asked == [
        {
            "model": "checkpoints/mine",
            "device": "cpu",
            "dim": 8,
            "max_image_tokens": 256,
            "positions": "mrope",
        }
    ]
    assert pickle.loads(pickle.dumps(embeddings)).encoder is encoder


def test_options_may_be_torch_objects() -> None:
    import torch

    assert GMEEmbeddings(device=torch.device("cpu"), dtype=torch.bfloat16).config == {
        "model": "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
        "device": "cpu",
        "dtype": "bfloat16",
    }


def test_configuration_mistakes_are_refused() -> None:
    with pytest.raises(ValidationError, match="modle"):
        GMEEmbeddings(modle="umr-tiny")
    with pytest.raises(ValidationError, match="positions"):
        GMEEmbeddings(positions="rope")
    with pytest.raises(ValidationError, match="greater than 0"):
        GMEEmbeddings(dim=0)
    with pytest.raises(ValidationError, match="frozen"):
        GMEEmbeddings().dim = 8
    with pytest.raises(InputError, match='"query" or "document"'):
        GMEEmbeddings().embed_items(["a"], role="passage")  # type: ignore[arg-type]  # that is the mistake
