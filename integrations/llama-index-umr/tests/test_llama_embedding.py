"""`GMEEmbedding`: roles, kinds of input, copies, events, coroutines."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import inspect
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.embeddings.utils import resolve_embed_model
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import QueryBundle
from llama_index.embeddings.gme import GMEEmbedding
from PIL import Image

from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def gme(encoder: FakeEncoder) -> GMEEmbedding:
    return GMEEmbedding(encoder=encoder, instruction="Find it.")


def png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    return path


def vector(encoder: FakeEncoder, item: Item | str) -> list[float]:
    return np.asarray(encoder.encode_documents([item])).tolist()[0]


def test_queries_get_the_instruction_and_documents_do_not(gme: GMEEmbedding, encoder: FakeEncoder) -> None:
    gme.get_query_embedding("cat")
    gme.get_text_embedding("cat")
    assert [(role, instruction) for role, _, instruction in encoder.calls] == [
        ("query", "Find it."),
        ("document", None),
    ]


@pytest.mark.parametrize("form", ["path", "str", "bytes", "BytesIO", "data"])
def test_a_picture_of_any_form_gets_the_same_vector(gme: GMEEmbedding, photo: Path, form: str) -> None:
    data = photo.read_bytes()
    given: Any = {
        "path": photo,
        "str": str(photo),
        "bytes": data,
        "BytesIO": io.BytesIO(data),
        "data": "data:image/png;base64," + base64.b64encode(data).decode(),
    }[form]
    assert gme.get_image_embedding(given) == vector(FakeEncoder(), Item(image=photo))


def test_picture_with_text_is_fused_into_one_vector(gme: GMEEmbedding, photo: Path) -> None:
    fused = gme.get_fused_embedding("a photo", str(photo))
    assert fused == vector(FakeEncoder(), Item(text="a photo", image=photo))
    assert fused != gme.get_image_embedding(str(photo))


def test_vectors_are_lists_of_python_floats(gme: GMEEmbedding, photo: Path) -> None:
    vectors = [
        gme.get_query_embedding("a"),
        gme.get_text_embedding("a"),
        *gme.get_text_embedding_batch(["a", "b"]),
        gme.get_image_embedding(str(photo)),
        gme.get_query_bundle_embedding(QueryBundle("a", str(photo))),
    ]
    assert all(type(value) is float for one in vectors for value in one)
    json.dumps(vectors)


def test_a_list_is_one_call_of_the_model(gme: GMEEmbedding, encoder: FakeEncoder) -> None:
    asyncio.run(gme.aget_text_embedding_batch([f"text {n}" for n in range(50)]))
    asyncio.run(gme.aget_image_embedding_batch([io.BytesIO(png(c)) for c in ("red", "blue")]))
    assert [len(items) for _, items, _ in encoder.calls] == [50, 2]


def test_sync_and_async_agree(gme: GMEEmbedding, photo: Path) -> None:
    async def both() -> list[list[float]]:
        return [
            await gme.aget_query_embedding("cat"),
            await gme.aget_text_embedding("cat"),
            await gme.aget_image_embedding(str(photo)),
            await gme.aget_fused_embedding("cat", str(photo)),
            await gme.aget_query_bundle_embedding(QueryBundle("cat", str(photo))),
            (await gme.aas_query("cat", photo)).embedding or [],
        ]

    bundle = QueryBundle("cat", str(photo))
    assert asyncio.run(both()) == [
        gme.get_query_embedding("cat"),
        gme.get_text_embedding("cat"),
        gme.get_image_embedding(str(photo)),
        gme.get_fused_embedding("cat", str(photo)),
        gme.get_query_bundle_embedding(bundle),
        gme.as_query("cat", photo).embedding,
    ]


class SlowEncoder(FakeEncoder):
    """Waits in the model until the event loop has done something else; counts calls at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.ticked = threading.Event()
        self.inside = self.most = 0

    def encode_documents(self, items: Any, instruction: Any = None, **options: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.ticked.wait(10), "the event loop stood still"
        self.inside -= 1
        return super().encode_documents(items, instruction, **options)


def test_the_event_loop_goes_on_and_one_batch_runs_at_a_time() -> None:
    encoder = SlowEncoder()
    gme = GMEEmbedding(encoder=encoder, embed_batch_size=1)

    async def main() -> list[list[float]]:
        task = asyncio.create_task(gme.aget_text_embedding_batch(["a", "b", "c", "d"]))
        await asyncio.sleep(0)
        encoder.ticked.set()
        return await task

    vectors = asyncio.run(main())
    assert vectors == [vector(FakeEncoder(), text) for text in "abcd"]
    assert encoder.most == 1


def test_a_query_does_not_wait_for_the_documents_before_it() -> None:
    encoder = SlowEncoder()
    gme = GMEEmbedding(encoder=encoder)

    async def main() -> None:
        task = asyncio.create_task(gme.aget_text_embedding_batch(["a"]))
        await gme.aget_query_embedding("now")
        assert not task.done()
        encoder.ticked.set()
        await task

    asyncio.run(main())


def test_as_query_sets_the_vector_and_keeps_the_picture(gme: GMEEmbedding, photo: Path) -> None:
    query = gme.as_query("cat", photo)
    assert query.query_str == "cat"
    assert query.image_path == str(photo)
    assert query.embedding == gme.get_query_bundle_embedding(QueryBundle("cat", str(photo)))
    held = photo.read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(held).decode()}"
    opened = Image.open(photo)
    for given, kept in ((held, held), (io.BytesIO(held), held), (uri, uri), (opened, opened)):
        query = gme.as_query(image=given)  # type: ignore[arg-type]  # as LlamaIndex's users pass it
        assert query.image_path == kept
        assert query.embedding == vector(FakeEncoder(), Item(image=kept))


