"""What we load, written as a sentence-transformers model: the same vectors, opened there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim
from test_adapters import write_adapter
from tiny_checkpoints import write_llava_next, write_qwen_vl

from umr_plugins import Embedder
from umr_plugins.errors import BatchError, InputError
from umr_plugins.sentence_transformers import UMRModule, load, write

GREEN = Image.new("RGB", (80, 60), "green")
ITEMS = ["a red apple", GREEN, {"text": "a boat", "image": GREEN}, "another text, somewhat longer"]
OURS = ["a red apple", {"image": GREEN}, {"text": "a boat", "image": GREEN}, "another text, somewhat longer"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_next"])
def test_the_same_vectors_for_every_kind_of_item(tmp_path: Path, family: str) -> None:
    make = write_llava_next if family == "llava_next" else write_qwen_vl
    options = {} if family == "llava_next" else {"family": family}
    (tmp_path / "model").mkdir()
    make(tmp_path / "model", **options)
    ours = Embedder(tmp_path / "model", dtype="float32", max_length=2048)
    write(ours, tmp_path / "st")
    theirs = load(tmp_path / "st", device="cpu", model_kwargs={"dtype": "float32"})
    for ask, encode in (
        (lambda: theirs.encode(ITEMS), ours.encode_queries),
        (lambda: theirs.encode_query(ITEMS), ours.encode_queries),
        (lambda: theirs.encode_document(ITEMS), ours.encode_documents),
    ):
        np.testing.assert_allclose(ask(), encode(OURS), atol=1e-6)
    instruction = "Find an image that matches the given text."
    np.testing.assert_allclose(
        theirs.encode(ITEMS[:1], prompt=instruction), ours.encode_queries(OURS[:1], instruction), atol=1e-6
    )
    assert theirs.get_embedding_dimension() == ours.dim
    assert theirs.max_seq_length == 2048
    assert cos_sim(theirs.encode("a"), theirs.encode("a")).item() == pytest.approx(1)


def test_options_and_adapter_travel_along(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_qwen_vl(tmp_path / "model")
    plain = Embedder(tmp_path / "model", dtype="float32", dim=16, min_image_tokens=4, positions="mrope")
    adapter = write_adapter(tmp_path / "adapter", "model.")
    ours = Embedder(**plain.config, adapter=adapter, dtype="float32")
    assert np.abs(ours.encode_documents(OURS) - plain.encode_documents(OURS)).max() > 1e-3
    folder = write(ours, tmp_path / "st")
    for path in (tmp_path / "model").iterdir():
        path.unlink()  # nothing of the old folders is needed
    moved = folder.rename(tmp_path / "elsewhere")
    theirs = SentenceTransformer(str(moved), trust_remote_code=True, model_kwargs={"dtype": "float32"})
    np.testing.assert_allclose(theirs.encode(ITEMS), ours.encode_documents(OURS), atol=1e-6)
    assert theirs.encode("a").shape == (16,)


def test_it_is_written_again_from_there(tmp_path: Path) -> None:
    write("umr-tiny", tmp_path / "one")
    first = load(tmp_path / "one")
    first.save(str(tmp_path / "two"))
    second = SentenceTransformer(str(tmp_path / "two"), trust_remote_code=True)
    np.testing.assert_array_equal(first.encode(ITEMS), second.encode(ITEMS))


def test_our_embedder_opens_the_folder_too(tmp_path: Path) -> None:
    folder = write("umr-tiny", tmp_path / "st")
    np.testing.assert_array_equal(
        Embedder(folder).encode_documents(OURS), Embedder("umr-tiny").encode_documents(OURS)
    )


def test_modules_name_no_remote_code(tmp_path: Path) -> None:
    folder = write("umr-tiny", tmp_path / "st")
    [module] = json.loads((folder / "modules.json").read_text())
    assert module["type"] == "umr_plugins.sentence_transformers.UMRModule"
    assert not list(folder.glob("*.py"))


def test_dtype_can_be_changed_there() -> None:
    model = SentenceTransformer(modules=[UMRModule(Embedder("umr-tiny", dtype="float32"))])
    before = model.encode("a red apple")
    model.to(torch.bfloat16)
    assert model[0].embedder.dtype == torch.bfloat16
    after = model.encode("a red apple")
    assert before @ after == pytest.approx(1, abs=0.02)
    assert (before != after).any()


def test_a_string_is_a_picture_where_it_is_one_for_them(tmp_path: Path) -> None:
    GREEN.save(tmp_path / "green.png")
    model = SentenceTransformer(modules=[UMRModule(Embedder("umr-tiny"))])
    np.testing.assert_allclose(model.encode(str(tmp_path / "green.png")), model.encode(GREEN), atol=1e-6)


def test_refusals_name_the_item(tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[UMRModule(Embedder("umr-tiny"))])
    with pytest.raises(BatchError, match="1 of 2"):
        model.encode(["a", " "])
    with pytest.raises(BatchError, match="1 of 1"):
        model.encode([{"role": "user", "content": "hello"}])
    with pytest.raises(InputError, match="documents are always encoded"):
        model.encode_document(["a"], prompt="Find it.")
    model.train()
    with pytest.raises(InputError, match="for inference"):
        model(model.preprocess(["a"]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        write("umr-tiny", tmp_path / "full")
    with pytest.raises(InputError, match="was not written by umr_plugins"):
        load(tmp_path / "full")


@pytest.mark.slow
def test_torchvision_is_not_needed(tmp_path: Path) -> None:
    folder = write("umr-tiny", tmp_path / "st")
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(folder)!r}, trust_remote_code=True)\n"
        "print(model.encode('a red apple').shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"({Embedder('umr-tiny').dim},)", done.stderr
