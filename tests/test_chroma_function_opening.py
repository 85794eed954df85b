"""Collections that know their model: made, opened again, and refused with another."""

from __future__ import annotations

import copy
import logging
import re
import shutil

import chromadb
import numpy as np
import pytest
from chroma_clients import client_of
from chromadb.utils.embedding_functions import known_embedding_functions

import umr_plugins.embedder
from umr_plugins.chroma import (
    UMREmbeddingFunction,
    UMRImageLoader,
    create_collection,
    open_collection,
    opening,
)
from umr_plugins.demo import ROOT as DEMO
from umr_plugins.errors import FingerprintError, InputError
from umr_plugins.testing import FakeEncoder


def fake(name: str = "fake", dim: int = 16, **options) -> UMREmbeddingFunction:
    return UMREmbeddingFunction(encoder=FakeEncoder(dim, name), **options)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(known_embedding_functions, "umr", UMREmbeddingFunction)


@pytest.fixture
def client(tmp_path):
    with client_of(tmp_path) as made:
        yield made


def test_a_collection_knows_its_model_and_keeps_the_users_metadata(client):
    collection = create_collection(client, "made", fake(), metadata={"owner": "me"})
    assert collection.metadata == {"owner": "me", "umr_fingerprint": "fake-16", "umr_dim": 16}
    assert collection.configuration_json["hnsw"]["space"] == "cosine"
    assert collection.configuration_json["embedding_function"]["config"]["fingerprint"] == "fake-16"


def test_a_collection_opens_again_with_an_equal_function(tmp_path):
    with client_of(tmp_path) as client:
        create_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32)).add(
            ids=["a", "b"], documents=["a dolphin", "a rocket"]
        )
    with client_of(tmp_path) as client:
        collection = open_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32))
        assert collection.query(query_texts=["a rocket"], n_results=1)["ids"] == [["b"]]
        again = create_collection(
            client, "made", UMREmbeddingFunction("umr-tiny", dim=32), get_or_create=True
        )
        assert again.count() == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"model": "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "dim": 32},
            "model is 'umr-tiny' there and 'Alibaba",
        ),
        ({"model": "umr-tiny", "dim": 64}, "dim is 32 there and 64 here"),
        ({"model": "umr-tiny"}, "dim is 32 there and None here"),
        ({"model": "umr-tiny", "dim": 32, "revision": "v2"}, "revision is None there and 'v2' here"),
        ({"model": "umr-tiny", "dim": 32, "positions": "mrope"}, "positions is None there"),
        ({"model": "umr-tiny", "dim": 32, "max_image_tokens": 64}, "max_image_tokens is None there"),
        ({"model": "umr-tiny", "dim": 32, "adapter": "a/b"}, "adapter is None there"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_without_fingerprint_another_configuration_is_refused(client, options, said):
    client.create_collection("made", embedding_function=UMREmbeddingFunction("umr-tiny", dim=32))
    other = UMREmbeddingFunction(**options)
    client.get_collection("made", embedding_function=other)  # Chroma itself compares the name only
    for open_ in (open_collection, lambda *a: create_collection(*a, get_or_create=True)):
        with pytest.raises(FingerprintError, match=said):
            open_(client, "made", other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "dim": 32}, "model is 'umr-tiny' there and 'Alib"),
        (
            {"model": "umr-tiny", "dim": 64},
            "have length 32, this model gives 64 (dim is 32 there and 64 here)",
        ),
    ],
)
def test_another_model_is_refused_at_once_where_it_is_known_unloaded(client, monkeypatch, options, said):
    create_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32))
    monkeypatch.setattr(umr_plugins.embedder, "shared_embedder", None)
    for open_ in (open_collection, lambda *a: create_collection(*a, get_or_create=True)):
        with pytest.raises(FingerprintError, match=re.escape(said)):
            open_(client, "made", UMREmbeddingFunction(**options))


