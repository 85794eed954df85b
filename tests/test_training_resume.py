"""Training that is killed, damaged or asked to stop goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from training_runs import (
    differences,
    kill,
    recipe_of,
    rows_of,
    start,
    state_of,
    wait_for,
    write_rows,
)

from umr_plugins.training import checkpoints

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and `whole`: a run that nobody disturbed."""
    made = tmp_path_factory.mktemp("resume")
    data = write_rows(made / "data")
    process = start(recipe_of(data), made / "whole", made / "whole.log")
    process.join()
    assert process.exitcode == 0, (made / "whole.log").read_text()
    return made


def final(out: Path) -> dict[str, object]:
    return state_of(out / f"checkpoints/checkpoint-{STEPS}")


def test_two_runs_are_alike_to_the_bit(folder: Path) -> None:
    process = start(recipe_of(folder / "data/train.jsonl"), folder / "again", folder / "again.log")
    process.join()
    assert differences(final(folder / "again"), final(folder / "whole")) == []
    other = start(recipe_of(folder / "data/train.jsonl", seed=1), folder / "other", folder / "other.log")
    other.join()
    assert len(differences(final(folder / "other"), final(folder / "whole"))) > 10


@pytest.mark.slow
def test_killed_at_ten_random_steps_it_ends_with_the_same_bits(folder: Path) -> None:
    rng = random.Random(7)
    out, logs = folder / "killed", [folder / f"killed-{number}.log" for number in range(11)]
    for log, step in zip(logs, sorted(rng.sample(range(3, STEPS - 6), 10)), strict=False):
        process = start(recipe_of(folder / "data/train.jsonl"), out, log)
        wait_for(log, f"step {step}/", process)
        time.sleep(rng.uniform(0, 0.1))  # anywhere in the next step or in writing a checkpoint
        assert process.is_alive()
        kill(process)
    process = start(recipe_of(folder / "data/train.jsonl"), out, logs[-1])
    process.join()
    assert process.exitcode == 0
    went_on = ["going on from checkpoint-" in log.read_text() for log in logs]
    assert went_on == [False, *[True] * 10]
    assert differences(final(out), final(folder / "whole")) == []
    seen: dict[int, set[str]] = {}
    for log in logs:
        for step, rows in rows_of(log).items():
            seen.setdefault(step, set()).update(rows)
    assert seen == rows_of(folder / "whole.log")
    merged, expected = ((each / "model.safetensors").read_bytes() for each in (out, folder / "whole"))
    assert merged == expected


def test_a_flipped_bit_in_the_newest_checkpoint_is_found_and_the_one_before_is_used(folder: Path) -> None:
    out, log = folder / "flipped", folder / "flipped.log"
    process = start(recipe_of(folder / "data/train.jsonl"), out, log)
    wait_for(log, "step 11/", process)
    kill(process)
    newest, before, *_ = checkpoints.all_in(out / "checkpoints")
    raw = bytearray((newest / "optimizer.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(raw)
    process = start(recipe_of(folder / "data/train.jsonl"), out, log)
    process.join()
    assert process.exitcode == 0
    said = log.read_text()
    assert f"not used: {newest / 'optimizer.pt'} is not as it was written" in said
    assert f"going on from {before.name}" in said
    assert differences(final(out), final(folder / "whole")) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_step_and_saves(folder: Path, number: signal.Signals, code: int) -> None:
    out, log = folder / number.name, folder / f"{number.name}.log"
    recipe = recipe_of(folder / "data/train.jsonl", save_every=1000)
    process = start(recipe, out, log)
    wait_for(log, "step 5/", process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    (saved,) = checkpoints.all_in(out / "checkpoints")
    assert checkpoints.check(saved)["step"] in (5, 6, 7)
    assert not (out / "config.json").exists()
    process = start(recipe, out, log)
    process.join()
    assert process.exitcode == 0
    assert differences(final(out), final(folder / "whole")) == []


def test_a_checkpoint_opens_as_an_adapter(folder: Path) -> None:
    from umr_plugins import Embedder

    last = folder / f"whole/checkpoints/checkpoint-{STEPS}"
    texts = ["red cat", "slow river"]
    with_adapter = Embedder("umr-tiny", adapter=last, dtype="float32").encode_documents(texts)
    whole = Embedder(folder / "whole", dtype="float32").encode_documents(texts)
    plain = Embedder("umr-tiny", dtype="float32").encode_documents(texts)
    assert abs(with_adapter - whole).max() < 0.02  # the whole model is stored in bfloat16, as its base is
    assert abs(with_adapter - plain).max() > 0.05


def test_a_model_lost_while_it_was_written_is_written_again(folder: Path) -> None:
    out = folder / "finish"
    shutil.copytree(folder / "whole", out)
    (out / "config.json").unlink()  # comes last: without it the model is not finished
    process = start(recipe_of(folder / "data/train.jsonl"), out, folder / "finish.log")
    process.join()
    assert process.exitcode == 0
    assert (out / "config.json").is_file()
    assert (out / "model.safetensors").read_bytes() == (folder / "whole/model.safetensors").read_bytes()
