"""Stored configuration is not trusted: what a collection names is loaded only if the program knows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from chroma_clients import client_of
from chromadb.api.models.Collection import Collection
from chromadb.api.types import EmbeddingFunction
from chromadb.utils.embedding_functions import known_embedding_functions

import umr_plugins.embedder
from umr_plugins.backbones.spec import KNOWN
from umr_plugins.chroma import UMREmbeddingFunction, create_collection, open_collection
from umr_plugins.chroma.config import check_hub_ids, difference
from umr_plugins.errors import InputError, UMRError
from umr_plugins.testing import FakeEncoder

GME = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
POISON = [
    {"model": "/srv/evil"},
    {"model": "../umr-tiny"},
    {"model": "someone/evil"},
    {"model": GME, "revision": "refs/pr/7"},
    {"model": GME, "adapter": "someone/evil"},
    {"model": "umr-tiny", "trust_remote_code": True},
    {"model": "umr-tiny", "kwargs": {"trust_remote_code": True}},
    {"model": "umr-tiny", "device": "cuda:7"},
    {"model": "umr-tiny", "min_image_tokens": 10**9},
    {"model": "umr-tiny", "dim": "8"},
    {"model": "umr-tiny", "instruction": {"a": "b"}},
    {"model": ["umr-tiny"]},
    {"model": None},
    {"encoder": "umr-tiny", "fingerprint": "0" * 64},
    {"encoder": "fake", "fingerprint": "0", "model": "umr-tiny"},
    {"encoder": "fake"},
    {},
    "umr-tiny",
    None,
]


def ids(poison: object) -> str:
    return json.dumps(poison)[:60]


class Poisoner(EmbeddingFunction):
    """Writes any configuration under our name, as whoever can write to the database may."""

    config: object = None

    def __init__(self) -> None:
        pass

    def __call__(self, input):
        return [np.ones(16, np.float32) / 4 for _ in input]

    @staticmethod
    def name():
        return "umr"

    def get_config(self):
        return self.config

    @staticmethod
    def build_from_config(config):
        return Poisoner()


def poison_collection(client, config, name="poisoned"):
    """A collection that holds one row and the given configuration under the name of our function."""
    function = Poisoner()
    function.config = config
    collection = client.create_collection(name, embedding_function=function)
    collection.add(ids=["a"], embeddings=[np.ones(16) / 4], documents=["a"])
    assert collection.configuration_json["embedding_function"]["config"] == config
    known_embedding_functions["umr"] = UMREmbeddingFunction


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """Any attempt to resolve or load a model fails the test; our class is registered again at its end."""
    monkeypatch.setitem(known_embedding_functions, "umr", UMREmbeddingFunction)

    def load(*args, **kwargs):
        pytest.fail(f"something was loaded: {args}")

    monkeypatch.setattr(umr_plugins.embedder, "resolve", load)
    monkeypatch.setattr(umr_plugins.embedder, "load_backbone", load)


@pytest.mark.parametrize("config", POISON, ids=ids)
def test_a_poisoned_configuration_is_refused_in_words(config):
    for read in (UMREmbeddingFunction.build_from_config, UMREmbeddingFunction.validate_config):
        with pytest.raises(InputError) as caught:
            read(config)
        assert isinstance(caught.value, ValueError), "Chroma expects one"
        assert re.search("allow|needs|must be|can't be rebuilt|a configuration is", str(caught.value))


@pytest.mark.parametrize("config", [one for one in POISON if isinstance(one, dict) and one], ids=ids)
def test_touching_a_poisoned_collection_loads_nothing(config, tmp_path):
    with client_of(tmp_path) as client:
        poison_collection(client, config)
    with client_of(tmp_path) as client:
        assert [one.name for one in client.list_collections()] == ["poisoned"]
        collection = client.get_collection("poisoned")
        with pytest.raises(ValueError, match="Could not build embedding function umr"):
            collection.configuration  # noqa: B018
        with pytest.raises(ValueError, match="Could not build embedding function umr"):
            collection.query(query_texts=["a"])
        with pytest.warns(UserWarning, match="Could not reconstruct"):
            collection.add(ids=["b"], embeddings=[np.ones(16) / 4])
        with pytest.raises(UMRError):
            open_collection(client, "poisoned", UMREmbeddingFunction("umr-tiny"))


def test_a_poisoned_collection_loads_nothing_in_a_fresh_process(tmp_path):
    with client_of(tmp_path) as client:
        poison_collection(client, {"model": "someone/evil", "revision": "main"})
    code = f"""