def test_other_options_are_refused_by_the_fingerprint_before_anything_is_embedded(client):
    create_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32))
    opened = open_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32, max_image_tokens=64))
    with pytest.raises(FingerprintError, match=r"others \(max_image_tokens is None there and 64 here\)"):
        opened.add(ids=["a"], documents=["a"])
    assert opened.count() == 0


def test_one_model_named_in_several_ways_opens_its_collection(client, tmp_path):
    folder, moved = tmp_path / "model", tmp_path / "moved"
    shutil.copytree(DEMO / "umr-tiny", folder)
    named = UMREmbeddingFunction(folder)
    create_collection(client, "made", named).add(ids=["a", "b"], documents=["a dolphin", "a rocket"])
    folder.rename(moved)
    for options in (
        {"model": moved},
        {"model": moved, "dim": named.encoder.dim},
    ):
        opened = open_collection(client, "made", UMREmbeddingFunction(**options))
        assert opened.query(query_texts=["a rocket"], n_results=1)["ids"] == [["b"]]
        opened.upsert(ids=["c"], documents=["a banana"])


def test_the_instruction_of_queries_is_no_reason_to_refuse(client):
    create_collection(client, "ours", fake(instruction="Find it."))
    client.create_collection("chromas", embedding_function=fake(instruction="Find it."))
    for name in ("ours", "chromas"):
        function = fake(instruction="Find a fruit.")
        open_collection(client, name, function).query(query_texts=["pear"])
        assert function.encoder.calls[-1][2] == "Find a fruit."


def test_a_lost_fingerprint_is_reported(client, caplog):
    collection = create_collection(client, "made", fake())
    with caplog.at_level(logging.WARNING, "umr_plugins.chroma.opening"):
        open_collection(client, "made", fake())
        assert caplog.text == ""
        collection.modify(metadata={"owner": "me"})  # replaces all metadata
        open_collection(client, "made", fake())
    assert "records its model's options, not its fingerprint" in caplog.text


def test_changed_weights_under_the_same_name_are_refused_before_anything_is_embedded(client):
    create_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32)).add(
        ids=["a"], documents=["a"]
    )
    collection = client.get_collection("made", embedding_function=None)
    collection.modify(metadata={**collection.metadata, "umr_fingerprint": "f" * 64})
    opened = open_collection(client, "made", UMREmbeddingFunction("umr-tiny", dim=32))
    for use in (
        lambda: opened.add(ids=["b"], documents=["b"]),
        lambda: opened.query(query_texts=["a"]),
        lambda: opened.query(query_images=[np.zeros((30, 30, 3), np.uint8)]),
    ):
        with pytest.raises(FingerprintError, match="fingerprint ffffffffffff; this one has"):
            use()
    assert opened.count() == 1


def test_a_model_that_chroma_has_swapped_in_place_is_noticed(client):
    """Chroma stores a changed function before it asks whether it may."""
    old, other = fake("old"), fake("new")
    create_collection(client, "made", old)
    with pytest.raises(InputError, match="can't be changed"):
        client.get_collection("made", embedding_function=None).modify(
            configuration={"embedding_function": other}
        )
    with pytest.raises(FingerprintError, match="fingerprint old-16; this one has new-16"):
        open_collection(client, "made", other)


def test_an_encoder_of_the_program_is_compared_when_the_collection_is_opened(client):
    create_collection(client, "made", fake())
    open_collection(client, "made", fake())
    with pytest.raises(FingerprintError, match="fingerprint is 'fake-16' there and 'other-16' here"):
        open_collection(client, "made", fake("other"))
    with pytest.raises(
        FingerprintError, match=r"length 16, .* 8 \(fingerprint is 'fake-16' there and 'fake-8'"
    ):
        open_collection(client, "made", fake(dim=8))


