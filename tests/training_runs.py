"""Small training runs for tests: data on disk, runs in processes that can be killed, and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

WORDS = (
    "red blue green cat dog house tree car fast slow big small bird fish river moon sun star book key".split()
)

# Importing torch, transformers and peft takes seconds; forked from a process that has, a run starts at once.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["training_preload"])


def write_rows(folder: Path, count: int = 24) -> Path:
    """Texts, pictures and both; every third row has hard negatives."""
    (folder / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        width, height = rng.integers(30, 120, 2)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
        words = " ".join(rng.choice(WORDS, 3))
        row: dict[str, Any] = {
            "id": f"q{number}",
            "query": {"text": words},
            "source": ("a", "b", "c")[number % 3],
        }
        if number % 3 == 0:
            row["positives"] = [{"image": f"pictures/{number}.png"}]
        elif number % 3 == 1:
            row["positives"] = [{"id": f"d{number}", "text": f"{words} document"}]
            row["negatives"] = [{"text": f"nothing {number}"}, {"text": f"more {number}"}]
        else:
            row["query"]["image"] = f"pictures/{number}.png"
            row["positives"] = [{"text": f"{words} both"}]
        lines.append(json.dumps(row))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_of(data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that takes seconds, dropout and chunks included."""
    return {
        "model": "umr-tiny",
        "data": [{"path": str(data)}],
        "steps": 24,
        "batch": {"pictures": 4, "text": 4},
        "memory": {"chunk_tokens": 60},
        "optimizer": {"learning_rate": 1e-3},
        "save_every": 2,
        "keep": 100,
        "log_every": 1,
        "precision": "float32",
        "min_image_tokens": 4,
        "max_image_tokens": 16,
        **changes,
    }


def start(recipe: dict[str, Any], out: Path, log: Path) -> BaseProcess:
    """Train in a process of its own; `log` gets its lines and the rows of every step."""
    process = _SERVER.Process(target=_run, args=(recipe, str(out), str(log)))
    process.start()
    return process


def _run(recipe: dict[str, Any], out: str, log: str) -> None:
    from umr_plugins.training.reading import make_recipe
    from umr_plugins.training.run import Stopped, train
    from umr_plugins.training.trainer import UMRTrainer

    torch.set_num_threads(1)
    with Path(log).open("a", encoding="utf-8", buffering=1) as file:
        step = UMRTrainer.training_step

        def told(self: UMRTrainer, model: Any, batch: Any, count: Any = None) -> torch.Tensor:
            file.write(f"rows {batch.step} {' '.join(batch.where)}\n")
            return step(self, model, batch, count)

        UMRTrainer.training_step = told  # type: ignore[method-assign]
        try:
            train(make_recipe(recipe, Path(out).parent), out, note=lambda line: file.write(line + "\n"))
        except Stopped as stopped:
            os._exit(128 + stopped.number)


def wait_for(log: Path, line: str, process: BaseProcess, seconds: float = 120) -> None:
    """Until the log holds a line that begins so, or the process has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.is_alive():
        if log.exists() and any(
            each.startswith(line) for each in log.read_text(encoding="utf-8").splitlines()
        ):
            return
        time.sleep(0.005)


def kill(process: BaseProcess) -> None:
    """SIGKILL, and wait."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that decides how training goes on."""
    state: dict[str, Any] = {
        f"trained {k}": v for k, v in load_file(checkpoint / "trained.safetensors").items()
    }
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for number, entry in optimizer["state"].items():
        state |= {f"optimizer {number} {key}": value for key, value in entry.items()}
    state["scheduler"] = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    with torch.serialization.safe_globals(_NUMPY):
        random = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    state["random"] = random["cpu"]
    return state


_NUMPY: list[Callable[..., Any] | tuple[Callable[..., Any], str] | type] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np._core.multiarray._reconstruct,
]


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of what is not bit-identical."""
    odd = sorted(set(one) ^ set(two))
    for name in sorted(set(one) & set(two)):
        a, b = one[name], two[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        odd += [] if same else [name]
    return odd


def rows_of(log: Path) -> dict[int, set[str]]:
    """Of every step, the rows it was taken with, as often as they were different."""
    found: dict[int, set[str]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("rows "):
            _, step, rows = line.split(" ", 2)
            found.setdefault(int(step), set()).add(rows)
    return found
