from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.registry import resolve
from umr_plugins.errors import InputError, StorageError
from umr_plugins.training.arguments import arguments
from umr_plugins.training.folder import RunFolder
from umr_plugins.training.lora import add_lora, save_adapter
from umr_plugins.training.recipe import Recipe, Source


def recipe(**changes: Any) -> Recipe:
    return Recipe(model="umr-tiny", data=[Source("train.jsonl")], **changes)


def asked(folder: Path, **changes: Any) -> Any:
    return arguments(recipe(**changes), resolve("umr-tiny").spec, 10, folder)


def begun(path: Path, **changes: Any) -> Path | None:
    folder = RunFolder(path, lambda line: None)
    try:
        return folder.begin(recipe(**changes), [])
    finally:
        folder.release()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device='cuda' can't be trained on here, cpu can"):
        asked(tmp_path, device="cuda")


def test_a_schedule_of_transformers_is_taken(tmp_path: Path) -> None:
    assert asked(tmp_path).lr_scheduler_type == "linear"
    assert asked(tmp_path, trainer={"lr_scheduler_type": "cosine"}).lr_scheduler_type == "cosine"


@pytest.mark.parametrize("key", ["dataloader_num_workers", "eval_steps", "save_only_model", "hub_model_id"])
def test_arguments_without_effect_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"trainer.{key} has no use in umr train"):
        asked(tmp_path, trainer={key: 1})


def test_what_transformers_refuses_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cosin is not a valid SchedulerType"):
        asked(tmp_path, trainer={"lr_scheduler_type": "cosin"})


def test_an_empty_list_of_layers_is_refused() -> None:
    backbone = load_backbone(resolve("umr-tiny"), torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match=r"lora\.targets is an empty list; name some of .*q_proj"):
        add_lora(backbone, targets=[])


def test_an_adapter_names_its_base_and_not_where_it_lies(tmp_path: Path) -> None:
    checkpoint = resolve("umr-tiny")
    backbone = load_backbone(checkpoint, torch.device("cpu"), torch.float32)
    add_lora(backbone, targets=["q_proj"])
    save_adapter(backbone.model, tmp_path, replace(checkpoint, given="owner/name", origin="hub"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"


def test_a_run_that_failed_before_its_first_checkpoint_leaves_the_folder_free(tmp_path: Path) -> None:
    assert begun(tmp_path / "out", seed=1) is None
    assert begun(tmp_path / "out", seed=2) is None
    assert json.loads((tmp_path / "out/run.json").read_text())["recipe"]["seed"] == 2
    (tmp_path / "out/checkpoints/checkpoint-1").mkdir()
    with pytest.raises(InputError, match="changed are seed"):
        begun(tmp_path / "out", seed=1)


@pytest.mark.parametrize("text", ["{}", "[]", '{"recipe"', '"text"'])
def test_a_run_json_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json was not written by umr train"):
        begun(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("run.json", text)]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(StorageError, match=r"out can't be used as --out: Not a directory"):
        begun(tmp_path / "out")