def test_collections_of_brought_vectors_open_with_a_warning(client, caplog):
    function = fake()
    old = client.create_collection("old", embedding_function=None)
    old.add(ids=["a", "b"], embeddings=function.embed_items(["one", "two"]), documents=["one", "two"])
    with caplog.at_level(logging.WARNING, "umr_plugins.chroma.opening"):
        collection = open_collection(client, "old", function)
    assert "does not say which model filled it" in caplog.text
    assert collection.query(query_texts=["two"], n_results=1)["ids"] == [["b"]]
    collection.add(ids=["c"], documents=["three"])
    assert collection.count() == 3


def test_vectors_of_another_length_are_refused_before_anything_is_embedded(client):
    client.create_collection("old", embedding_function=None).add(ids=["a"], embeddings=[np.ones(8) / 8**0.5])
    said = "vectors of collection 'old' have length 8, this model gives"
    with pytest.raises(FingerprintError, match=f"{said} 16"):
        open_collection(client, "old", fake())
    with pytest.raises(FingerprintError, match=f"{said} 1536"):
        open_collection(client, "old", UMREmbeddingFunction())
    with pytest.raises(FingerprintError, match=f"{said} 32"):
        open_collection(client, "old", UMREmbeddingFunction("umr-tiny", dim=32))
    function = UMREmbeddingFunction("umr-tiny")
    opened = open_collection(client, "old", function)  # its length is known once it is loaded
    with pytest.raises(FingerprintError, match=said):
        opened.query(query_texts=["a"])
    assert len(function.embed_query(["a"])) == 1, "the function itself belongs to no collection"


def test_the_check_survives_copies_of_the_opened_function(client):
    client.create_collection("old", embedding_function=None).add(ids=["a"], embeddings=[np.ones(8) / 8**0.5])
    opened = open_collection(client, "old", UMREmbeddingFunction("umr-tiny"))
    with pytest.raises(FingerprintError, match="length 8"):
        copy.deepcopy(opened._embedding_function)(["a"])


def test_a_distance_is_chosen_once(client):
    assert create_collection(client, "made", fake(), space="ip").configuration_json["hnsw"]["space"] == "ip"
    own = create_collection(client, "own", fake(), configuration={"hnsw": {"space": "l2", "ef_search": 50}})
    assert (own.configuration_json["hnsw"]["space"], own.configuration_json["hnsw"]["ef_search"]) == (
        "l2",
        50,
    )
    tuned = create_collection(client, "tuned", fake(), configuration={"hnsw": {"ef_search": 50}})
    assert tuned.configuration_json["hnsw"]["space"] == "cosine"
    open_collection(client, "made", fake(), space="ip")
    for call in (
        lambda: open_collection(client, "made", fake(), space="cosine"),
        lambda: create_collection(client, "made", fake(), space="cosine", get_or_create=True),
    ):
        with pytest.raises(InputError, match="has the distance 'ip', not 'cosine'"):
            call()
    with pytest.raises(InputError, match="space='ip' contradicts 'l2' in the configuration"):
        create_collection(client, "both", fake(), space="ip", configuration={"hnsw": {"space": "l2"}})


def test_what_an_existing_collection_has_not_is_refused(client):
    asked = {"metadata": {"owner": "me"}, "configuration": {"hnsw": {"space": "ip", "ef_search": 50}}}
    for _ in range(2):
        collection = create_collection(client, "made", fake(), get_or_create=True, **asked)
    assert collection.metadata["owner"] == "me"
    for options, said in (
        ({"metadata": {"owner": "you"}}, "owner is 'me' there and 'you' here"),
        ({"metadata": {"team": "x"}}, "team is None there and 'x' here"),
        ({"configuration": {"hnsw": {"ef_search": 70}}}, "ef_search is 50 there and 70 here"),
        ({"configuration": {"hnsw": {"space": "l2"}}}, "has the distance 'ip', not 'l2'"),
    ):
        with pytest.raises(InputError, match=said):
            create_collection(client, "made", fake(), get_or_create=True, **options)


