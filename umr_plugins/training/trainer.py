"""transformers' Trainer with GradCache steps, checkpoints that are whole or not there, batches by number."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from umr_plugins.encoding.trainable import TrainableEncoder
from umr_plugins.errors import CheckpointError, StorageError, TrainingError
from umr_plugins.training import checkpoints, losses
from umr_plugins.training.collate import Batch, Batches
from umr_plugins.training.distributed import any_true, barrier, gather, rank, world_size
from umr_plugins.training.gradcache import GradCache
from umr_plugins.training.recipe import Recipe

_log = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
"""In a checkpoint: the trained weights, by their names in `TrainableEncoder`, in their own type."""


class UMRTrainer(Trainer):
    """Trains a `TrainableEncoder` by the batches of a recipe.

    Args:
        encoder: with the weights that are trained marked by `requires_grad`.
        batches: by number; one is one step.
        recipe: loss, budgets and limits.
        args: of transformers.
        facts: JSON values for the manifest of every checkpoint.
        callbacks: of transformers.
    """

    def __init__(
        self,
        encoder: TrainableEncoder,
        batches: Batches,
        recipe: Recipe,
        args: TrainingArguments,
        facts: Mapping[str, Any],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(model=encoder, args=args, train_dataset=batches, callbacks=callbacks)
        self.encoder, self.recipe, self.facts = encoder, recipe, facts
        self.skipped = 0
        """Steps whose loss or gradient was not finite."""
        self._skipped_in_a_row = 0
        self._told_of_scores = False
        self._staging: Path | None = None
        self._tally = _Tally()
        self._cache: GradCache | None = None
        self._folder = Path(str(args.output_dir))

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """As always, with numbers below 1e-38 taken as 0.

        A softmax over similarities leaves many of them among the gradients, and a CPU computes with them a
        hundred times slower.
        """
        before = bool(torch.tensor(1e-40) * 1 == 0)
        torch.set_flush_denormal(True)
        try:
            return super().train(*args, **options)
        finally:
            torch.set_flush_denormal(before)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Batches one after another; each process takes its part of every one itself."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=_only)  # type: ignore[arg-type]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """One batch a step: a loss over pairs has no count of tokens to be scaled by."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the formula of transformers knows neither pictures nor two passes."""
        return 0

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One GradCache step. Where loss or gradient is not finite, no gradient is left."""
        batch: Batch = inputs
        model.train()
        step = self._grad_cache(model).step(
            batch.entries, lambda *given: self._losses(batch, *given), self._shared()
        )
        bad = not math.isfinite(step.loss.item()) or not _finite(self.encoder)
        self._tally.add(batch, step.tokens, step.truncated, step.recomputed)
        if any_true(bad, self.args.device):
            self._skip(model, batch, step.loss.item())
            return torch.full((), float("nan"), device=self.args.device)  # left out of the logged mean
        self._skipped_in_a_row = 0
        self._tally.losses.append(step.loss.item())
        return step.loss.detach().to(self.args.device)

    def _grad_cache(self, model: torch.nn.Module) -> GradCache:
        if self._cache is None:
            memory = self.recipe.memory
            self._cache = GradCache(
                self.encoder,
                memory.chunk_tokens,
                memory.chunk_entries,
                memory.feature_bytes,
                model,
                lambda: self.accelerator.no_sync(model),
                self.accelerator.backward,
                even=self.is_fsdp_enabled or self.is_deepspeed_enabled,
            )
        return self._cache

    def _shared(self) -> list[torch.nn.Parameter]:
        learned = self.encoder.log_temperature
        return [] if learned is None else [learned]

    def _losses(
        self, batch: Batch, rows: torch.Tensor, log_temperature: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """The loss of the whole batch, in slices of queries that add up to it; the same in every process."""
        said = self.recipe.loss
        relations = batch.relations.to(rows.device)
        count = len(relations.positive)
        distils = said.distillation > 0 and bool(losses.judged(relations).any())
        if said.distillation and not distils and not self._told_of_scores:
            self._told_of_scores = True
            _log.warning(
                "step %d: loss.distillation has nothing to learn from in this batch: no query has two "
                "documents with a score. Batches without scores are trained by the contrastive loss alone",
                batch.step + 1,
            )
        for start in range(0, count, self.recipe.memory.loss_rows):
            part = slice(start, min(start + self.recipe.memory.loss_rows, count))
            # Anew for each slice: backward frees what it was computed by.
            temperature = said.temperature if log_temperature is None else log_temperature.exp()

            def contrast(
                queries: torch.Tensor,
                documents: torch.Tensor,
                part: slice = part,
                temperature: float | torch.Tensor = temperature,
            ) -> torch.Tensor:
                loss = losses.info_nce(
                    queries,
                    documents,
                    relations,
                    temperature=temperature,
                    in_batch=said.in_batch,
                    same_source_only=said.same_source_only,
                    query_query=said.query_query,
                    document_document=said.document_document,
                    false_negative_margin=said.false_negative_margin,
                    rows=part,
                )
                if distils:
                    loss = loss + said.distillation * losses.distillation(
                        queries,
                        documents,
                        relations,
                        temperature=temperature,
                        teacher_temperature=said.teacher_temperature,
                        rows=part,
                    )
                return loss

            whole = losses.matryoshka(contrast, said.matryoshka) if said.matryoshka else contrast
            yield whole(gather(rows[batch.queries]), gather(rows[batch.documents]))

    def _skip(self, model: torch.nn.Module, batch: Batch, loss: float) -> None:
        for parameter in model.parameters():
            parameter.grad = None  # the optimizer leaves alone what has no gradient
        self.skipped += 1
        self._skipped_in_a_row += 1
        rows = ", ".join(batch.where[:3]) + (
            f" and {len(batch.where) - 3} more" if len(batch.where) > 3 else ""
        )
        _log.warning(
            "step %d: %s is not finite; skipped (%s)",
            batch.step + 1,
            "the gradient" if math.isfinite(loss) else "the loss",
            rows,
        )
        if self._skipped_in_a_row >= self.recipe.max_skipped:
            good = checkpoints.all_in(self._folder)
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row gave a loss or gradient that is not finite, the "
                f"last with rows {rows}. No weight was changed by them. "
                + (f"The last checkpoint is {good[0]}. " if good else "There is no checkpoint yet. ")
                + "Try a lower optimizer.learning_rate, precision: float32, or look at these rows"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds rates and counts to what is logged."""
        if "loss" in logs:
            logs = {**logs, **self._tally.taken(self.args.device), "skipped": self.skipped}
            if math.isnan(logs["loss"]):  # every step since the last line was skipped
                del logs["loss"]
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As transformers writes it, but aside, with a manifest, and renamed when it is complete."""
        folder, step = self._folder, self.state.global_step
        self._staging = checkpoints.aside(folder, step)
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        problem: Exception | None = None
        try:
            if rank() == 0:
                shutil.rmtree(self._staging, ignore_errors=True)
                (self._staging / name).mkdir(parents=True)
            barrier()
            super()._save_checkpoint(model, trial)
            barrier()
            if rank() == 0:
                checkpoints.publish(self._staging / name, folder / name, {**self.facts, "step": step})
                checkpoints.rotate(folder, self.recipe.keep)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            problem = error
        finally:
            if rank() == 0:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if any_true(problem is not None, self.args.device):
            good = checkpoints.all_in(folder)
            raise StorageError(
                f"the checkpoint of step {step} can't be written to {folder}: "
                f"{problem or 'see the other processes'}. "
                + (f"The last good one is {good[0].name}. " if good else "There is none before it. ")
                + "Make room and run the same command again to go on"
            ) from problem
        barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trained weights only, and adapters also as peft saves them."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict or {name: part.detach() for name, part in self.encoder.named_parameters()}
        names = {name for name, part in self.encoder.named_parameters() if part.requires_grad}
        save_file({name: state[name].contiguous().cpu() for name in sorted(names)}, folder / TRAINED)
        if self.recipe.tuning == "lora":
            self.encoder.model.save_pretrained(folder)  # type: ignore[operator]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        state = load_file(path)
        trained = {name: part for name, part in self.encoder.named_parameters() if part.requires_grad}
        if set(state) != set(trained):
            odd = sorted(set(state) ^ set(trained))
            raise CheckpointError(f"{path} does not hold what this recipe trains: {', '.join(odd[:3])}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state[name])


class _Tally:
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


def _finite(encoder: TrainableEncoder) -> bool:
    gradients = [part.grad for part in encoder.parameters() if part.grad is not None]
    return all(bool(torch.isfinite(each).all()) for each in gradients)


def _only(batches: list[Batch]) -> Batch:
    return batches[0]


class StopWhenAsked(TrainerCallback):
    """Saves and stops after the step in which a signal arrived; all processes in the same one."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Asks all processes."""
        if any_true(self.signal is not None, args.device):
            control.should_save = control.should_training_stop = control.should_log = True
        return control


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
