"""LoRA adapters: merged weights equal the two-branch forward pass; what can't be merged is refused."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families_llava import Reference as LlavaReference
from test_families_qwen import Reference as QwenReference

from umr_plugins.embedder import Embedder
from umr_plugins.errors import CheckpointError, ModelNotFoundError
from umr_plugins.index.index import Index

Q, V, UP = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.up_proj"
SHAPES = {Q: (64, 64), V: (32, 64), UP: (128, 64)}


def write_adapter(folder: Path, prefix: str, rank: int = 4, **config: Any) -> Path:
    """As peft saves it, for three linear layers of the language model below `prefix`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = torch.Generator().manual_seed(3)
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        key = f"base_model.model.{prefix}{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=made) * 0.2
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=made) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def add_branches(language_model: torch.nn.Module, folder: Path, scale: Callable[[str], float]) -> None:
    """What LoRA means: y = W x + s B (A x), as hooks on an untouched model."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in SHAPES:
        a, b = (
            next(tensor for key, tensor in tensors.items() if f"{name}.lora_{side}" in key) for side in "AB"
        )
        layer = language_model.get_submodule(name)

        def branch(_: Any, inputs: Any, output: Any, a: Any = a, b: Any = b, s: float = scale(name)) -> Any:
            return output + s * (inputs[0] @ a.T) @ b.T

        layer.register_forward_hook(branch)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model."])
def test_an_adapter_of_any_layout_equals_its_branches(
    qwen2_5_vl_folder: Path, tmp_path: Path, photo: Image.Image, prefix: str
) -> None:
    adapter = write_adapter(tmp_path / "a", prefix)
    reference = QwenReference(qwen2_5_vl_folder, "qwen2_5_vl")
    add_branches(reference.model.model.language_model, adapter, lambda _: 6 / 4)
    embedder = Embedder(qwen2_5_vl_folder, dtype="float32", adapter=adapter)
    exact = photo.resize((672, 448))
    ours = embedder.encode_documents(["fox", {"text": "dog", "image": exact}])
    theirs = np.stack([reference.encode("fox"), reference.encode("dog", (exact,))])
    assert np.abs(ours - theirs).max() < 1e-5
    plain = Embedder(qwen2_5_vl_folder, dtype="float32")
    assert np.abs(plain.encode_documents(["fox"])[0] - ours[0]).max() > 1e-3
    assert plain.fingerprint != embedder.fingerprint


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, lambda name: 6 / math.sqrt(4)),
        ({"alpha_pattern": {"v_proj": 20}}, lambda name: (20 if "v_proj" in name else 6) / 4),
        ({"alpha_pattern": {r"layers\.1\.mlp\.up_proj": 1}}, lambda name: (1 if name == UP else 6) / 4),
    ],
)  # fmt: skip
def test_scales(
    qwen3_vl_folder: Path, tmp_path: Path, config: dict[str, Any], scale: Callable[[str], float]
) -> None:
    adapter = write_adapter(tmp_path / "a", "model.language_model.", **config)
    reference = QwenReference(qwen3_vl_folder, "qwen3_vl")
    add_branches(reference.model.model.language_model, adapter, scale)
    ours = Embedder(qwen3_vl_folder, dtype="float32", adapter=adapter).encode_documents(["fox"])[0]
    assert np.abs(ours - reference.encode("fox")).max() < 1e-5


def test_on_mm_embed(mm_embed_folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", "language_model.")
    reference = LlavaReference(mm_embed_folder, mm_embed=True)
    add_branches(reference.model.language_model, adapter, lambda _: 6 / 4)
    ours = Embedder(mm_embed_folder, dtype="float32", adapter=adapter).encode_documents(["fox"])[0]
    assert np.abs(ours - reference.encode("fox")).max() < 1e-5


def test_an_index_and_a_pickle_keep_the_adapter(qwen2_5_vl_folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", "model.")
    embedder = Embedder(qwen2_5_vl_folder, dtype="float32", adapter=adapter)
    again = pickle.loads(pickle.dumps(embedder))
    assert again.fingerprint == embedder.fingerprint
    with Index(tmp_path / "db", embedder) as index:
        index.add(["fox"])
    with Index(tmp_path / "db") as index:  # by what it recorded
        assert index.search("fox")[0].score > 0.999  # bfloat16 where the machine has it
        assert index.encoder.fingerprint == embedder.fingerprint


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"use_dora": True}, "use_dora=True can't be merged"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save=.'embed_tokens'. can't be merged"),
    ({"bias": "all"}, "bias='all' can't be merged"),
    ({"lora_alpha": None}, "lora_alpha must be a number above 0, got None"),
    ({"lora_alpha": 0}, "lora_alpha must be a number above 0, got 0"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_cannot_be_merged_is_refused(
    qwen2_5_vl_folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Embedder(qwen2_5_vl_folder, adapter=write_adapter(tmp_path / "a", "model.", **config))


def test_an_adapter_for_another_base_is_named(qwen2_5_vl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no linear layer 'encoder\.layers\.0.*trained on 'org/base'"):
        Embedder(qwen2_5_vl_folder, adapter=write_adapter(tmp_path / "a", "encoder."))
    other = write_adapter(tmp_path / "b", "model.")
    tensors = load_file(other / "adapter_model.safetensors")
    key = f"base_model.model.model.{Q}.lora_A.weight"
    save_file({**tensors, key: torch.zeros(4, 96)}, other / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(64, 96\), the model's have \(64, 64\)"):
        Embedder(qwen2_5_vl_folder, adapter=other)


def test_files_that_are_no_adapter(qwen2_5_vl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no adapter .\./nowhere."):
        Embedder(qwen2_5_vl_folder, adapter="./nowhere")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        Embedder(qwen2_5_vl_folder, adapter=tmp_path)
    pickled = write_adapter(tmp_path / "a", "model.")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        Embedder(qwen2_5_vl_folder, adapter=pickled)
    (pickled / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Embedder(qwen2_5_vl_folder, adapter=pickled)
    with pytest.raises(CheckpointError, match=r"pass its base as the model.*Embedder\('org/base', adapter="):
        Embedder(write_adapter(tmp_path / "b", "model."))
