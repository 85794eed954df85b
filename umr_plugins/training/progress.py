"""Lines for people while training runs: ours, and none of transformers'."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umr_plugins.training.facts import duration


class Progress(TrainerCallback):
    """Tells loss, rates and the time that is left at every line of the log.

    Args:
        tell: called with a line.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._first: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Notes where it starts from."""
        self._first = (state.global_step, time.perf_counter())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """One line."""
        logs: dict[str, float] = others.get("logs") or {}
        if "samples_per_second" not in logs or self._first is None:
            return
        step, began = self._first
        each = (time.perf_counter() - began) / max(1, state.global_step - step)
        loss = f"{logs['loss']:.4f}" if "loss" in logs else "all skipped"
        skipped = f"  skipped {int(logs['skipped'])}" if logs.get("skipped") else ""
        self._tell(
            f"step {state.global_step}/{state.max_steps}  loss {loss}  rate {logs['learning_rate']:.2e}  "
            f"{logs['samples_per_second']:.1f} samples/s  {logs['tokens_per_second']:,.0f} tokens/s  "
            f"{duration(each * (state.max_steps - state.global_step))} left{skipped}"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own notes and bars on stderr; errors still come through."""
    chatter: Any = importlib.import_module("transformers.utils.logging")
    before, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(before)
        if bars:
            chatter.enable_progress_bar()
