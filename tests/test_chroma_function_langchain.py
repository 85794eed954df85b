"""Native collections seen from LangChain's Chroma, and the other way round."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from chroma_clients import client_of
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_umr import GMEEmbeddings

from umr_plugins.chroma import UMREmbeddingFunction, create_collection, open_collection
from umr_plugins.errors import FingerprintError
from umr_plugins.testing import FakeEncoder

TEXTS = ["a violin", "a dolphin", "a banana", "a rocket"]


@pytest.fixture
def client(tmp_path):
    with client_of(tmp_path) as made:
        yield made


@pytest.mark.parametrize("embedding", [None, GMEEmbeddings(model="umr-tiny")], ids=["stored", "given"])
def test_langchain_opens_a_native_collection(client, embedding):
    function = UMREmbeddingFunction("umr-tiny")
    create_collection(client, "native", function).add(ids=TEXTS, documents=TEXTS)
    store = Chroma(collection_name="native", client=client, embedding_function=embedding)
    scored = store.similarity_search_with_relevance_scores("a rocket", k=2)
    assert scored[0][0].page_content == "a rocket"
    assert scored[0][1] == pytest.approx(1, abs=1e-4)
    direct = np.dot(*function.embed_items(["a rocket", scored[1][0].page_content]))
    assert scored[1][1] == pytest.approx(float(direct), abs=1e-4)
    store.add_texts(["a candle"], ids=["a candle"])
    found = client.get_collection("native", embedding_function=None).get("a candle", include=["embeddings"])
    np.testing.assert_allclose(found["embeddings"][0], function(["a candle"])[0], atol=1e-5)


def test_a_native_function_opens_a_collection_that_langchain_made(client):
    store = Chroma(
        collection_name="theirs", client=client, embedding_function=GMEEmbeddings(model="umr-tiny")
    )
    store.add_documents([Document(text, id=text) for text in TEXTS])
    collection = open_collection(client, "theirs", UMREmbeddingFunction("umr-tiny"))
    assert collection.query(query_texts=["a banana"], n_results=1)["ids"] == [["a banana"]]
    assert collection.configuration_json["hnsw"]["space"] == "l2", "ranks alike for unit vectors"


def test_rows_with_an_empty_text_are_seen_by_langchain_and_rows_without_are_not(client, photo):
    function = UMREmbeddingFunction(encoder=FakeEncoder())
    collection = create_collection(client, "native", function)
    pixels = np.asarray(photo)
    collection.add(ids=["unseen"], images=[pixels])
    collection.add(ids=["seen"], embeddings=function.embed_items([pixels]), documents=[""])
    store = Chroma(collection_name="native", client=client)
    assert [document.id for document in store.similarity_search("anything", k=5)] == ["seen"]


def test_a_process_that_has_not_imported_the_package_is_told_what_is_missing(client, tmp_path):
    create_collection(client, "native", UMREmbeddingFunction("umr-tiny"))
    code = f"""
import chromadb
client = chromadb.PersistentClient({str(tmp_path)!r})
assert [one.name for one in client.list_collections()] == ["native"]
try:
    client.get_collection("native").configuration
except ValueError as error:
    print("umr not found" in str(error))
import umr_plugins.chroma
print(client.get_collection("native").configuration["embedding_function"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines() == ["True", "UMREmbeddingFunction(model='umr-tiny')"], done.stderr


def test_a_function_recorded_through_langchain_is_checked_like_any_other(client):
    function = UMREmbeddingFunction("umr-tiny", dim=32)
    Chroma(
        collection_name="theirs",
        client=client,
        collection_configuration={"embedding_function": function, "hnsw": {"space": "cosine"}},
    ).add_texts(TEXTS, ids=TEXTS)
    collection = open_collection(client, "theirs", UMREmbeddingFunction("umr-tiny", dim=32))
    assert collection.query(query_texts=["a violin"], n_results=1)["ids"] == [["a violin"]]
    with pytest.raises(FingerprintError, match="dim is 32 there and None here"):
        open_collection(client, "theirs", UMREmbeddingFunction("umr-tiny"))