import sys, chromadb, umr_plugins.chroma
collection = chromadb.PersistentClient({str(tmp_path)!r}).get_collection("poisoned")
try:
    collection.query(query_texts=["a"])
except ValueError as error:
    print("torch" in sys.modules, "allow(model='someone/evil', revision='main')" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_bundled_and_known_models_may_be_named_by_a_collection():
    for model in ("umr-tiny", *KNOWN):
        config = {
            "model": model,
            "dim": 64,
            "instruction": "Find it.",
            "positions": "mrope",
            "max_length": 512,
        }
        built = UMREmbeddingFunction.build_from_config(config)
        assert built.get_config() == config


def test_what_the_program_has_named_may_be_named_by_a_collection_afterwards(tmp_path):
    named = {"model": "team/fine-tuned", "revision": "v2"}
    with pytest.raises(InputError, match="a model that this program has not: model='team/fine-tuned'"):
        UMREmbeddingFunction.build_from_config(named)
    UMREmbeddingFunction("team/fine-tuned", revision="v2")
    assert UMREmbeddingFunction.build_from_config(named).get_config() == named
    with pytest.raises(InputError, match="revision='v3'"):
        UMREmbeddingFunction.build_from_config({**named, "revision": "v3"})
    UMREmbeddingFunction.allow("team/fine-tuned", revision="v3")
    UMREmbeddingFunction.build_from_config({**named, "revision": "v3"})
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(InputError):
        UMREmbeddingFunction.build_from_config({"model": str(folder)})
    assert UMREmbeddingFunction(folder).get_config() == {"model": str(folder)}
    UMREmbeddingFunction.build_from_config({"model": str(folder)})


def test_building_from_a_configuration_allows_nothing_new():
    config = {"model": "someone/else"}
    for _ in range(2):
        with pytest.raises(InputError):
            UMREmbeddingFunction.build_from_config(config)


def test_device_and_type_are_not_stored_but_those_of_the_program_are_used():
    function = UMREmbeddingFunction("umr-tiny", dim=48, device="cpu", dtype="float32", max_batch_tokens=512)
    assert function.get_config() == {"model": "umr-tiny", "dim": 48}
    built = UMREmbeddingFunction.build_from_config(function.get_config())
    assert built._machine == {"device": "cpu", "dtype": "float32", "max_batch_tokens": 512}


def test_an_encoder_of_the_program_is_recorded_by_fingerprint_and_never_rebuilt():
    encoder = FakeEncoder(name="own")
    config = UMREmbeddingFunction(encoder=encoder).get_config()
    assert config == {"encoder": "own", "fingerprint": "own-16"}
    assert UMREmbeddingFunction.build_from_config(config).encoder is encoder
    del encoder
    with pytest.raises(InputError, match=r"'own' \(fingerprint own-16\), which can't be rebuilt"):
        UMREmbeddingFunction.build_from_config(config)


def test_a_collection_of_an_own_encoder_is_used_again_with_an_equal_one(tmp_path):
    with client_of(tmp_path) as client:
        collection = client.create_collection(
            "native", embedding_function=UMREmbeddingFunction(encoder=FakeEncoder(name="again"))
        )
        collection.add(ids=["a", "b"], documents=["one", "two"])
    with client_of(tmp_path) as client:
        collection = client.get_collection("native")
        with pytest.raises(ValueError, match="can't be rebuilt"):
            collection.query(query_texts=["one"])
        function = UMREmbeddingFunction(encoder=FakeEncoder(name="again"))
        collection = client.get_collection("native", embedding_function=function)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            collection.add(ids=["c"], documents=["three"])
        assert collection.query(query_texts=["two"], n_results=1)["ids"] == [["b"]]


def test_changing_the_model_of_a_collection_is_refused(tmp_path):
    function = UMREmbeddingFunction("umr-tiny", dim=32)
    config = function.get_config()
    function.validate_config_update(config, dict(config))
    for changed in (
        {"model": GME, "dim": 32},
        {"model": "umr-tiny", "dim": 64},
        {**config, "instruction": "x"},
    ):
        with pytest.raises(InputError, match="can't be changed"):
            function.validate_config_update(config, changed)
    with client_of(tmp_path) as client:
        collection = client.create_collection("native", embedding_function=function)
        with pytest.raises(InputError, match="dim is 32 there and 64 here"):
            collection.modify(configuration={"embedding_function": UMREmbeddingFunction("umr-tiny", dim=64)})


def test_a_difference_names_both_sides_and_stays_short():
    assert difference({"model": "a"}, {"model": "a"}) == ""
    assert difference({"model": "a", "dim": 8}, {"model": "a"}) == "dim is 8 there and None here"
    assert len(difference({"model": "a" * 10**6}, {"model": "b" * 10**6})) < 400


def test_the_stored_function_of_another_library_is_never_built(tmp_path, monkeypatch):
    built = []

    class Evil(Poisoner):
        @staticmethod
        def name():
            return "evil"

        @staticmethod
        def build_from_config(config):
            built.append(config)
            return Evil()

    with client_of(tmp_path) as client:
        evil = Evil()
        evil.config = {"trust_remote_code": True}
        client.create_collection("evil", embedding_function=evil)
        built.clear()
        for open_ in (open_collection, lambda *a: create_collection(*a, get_or_create=True)):
            with pytest.raises(InputError, match="stored with the embedding function 'evil', not with 'umr'"):
                open_(client, "evil", UMREmbeddingFunction(encoder=FakeEncoder()))
        assert built == []
    monkeypatch.delitem(known_embedding_functions, "evil")


def collection_that_stores(client, monkeypatch, place, stored):
    """A collection of ours whose server answers with another embedding function in one place."""
    function, real = UMREmbeddingFunction(encoder=FakeEncoder()), Collection.get_model

    def poisoned(collection):
        model = real(collection)
        if place == "configuration":
            model.configuration_json = {**model.configuration_json, "embedding_function": stored}
        elif place == "schema":
            dense = model.serialized_schema["defaults"]["float_list"]["vector_index"]["config"]
            dense["embedding_function"] = stored
        else:
            index = {"enabled": True, "config": {"embedding_function": stored, "source_key": "#document"}}
            key = "words" if place == "words" else "embedding_function"  # metadata may have any name
            model.serialized_schema["keys"][key] = {
                **({"name": "umr", "config": function.get_config()} if place == "within ours" else {}),
                "sparse_vector": {"sparse_vector_index": index},
            }
        return model

    create_collection(client, "made", function)
    monkeypatch.setattr(Collection, "get_model", poisoned)
    return function


PLACES = ["configuration", "schema", "words", "key of that name", "within ours"]
"""The last three are metadata keys with an index of sparse vectors."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("said", ["known", "unknown", "legacy", None])
def test_a_function_with_a_name_is_refused_wherever_it_stands(tmp_path, monkeypatch, place, said):
    with client_of(tmp_path) as client:
        evil = {"type": said, "name": "evil", "config": {}}
        function = collection_that_stores(client, monkeypatch, place, evil)
        with pytest.raises(InputError, match="the embedding function 'evil', not with 'umr'"):
            open_collection(client, "made", function)


@pytest.mark.parametrize("place", PLACES)
def test_a_function_without_a_name_is_none(tmp_path, monkeypatch, place):
    with client_of(tmp_path) as client:
        open_collection(
            client, "made", collection_that_stores(client, monkeypatch, place, {"type": "unknown"})
        )


def test_a_stored_hub_id_is_never_read_from_the_working_directory(tmp_path, monkeypatch):
    adapter = "team/adapter"
    UMREmbeddingFunction.allow("umr-tiny", adapter=adapter)
    built = [UMREmbeddingFunction.build_from_config({"model": GME}), UMREmbeddingFunction(GME)]
    built.append(UMREmbeddingFunction.build_from_config({"model": "umr-tiny", "adapter": adapter}))
    for name in (GME, adapter, "umr-tiny"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for function, name in zip(built, (GME, GME, adapter), strict=True):
        with pytest.raises(InputError, match=f"'{name}' is recorded as an id of the Hugging Face hub"):
            function(["a"])
    check_hub_ids({"model": "umr-tiny"})
    assert UMREmbeddingFunction(GME).get_config() == {"model": str((tmp_path / GME).resolve())}
