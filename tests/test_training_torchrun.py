"""Two processes give the loss and the gradient of one with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_of, write_rows

from umr_plugins.training import checkpoints

SCRIPT = Path(__file__).with_name("training_torchrun.py")


def launched(recipe: dict[str, Any], out: Path, processes: int) -> list[float]:
    """Losses by step."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(recipe))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(file), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[float] = json.loads(out.with_name(f"{out.name}-losses.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": {"pictures": 5, "text": 5, "same_source": False}},
        {
            "batch": {"pictures": 5, "text": 5, "same_source": False},
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
    recipe = recipe_of(data, **{"lora": {"dropout": 0}, "steps": 4, "save_every": 2, **changes})
    one, two = (launched(recipe, tmp_path / name, processes) for name, processes in (("one", 1), ("two", 2)))
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
    assert checkpoints.newest_valid(tmp_path / "two/checkpoints")[0] is not None
    assert (tmp_path / "two/checkpoints/checkpoint-4/rng_state_1.pth").is_file()
    assert (tmp_path / "two/config.json").is_file()
