"""The embedding function: what it takes and gives, alone and inside Chroma's collections."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from chroma_clients import client_of
from PIL import Image

import umr_plugins.embedder
from umr_plugins.chroma import UMREmbeddingFunction, UMRImageLoader
from umr_plugins.demo import queries as demo_queries
from umr_plugins.embedder import Embedder, shared_embedder
from umr_plugins.errors import BatchError, InputError
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Encoded, Item

QUERIES = Path(demo_queries.__file__).parent / "queries"
PICTURES = ["fxemoji-dolphin.png", "fxemoji-banana.png", "fxemoji-rocket.png"]


@pytest.fixture(scope="module")
def tiny() -> UMREmbeddingFunction:
    return UMREmbeddingFunction("umr-tiny", device="cpu", dtype="float32")


def arrays() -> list[np.ndarray]:
    return UMRImageLoader(roots=QUERIES)(PICTURES)


def ran(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_texts_become_float32_vectors_of_unit_length(tiny):
    vectors = tiny(["a red apple", "a dolphin"])
    assert isinstance(vectors, list)
    assert [(vector.shape, vector.dtype) for vector in vectors] == [((tiny.encoder.dim,), np.float32)] * 2
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        vectors, tiny.encoder.encode_documents(["a red apple", "a dolphin"]), atol=1e-6
    )


def test_pictures_as_arrays_give_the_vectors_of_their_files(tiny):
    paths = [QUERIES / name for name in PICTURES]
    np.testing.assert_allclose(tiny(arrays()), tiny.encoder.encode_documents(paths), atol=1e-5)


def test_grey_alpha_wide_and_float_arrays_go_through_the_rules_of_pictures():
    function, rgb = UMREmbeddingFunction(encoder=FakeEncoder()), arrays()[0]
    same = [
        rgb,
        rgb.astype(np.int64),
        rgb.astype(np.float64) / 255,
        np.dstack([rgb, np.full_like(rgb[:, :, :1], 255)]),
    ]
    function(same)
    shown = [np.asarray(item.image.convert("RGB")) for item in function.encoder.calls[0][1]]
    for picture in shown[1:]:
        np.testing.assert_array_equal(picture, shown[0])


def test_queries_get_the_instruction_and_documents_do_not():
    encoder = FakeEncoder()
    function = UMREmbeddingFunction(encoder=encoder, instruction="Find the animal.")
    function(["a"])
    function.embed_query(["b"])
    function.embed_items(["c"], role="query")
    function.embed_items(["d"])
    assert [(role, instruction) for role, _, instruction in encoder.calls] == [
        ("document", None), ("query", "Find the animal."), ("query", "Find the animal."), ("document", None),
    ]  # fmt: skip


def test_an_instruction_changes_the_vectors_of_queries_only(gme_folder):
    plain, told = (
        UMREmbeddingFunction(gme_folder, device="cpu", dtype="float32", instruction=instruction)
        for instruction in (None, "Find a fruit.")
    )
    assert plain.encoder is told.encoder
    np.testing.assert_array_equal(plain(["pear"]), told(["pear"]))
    assert np.abs(np.subtract(plain.embed_query(["pear"]), told.embed_query(["pear"]))).max() > 1e-4


def test_items_of_any_form_become_vectors_for_embeddings(tiny):
    path, array = QUERIES / PICTURES[0], arrays()[0]
    items = [
        Item("a dolphin", path),
        {"text": "a dolphin", "image": path},
        {"text": "a dolphin", "image": array},
        {"text": "a dolphin", "image": Image.open(path)},
    ]
    vectors = tiny.embed_items(items)
    assert {type(vector) for vector in vectors} == {np.ndarray}
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-5)
    assert np.dot(vectors[0], tiny.embed_items([path])[0]) < 0.999
    assert tiny.embed_items([]) == []
    with pytest.raises(InputError, match='"query" or "document"'):
        tiny.embed_items(["a"], role="both")


@pytest.mark.parametrize(
    ("given", "positions", "said"),
    [
        (["good", " ", "fine", ""], [1, 3], "empty or blank"),
        ([None, "good"], [0], "neither text nor picture"),
        (["good", np.full((4, 4, 3), np.nan)], [1], "no number"),
        (["good", np.zeros((3, 40, 50), np.uint8)], [1], r"transpose\(1, 2, 0\)"),
        (["good", 5, b"bytes"], [1, 2], "an item is a str"),
        (["good", "poison", "poison"], [1, 2], "refuses poison"),
    ],
    ids=["blank", "none", "nan", "channels-first", "type", "model"],
)
@pytest.mark.parametrize("method", ["__call__", "embed_query", "embed_items"])
def test_one_error_names_every_position_that_fails(method, given, positions, said):
    function = UMREmbeddingFunction(encoder=FakeEncoder())
    with pytest.raises(BatchError, match=said) as caught:
        getattr(function, method)(given)
    assert [error.index for error in caught.value.errors] == positions
    assert f"{len(positions)} of {len(given)} items" in str(caught.value)
    assert "on_error" not in str(caught.value), "Chroma has no such option"


def test_what_is_no_list_or_empty_is_refused():
    function = UMREmbeddingFunction(encoder=FakeEncoder())
    for method in (function, function.embed_query, function.embed_items):
        for wrong in ("text", b"bytes", np.zeros((4, 4, 3)), {"text": "a"}, Path("a.png"), 5, None):
            with pytest.raises(InputError, match="give a list of texts or pictures"):
                method(wrong)
    for method in (function, function.embed_query):
        with pytest.raises(InputError, match="empty list"):
            method([])


def test_vectors_that_are_no_number_never_reach_a_collection():
    class Broken(FakeEncoder):
        def encode_documents(self, items, *args, **kwargs):
            vectors = super().encode_documents(items, *args, **kwargs)
            vectors[1, 0] = np.nan
            return Encoded(vectors, tuple(range(len(items))))

    function = UMREmbeddingFunction(encoder=Broken())
    with pytest.raises(BatchError, match="NaN or infinity") as caught:
        function(["a", "b", "c"])
    assert [error.index for error in caught.value.errors] == [1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 0}, "dim must be a whole number from 1"),
        ({"dim": True}, "dim must be"),
        ({"dim": "8"}, "dim must be"),
        ({"max_length": 10**9}, "max_length must be"),
        ({"min_image_tokens": 500, "max_image_tokens": 100}, "min_image_tokens=500 is above"),
        ({"positions": "both"}, "positions must be one of"),
        ({"instruction": " "}, "instruction must be"),
        ({"revision": 5}, "revision must be"),
        ({"model": ""}, "a model is an alias"),
        ({"model": None}, "a model is an alias"),
        ({"encoder": FakeEncoder(), "dim": 8}, "dim can't be given beside a ready encoder"),
        ({"encoder": FakeEncoder(), "device": "cpu"}, "device can't be given"),
        ({"encoder": FakeEncoder(), "model": "umr-tiny"}, "model can't be given"),
    ],
)
def test_options_that_are_not_allowed_are_refused_at_once(options, said):
    with pytest.raises(InputError, match=said):
        UMREmbeddingFunction(**options)


def test_copies_share_the_weights_and_pickles_travel(tiny):
    for other in (copy.copy(tiny), copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert other.encoder is tiny.encoder
        assert other.get_config() == tiny.get_config()
    ready = UMREmbeddingFunction(encoder=shared_embedder("umr-tiny", dim=64), instruction="Find it.")
    for other in (copy.deepcopy(ready), pickle.loads(pickle.dumps(ready))):
        assert other.encoder is ready.encoder
        assert other.get_config() == {"model": "umr-tiny", "dim": 64, "instruction": "Find it."}
    fake = UMREmbeddingFunction(encoder=FakeEncoder(dim=5))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fake))(["a"]), fake(["a"]))
    assert copy.deepcopy(fake).encoder is fake.encoder


def test_a_pickle_works_in_a_fresh_process(tmp_path, tiny):
    (tmp_path / "function.pickle").write_bytes(pickle.dumps(tiny))
    code = (
        "import pickle, json, pathlib\n"
        f"function = pickle.loads(pathlib.Path({str(tmp_path / 'function.pickle')!r}).read_bytes())\n"
        "print(json.dumps([function.get_config(), function(['a red apple'])[0].tolist()]))"
    )
    config, vector = json.loads(ran(code))
    assert config == {"model": "umr-tiny"}
    np.testing.assert_allclose(vector, tiny(["a red apple"])[0], atol=1e-5)


def test_threads_share_one_function(tiny):
    texts = [f"text {row}" for row in range(24)]
    alone = tiny(texts)
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda text: tiny([text])[0], texts))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_making_recording_and_rebuilding_import_no_torch_and_load_nothing(tmp_path):
    code = f"""
