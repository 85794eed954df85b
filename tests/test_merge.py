"""Checkpoints with changed weights: those are right, all else is as it was, and nothing is left half done."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_adapters import Q, write_adapter
from transformers import AutoModel, AutoModelForImageTextToText

from umr_plugins import Embedder, Reranker
from umr_plugins.backbones import merge
from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.merge import write_checkpoint
from umr_plugins.backbones.names import canonical
from umr_plugins.backbones.registry import headers, resolve
from umr_plugins.cli.main import main
from umr_plugins.errors import CheckpointError, InputError, StorageError
from umr_plugins.sentence_transformers import load, write
from umr_plugins.st_files import add_to

# peft asks transformers for what has another name since.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEARS = ["q_proj", "v_proj", "up_proj", "qkv", "fc1", "linear_fc1", "linear_1"]  # language and vision
CPU = torch.device("cpu")
WHOLE = ["qwen2_vl_folder", "gme_folder", "qwen2_5_vl_folder", "qwen3_vl_folder", "llava_next_folder"]
"""Checkpoints that transformers itself opens, head and all."""
EVERY = [*WHOLE, "mm_embed_folder"]


def adapt(model: torch.nn.Module, folder: Path, targets: list[str], **config: Any) -> torch.nn.Module:
    """Save an adapter as peft does; the model with it merged by peft."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wanted = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **config)
        adapted = get_peft_model(model, wanted)  # type: ignore[arg-type]
    adapted.save_pretrained(str(folder), save_embedding_layers=False)  # a copy of the head, if it is adapted
    merged: torch.nn.Module = adapted.merge_and_unload()  # type: ignore[operator]
    return merged


def vectors(embedder: Embedder, photo: Image.Image) -> np.ndarray[Any, Any]:
    return embedder.encode_documents(["a quick fox", {"image": photo}, {"text": "dog", "image": photo}])


def every_tensor(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in headers(folder) for name, tensor in load_file(path).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).numpy().data)


