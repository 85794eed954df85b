"""transformers' Trainer with GradCache steps, checkpoints that are whole or not there, batches by number."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from umr_plugins.encoding.trainable import TrainableEncoder
from umr_plugins.errors import CheckpointError, StorageError, TrainingError
from umr_plugins.training import checkpoints, losses
from umr_plugins.training.collate import Batch, Batches
from umr_plugins.training.distributed import any_true, gather, rank
from umr_plugins.training.gradcache import GradCache
from umr_plugins.training.recipe import Recipe
from umr_plugins.training.tally import Tally

_log = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
"""In a checkpoint: the trained weights, by their names in `TrainableEncoder`, in their own type."""


COUNTS = "counts.json"
"""In a checkpoint: steps that were skipped, and seconds of training."""


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
        self._tally = Tally()
        self._cache: GradCache | None = None
        self._folder = Path(str(args.output_dir))
        self._began, self._seconds_before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Of training, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """A learned temperature is no weight: decay would pull it to 1."""
        return [name for name in super().get_decay_parameter_names(model) if "log_temperature" not in name]

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
        # What dropout draws depends on the step alone, however training got there.
        seeds = np.random.SeedSequence([self.recipe.seed, 3, batch.step, rank()])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
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
                self.accelerator.autocast,
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
                + "Look at these rows, or begin anew in another --out with a lower optimizer.learning_rate "
                "or precision: float32"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds rates and counts to what is logged."""
        if "loss" in logs:
            logs = {**logs, **self._tally.taken(self.args.device), "skipped": self.skipped}
            logs["seconds"] = self.seconds
            if self.encoder.log_temperature is not None:
                logs["temperature"] = self.encoder.log_temperature.exp().item()
            if math.isnan(logs["loss"]):  # every step since the last line was skipped
                del logs["loss"]
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As transformers writes it, but aside, with a manifest, and renamed when it is complete."""
        folder, step = self._folder, self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self._staging = checkpoints.aside(folder, step)

        def begin() -> None:
            shutil.rmtree(checkpoints.aside(folder, step), ignore_errors=True)
            (checkpoints.aside(folder, step) / name).mkdir(parents=True)

        def publish() -> None:
            facts = {**self.facts, "step": step}
            checkpoints.publish(checkpoints.aside(folder, step) / name, folder / name, facts)
            checkpoints.rotate(folder, self.recipe.keep)

        first = rank() == 0
        stages = [begin if first else None, lambda: super(UMRTrainer, self)._save_checkpoint(model, trial)]
        try:
            for stage in [*stages, publish if first else None]:
                self._try(stage, step)  # every process gets to the end of each stage, or none
        finally:
            if first:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _try(self, stage: Callable[[], None] | None, step: int) -> None:
        problem: Exception | None = None
        try:
            if stage is not None:
                stage()
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            problem = error
        if any_true(problem is not None, self.args.device):
            good = checkpoints.all_in(self._folder)
            raise StorageError(
                f"the checkpoint of step {step} can't be written to {self._folder}: "
                f"{problem or 'see the other processes'}. "
                + (f"The last good one is {good[0].name}. " if good else "There is none before it. ")
                + "Make room and run the same command again to go on"
            ) from problem

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trained weights only, and adapters also as peft saves them."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict or {name: part.detach() for name, part in self.encoder.named_parameters()}
        names = {name for name, part in self.encoder.named_parameters() if part.requires_grad}
        save_file({name: state[name].contiguous().cpu() for name in sorted(names)}, folder / TRAINED)
        counts = {"skipped": self.skipped, "in_a_row": self._skipped_in_a_row, "seconds": self.seconds}
        (folder / COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")
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
        counts = json.loads(path.with_name(COUNTS).read_text(encoding="utf-8"))
        self.skipped, self._skipped_in_a_row = counts["skipped"], counts["in_a_row"]
        self._seconds_before = counts["seconds"]


def _finite(encoder: TrainableEncoder) -> bool:
    gradients = [part.grad for part in encoder.parameters() if part.grad is not None]
    return all(bool(torch.isfinite(each).all()) for each in gradients)


def _only(batches: list[Batch]) -> Batch:
    return batches[0]