import sys, chromadb
from umr_plugins.chroma import UMREmbeddingFunction
function = UMREmbeddingFunction()
assert not function.is_legacy() and repr(function)
client = chromadb.PersistentClient({str(tmp_path)!r})
collection = client.create_collection("native", embedding_function=function)
assert collection.configuration["embedding_function"].get_config() == function.get_config()
print("torch" in sys.modules, collection.configuration_json["hnsw"]["space"], function.get_config()["model"])
"""
    assert ran(code) == "False cosine Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize("module", ["umr_plugins", "umr_plugins.index.index", "umr_plugins.index.chroma"])
def test_only_our_own_package_registers_the_name(module):
    code = f"""
import {module}
from chromadb.utils.embedding_functions import known_embedding_functions
before = "umr" in known_embedding_functions
import umr_plugins.chroma
print(before, known_embedding_functions["umr"].__name__)
"""
    assert ran(code) == "False UMREmbeddingFunction"


def test_weights_are_loaded_once_for_all_that_chroma_builds(tmp_path, monkeypatch):
    loads = []
    real = umr_plugins.embedder.load_backbone
    monkeypatch.setattr(
        umr_plugins.embedder, "load_backbone", lambda *args: loads.append(args) or real(*args)
    )
    function = UMREmbeddingFunction("umr-tiny", max_length=777, device="cpu", dtype="float32")
    assert loads == []
    with client_of(tmp_path) as client:
        collection = client.create_collection("native", embedding_function=function)
        assert loads == [], "creating a collection loads nothing"
        collection.add(ids=["a"], documents=["an apple"])
        collection.upsert(ids=["b"], images=arrays()[:1])
        collection.update(ids=["a"], documents=["a pear"])
        collection.query(query_texts=["fruit"])
        # The collection's own function, rebuilt from what is stored, runs on the same weights.
        client.get_collection("native").query(query_texts=["fruit"])
        collection.configuration["embedding_function"](["fruit"])
        UMREmbeddingFunction("umr-tiny", max_length=777, device="cpu", dtype="float32")(["fruit"])
    assert len(loads) == 1


def test_texts_and_pictures_are_added_and_found_in_native_collections(tmp_path, tiny):
    loader = UMRImageLoader(roots=QUERIES)
    with client_of(tmp_path) as client:
        collection = client.create_collection("native", embedding_function=tiny, data_loader=loader)
        collection.add(ids=["text"], documents=["a violin"])
        collection.add(ids=PICTURES[:2], images=arrays()[:2])
        collection.add(ids=PICTURES[2:], uris=PICTURES[2:])
        assert collection.count() == 4
    with client_of(tmp_path) as client:  # from the disk
        collection = client.get_collection("native", embedding_function=tiny, data_loader=loader)
        for at, name in enumerate(PICTURES):
            assert collection.query(query_images=arrays()[at : at + 1], n_results=1)["ids"] == [[name]]
            assert collection.query(query_uris=[name], n_results=1)["ids"] == [[name]]
        assert collection.query(query_texts=["a violin"], n_results=1)["ids"] == [["text"]]
        assert collection.query(query_texts="a dolphin", n_results=4)["ids"][0].index(PICTURES[0]) < 3
        got = collection.get(include=["data"])
        shapes = {
            name: data is not None and data.shape for name, data in zip(got["ids"], got["data"], strict=True)
        }
        assert shapes == {
            "text": False,
            PICTURES[0]: False,
            PICTURES[1]: False,
            PICTURES[2]: arrays()[2].shape,
        }
    code = f"""