def changed_names(before: Path, after: Path) -> set[str]:
    old, new = every_tensor(before), every_tensor(after)
    assert list(old) == list(new)
    assert [(t.dtype, t.shape) for t in old.values()] == [(t.dtype, t.shape) for t in new.values()]
    return {name for name in old if raw(old[name]) != raw(new[name])}


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("base", WHOLE)
def test_a_merged_adapter_gives_what_peft_and_embedder_give(
    base: str, request: pytest.FixtureRequest, tmp_path: Path, photo: Image.Image
) -> None:
    folder = request.getfixturevalue(base)
    targets = [*LINEARS, "lm_head"] if base == "llava_next_folder" else LINEARS  # the others tie theirs
    theirs = adapt(AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter", targets)
    theirs.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    out = write_checkpoint(resolve(folder), tmp_path / "out", adapter=tmp_path / "adapter")
    assert out == tmp_path / "out"

    ours, expected = every_tensor(out), every_tensor(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)
    changed = changed_names(folder, out)
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in changed} <= set(targets)
    assert any("vis" in name for name in changed)
    assert any("lm_head" in name for name in changed) == ("lm_head" in targets)

    merged = vectors(Embedder(out, dtype="float32"), photo)
    apart = Embedder(folder, dtype="float32", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(merged, vectors(apart, photo), atol=1e-5)
    assert np.abs(merged - vectors(Embedder(folder, dtype="float32"), photo)).max() > 1e-3
    opened = AutoModel.from_pretrained(out)
    state, native = opened.state_dict(), theirs.model.state_dict()
    assert state.keys() == native.keys()
    for name in state:
        torch.testing.assert_close(state[name], native[name], atol=1e-5, rtol=0)


def test_a_merged_adapter_on_mm_embed_leaves_the_pooler_as_it_is(
    mm_embed_folder: Path, tmp_path: Path, photo: Image.Image
) -> None:
    base = resolve(mm_embed_folder)
    theirs = adapt(load_backbone(base, CPU, torch.float32).model, tmp_path / "adapter", LINEARS)
    out = write_checkpoint(base, tmp_path / "out", adapter=tmp_path / "adapter")
    opened = load_backbone(resolve(out), CPU, torch.float32).model.state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(opened[name], tensor, atol=1e-5, rtol=0)
    changed = changed_names(mm_embed_folder, out)
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in changed
    assert not any(name.startswith("latent_attention_model.") for name in changed)
    apart = Embedder(mm_embed_folder, dtype="float32", adapter=tmp_path / "adapter")
    merged = Embedder(out, dtype="float32")
    np.testing.assert_allclose(vectors(merged, photo), vectors(apart, photo), atol=1e-5)
    assert merged.spec.license == "cc-by-nc-4.0"


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.", ""])
@pytest.mark.parametrize("base", ["qwen2_vl_folder", "qwen3_vl_folder", "mm_embed_folder"])
def test_an_adapter_of_any_layout_finds_its_tensors(
    base: str, prefix: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    out = write_checkpoint(
        resolve(folder), tmp_path / "out", adapter=write_adapter(tmp_path / "adapter", prefix)
    )
    changed = changed_names(folder, out)
    assert len(changed) == 3
    found = next(name for name in changed if "q_proj" in name)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{prefix}{Q}.lora_{side}.weight"].double() for side in "AB")
    expected = every_tensor(folder)[found].double() + 6 / 4 * b @ a
    torch.testing.assert_close(every_tensor(out)[found].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", EVERY)
def test_trained_weights_are_stored_under_their_old_names(
    base: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    model = load_backbone(resolve(folder), CPU, torch.float32).model
    made = torch.Generator().manual_seed(1)
    trained = {name: torch.randn(part.shape, generator=made) for name, part in model.named_parameters()}
    assert len(trained) > 50
    out = write_checkpoint(resolve(folder), tmp_path / "out", tensors=trained)
    opened = dict(load_backbone(resolve(out), CPU, torch.float32).model.named_parameters())
    assert opened.keys() == trained.keys()
    assert all(torch.equal(opened[name], trained[name]) for name in trained)
    left = changed_names(folder, out) ^ set(every_tensor(folder))
    assert all("latent_attention_model." in name or "lm_head" in name for name in left)


def test_tensors_keep_the_type_they_are_stored_in(qwen2_5_vl_folder: Path, tmp_path: Path) -> None:
    folder = copied(qwen2_5_vl_folder, tmp_path / "base")
    types = {"model.norm.weight": torch.float32, "visual.merger.mlp.0.bias": torch.float16}
    stored = {
        name: tensor.to(types.get(name, torch.bfloat16)) for name, tensor in every_tensor(folder).items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    new = torch.randn(64, 64)
    name = "language_model.layers.0.self_attn.q_proj.weight"
    bias = "visual.merger.mlp.0.bias"
    changes = {name: new, bias: torch.full(stored[bias].shape, 0.1), "language_model.norm.weight": new[0]}
    out = write_checkpoint(resolve(folder), tmp_path / "out", tensors=changes)
    after = every_tensor(out)
    assert changed_names(folder, out) == {"model.layers.0.self_attn.q_proj.weight", bias, "model.norm.weight"}
    assert torch.equal(after["model.layers.0.self_attn.q_proj.weight"], new.bfloat16())
    assert torch.equal(after["model.norm.weight"], new[0])

    adapter = write_adapter(tmp_path / "adapter", "model.")
    merged = every_tensor(write_checkpoint(resolve(folder), tmp_path / "merged", adapter=adapter))
    parts = load_file(adapter / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.model.{Q}.lora_{side}.weight"] for side in "AB")
    old = stored[f"model.{Q}.weight"].float()
    torch.testing.assert_close(
        merged[f"model.{Q}.weight"], (old + 1.5 * (b @ a)).bfloat16(), atol=0, rtol=2e-2
    )
    assert torch.equal(merged[f"model.{Q}.bias"], stored[f"model.{Q}.bias"])


def test_shards_are_changed_where_the_tensor_lies(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    folder = copied(qwen3_vl_folder, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(qwen3_vl_folder).save_pretrained(
        folder, max_shard_size="200KB"
    )
    shards = sorted(path.name for path in headers(folder))
    assert len(shards) > 2
    name = "language_model.layers.1.mlp.up_proj.weight"
    out = write_checkpoint(resolve(folder), tmp_path / "out", tensors={name: torch.ones(128, 64)})
    assert sorted(path.name for path in headers(out)) == shards
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (folder / index).read_bytes()
    place = json.loads((out / index).read_text())["weight_map"][f"model.{name}"]
    differ = [each for each in shards if (out / each).read_bytes() != (folder / each).read_bytes()]
    assert differ == [place]
    assert changed_names(folder, out) == {f"model.{name}"}
    with safe_open(out / place, framework="pt") as new, safe_open(folder / place, framework="pt") as old:
        assert new.metadata() == old.metadata() == {"format": "pt"}
    assert (
        AutoModel.from_pretrained(out).get_submodule("language_model.layers.1.mlp.up_proj").weight.mean() == 1
    )


def write_head_adapter(folder: Path, rows: int) -> Path:
    write_adapter(folder, "model.")
    sides = {"A": torch.ones(4, 64), "B": torch.ones(rows, 4)}
    tensors = {f"base_model.model.lm_head.lora_{side}.weight": part for side, part in sides.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_tied_embeddings_stay_tied(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    folder = copied(qwen2_vl_folder, tmp_path / "base")
    stored = every_tensor(folder)
    table = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": table.clone()}, folder / "model.safetensors")
    new = torch.randn(table.shape)
    name = "language_model.embed_tokens.weight"
    both = {name: new, "lm_head.weight": new}  # as the weights of a whole model are given
    for number, tensors in enumerate(({name: new}, both)):
        out = write_checkpoint(resolve(folder), tmp_path / f"out{number}", tensors=tensors)
        assert changed_names(folder, out) == {"model.embed_tokens.weight", "lm_head.weight"}
        after = every_tensor(out)
        assert torch.equal(after["lm_head.weight"], new)
        assert torch.equal(after["model.embed_tokens.weight"], new)
    with pytest.raises(CheckpointError, match=r"two different tensors are given for .*embed_tok"):
        write_checkpoint(resolve(folder), tmp_path / "no", tensors={name: new, "lm_head.weight": table})
    with pytest.raises(CheckpointError, match="is its embedding table"):
        write_checkpoint(
            resolve(folder), tmp_path / "no", adapter=write_head_adapter(tmp_path / "a", len(table))
        )

    config = folder / "config.json"
    parts = json.loads(config.read_text())
    parts["tie_word_embeddings"] = parts["text_config"]["tie_word_embeddings"] = False
    config.write_text(json.dumps(parts))
    out = write_checkpoint(resolve(folder), tmp_path / "untied", tensors={name: new})
    assert changed_names(folder, out) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("base", "why"), [("qwen2_vl_folder", "is its embedding table"), ("mm_embed_folder", "is not stored")]
)
def test_a_head_that_cannot_be_changed_alone_is_refused(
    base: str, why: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    with pytest.raises(CheckpointError, match=f"changes lm_head, but the head of .* {why}"):
        write_checkpoint(
            resolve(folder), tmp_path / "out", adapter=write_head_adapter(tmp_path / "adapter", 500)
        )
    assert not (tmp_path / "out").exists()


def test_only_what_belongs_to_the_checkpoint_is_copied(gme_folder: Path, tmp_path: Path) -> None:
    blobs, folder = copied(gme_folder, tmp_path / "blobs"), tmp_path / "base"
    folder.mkdir()
    for path in blobs.iterdir():  # as the hub's cache keeps them
        (folder / path.name).symlink_to(path)
    left_out = [".hidden.json", "pytorch_model.bin", "training_args.bin", "modeling_gme_qwen2vl.py"]
    left_out += ["modules.json", "umr_sentence_transformers.json"]
    for name in [*left_out, "merges.txt", "chat_template.jinja"]:
        (folder / name).write_text("{}")
    (folder / "sub.json").mkdir()
    out = write_checkpoint(
        resolve(folder), tmp_path / "deep" / "er" / "out", adapter=write_adapter(tmp_path / "a", "model.")
    )
    expected = {path.name for path in blobs.iterdir()} | {"merges.txt", "chat_template.jinja", "umr.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert not any(path.is_symlink() for path in out.iterdir())
    assert changed_names(blobs, out)
    assert (out / "config.json").read_bytes() == (blobs / "config.json").read_bytes()
    assert resolve(out).spec.positions == "sequential"  # as GME's, now said by umr.json
    assert resolve(out).spec.name == "out"


Break = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
NAME = "language_model.layers.0.self_attn.q_proj.weight"
SQUARE = torch.ones(64, 64)
TRAINED: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"language_model.layers.7.mlp.up_proj.weight": SQUARE}, r"holds language_model\.layers\.7\..* nowhere"),
    ({"q_proj.weight": SQUARE}, r"holds q_proj\.weight nowhere"),
    ({NAME: torch.ones(64, 32)}, r"q_proj\.weight has shape \(64, 64\) in .*, the trained one \(64, 32\)"),
    ({NAME: SQUARE * float("nan")}, r"q_proj\.weight holds values that are not finite in torch\.float32"),
]


@pytest.mark.parametrize(("tensors", "message"), TRAINED)
def test_a_weight_without_a_place_is_named(
    qwen2_vl_folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(resolve(qwen2_vl_folder), tmp_path / "out", tensors=tensors)
    assert list(tmp_path.iterdir()) == []


STORED: list[tuple[Break, str]] = [
    (
        lambda stored: {**stored, f"model.{NAME}": SQUARE.clone()},
        r"holds language_model\.layers\.0.* as model\.l.*, model\.l",
    ),
    (
        lambda stored: {**stored, "model.layers.0.self_attn.q_proj.weight": SQUARE.to(torch.float8_e4m3fn)},
        "stored as F8_E4M3; only weights stored as one of F32, BF16, F16",
    ),
    (
        lambda stored: {**stored, "model.layers.0.self_attn.q_proj.weight": SQUARE.half()},
        r"not finite in torch\.float16",
    ),
]


@pytest.mark.parametrize(("change", "message"), STORED)
def test_a_place_that_cannot_take_the_weight_is_named(
    qwen2_vl_folder: Path, tmp_path: Path, change: Break, message: str
) -> None:
    folder = copied(qwen2_vl_folder, tmp_path / "base")
    save_file(change(every_tensor(folder)), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(resolve(folder), tmp_path / "out", tensors={NAME: SQUARE * 1e6})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_adapter_of_another_base_is_refused(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no linear layer 'encoder\.layers\.0.*trained on 'org/base'"):
        write_checkpoint(
            resolve(qwen2_vl_folder), tmp_path / "out", adapter=write_adapter(tmp_path / "a", "encoder.")
        )
    other = write_adapter(tmp_path / "b", "model.")
    tensors = load_file(other / "adapter_model.safetensors")
    key = f"base_model.model.model.{Q}.lora_A.weight"
    save_file({**tensors, key: torch.zeros(4, 96)}, other / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(64, 96\), the model's have \(64, 64\)"):
        write_checkpoint(resolve(qwen2_vl_folder), tmp_path / "out", adapter=other)
    twice = f"base_model.model.model.language_model.{Q}"
    pair = {f"{twice}.lora_A.weight": torch.ones(4, 64), f"{twice}.lora_B.weight": torch.ones(64, 4)}
    save_file({**tensors, **pair}, other / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="are the same layer of a model"):
        write_checkpoint(resolve(qwen2_vl_folder), tmp_path / "out", adapter=other)
    assert not (tmp_path / "out").exists()


def test_the_folder_must_be_new_or_empty(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    base, out = resolve(qwen2_vl_folder), tmp_path / "out"
    out.mkdir()
    tensors = {NAME: SQUARE}
    assert write_checkpoint(base, out, tensors=tensors) == out
    assert changed_names(qwen2_vl_folder, out)
    (tmp_path / "file").touch()
    for taken in (out, tmp_path / "file"):
        with pytest.raises(InputError, match="is not empty; give a new folder"):
            write_checkpoint(base, taken, tensors=tensors)
    for wrong in ({}, {"tensors": {}}, {"tensors": tensors, "adapter": tmp_path}):
        with pytest.raises(InputError, match="give an adapter or trained tensors, one of both"):
            write_checkpoint(base, tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_nothing(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    size = (qwen2_vl_folder / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(StorageError, match=r"can't write .*out: .*; nothing was left there"):
            write_checkpoint(resolve(qwen2_vl_folder), tmp_path / "out", tensors={NAME: SQUARE})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(
    qwen2_vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        assert path.parent.name.startswith(".out.")  # beside the folder, hidden
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(resolve(qwen2_vl_folder), tmp_path / "out", tensors={NAME: SQUARE})
    assert list(tmp_path.iterdir()) == []


def test_a_torn_file_is_named(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    folder = copied(qwen2_vl_folder, tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        write_checkpoint(resolve(folder), tmp_path / "out", tensors={NAME: SQUARE})


def test_sentence_transformers_opens_a_merged_checkpoint(
    qwen2_5_vl_folder: Path, tmp_path: Path, photo: Image.Image
) -> None:
    adapter = write_adapter(tmp_path / "adapter", "model.")
    out = write_checkpoint(resolve(qwen2_5_vl_folder), tmp_path / "out", adapter=adapter)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    add_to(out, dim=48)
    ours = vectors(Embedder(out, dtype="float32", dim=48), photo)
    items = ["a quick fox", photo, {"text": "dog", "image": photo}]
    float32 = {"dtype": "float32"}
    theirs = SentenceTransformer(str(out), trust_remote_code=True, model_kwargs=float32)
    np.testing.assert_allclose(theirs.encode(items), ours, atol=1e-6)
    np.testing.assert_allclose(load(out, model_kwargs=float32).encode_document(items), ours, atol=1e-6)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before

    written = write(Embedder(out, dim=48), tmp_path / "st")  # sentence-transformers' own hand
    for name in ("modules.json", "umr_sentence_transformers.json"):
        assert json.loads((out / name).read_text()) == json.loads((written / name).read_text())
    config = json.loads((written / "config_sentence_transformers.json").read_text())
    del config["__version__"]
    assert json.loads((out / "config_sentence_transformers.json").read_text()) == config


def test_the_files_of_sentence_transformers_go_into_a_checkpoint_only(
    tmp_path: Path, qwen2_vl_folder: Path
) -> None:
    with pytest.raises(InputError, match=r"has no umr\.json"):
        add_to(tmp_path, dim=4)
    out = write_checkpoint(resolve(qwen2_vl_folder), tmp_path / "out", tensors={NAME: SQUARE})
    with pytest.raises(InputError, match="dim must be a whole number of at least 1, got 0"):
        add_to(out, dim=0)
    assert not (out / "modules.json").exists()


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = main([str(word) for word in words] + ["--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_the_verb_takes_the_base_that_the_adapter_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_backbone(resolve("umr-tiny"), CPU, torch.float32).model
    adapt(model, tmp_path / "adapter", ["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "umr-tiny"}))
    monkeypatch.chdir(tmp_path)
    code, answer, err = run_json(capsys, "merge", "adapter", "--out", "out")
    layers = sum(name.endswith("q_proj.weight") for name in every_tensor(resolve("umr-tiny").folder))
    assert (code, answer) == (
        0,
        {
            "out": str(tmp_path / "out"),
            "model": "umr-tiny",
            "adapter": str(tmp_path / "adapter"),
            "changed": layers,
        },
    )
    assert "demonstration model" in err
    merged = Embedder(tmp_path / "out")
    assert merged.is_demo
    apart = Embedder("umr-tiny", adapter=tmp_path / "adapter").encode_queries(["a red apple"])
    # Stored in bfloat16, as the base is: one rounding more than when it is merged on loading.
    assert (merged.encode_queries(["a red apple"]) @ apart.T).item() > 0.9999
    assert (Embedder("umr-tiny").encode_queries(["a red apple"]) @ apart.T).item() < 0.999

    assert main(["merge", "adapter", "--out", "again"]) == 0
    said = capsys.readouterr().out
    assert said == f"{layers} weights of umr-tiny changed; the whole checkpoint is in {tmp_path / 'again'}.\n"


def test_the_verb_makes_an_embedder_or_a_reranker_of_an_instruct_checkpoint(
    qwen2_5_vl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "a", "model.")
    words = ("merge", adapter, "--model", qwen2_5_vl_folder, "--out")
    code, answer, _ = run_json(capsys, *words, tmp_path / "embedder")
    assert (code, answer["model"], answer["changed"]) == (0, str(qwen2_5_vl_folder), 3)
    assert resolve(tmp_path / "embedder").spec.role == "embedder"
    assert run_json(capsys, *words, tmp_path / "reranker", "--role", "reranker")[0] == 0
    merged = Reranker(tmp_path / "reranker", dtype="float32").score("fox", ["a dog", "a river"])
    apart = Reranker(qwen2_5_vl_folder, dtype="float32", adapter=adapter).score("fox", ["a dog", "a river"])
    np.testing.assert_allclose(merged, apart, atol=1e-5)

    other = ("merge", adapter, "--model", tmp_path / "reranker", "--out", tmp_path / "again")
    assert run_json(capsys, *other)[0] == 0  # what is only a reranker stays one
    assert resolve(tmp_path / "again", role="reranker").spec.role == "reranker"


def test_the_verb_says_what_is_missing(
    qwen2_vl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(*words: object) -> tuple[str, str]:
        code, answer, _ = run_json(capsys, "merge", *words, "--out", tmp_path / "out")
        assert code == 1
        assert not (tmp_path / "out").exists()
        return answer["error"]["code"], answer["error"]["message"]

    code, message = failed(tmp_path / "none")
    assert code == "model_not_found"
    assert "no adapter" in message
    code, message = failed(write_adapter(tmp_path / "a", "model."))  # of org/base
    assert code == "model_not_found"
    assert "adapter_config.json names was not found; give it with --model" in message
    assert "no model 'org/base'" in message
    code, message = failed(tmp_path / "a", "--model", "no-such-base")
    assert code == "model_not_found"
    assert "no model 'no-such-base'" in message
    assert "--model" not in message
    code, message = failed(write_adapter(tmp_path / "b", "model.", base_model_name_or_path=None))
    assert code == "input"
    assert "does not name the adapter's base; give it with --model" in message
    code, message = failed(write_adapter(tmp_path / "c", "x."), "--model", qwen2_vl_folder)
    assert code == "checkpoint"
    code, message = failed(tmp_path / "a", "--model", tmp_path / "b")
    assert code == "checkpoint"
    assert "holds a LoRA adapter, not a whole model" in message


@pytest.mark.parametrize(
    "words", [["merge", "a"], ["merge", "--out", "o"], ["merge", "a", "--out", "o", "--role", "x"]]
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert "usage: umr merge" in capsys.readouterr().err


@pytest.mark.parametrize("base", EVERY)
def test_canonical_names_are_those_of_the_loaded_model(base: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    stored = {canonical(name) for name in every_tensor(folder)}
    loaded = {
        canonical(name) for name in load_backbone(resolve(folder), CPU, torch.float32).model.state_dict()
    }
    assert loaded <= stored
    assert all(name == "lm_head.weight" or "latent_attention_model" in name for name in stored - loaded)
