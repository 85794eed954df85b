"""A run for torchrun that keeps the gradient of its first step: `training_torchrun.py RECIPE.json OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from umr_plugins.training.distributed import rank
from umr_plugins.training.recipe import make_recipe
from umr_plugins.training.run import train
from umr_plugins.training.trainer import UMRTrainer


def main(recipe: Path, out: Path) -> None:
    """Train, and save the first step's gradient before it is clipped."""
    torch.set_num_threads(1)
    clip = UMRTrainer._clip_grad_norm

    def kept(self: UMRTrainer, model: Any) -> Any:
        if self.state.global_step == 0:
            found = {
                name: part.grad for name, part in self.encoder.named_parameters() if part.grad is not None
            }
            torch.save(found, out.with_name(f"{out.name}-gradient-{rank()}.pt"))
        return clip(self, model)

    UMRTrainer._clip_grad_norm = kept  # type: ignore[method-assign]
    made = train(make_recipe(json.loads(recipe.read_text()), recipe.parent), out)
    if rank() == 0:
        losses = [line["loss"] for line in made.history]
        out.with_name(f"{out.name}-losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
