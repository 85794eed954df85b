"""A run for torchrun that keeps the gradient of its first step: RECIPE.json OUT [TROUBLE].

TROUBLE comes to one process only: `lost` (a picture, in process 1), `full` (the disk, in process 0, late) or
`signal` (SIGTERM, to process 1).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from umr_plugins.errors import ItemError, UMRError
from umr_plugins.training import trainer
from umr_plugins.training.distributed import rank
from umr_plugins.training.reading import make_recipe
from umr_plugins.training.run import Stopped, train
from umr_plugins.training.trainer import UMRTrainer


def keep_gradients(out: Path) -> None:
    """Of the first step, before they are clipped."""
    clip = UMRTrainer._clip_grad_norm

    def kept(self: UMRTrainer, model: Any) -> Any:
        if self.state.global_step == 0:
            parts = self.encoder.named_parameters()
            found = {name: part.grad for name, part in parts if part.grad is not None}
            torch.save(found, out.with_name(f"{out.name}-gradient-{rank()}.pt"))
        return clip(self, model)

    UMRTrainer._clip_grad_norm = kept  # type: ignore[method-assign]


def make_trouble(kind: str) -> None:
    """At step 3, or the checkpoint after it."""
    step, write = UMRTrainer.training_step, trainer.save_file

    def troubled(self: UMRTrainer, model: Any, batch: Any, count: Any = None) -> torch.Tensor:
        if batch.step == 2 and rank() == 1:
            if kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif kind == "lost":

                def lost(entries: Any) -> Any:
                    raise ItemError("unreadable", "the picture is gone", name=entries[0].where)

                self.encoder.prepared = lost  # type: ignore[method-assign]
        return step(self, model, batch, count)

    def full(tensors: Any, path: Path) -> None:
        if path.parent.name == "checkpoint-4":
            time.sleep(1)
            raise OSError(28, "No space left on device")
        write(tensors, path)

    UMRTrainer.training_step = troubled  # type: ignore[method-assign]
    if kind == "full":
        trainer.save_file = full  # type: ignore[assignment]


def main(recipe: Path, out: Path, trouble: str = "") -> None:
    """Train, and write the losses or what stopped it."""
    torch.set_num_threads(1)
    keep_gradients(out)
    if trouble:
        make_trouble(trouble)
    said = out.with_name(f"{out.name}-{rank_of()}.json")
    try:
        made = train(make_recipe(json.loads(recipe.read_text()), recipe.parent), out)
    except (UMRError, Stopped) as error:
        said.write_text(json.dumps(f"{type(error).__name__}: {error}"))
        return
    said.write_text(json.dumps([line["loss"] for line in made.history]))


def rank_of() -> int:
    """Also when there is no process group any more."""
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
