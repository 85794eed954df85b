"""What a line of the training log counts."""

from __future__ import annotations

import math
import time

import torch

from umr_plugins.training.collate import Batch
from umr_plugins.training.distributed import rank, world_size


class Tally:
    """Counts between two lines of the log."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._counts = dict.fromkeys(("samples", "tokens", "masked", "truncated", "recomputed"), 0)
        self.losses: list[float] = []

    def add(self, batch: Batch, tokens: int, truncated: int, recomputed: int) -> None:
        """One step of this process."""
        found = (len(batch.queries), tokens, batch.masked if rank() == 0 else 0, truncated, recomputed)
        for name, count in zip(self._counts, found, strict=True):
            self._counts[name] += count

    def taken(self, device: torch.device) -> dict[str, float]:
        """Mean loss of the steps that were not skipped, rates over all processes, counts; starts anew."""
        numbers = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        if world_size() > 1:
            numbers = numbers.to(device)
            torch.distributed.all_reduce(numbers)
        samples, tokens, *others = numbers.tolist()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        names = list(self._counts)[2:]
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan  # alike in every process
        self._reset()
        return {
            "loss": mean,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            **{name: int(count) for name, count in zip(names, others, strict=True)},
        }
