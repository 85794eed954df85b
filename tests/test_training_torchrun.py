"""Two processes give the loss and the gradient of one with the whole batch, and fail together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_of, write_rows

from umr_plugins.training import checkpoints

SCRIPT = Path(__file__).with_name("training_torchrun.py")


def launched(recipe: dict[str, Any], out: Path, processes: int, trouble: str = "") -> list[Any]:
    """What each process wrote: its losses by step, or what stopped it."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(recipe))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(file), str(out), *([trouble] if trouble else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"dropout": 0}},
        {
            "loss": {"learn_temperature": True, "query_query": True},
            "memory": {"chunk_tokens": 60, "loss_rows": 2},
            "tuning": "full",
            "full_vision": True,
        },
    ],
    ids=["lora", "full"],
)
def test_two_processes_do_what_one_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = write_rows(tmp_path / "data")
    batch = {"pictures": 5, "text": 5, "same_source": False}  # shared unevenly
    recipe = recipe_of(data, **{"batch": batch, "steps": 4, **changes})
    (one,) = launched(recipe, tmp_path / "one", 1)
    two, second = launched(recipe, tmp_path / "two", 2)
    assert two == second
    assert two == pytest.approx(one, rel=1e-4)
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    (expected, *found) = (
        torch.load(tmp_path / f"{name}-gradient-{rank}.pt", weights_only=True)
        for name, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    whole = torch.cat([part.flatten() for part in expected.values()]).double()
    assert len(whole) > 40_000
    for gradient in found:
        assert list(gradient) == list(expected)
        other = torch.cat([part.flatten() for part in gradient.values()]).double()
        assert (other - whole).norm() / whole.norm() < 2e-6
    assert (tmp_path / "two/checkpoints/checkpoint-4/rng_state_1.pth").is_file()
    assert (tmp_path / "two/config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words", "left"),
    [
        ("lost", "TrainingError: step 3: .*Steps up to 2 are saved", [2]),
        ("full", "StorageError: the checkpoint of step 4 can't be written", [2]),
        ("signal", r"Stopped: \(15, 3, 6\)", [3, 2]),
    ],
)
def test_trouble_in_one_process_ends_both_and_loses_no_checkpoint(
    tmp_path: Path, trouble: str, words: str, left: list[int]
) -> None:
    data = write_rows(tmp_path / "data")
    said = launched(recipe_of(data, steps=6), tmp_path / "out", 2, trouble)
    for each in said:
        assert isinstance(each, str)
        assert re.match(words, each), each
    found = checkpoints.all_in(tmp_path / "out/checkpoints")
    assert [checkpoints.check(path)["step"] for path in found] == left
