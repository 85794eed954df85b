"""Ending a run between two steps, in all processes alike."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umr_plugins.training.distributed import largest


class StopWhenAsked(TrainerCallback):
    """Saves and stops after the step in which a signal arrived, all processes in the same one."""

    def __init__(self) -> None:
        self.signal = 0
        """What arrived here."""
        self.agreed = 0
        """What arrived anywhere, once all processes know."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """A checkpoint holds how often was logged and saved; what is asked for now counts."""
        told: Any = state  # transformers gives this method no types
        told.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Asks all processes."""
        self.agreed = largest(self.signal, args.device)
        if self.agreed:
            control.should_save = control.should_training_stop = control.should_log = True
        return control