@pytest.mark.parametrize("space", ["hamming", "Cosine", ""])
def test_a_distance_that_is_not_supported_makes_no_collection(client, space):
    for options in ({"space": space}, {"configuration": {"hnsw": {"space": space}}}):
        with pytest.raises(InputError, match=r"space must be one of \['cosine', 'ip', 'l2'\]"):
            create_collection(client, "made", fake(), **options)
    assert client.list_collections() == []


def test_a_collection_stays_refused_where_the_function_supports_less(client):
    class CosineOnly(UMREmbeddingFunction):
        def supported_spaces(self):
            return ["cosine"]

    with pytest.raises(InputError, match="space must be one of"):
        create_collection(client, "made", CosineOnly(encoder=FakeEncoder()), space="ip")
    create_collection(client, "made", fake(), space="ip")
    with pytest.raises(InputError, match="space must be one of"):
        open_collection(client, "made", CosineOnly(encoder=FakeEncoder()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"configuration": {"embedding_function": None}}, "as an argument, not in the configuration"),
        ({"metadata": {"hnsw:space": "ip"}}, 'as space="cosine"'),
        ({"embedding_function": None}, "is a UMREmbeddingFunction, got NoneType"),
        ({"embedding_function": FakeEncoder()}, "is a UMREmbeddingFunction, got FakeEncoder"),
    ],
)
def test_arguments_that_would_go_unheard_are_refused(client, options, said):
    given = {"client": client, "name": "made", "embedding_function": fake(), **options}
    with pytest.raises(InputError, match=said):
        create_collection(**given)
    assert client.list_collections() == []


def test_absent_and_present_collections_are_told_apart(client):
    with pytest.raises(InputError, match="no collection 'made'; make it with create_collection"):
        open_collection(client, "made", fake())
    create_collection(client, "made", fake())
    with pytest.raises(InputError, match="'made' already; open it with open_collection"):
        create_collection(client, "made", fake())


def test_a_collection_made_by_another_process_meanwhile_is_opened_or_reported(client, monkeypatch):
    create_collection(client, "made", fake()).add(ids=["a"], documents=["a"])
    real, asked = opening._find, []

    def late(client, name):
        asked.append(name)
        return None if len(asked) == 1 else real(client, name)

    monkeypatch.setattr(opening, "_find", late)
    assert create_collection(client, "made", fake(), get_or_create=True).count() == 1
    asked.clear()
    with pytest.raises(chromadb.errors.ChromaError, match="already exists"):
        create_collection(client, "made", fake())
    asked.clear()
    with pytest.raises(FingerprintError):
        create_collection(client, "made", fake("other"), get_or_create=True)


def test_an_asynchronous_client_is_refused_in_words():
    class Asynchronous:
        async def get_collection(self, name): ...

    for open_ in (create_collection, open_collection):
        with pytest.raises(InputError, match="asynchronous clients are not supported"):
            open_(Asynchronous(), "made", fake())


def test_a_collection_with_chromas_own_function_says_how_to_go_on(client):
    client.create_collection("default").add(ids=["a"], embeddings=fake().embed_items(["a"]))
    with pytest.raises(InputError, match=r"'default', not with 'umr'.*vectors of embed_items"):
        open_collection(client, "default", fake())
    found = client.get_collection("default").query(query_embeddings=fake().embed_items(["a"], role="query"))
    assert found["ids"] == [["a"]]


def test_the_loader_goes_along(client, tmp_path, photo):
    photo.save(tmp_path / "photo.png")
    loader = UMRImageLoader(roots=tmp_path)
    create_collection(client, "made", fake(), data_loader=loader).add(ids=["a"], uris=["photo.png"])
    found = open_collection(client, "made", fake(), data_loader=loader).query(
        query_uris=["photo.png"], n_results=1, include=["data", "distances"]
    )
    assert found["distances"][0][0] == pytest.approx(0, abs=1e-5)
    np.testing.assert_array_equal(found["data"][0][0], np.asarray(photo))