def test_several_query_strings_give_a_unit_mean(gme: GMEEmbedding) -> None:
    mean = gme.get_query_bundle_embedding(QueryBundle("unused", custom_embedding_strs=["cat", "dog"]))
    expected = np.add(vector(FakeEncoder(), "cat"), vector(FakeEncoder(), "dog"))
    np.testing.assert_allclose(mean, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize(
    "empty", [QueryBundle(""), QueryBundle(" \n"), QueryBundle("", custom_embedding_strs=[])]
)
def test_an_empty_query_is_refused(gme: GMEEmbedding, empty: QueryBundle) -> None:
    with pytest.raises(InputError, match="empty"):
        gme.get_query_bundle_embedding(empty)


def test_urls_are_refused(gme: GMEEmbedding) -> None:
    with pytest.raises(ItemError, match="URL"):
        gme.get_image_embedding("https://example.org/a.png")
    with pytest.raises(ItemError, match="URL"):
        gme.as_query(image="http://example.org/a.png")


def test_options_survive_a_dump(encoder: FakeEncoder) -> None:
    gme = GMEEmbedding(
        "umr-tiny",
        device="cpu",
        dtype="float32",
        dim=64,
        min_image_tokens=4,
        max_image_tokens=64,
        max_length=128,
        positions="mrope",
        max_batch_tokens=1024,
        revision="main",
        instruction="Find it.",
        embed_batch_size=7,
    )
    data = gme.to_dict()
    again = GMEEmbedding.from_dict(json.loads(json.dumps(data)))
    assert again.to_dict() == data
    assert data["class_name"] == "GMEEmbedding"
    assert data["positions"] == "mrope"
    assert data["dim"] == 64


def test_a_dump_has_the_options_of_a_given_encoder_but_not_the_encoder(gme: GMEEmbedding) -> None:
    data = gme.to_dict()
    assert data["model_name"] == "fake"
    assert data["instruction"] == "Find it."
    assert "FakeEncoder" not in str(data)


def test_copies_share_the_model(gme: GMEEmbedding, encoder: FakeEncoder) -> None:
    assert copy.deepcopy(gme).encoder is encoder
    assert copy.copy(gme).encoder is encoder
    assert gme.model_copy().encoder is encoder
    changed = gme.model_copy(update={"instruction": "Other."})
    changed.get_query_embedding("a")
    assert encoder.calls[-1][2] == "Other."


def test_a_pickle_keeps_options_and_a_foreign_encoder(gme: GMEEmbedding) -> None:
    again = pickle.loads(pickle.dumps(gme))
    assert again.to_dict() == gme.to_dict()
    assert again.get_text_embedding("a") == gme.get_text_embedding("a")


def test_a_pickle_of_a_named_model_holds_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import umr_plugins.embedder

    made: list[dict[str, Any]] = []

    def shared(**options: Any) -> FakeEncoder:
        made.append(options)
        return FakeEncoder()

    monkeypatch.setattr(umr_plugins.embedder, "shared_embedder", shared)
    gme = GMEEmbedding("umr-tiny", dim=64)
    assert made == []  # nothing is loaded before it is needed
    pickled = pickle.dumps(gme)
    assert len(pickled) < 2000
    pickle.loads(pickled).get_text_embedding("a")
    assert made == [{"model": "umr-tiny", "dim": 64}]


def test_a_changed_option_is_not_answered_by_the_old_model(
    gme: GMEEmbedding, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import umr_plugins.embedder

    other = FakeEncoder(dim=8)
    monkeypatch.setattr(umr_plugins.embedder, "shared_embedder", lambda **options: other)
    assert gme.model_copy(update={"dim": 8}).encoder is other
    assert gme.encoder is encoder


def test_contradicting_options_are_refused(encoder: FakeEncoder) -> None:
    with pytest.raises(InputError, match=r"model_name, dim"):
        GMEEmbedding("umr-tiny", dim=3, encoder=encoder)
    with pytest.raises(TypeError, match="instuction"):
        GMEEmbedding(encoder=encoder, instuction="x")  # type: ignore[call-arg]


def test_every_bad_text_is_named(gme: GMEEmbedding) -> None:
    with pytest.raises(BatchError) as caught:
        gme.get_text_embedding_batch(["fine", "poison", ""])
    assert [error.index for error in caught.value.errors] == [1, 2]


class Recorder(BaseEventHandler):
    events: list[Any] = []  # noqa: RUF012  # a pydantic field

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)


@pytest.mark.parametrize("way", ["text", "query", "image", "images", "fused", "bundle", "async"])
def test_both_event_systems_see_every_embedding(encoder: FakeEncoder, photo: Path, way: str) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    gme = GMEEmbedding(encoder=encoder, callback_manager=CallbackManager([debug]))
    recorder = Recorder()
    root = get_dispatcher()
    root.add_event_handler(recorder)
    data = photo.read_bytes()
    key = f"<image sha256:{hashlib.sha256(data).hexdigest()}>"
    calls: dict[str, tuple[Any, list[str]]] = {
        "text": (lambda: gme.get_text_embedding("cat"), ["cat"]),
        "query": (lambda: gme.get_query_embedding("cat"), ["cat"]),
        "image": (lambda: gme.get_image_embedding(str(photo)), [str(photo)]),
        "images": (lambda: gme.get_image_embedding_batch([io.BytesIO(data)]), [key]),
        "fused": (lambda: gme.get_fused_embedding("cat", str(photo)), [f"cat {photo}"]),
        "bundle": (lambda: gme.as_query("cat", data), [f"cat {key}"]),
        "async": (lambda: asyncio.run(gme.aget_image_embedding(io.BytesIO(data))), [key]),
    }
    call, chunks = calls[way]
    try:
        call()
    finally:
        root.event_handlers.remove(recorder)
    starts = [event for event in recorder.events if isinstance(event, EmbeddingStartEvent)]
    ends = [event for event in recorder.events if isinstance(event, EmbeddingEndEvent)]
    assert len(starts) == len(ends) == 1
    assert ends[0].chunks == chunks
    assert starts[0].model_dict["class_name"] == "GMEEmbedding"
    [(_, end)] = debug.get_event_pairs(CBEventType.EMBEDDING)
    assert end.payload is not None
    assert end.payload[EventPayload.CHUNKS] == chunks
    assert len(end.payload[EventPayload.EMBEDDINGS]) == 1


def test_overrides_keep_the_parameter_names_of_the_base() -> None:
    # Tracing binds arguments by name, so another name fails at run time only.
    for name, method in inspect.getmembers(MultiModalEmbedding, inspect.isfunction):
        mine = getattr(GMEEmbedding, name)
        if name.startswith("__") or mine is method:
            continue
        theirs = [p for p in inspect.signature(method).parameters if p != "kwargs"]
        assert list(inspect.signature(mine).parameters)[: len(theirs)] == theirs, name


def test_it_is_a_llama_index_embedding(gme: GMEEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(gme, MultiModalEmbedding)
    assert GMEEmbedding.class_name() == "GMEEmbedding"
    assert resolve_embed_model(gme) is gme
    monkeypatch.setattr(Settings, "_embed_model", None)
    Settings.embed_model = gme
    assert Settings.embed_model is gme
