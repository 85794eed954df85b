"""Every family runs through the index and both adapters; the table in docs/models.md is what was seen here.

`UMR_WRITE_TABLES=1 pytest tests/test_families_everywhere.py` writes the table anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from langchain_umr import GMEEmbeddings, UMRVectorStore
from llama_index.core.schema import ImageNode, TextNode
from llama_index.embeddings.gme import GMEEmbedding
from llama_index.indices.umr import MultimodalIndex
from PIL import Image

from umr_plugins.backbones.registry import resolve
from umr_plugins.backbones.spec import FAMILIES
from umr_plugins.embedder import Embedder
from umr_plugins.errors import BatchError
from umr_plugins.index.index import Index
from umr_plugins.types import Item

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
GOLDEN = Path(__file__).parent / "golden"
BEGIN, END = "<!-- table: families -->\n", "<!-- end -->\n"
# Fixture of the checkpoint, and what it stands for.
CHECKPOINTS = {
    "gme_folder": "GME",
    "qwen2_vl_folder": "another Qwen2-VL",
    "qwen2_5_vl_folder": "any Qwen2.5-VL",
    "qwen3_vl_folder": "Qwen3-VL-Embedding, any Qwen3-VL",
    "mm_embed_folder": "MM-Embed",
    "llava_next_folder": "another LLaVA-NeXT",
}
SEEN: dict[str, list[str]] = {}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def named(request: pytest.FixtureRequest) -> tuple[str, Embedder]:
    return request.param, Embedder(request.getfixturevalue(request.param), dtype="float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, picture in (("a.png", photo), ("b.png", photo.transpose(Image.Transpose.ROTATE_90))):
        picture.resize((224, 224)).save(folder / name)
    return sorted(folder.iterdir())


def test_a_family_runs_everywhere(named: tuple[str, Embedder], files: list[Path]) -> None:
    fixture, embedder = named
    seen = SEEN.setdefault(fixture, [FAMILIES[embedder.spec.family].title])
    items = [
        Item("a river bank"),
        Item(image=files[0]),
        Item("the lazy dog", files[0]),
        Item("the lazy dog", files[1]),
    ]
    index = Index(None, embedder)
    assert len(index.add(items, ids=["text", "picture", "fused", "other"])) == 4
    for name, item in zip(("text", "picture", "fused"), items, strict=False):
        query = embedder.encode_documents([item])[0]
        assert index.search_vector(query, k=1)[0].id == name
        assert len(index.search(item, k=4)) == 4
    seen += ["yes"] * 3

    if embedder.spec.max_images > 1:
        assert embedder.encode_documents([{"images": files}]).shape == (1, embedder.dim)
        seen.append(f"up to {embedder.spec.max_images}")
    else:
        with pytest.raises(BatchError, match="one picture per item"):
            embedder.encode_documents([{"images": files}])
        seen.append("refused")

    if embedder.spec.video_slot is not None:
        assert embedder.encode_documents([{"video": files}]).shape == (1, embedder.dim)
        seen.append(f"up to {embedder.spec.max_frames} frames")
    else:
        with pytest.raises(BatchError, match="not video"):
            embedder.encode_documents([{"video": files}])
        seen.append("refused")

    gme = GMEEmbedding(encoder=embedder)
    nodes = [TextNode(text="a river bank", id_="text"), ImageNode(image_path=str(files[0]), id_="picture")]
    retriever = MultimodalIndex(nodes, embed_model=gme).as_retriever(similarity_top_k=2)
    for query in (gme.as_query("a river bank"), gme.as_query(None, files[0]), gme.as_query("x", files[0])):
        assert {hit.node_id for hit in retriever.retrieve(query)} == {"text", "picture"}
    seen.append("yes")

    store = UMRVectorStore(embedding=GMEEmbeddings.from_encoder(embedder))
    store.add_texts(["a river bank"], ids=["text"])
    store.add_images([files[0]], ids=["picture"])
    for asked in ("a river bank", {"image": str(files[0])}, {"text": "x", "image": str(files[0])}):
        assert {document.id for document in store.similarity_search(asked, k=2)} == {"text", "picture"}
    seen.append("yes")


def test_no_family_is_left_out(request: pytest.FixtureRequest) -> None:
    pinned = {case["family"] for case in json.loads((GOLDEN / "family_prompts.json").read_text())}
    for fixtures in (set(CHECKPOINTS), pinned | {"gme_folder"}):  # GME has a golden file of its own
        assert {resolve(request.getfixturevalue(name)).spec.family for name in fixtures} == set(FAMILIES)


def test_the_table_in_the_docs_is_what_was_seen() -> None:
    if set(SEEN) != set(CHECKPOINTS):
        pytest.skip("needs all families of this file in the same run")
    head = [
        "family",
        "checkpoints",
        "text",
        "picture",
        "fused",
        "several pictures",
        "video",
        "LlamaIndex",
        "LangChain",
    ]
    rows = [head, ["---"] * len(head)]
    rows += [[SEEN[name][0], title, *SEEN[name][1:]] for name, title in CHECKPOINTS.items()]
    table = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if os.environ.get("UMR_WRITE_TABLES"):
        DOCS.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    else:
        assert written == table, "run it again with UMR_WRITE_TABLES=1 and commit docs/models.md"
