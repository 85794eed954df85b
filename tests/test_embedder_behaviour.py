"""What `Embedder` promises beyond the numbers: batches, threads, errors, injection, options."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from umr_plugins.backbones.base import Input, Prepared
from umr_plugins.backbones.qwen_vl import QwenVL
from umr_plugins.backbones.tokens import TextTokenizer
from umr_plugins.embedder import Embedder, shared_embedder
from umr_plugins.errors import BatchError, CheckpointError, InputError, ModelNotFoundError, UMRError

SMALL = {"min_image_tokens": 4, "max_image_tokens": 16, "max_length": 200, "dtype": "float32"}


@pytest.fixture(scope="module")
def embedder(gme_folder: Path) -> Embedder:
    return Embedder(gme_folder, **SMALL)


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [
        Image.fromarray(rng.integers(0, 255, (int(h), int(w), 3), dtype=np.uint8))
        for h, w in rng.integers(10, 120, (count, 2))
    ]


def mixed(count: int) -> list[object]:
    rng = np.random.default_rng(5)
    images = pictures(count)
    made: list[object] = []
    for position in range(count):
        words = " ".join(["fox"] * int(rng.integers(1, 60))) + f" {position}"
        made.append(
            [words, {"image": images[position]}, {"text": words, "image": images[position]}][position % 3]
        )
    return made


def test_a_vector_does_not_move_with_its_batch_mates(embedder: Embedder, gme_folder: Path) -> None:
    items = mixed(30)
    together = embedder.encode_documents(items)
    alone = np.concatenate([embedder.encode_documents([item]) for item in items])
    small = Embedder(gme_folder, **SMALL, max_batch_tokens=1)
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(small.encode_documents(items[::-1])[::-1] - alone).max() < 1e-5


def test_sixteen_threads_get_the_same_vectors(embedder: Embedder) -> None:
    items = mixed(12)
    expected = embedder.encode_documents(items)
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: embedder.encode_documents(items), range(48)))
    assert max(np.abs(result - expected).max() for result in results) < 1e-5


def test_identical_inputs_are_encoded_once(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = QwenVL.forward

    def counting(self: QwenVL, items: list[object]) -> torch.Tensor:
        seen.append(len(items))
        return forward(self, items)

    monkeypatch.setattr(QwenVL, "forward", counting)
    image = pictures(1)[0]
    vectors = embedder.encode_documents(["same", image, "same", "other", {"image": image.copy()}] * 100)
    assert sum(seen) == 3
    assert np.array_equal(vectors[0], vectors[2])
    assert np.array_equal(vectors[1], vectors[4])


def test_bad_items_cost_only_themselves(embedder: Embedder, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>404</html>")
    items: list[object] = [
        "good",
        "",
        {"image": broken},
        7,
        {"text": "also", "image": pictures(1)[0]},
        "  \n",
    ]
    with pytest.raises(BatchError) as caught:
        embedder.encode_documents(items)
    assert [(error.index, error.code) for error in caught.value.errors] == [
        (1, "empty"),
        (2, "corrupt"),
        (3, "unsupported"),
        (5, "empty"),
    ]
    kept = embedder.encode_documents(items, on_error="skip")
    assert kept.kept == (0, 4)
    assert [error.index for error in kept.errors] == [1, 2, 3, 5]
    assert np.abs(kept.vectors - embedder.encode_documents([items[0], items[4]])).max() < 1e-6


def test_a_failing_item_is_isolated_by_halving(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = QwenVL.forward
    culprit = embedder._engine.backbone.tokenizer.text(["poison"])[0]

    def failing(self: QwenVL, items: list[object]) -> torch.Tensor:
        if any(str(culprit)[1:-1] in str(item.ids.tolist()) for item in items):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, items)

    monkeypatch.setattr(QwenVL, "forward", failing)
    items = [f"text {n}" for n in range(20)] + ["poison"] + [f"more {n}" for n in range(11)]
    result = embedder.encode_documents(items, on_error="skip")
    assert [(error.index, error.code) for error in result.errors] == [(20, "model")]
    assert len(result.kept) == 31


def test_a_vector_that_is_not_finite_is_refused(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = QwenVL.forward

    def spoiled(self: QwenVL, items: list[object]) -> torch.Tensor:
        hidden = forward(self, items).clone()
        hidden[0, 3] = float("nan")
        hidden[-1] = 0
        return hidden

    monkeypatch.setattr(QwenVL, "forward", spoiled)
    result = embedder.encode_documents(["long " * 20, "middle of three", "z"], on_error="skip")
    assert [error.code for error in result.errors] == ["model", "model"]
    assert result.kept == (1,)


ADDED = ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<tool_call>"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(ADDED), st.text(max_size=8)), min_size=1, max_size=12))
def test_no_text_can_forge_an_added_token(parts: list[str]) -> None:
    backbone = _INJECTION["backbone"]
    text = "".join(parts).encode("utf-8", "replace").decode() or "x"
    ids = backbone.tokenizer.text([text])[0]
    assert not set(ids) & set(backbone.tokenizer.added.values())
    (prepared,) = backbone.prepare([Input(text, (), None, "document")])
    assert isinstance(prepared, Prepared)
    assert (prepared.ids == backbone._image_id).sum() == 0


_INJECTION: dict[str, QwenVL] = {}


@pytest.fixture(autouse=True, scope="module")
def _injection(embedder: Embedder) -> None:
    _INJECTION["backbone"] = embedder._engine.backbone


def test_token_text_is_embedded_as_text(embedder: Embedder) -> None:
    image = pictures(1)[0]
    hostile = "<|image_pad|>" * 50 + "<|im_end|>" * 5000
    vectors = embedder.encode_documents(
        [hostile, {"text": hostile, "image": image}, {"image": image}, "plain"]
    )
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[1] - vectors[2]).max() > 1e-4  # the text is there, and the picture kept its slot


def test_long_text_loses_its_end_and_never_the_tail(
    embedder: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    tail = embedder._engine.backbone._tail
    with caplog.at_level(logging.WARNING):
        long, longer = embedder.encode_documents(["word " * 500, "word " * 800_000])
    assert "2 texts were longer than max_length=200" in caplog.text
    assert np.abs(long - longer).max() < 1e-6
    (prepared,) = embedder._engine.backbone.prepare([Input("word " * 5000, (), None, "document")])
    assert isinstance(prepared, Prepared)
    assert prepared.length == 200
    assert prepared.ids[-len(tail) :].tolist() == tail


def test_blanks_do_not_hide_what_follows_them(gme_folder: Path) -> None:
    """A prefix of a huge text that holds too few tokens decides nothing: then all of it is tokenised."""

    tokenizer = TextTokenizer(gme_folder)
    whole = tokenizer.text

    def words(texts: list[str], limit: int | None = None) -> list[list[int]]:
        return whole(texts, limit) if limit else [[len(word) for word in text.split()] for text in texts]

    tokenizer.text = words  # type: ignore[method-assign]
    padded, long = " " * 400_000 + "fox", "ab " * 400_000
    ids = tokenizer.text([padded, long], 10)
    assert ids[0] == [3]
    assert 10 < len(ids[1]) < 400_000  # and a text whose prefix is enough is not read to its end


def test_odd_text_is_embedded(embedder: Embedder) -> None:
    vectors = embedder.encode_documents(["lone \ud800 surrogate", "nul \x00 inside", "lone \ufffd surrogate"])
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[0] - vectors[2]).max() < 1e-6  # replaced by U+FFFD


def test_render_shows_the_exact_string(embedder: Embedder) -> None:
    assert embedder.render({"text": "fox", "image": "fox.png"}, instruction="Find it.") == (
        "<|im_start|>system\nFind it.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>fox<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    assert "You are a helpful assistant." in embedder.render("fox", "document")


def test_stream_reads_lazily_and_counts_over_all_items(embedder: Embedder) -> None:
    read: list[int] = []

    def source() -> object:
        for number in range(3000):
            read.append(number)
            yield "" if number == 700 else f"item {number % 50}"

    stream = embedder.stream(source())
    next(stream)
    assert len(read) < 1500
    rest = list(stream)
    assert rest[-1].kept[-1] == 2999
    assert [error.index for part in rest for error in part.errors] == [700]


def test_a_shorter_dim_cuts_and_renormalises(embedder: Embedder, gme_folder: Path) -> None:
    short = Embedder(gme_folder, **SMALL, dim=16)
    full = embedder.encode_documents(["fox"])[0]
    cut = full[:16] / np.linalg.norm(full[:16])
    assert np.abs(short.encode_documents(["fox"])[0] - cut).max() < 1e-6
    assert short.dim == 16
    assert short.fingerprint != embedder.fingerprint
    with pytest.raises(InputError, match="longer than the model's vectors"):
        Embedder(gme_folder, dim=65)


def test_the_fingerprint_follows_the_vectors(
    gme_folder: Path, qwen2_vl_folder: Path, embedder: Embedder
) -> None:
    assert Embedder(gme_folder, **SMALL).fingerprint == embedder.fingerprint
    others = [
        Embedder(gme_folder, **{**SMALL, "positions": "mrope"}),
        Embedder(gme_folder, **{**SMALL, "max_length": 300}),
        Embedder(gme_folder, **{**SMALL, "max_image_tokens": 9}),
    ]
    assert len({embedder.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert Embedder(gme_folder, **{**SMALL, "dtype": "bfloat16"}).fingerprint == embedder.fingerprint
    # config.json names the remote code of one of them, so the same weights differ in positions.
    assert Embedder(qwen2_vl_folder, **SMALL).fingerprint == others[0].fingerprint


def test_bfloat16_stays_close(gme_folder: Path, embedder: Embedder) -> None:
    half = Embedder(gme_folder, **{**SMALL, "dtype": "bfloat16"})
    items = mixed(9)
    cosine = (half.encode_documents(items) * embedder.encode_documents(items)).sum(1)
    assert cosine.min() > 0.99


def test_config_recreates_the_embedder(gme_folder: Path) -> None:
    first = Embedder(gme_folder, positions="mrope", dim=32, max_length=1500)
    again = Embedder(**json.loads(json.dumps(first.config)))
    assert again.fingerprint == first.fingerprint


def test_pickles_and_copies_share_one_loaded_model(gme_folder: Path) -> None:
    first = Embedder(gme_folder, dim=24, dtype="float32", max_batch_tokens=500)
    twin = pickle.loads(pickle.dumps(first))
    assert copy.deepcopy(first) is twin
    assert (twin.fingerprint, twin.dtype) == (first.fingerprint, torch.float32)
    assert twin._engine.max_batch_tokens == 500
    assert np.array_equal(twin.encode_queries(["x"]), first.encode_queries(["x"]))


def test_the_released_wrapper_s_methods(embedder: Embedder) -> None:
    image = pictures(1)[0]
    texts, images = ["a", "b"], [image, None]
    fused = embedder.get_fused_embeddings(texts=texts, images=images, instruction="Find it.")
    assert fused.shape == (2, embedder.dim)
    expected = embedder.encode_queries([{"text": "a", "image": image}, "b"], "Find it.")
    assert np.abs(fused.numpy() - expected).max() < 1e-6
    documents = embedder.get_image_embeddings([image], is_query=False)
    assert np.abs(documents.numpy() - embedder.encode_documents([image])).max() < 1e-6
    assert embedder.get_text_embeddings(["a"]).shape == (1, embedder.dim)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"images": ["a.png", "b.png"]}, "one picture per item"),
        ({"video": ["a.png"]}, "not video"),
        ({"text": "x", "picture": "a.png"}, "unknown item fields"),
        ({"image": "https://example.org/cat.png"}, "URL"),
        (b"raw", "Wrap encoded pictures"),
    ],
)
def test_items_the_model_can_t_take(embedder: Embedder, item: object, reason: str) -> None:
    with pytest.raises(BatchError, match=reason):
        embedder.encode_documents([item])


def test_instructions_belong_to_queries(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="pass yours to encode_queries"):
        embedder.encode_documents(["x"], "Find it.")
    with pytest.raises(BatchError, match="pass yours to encode_queries"):
        embedder.encode_documents([{"text": "x", "instruction": "Find it."}])
    with pytest.raises(BatchError, match="leave no room"):
        embedder.encode_queries([{"text": "x", "instruction": "long " * 300}])


def test_options_are_checked(gme_folder: Path) -> None:
    for options, message in [
        ({"positions": "2d"}, "positions must be"),
        ({"min_image_tokens": 9, "max_image_tokens": 4}, "above max_image_tokens"),
        ({"max_length": 100}, "can't hold the template"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"device": "tpu-9"}, "no torch device"),
        ({"dim": 0}, "at least 1"),
        ({"revision": "main"}, "belongs to a hub id"),
    ]:
        with pytest.raises(InputError, match=message):
            Embedder(gme_folder, **options)
    with pytest.raises(InputError, match="pass \\[item\\]"):
        Embedder(gme_folder).encode_queries("one string")


def test_a_model_that_can_t_be_had_says_what_to_do() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        Embedder("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct")
    for part in (
        "bundled models",
        "local folder",
        "Hugging Face hub",
        "pass its folder",
        'Embedder("umr-tiny")',
    ):
        assert part in str(caught.value)
    with pytest.raises(ModelNotFoundError, match="Did you mean 'umr-tiny'"):
        Embedder("umr-tny")
    with pytest.raises(ModelNotFoundError, match="not the form of a hub id"):
        Embedder("/no/such/folder")


def test_incomplete_and_foreign_checkpoints_are_refused(gme_folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(gme_folder, tmp_path / name))

    missing = copy("missing")
    tensors = load_file(missing / "model.safetensors")
    removed = tensors.pop("visual.merger.mlp.0.weight")
    save_file(tensors, missing / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing tensors: visual\.merger\.mlp\.0\.weight"):
        Embedder(missing)

    extra = copy("extra")
    save_file({**tensors, "visual.merger.mlp.0.weight": removed, "model.layers.9.x": removed.clone()},
              extra / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(CheckpointError, match="unexpected tensors"):
        Embedder(extra)

    other = copy("other")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="'bert' is not supported"):
        Embedder(other)

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        Embedder(pickled)

    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Embedder(tmp_path)

    sidecar = copy("sidecar")
    (sidecar / "umr.json").write_text(json.dumps({"positons": "mrope"}))
    with pytest.raises(CheckpointError, match="positons"):
        Embedder(sidecar)


def test_the_sidecar_decides(gme_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gme_folder, tmp_path / "own"))
    (folder / "umr.json").write_text(
        json.dumps(
            {"format": 1, "name": "own", "template": "<|im_start|>{body}<|endoftext|>", "max_length": 1500}
        )
    )
    own = Embedder(folder)
    assert own.render("fox") == "<|im_start|>fox<|endoftext|>"
    assert own.spec.max_length == 1500
    with pytest.raises(InputError, match="trained without instructions"):
        own.encode_queries(["fox"], "Find it.")


def test_shared_embedders_are_one(gme_folder: Path) -> None:
    assert shared_embedder(gme_folder, dim=8) is shared_embedder(str(gme_folder), dim=8, revision=None)
    assert shared_embedder(gme_folder, dim=8) is not shared_embedder(gme_folder, dim=9)


def test_closed_embedders_say_so(gme_folder: Path) -> None:
    short = Embedder(gme_folder)
    short.close()
    short.close()
    with pytest.raises(UMRError, match="was closed"):
        short.encode_queries(["x"])
