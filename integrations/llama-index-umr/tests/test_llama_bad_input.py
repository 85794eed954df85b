"""What is given wrongly, and what becomes of it: the error names the node and says what to do."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import QueryBundle, StorageContext
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode, Document, ImageNode, MediaResource, Node, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from llama_index.vector_stores.umr import UMRVectorStore
from llama_nodes import png, save
from PIL import Image

from umr_plugins.errors import BatchError, FingerprintError, InputError
from umr_plugins.testing import FakeEncoder


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder(dim=8)


@pytest.fixture
def gme(encoder: FakeEncoder) -> GMEEmbedding:
    return GMEEmbedding(encoder=encoder)


def b64(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def two_pictures(folder: Path) -> list[BaseNode]:
    path = save(folder, 2)
    return [
        ImageNode(id_="x", image=b64(1), image_path=str(path)),
        ImageNode(id_="x", text="said", image=f"data:image/png;base64,{b64(1)}", image_path=str(path)),
        Node(id_="x", image_resource=MediaResource(data=png(1), path=path)),
        Document(id_="x", text="said", image_resource=MediaResource(data=png(1), path=path)),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("stock", [False, True])
def test_a_node_of_two_pictures_is_refused(
    gme: GMEEmbedding, encoder: FakeEncoder, tmp_path: Path, which: int, stock: bool
) -> None:
    storage = StorageContext.from_defaults() if stock else None
    index = MultimodalIndex(embed_model=gme, storage_context=storage)
    with pytest.raises(BatchError, match=r"node x: the node holds one picture and names the file of another"):
        index.insert_nodes([two_pictures(tmp_path)[which]])
    assert encoder.calls == []


def test_bytes_beside_the_file_that_they_came_from_are_one_picture(gme: GMEEmbedding, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    nodes = [
        ImageNode(image=b64(1), image_path=str(path)),
        Node(image_resource=MediaResource(data=png(1), path=path)),
        ImageNode(image=b64(1), image_path=str(tmp_path / "moved-away.png")),
        ImageNode(image=b64(1), image_url="https://example.org/where-it-came-from.png"),
        ImageNode(image_path=str(path), image_url="https://example.org/where-it-came-from.png"),
    ]
    expected = gme.get_image_embedding(str(path))
    assert [node.embedding for node in gme.embed_nodes(nodes)] == [expected] * len(nodes)


VECTORS: dict[str, tuple[list[float], str]] = {
    "nan": ([math.nan] + [0.0] * 7, "NaN"),
    "infinite": ([math.inf] + [0.0] * 7, "infinity"),
    "zero": ([0.0] * 8, "zeros"),
    "empty": ([], "zeros"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_that_can_not_be_searched_is_refused_on_every_way(gme: GMEEmbedding, name: str) -> None:
    vector, reason = VECTORS[name]

    def nodes() -> list[BaseNode]:
        good = TextNode(text="g", embedding=[1.0] + [0.0] * 7)
        return [good, TextNode(id_="bad", text="b", embedding=vector)]

    store = UMRVectorStore(gme)
    for call in (
        lambda: gme.embed_nodes(nodes()),
        lambda: store.add(nodes()),
        lambda: MultimodalIndex(nodes(), embed_model=gme),
        lambda: MultimodalIndex(nodes(), embed_model=gme, storage_context=StorageContext.from_defaults()),
        lambda: IngestionPipeline(transformations=[gme], vector_store=store).run(nodes=nodes()),
    ):
        with pytest.raises(BatchError, match=f"node bad: .*{reason}"):
            call()
    assert store.get_nodes() == []
    assert [node.node_id for node in gme.embed_nodes(nodes(), on_error="skip")].count("bad") == 0


@pytest.mark.parametrize("filled", [False, True])
def test_a_vector_of_another_length_is_refused_by_name(gme: GMEEmbedding, filled: bool) -> None:
    store = UMRVectorStore(gme)
    good = TextNode(text="g", embedding=[1.0] + [0.0] * 7)
    if filled:
        store.add([good])
    with pytest.raises(FingerprintError, match=r"node bad has a vector of 2 numbers; .* 8"):
        store.add([good, TextNode(id_="bad", text="b", embedding=[1.0, 0.0])])
    assert len(store.get_nodes()) == filled


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"a": {"b": Path("x")}}, "key 'a', key 'b' is a PosixPath"),
        ({"a": math.nan}, "key 'a' is nan"),
        ({"a": {1: "x"}}, "keys must be strings"),
    ],
    ids=["object", "nan", "key"],
)
def test_metadata_that_json_can_not_hold_are_named_before_anything_is_embedded(
    gme: GMEEmbedding, encoder: FakeEncoder, metadata: dict[str, Any], reason: str
) -> None:
    nodes = [TextNode(text="a"), TextNode(id_="bad", text="b", metadata=metadata)]
    with pytest.raises(BatchError, match=f"node bad: its metadata.*{reason}"):
        MultimodalIndex(nodes, embed_model=gme)
    assert encoder.calls == []
    store = UMRVectorStore(gme)
    with pytest.raises(BatchError, match=f"node bad: its metadata.*{reason}"):
        store.add(gme.embed_nodes(nodes))
    assert store.get_nodes() == []


def test_nested_metadata_come_back_and_filters_see_the_flat_ones(gme: GMEEmbedding) -> None:
    nested = {"none": None, "nested": {"deep": [1, {"x": 2}]}, "mixed": [1, "a"]}
    metadata = {"tags": ["a", "b"], "n": 1} | nested
    index = MultimodalIndex([TextNode(id_="x", text="a", metadata=metadata)], embed_model=gme)
    [node] = index.vector_store.get_nodes()
    assert node.metadata == metadata

    def passing(key: str, operator: FilterOperator, value: Any) -> int:
        filters = MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])
        return len(index.vector_store.get_nodes(filters=filters))

    assert passing("tags", FilterOperator.CONTAINS, "a") == 1
    assert passing("n", FilterOperator.EQ, 1) == 1
    for key in nested:  # as if the node lacked them
        assert passing(key, FilterOperator.EQ, "x") == passing(key, FilterOperator.CONTAINS, 1) == 0
        assert passing(key, FilterOperator.NE, "x") == 1


def test_an_id_that_comes_twice_is_refused_by_the_store_too(gme: GMEEmbedding) -> None:
    store = UMRVectorStore(gme)
    nodes = gme.embed_nodes([TextNode(id_="x", text="a"), TextNode(id_="x", text="b")])
    with pytest.raises(InputError, match="'x'"):
        store.add(nodes)
    assert store.get_nodes() == []


def test_a_dead_path_is_named_by_node_and_file(gme: GMEEmbedding, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.png")
    with pytest.raises(BatchError, match=r"node x: .*gone\.png"):
        MultimodalIndex([ImageNode(id_="x", image_path=gone)], embed_model=gme)


def test_base64_with_line_breaks_is_read(gme: GMEEmbedding) -> None:
    broken = base64.encodebytes(png(1) * 3).decode()
    assert "\n" in broken.strip()
    node = ImageNode(image=broken)
    assert gme.embed_nodes([node])[0].embedding == gme.get_image_embedding(png(1) * 3)


def test_the_same_pixels_encoded_anew_are_one_picture(gme: GMEEmbedding, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    anew = io.BytesIO()
    Image.open(path).save(anew, "BMP")
    gme.embed_nodes([ImageNode(image=base64.b64encode(anew.getvalue()).decode(), image_path=str(path))])


@pytest.mark.parametrize("place", ["path", "data", "url"])
def test_a_text_that_is_not_in_the_node_is_refused(gme: GMEEmbedding, tmp_path: Path, place: str) -> None:
    (tmp_path / "t.txt").write_text("words")
    values: dict[str, Any] = {
        "path": tmp_path / "t.txt",
        "data": b"words",
        "url": "https://example.org/t.txt",
    }
    node = Node(
        id_="x",
        text_resource=MediaResource(**{place: values[place]}),
        image_resource=MediaResource(path=save(tmp_path, 1)),
    )
    with pytest.raises(BatchError, match="node x: text_resource has no text"):
        gme.embed_nodes([node])


def test_an_empty_image_path_is_none(gme: GMEEmbedding) -> None:
    query = QueryBundle("a", image_path="")
    assert gme.get_query_bundle_embedding(query) == gme.get_query_embedding("a")


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_query_vector_that_can_not_be_compared_is_refused_over_any_store(
    gme: GMEEmbedding, stock: bool, way: str
) -> None:
    storage = StorageContext.from_defaults() if stock else None
    retriever = MultimodalIndex([TextNode(text="a")], embed_model=gme, storage_context=storage).as_retriever()

    def ask(vector: list[float]) -> None:
        query = QueryBundle("a", embedding=vector)
        _ = retriever.retrieve(query) if way == "sync" else asyncio.run(retriever.aretrieve(query))

    for vector in ([math.nan] * 8, [0.0] * 8):
        with pytest.raises(InputError, match="zero or holds NaN"):
            ask(vector)
    with pytest.raises(FingerprintError, match="8 dimensions, these have 3"):
        ask([1.0] * 3)
    ask([1.0] * 8)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("option", ["node_ids", "doc_ids"])
def test_a_search_within_nothing_finds_nothing(gme: GMEEmbedding, stock: bool, option: str) -> None:
    storage = StorageContext.from_defaults() if stock else None
    index = MultimodalIndex([TextNode(text="a")], embed_model=gme, storage_context=storage)
    assert len(index.as_retriever(**{option: None}).retrieve("a")) == 1
    assert index.as_retriever(**{option: []}).retrieve("a") == []
    assert asyncio.run(index.as_retriever(**{option: []}).aretrieve("a")) == []
