"""`train`: against a loop written by hand, its results, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import write_qwen_vl
from training_runs import recipe_of, start, wait_for, write_rows

from umr_plugins import Embedder
from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.registry import resolve
from umr_plugins.data.readers import read
from umr_plugins.encoding.trainable import TrainableEncoder
from umr_plugins.errors import DataError, InputError, StorageError, TrainingError
from umr_plugins.training import checkpoints, losses
from umr_plugins.training.collate import Batches
from umr_plugins.training.lora import add_lora
from umr_plugins.training.reading import make_recipe
from umr_plugins.training.run import Trained, train
from umr_plugins.training.sampler import Mixture
from umr_plugins.training.trainer import UMRTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("base"), gme=True)


def trained(data: Path, out: Path, **changes: Any) -> Trained:
    recipe = recipe_of(data, **{"steps": 4, **changes})
    return train(make_recipe(recipe, out.parent), out)


def test_weights_are_those_of_a_loop_written_by_hand(data: Path, base: Path, tmp_path: Path) -> None:
    changes = {
        "model": str(base),
        "steps": 6,
        "batch": {"pictures": 5, "text": 4, "same_source": False},
        "negatives": None,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup": 0.4, "max_grad_norm": 0.5},
        "memory": {"chunk_tokens": 600, "loss_rows": 2},
    }
    made = trained(data, tmp_path / "out", **changes)

    checkpoint = resolve(base)
    spec = dataclasses.replace(checkpoint.spec, min_image_tokens=4, max_image_tokens=16)
    checkpoint = dataclasses.replace(checkpoint, spec=spec)
    backbone = load_backbone(checkpoint, torch.device("cpu"), torch.float32)
    add_lora(backbone, rank=4, alpha=8, dropout=0, seed=0)
    encoder = TrainableEncoder(backbone, pack=False).train()
    sources = read("rows", data)
    mixture = Mixture(sources, sizes={"pictures": 5, "text": 4}, steps=6, same_source=False, seed=0)
    batches = Batches(mixture, max_text_length=512)
    weights = [part for part in encoder.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    seen = []
    for step in range(6):
        batch = batches[step]
        rows = encoder(list(encoder.prepared(batch.entries)))
        loss = losses.info_nce(rows[batch.queries], rows[batch.documents], batch.relations)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        warm = math.ceil(0.4 * 6)
        rate = step / warm if step < warm else (6 - step) / (6 - warm)
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert [line["loss"] for line in made.history] == pytest.approx(seen, rel=1e-4)
    found = checkpoints.all_in(tmp_path / "out/checkpoints")[0] / "trained.safetensors"

    state = load_file(found)
    expected = {name: part for name, part in encoder.named_parameters() if part.requires_grad}
    assert set(state) == set(expected)
    for name, part in expected.items():
        assert torch.allclose(state[name], part, rtol=1e-3, atol=2e-5), name
    assert any("lora_B" in name and part.abs().max() > 1e-4 for name, part in state.items())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_result_opens_everywhere_with_the_same_vectors(
    data: Path, base: Path, tmp_path: Path, tuning: str
) -> None:
    out = tmp_path / "out"
    made = trained(data, out, model=str(base), tuning=tuning, full_vision=tuning == "full")
    items: list[Any] = ["red cat", {"text": "dog", "image": str(data.parent / "pictures/2.png")}]
    vectors = Embedder(out, dtype="float32").encode_documents(items)
    assert made.out == out
    assert np.abs(vectors - Embedder(base, dtype="float32").encode_documents(items)).max() > 1e-3
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(out)
    assert plain.config.model_type == "qwen2_vl"
    for name, part in plain.named_parameters():
        assert torch.isfinite(part).all(), name
    sentence = pytest.importorskip("umr_plugins.sentence_transformers")
    theirs = sentence.load(out, device="cpu", model_kwargs={"dtype": "float32"}).encode(items)
    assert np.abs(theirs - vectors).max() < 1e-5
    if tuning == "lora":
        with_adapter = Embedder(
            base, adapter=out / "adapter", dtype="float32", min_image_tokens=4, max_image_tokens=16
        ).encode_documents(items)
        assert np.abs(with_adapter - vectors).max() < 1e-5
    assert Embedder(out).spec.positions == "sequential"  # what GME's layout says, kept in umr.json
    card = (out / "README.md").read_text()
    assert "train.jsonl" in card
    assert made.report.read_text().count("<svg") >= 3


def test_what_is_trained_is_learned(data: Path, tmp_path: Path) -> None:
    only = {"batch": {"pictures": 8, "text": 8}, "weights": {"classes": {"cross": 1}}}
    made = trained(data, tmp_path / "out", steps=40, **only)
    series = [line["loss"] for line in made.history]
    assert np.mean(series[-5:]) < 0.3 * np.mean(series[:5])


def test_every_option_of_the_loss_can_be_trained_with(data: Path, tmp_path: Path) -> None:
    scored = data.with_name("scored.jsonl")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        for number, document in enumerate([*line["positives"], *line.get("negatives", [])]):
            document["score"] = 0.9 - 0.3 * number
    scored.write_text("\n".join(map(json.dumps, lines)))
    made = trained(
        scored,
        tmp_path / "out",
        loss={
            "learn_temperature": True,
            "query_query": True,
            "document_document": True,
            "same_source_only": True,
            "false_negative_margin": 0.1,
            "matryoshka": {64: 1, 256: 0.5},
            "distillation": 0.5,
        },
        batch={"pictures": 4, "text": 8, "same_source": False},
        weights={"classes": {"single": 1, "cross": 0, "fused": 0}},
        memory={"chunk_tokens": 60, "checkpointing": True},
    )
    assert all(math.isfinite(line["loss"]) for line in made.history)
    state = checkpoints.all_in(tmp_path / "out/checkpoints")[0] / "trained.safetensors"

    assert load_file(state)["log_temperature"] != pytest.approx(math.log(0.03), abs=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, steps = losses.info_nce, []

    def sometimes(*args: Any, **options: Any) -> torch.Tensor:
        steps.append(1)
        loss = whole(*args, **options)
        return loss * (float("nan") if len(steps) == 2 else float("inf") if len(steps) == 4 else 1)

    monkeypatch.setattr(losses, "info_nce", sometimes)
    made = trained(data, tmp_path / "out", steps=6, save_every=1)
    assert made.skipped == 2
    assert [line["skipped"] for line in made.history] == [0, 1, 1, 2, 2, 2]
    assert ["loss" in line for line in made.history] == [True, False, True, False, True, True]
    assert caplog.text.count("is not finite; skipped (train.jsonl:") == 2

    for path in checkpoints.all_in(tmp_path / "out/checkpoints"):
        assert all(bool(part.isfinite().all()) for part in load_file(path / "trained.safetensors").values())
    one, two = (load_file(tmp_path / f"out/checkpoints/checkpoint-{n}/trained.safetensors") for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_gradient_that_is_not_finite_is_skipped_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = UMRTrainer._grad_cache

    def poisoned(self: UMRTrainer, model: Any) -> Any:
        cache = step(self, model)
        if self.state.global_step == 1:
            name, part = next((n, p) for n, p in self.encoder.named_parameters() if "lora_B" in n)
            assert name
            part.grad = torch.full_like(part, float("nan"))
        return cache

    monkeypatch.setattr(UMRTrainer, "_grad_cache", poisoned)
    made = trained(data, tmp_path / "out")
    assert made.skipped == 1


def test_it_stops_when_steps_in_a_row_are_not_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = losses.info_nce, []

    def later(*args: Any, **options: Any) -> torch.Tensor:
        steps.append(1)
        return whole(*args, **options) * (float("nan") if len(steps) > 3 else 1)

    monkeypatch.setattr(losses, "info_nce", later)
    with pytest.raises(TrainingError, match=r"3 steps in a row .* The last checkpoint is .*checkpoint-\d"):
        trained(data, tmp_path / "out", steps=20, max_skipped=3, save_every=1)
    assert checkpoints.newest_valid(tmp_path / "out/checkpoints")[0] is not None
    monkeypatch.undo()
    made = trained(data, tmp_path / "out", steps=20, max_skipped=3, save_every=1)
    assert made.resumed_from is not None


def test_a_picture_that_is_lost_on_the_way_costs_no_step(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    recipe = make_recipe(recipe_of(data, steps=30, save_every=1000), tmp_path)
    pictures = data.parent / "pictures"

    def lose(line: str) -> None:
        if line.startswith("step 3/") and pictures.is_dir():
            pictures.rename(data.parent / "elsewhere")

    with pytest.raises(TrainingError, match=r"step \d+: train\.jsonl:\d+: .*Steps up to \d+ are saved"):
        train(recipe, tmp_path / "out", note=lose)
    (data.parent / "elsewhere").rename(pictures)
    made = train(recipe, tmp_path / "out")
    assert made.resumed_from is not None
    assert made.resumed_from >= 3


def test_a_full_disk_while_saving_costs_the_steps_since_the_last_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(recipe_of(data, steps=8, save_every=2), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(line: str) -> None:
        if line.startswith("step 5/"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))

    try:
        with pytest.raises(StorageError, match=r"checkpoint of step 6 .* The last good one is checkpoint-4"):
            train(recipe, tmp_path / "out", note=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    names = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-4"]
    assert train(recipe, tmp_path / "out").resumed_from == 4


def test_it_is_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lora": {"targets": ["q_prj"]}}, InputError, r"no linear layer .* q_prj; there are .*q_proj"),
        ({"negatives": 2}, DataError, r"16 rows have fewer, such as train\.jsonl:1 \(0\)"),
        (
            {"batch": {"pictures": 9, "text": 4}},
            InputError,
            r"has 8 rows with pictures, fewer than a batch of 9",
        ),
        ({"weights": {"sources": {"d": 1}}}, InputError, r"no source 'd'"),
        ({"trainer": {"fdsp": "full_shard"}}, InputError, r"trainer\.fdsp .* did you mean 'fsdp'"),
        ({"trainer": {"max_steps": 3}}, InputError, r"trainer\.max_steps is set by the recipe"),
    ]
    for number, (changes, kind, words) in enumerate(cases):
        with pytest.raises(kind, match=words):
            trained(data, tmp_path / str(number), **changes)
        assert not list((tmp_path / str(number)).glob("checkpoints/*"))


def test_a_folder_of_another_recipe_or_other_data_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    trained(data, tmp_path / "out")
    with pytest.raises(InputError, match="finished model"):
        trained(data, tmp_path / "out")
    with pytest.raises(InputError, match=r"changed are optimizer\.learning_rate, steps"):
        trained(data, tmp_path / "out", steps=5, optimizer={"learning_rate": 1e-4})
    data.write_text(data.read_text().replace("document", "paper", 1))
    with pytest.raises(InputError, match=r"data .* have changed since it was begun: b"):
        trained(data, tmp_path / "out")


def test_a_run_can_be_killed_while_its_folder_is_new(data: Path, tmp_path: Path) -> None:
    process = start(recipe_of(data, steps=3), tmp_path / "out", tmp_path / "log")
    wait_for(tmp_path / "log", "training", process)
    process.kill()
    process.join()
    made = trained(data, tmp_path / "out", steps=3)
    assert made.resumed_from is None


def test_in_bfloat16_adapters_are_trained_in_float32(data: Path, base: Path, tmp_path: Path) -> None:
    made = trained(data, tmp_path / "out", model=str(base), precision="bfloat16", steps=6)
    state = load_file(checkpoints.all_in(tmp_path / "out/checkpoints")[0] / "trained.safetensors")
    assert {part.dtype for part in state.values()} == {torch.float32}
    whole = trained(data, tmp_path / "exact", model=str(base), steps=6)
    pairs = zip(made.history, whole.history, strict=True)
    assert all(abs(one["loss"] - two["loss"]) < 0.1 * two["loss"] + 0.05 for one, two in pairs)


def test_after_a_lost_picture_is_back_the_bits_are_those_of_a_whole_run(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    options: dict[str, Any] = {"steps": 8, "lora": {"dropout": 0.3}, "save_every": 1000}
    trained(data, tmp_path / "whole", **options)
    recipe = make_recipe(recipe_of(data, **options), tmp_path)
    pictures = data.parent / "pictures"

    def lose(line: str) -> None:
        if line.startswith("step 2/") and pictures.is_dir():
            pictures.rename(data.parent / "elsewhere")

    with pytest.raises(TrainingError, match="Mend or replace the picture"):
        train(recipe, tmp_path / "out", note=lose)
    (data.parent / "elsewhere").rename(pictures)
    train(recipe, tmp_path / "out")
    one, two = (
        load_file(tmp_path / name / "checkpoints/checkpoint-8/trained.safetensors")
        for name in ("whole", "out")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_may_change_on_resuming_has_an_effect_and_counts_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = losses.info_nce, []

    def once(*args: Any, **options: Any) -> torch.Tensor:
        steps.append(1)
        return whole(*args, **options) * (float("nan") if len(steps) == 2 else 1)

    monkeypatch.setattr(losses, "info_nce", once)

    def crash(line: str) -> None:
        if line.startswith("step 5/"):
            raise RuntimeError("power cut")

    first = make_recipe(recipe_of(data, steps=8, save_every=4), tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        train(first, tmp_path / "out", note=crash)
    second = make_recipe(recipe_of(data, steps=8, save_every=1, log_every=2), tmp_path)
    made = train(second, tmp_path / "out")
    assert (made.resumed_from, made.skipped) == (4, 1)
    assert [path.name for path in checkpoints.all_in(tmp_path / "out/checkpoints")] == [
        f"checkpoint-{step}" for step in (8, 7, 6, 5, 4)
    ]
    assert [line["step"] for line in made.history][-2:] == [6, 8]
    seconds = [line["seconds"] for line in made.history]
    assert seconds == sorted(seconds)
    assert "skipped" in (tmp_path / "out/README.md").read_text()


def test_another_base_is_refused_on_resuming(data: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = write_qwen_vl(tmp_path / "base")
    recipe = make_recipe(recipe_of(data, model=str(base), steps=4, save_every=1), tmp_path)

    def crash(line: str) -> None:
        if line.startswith("step 2/"):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(recipe, tmp_path / "out", note=crash)
    write_qwen_vl(base, seed=1)
    with pytest.raises(InputError, match=r"the weights of .* are not those"):
        train(recipe, tmp_path / "out")


def test_keys_that_would_have_no_effect_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="full_vision belongs to tuning: full"):
        trained(data, tmp_path / "out", full_vision=True)
    with pytest.raises(InputError, match="keys of lora have no effect"):
        trained(data, tmp_path / "out", tuning="full", lora={"rank": 4})
    with pytest.raises(InputError, match=r"trainer\.neftune_noise_alpha"):
        trained(data, tmp_path / "out", trainer={"neftune_noise_alpha": 5})
    with pytest.raises(InputError, match=r"loss\.matryoshka: 512 dimensions can't be trained"):
        trained(data, tmp_path / "out", loss={"matryoshka": {512: 1}})


def test_a_learned_temperature_does_not_decay(data: Path, tmp_path: Path) -> None:
    options = {"loss": {"learn_temperature": True}, "optimizer": {"learning_rate": 1e-9, "weight_decay": 9}}
    made = trained(data, tmp_path / "out", **options)
    assert made.history[-1]["temperature"] == pytest.approx(0.03, rel=1e-4)