import chromadb
from umr_plugins.chroma import UMREmbeddingFunction
collection = chromadb.PersistentClient({str(tmp_path)!r}).get_collection("native")
print(collection.query(query_texts=["a violin"], n_results=1)["ids"][0][0])
"""
    assert ran(code) == "text", "a fresh process rebuilds the function from what is stored"


def test_a_blank_document_fails_before_anything_is_stored(tmp_path):
    with client_of(tmp_path) as client:
        collection = client.create_collection(
            "native", embedding_function=UMREmbeddingFunction(encoder=FakeEncoder())
        )
        with pytest.raises(BatchError, match=r"item 1: .*blank"):
            collection.add(ids=["a", "b"], documents=["good", " "])
        with pytest.raises(BatchError, match=r"item 0: .*blank"):
            collection.query(query_texts=[""])
        assert collection.count() == 0


def test_fused_items_go_in_by_their_vectors(tmp_path, tiny):
    path = QUERIES / PICTURES[0]
    with client_of(tmp_path) as client:
        collection = client.create_collection(
            "native", embedding_function=tiny, data_loader=UMRImageLoader(roots=QUERIES)
        )
        with pytest.raises(ValueError, match="Exactly one of"):
            collection.add(ids=["x"], documents=["a dolphin"], images=arrays()[:1])
        with pytest.raises(ValueError, match="Exactly one of"):
            collection.upsert(ids=["x"], uris=[PICTURES[0]])
        items = [{"text": "a dolphin", "image": path}, {"image": QUERIES / PICTURES[1]}]
        collection.upsert(
            ids=["fused", "image"],
            embeddings=tiny.embed_items(items),
            documents=["a dolphin", ""],
            uris=PICTURES[:2],
        )
        asked = tiny.embed_items([{"text": "a dolphin", "image": path}], role="query")
        found = collection.query(query_embeddings=asked, n_results=1, include=["documents", "uris", "data"])
        assert (found["ids"], found["documents"], found["uris"]) == (
            [["fused"]],
            [["a dolphin"]],
            [[PICTURES[0]]],
        )
        np.testing.assert_array_equal(found["data"][0][0], arrays()[0])


def test_a_stored_uri_outside_the_roots_is_never_opened(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (3, 3)).save(secret)
    function = UMREmbeddingFunction(encoder=FakeEncoder())
    with client_of(tmp_path / "db") as client:
        poisoned = client.create_collection("native", embedding_function=function)
        poisoned.add(ids=["a"], embeddings=function.embed_items(["a"]), uris=[str(secret)])
        collection = client.get_collection(
            "native", embedding_function=function, data_loader=UMRImageLoader(roots=QUERIES)
        )
        with pytest.raises(BatchError, match="may not be opened"):
            collection.get(include=["data"])
        with pytest.raises(BatchError, match="may not be opened"):
            collection.query(query_texts=["a"], include=["data"])


def test_an_embedder_is_recorded_by_its_options(tiny):
    embedder = shared_embedder("umr-tiny", dim=64)
    ready = UMREmbeddingFunction(encoder=embedder)
    assert ready.get_config() == UMREmbeddingFunction("umr-tiny", dim=64).get_config()
    ready = UMREmbeddingFunction(encoder=embedder)
    assert UMREmbeddingFunction.build_from_config(ready.get_config()).encoder is embedder
    assert isinstance(embedder, Embedder)


def test_vectors_rank_alike_in_every_supported_space(tmp_path, tiny):
    texts = ["a violin", "a dolphin", "a banana", "a rocket", "a candle"]
    ranked = []
    with client_of(tmp_path) as client:
        for space in tiny.supported_spaces():
            collection = client.create_collection(
                f"in-{space}", embedding_function=tiny, configuration={"hnsw": {"space": space}}
            )
            collection.add(ids=texts, documents=texts)
            ranked.append(collection.query(query_texts=["fruit"], n_results=5)["ids"][0])
    assert len(ranked) == 3
    assert ranked[0] == ranked[1] == ranked[2]
