"""How a model name becomes files and a spec."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLModel

from umr_plugins.backbones.registry import resolve, write_sidecar
from umr_plugins.backbones.spec import KNOWN, ModelSpec
from umr_plugins.backbones.weights import load_weights
from umr_plugins.errors import CheckpointError, ModelNotFoundError

GME = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"


@pytest.fixture
def hub(qwen2_vl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that delivers the small checkpoint and records what was asked."""
    calls: list[dict[str, Any]] = []

    def deliver(repo_id: str, **asked: Any) -> str:
        calls.append({"repo_id": repo_id, **asked})
        return str(qwen2_vl_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", deliver)
    return calls


def test_a_hub_id_is_downloaded_at_its_revision_without_code_or_pickles(hub: list[dict[str, Any]]) -> None:
    found = resolve(GME, revision="abc123")
    assert hub[0]["repo_id"] == GME
    assert hub[0]["revision"] == "abc123"
    assert "*.safetensors" in hub[0]["allow_patterns"]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in hub[0]["allow_patterns"])
    assert found.origin == "hub"
    assert found.spec == KNOWN[GME]
    assert found.spec.positions == "sequential"  # whatever the files alone would say


def test_gme_is_as_the_released_wrapper_has_it() -> None:
    for spec in (spec for name, spec in KNOWN.items() if "gme" in name):
        assert (spec.min_image_tokens, spec.max_image_tokens, spec.max_length) == (256, 1280, 1800)
        assert spec.default_instruction == "You are a helpful assistant."
        assert spec.resampler == "torch"


def test_an_unknown_hub_id_is_read_by_its_model_type(hub: list[dict[str, Any]]) -> None:
    assert resolve("someone/qwen2-vl-tuned").spec.positions == "mrope"


def test_a_folder_wins_over_the_hub(gme_folder: Path, hub: list[dict[str, Any]]) -> None:
    found = resolve(gme_folder)
    assert (found.origin, hub) == ("folder", [])
    assert found.spec.positions == "sequential"  # its config names GME's remote code


def test_the_hub_s_failure_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **asked: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match="at revision 'v2' and the local cache has no copy"):
        resolve(GME, revision="v2")


def test_a_sidecar_written_is_read_back(gme_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gme_folder, tmp_path / "own"))
    spec = ModelSpec(name="own", positions="sequential", max_length=77, shortest_trained_dim=16)
    write_sidecar(folder, spec)
    assert resolve(folder).spec == spec


@pytest.mark.parametrize("template", ["no slots", "{body}{body}", "{instruction}{instruction}{body}"])
def test_a_template_needs_its_slots(gme_folder: Path, tmp_path: Path, template: str) -> None:
    folder = Path(shutil.copytree(gme_folder, tmp_path / "own"))
    (folder / "umr.json").write_text(json.dumps({"template": template}))
    with pytest.raises(CheckpointError, match="template needs"):
        resolve(folder)


def test_damaged_json_is_named(gme_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gme_folder, tmp_path / "own"))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json can't be read as JSON"):
        resolve(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_files_in_any_type(
    gme_folder: Path, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    """Loading converts piece by piece and gives pages back; every weight must survive it."""
    tensors = {name: each.to(stored) for name, each in load_file(gme_folder / "model.safetensors").items()}
    for path in gme_folder.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_weights(Qwen2VLModel, tmp_path, wanted).state_dict()
    assert {each.dtype for each in loaded.values()} == {wanted}
    plain = {name.removeprefix("model."): each.to(wanted) for name, each in tensors.items()}
    for name, each in loaded.items():
        assert torch.equal(each, plain.get(name, plain.get(name.removeprefix("language_model.")))), name
