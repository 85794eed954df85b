"""`train`: from a recipe to a folder that opens as a model; run again, it goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.registry import Checkpoint, resolve
from umr_plugins.data.readers import read
from umr_plugins.data.schema import CLASSES, Rows
from umr_plugins.encoding.fingerprint import weights_sha256
from umr_plugins.encoding.options import check_spec, choose_dtype
from umr_plugins.encoding.trainable import TrainableEncoder
from umr_plugins.errors import InputError, ItemError, MissingExtraError, TrainingError
from umr_plugins.training import checkpoints
from umr_plugins.training.collate import Batches
from umr_plugins.training.distributed import barrier, from_first, rank, world_size
from umr_plugins.training.folder import RunFolder, step_of
from umr_plugins.training.lora import add_lora, keep_no_activations, train_everything
from umr_plugins.training.recipe import Lora, Recipe
from umr_plugins.training.sampler import Mixture

_LIMITS = ("max_length", "min_image_tokens", "max_image_tokens")


class Stopped(Exception):  # noqa: N818  # not an error
    """A signal ended training after a step; its checkpoint is saved.

    Args:
        number: of the signal.
        step: the last one that was done.
        steps: of the recipe.
    """

    def __init__(self, number: int, step: int, steps: int) -> None:
        super().__init__(number, step, steps)
        self.number, self.step, self.steps = number, step, steps


@dataclass(frozen=True)
class Trained:
    """What `train` made.

    Args:
        out: the folder; it opens as a model.
        steps: of training.
        loss: mean of the last logged steps.
        skipped: steps whose loss or gradient was not finite.
        resumed_from: the step it went on from; None for a run in one piece.
        seconds: of this call.
        report: the page with curves.
        history: what was logged.
    """

    out: Path
    steps: int
    loss: float | None
    skipped: int
    resumed_from: int | None
    seconds: float
    report: Path
    history: list[dict[str, Any]]


def train(recipe: Recipe, out: str | Path, *, note: Callable[[str], object] | None = None) -> Trained:
    """Train by a recipe, or go on with it.

    The folder then holds the whole model (weights, tokenizer, `umr.json`, files for sentence-transformers),
    with `tuning: lora` also `adapter/`; `README.md`, the model card; `report.html`, the curves;
    `checkpoints/`. A second call with the same recipe goes on from the newest checkpoint that is whole;
    weights, optimizer and order of data are then as if it had never stopped.

    Args:
        recipe: see `umr_plugins.training.recipe`.
        out: folder; new, empty, or of a run of the same recipe.
        note: called with lines for people.

    Raises:
        InputError: a value of the recipe that can't be, or a folder of another recipe or other data.
        DataError: rows that can't be used.
        CheckpointError, ModelNotFoundError: as `Embedder`.
        TrainingError: loss or gradient was not finite too often, or a picture could not be read.
        StorageError: a checkpoint could not be written.
        Stopped: SIGTERM or SIGINT arrived; a checkpoint was saved.
    """
    tell: Callable[[str], object] = (
        (note or (lambda line: None)) if rank_of_environment() == 0 else (lambda line: None)
    )
    folder = Path(out).expanduser().absolute()
    run = _Run(recipe, folder, tell)
    with run.handling_signals():
        try:
            return run.train()
        finally:
            run.folder.release()


def rank_of_environment() -> int:
    """The number of this process as torchrun says, before there is a process group."""
    return int(os.environ.get("RANK", "0"))


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, tell: Callable[[str], object]) -> None:
        self.recipe, self.tell = recipe, tell
        self.folder = RunFolder(folder, tell)
        try:
            from umr_plugins.training.stopping import StopWhenAsked
        except ImportError as error:
            raise MissingExtraError("training needs more: pip install 'umr-plugins[train]'") from error
        self.stopping = StopWhenAsked()
        self.under_way = self.finishing = False
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end training after the current step; a second SIGINT ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, frame: object) -> None:
            if not self.under_way:
                raise Stopped(number, 0, 0)
            if self.stopping.signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self.stopping.signal = number
            doing = "writing the model" if self.finishing else "finishing this step, then saving"
            self.tell(f"{signal.Signals(number).name}: {doing}")

        before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train(self) -> Trained:
        from transformers import PrinterCallback

        from umr_plugins.training.arguments import arguments
        from umr_plugins.training.progress import Progress, quiet_transformers
        from umr_plugins.training.trainer import UMRTrainer

        recipe = self.recipe
        if recipe.tuning == "lora" and recipe.full_vision:
            raise InputError("full_vision belongs to tuning: full; with lora say lora.vision: true")
        if recipe.tuning == "full" and recipe.lora != Lora():
            raise InputError("the keys of lora have no effect with tuning: full; leave them out")
        checkpoint = self._resolve()
        sources = self._read()
        data = [_described(rows) for rows in sources]
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        mixture = self._mixture(sources)
        with quiet_transformers():
            args = arguments(recipe, checkpoint.spec, len(mixture), self.folder.checkpoints)
            device = args.device  # joins the other processes
            dtype = choose_dtype(recipe.precision, checkpoint.spec, device)
            base = {"weights": weights_sha256(checkpoint), "precision": str(dtype).removeprefix("torch.")}
            resumed = from_first(self.folder.begin(recipe, data, base) if rank() == 0 else None)
            encoder, trained = self._encoder(checkpoint, device)
            batches = Batches(
                mixture,
                negatives=recipe.negatives,
                takes_instruction=checkpoint.spec.takes_instruction,
                max_text_length=min(recipe.max_text_length, recipe.max_length),
                seed=recipe.seed,
                rank=rank(),
                world=world_size(),
            )
            self._check_sizes()
            facts = {"recipe_sha256": recipe.sha256(), "data_sha256": digest, "versions": _versions()}
            try:
                trainer = UMRTrainer(encoder, batches, recipe, args, facts, [self.stopping])
            except (ValueError, ImportError) as error:  # such as FSDP without several processes
                raise InputError(f"transformers refuses trainer: {recipe.trainer}: {error}") from error
            trainer.remove_callback(PrinterCallback)  # writes to stdout
            trainer.add_callback(Progress(self.tell))
            self.tell(
                f"training {trained:,} of {sum(part.numel() for part in encoder.parameters()):,} parameters "
                f"of {checkpoint.spec.name} for {len(mixture):,} steps on {args.device}"
            )
            self.under_way = True
            try:
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except ItemError as error:
                raise self._lost(error, trainer) from error
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"step {trainer.state.global_step + 1}: memory is full ({error}). Lower "
                    f"memory.chunk_tokens (now {recipe.memory.chunk_tokens}) or memory.feature_bytes, or set "
                    "memory.checkpointing, and run the command again: it goes on from the last checkpoint"
                ) from error
        state = trainer.state
        if self.stopping.agreed and state.global_step < len(mixture):
            raise Stopped(self.stopping.agreed, state.global_step, len(mixture))
        self.finishing = True
        history = [line for line in state.log_history if "samples_per_second" in line]
        barrier()
        if rank() == 0:
            everything = {
                "model": recipe.model if checkpoint.origin != "folder" else checkpoint.folder.name,
                "recipe": self._shown_recipe(),
                "data": data,
                "data_sha256": digest,
                "trainable_parameters": trained,
                "parameters": sum(part.numel() for part in encoder.parameters()),
                "steps": state.global_step,
                "versions": facts["versions"],
                "git": _git(),
                "device": str(args.device),
                "dtype": str(next(iter(encoder.model.parameters())).dtype).removeprefix("torch."),
                "seconds": trainer.seconds,
                "limits": {name: getattr(checkpoint.spec, name) for name in _LIMITS},
                "base": base,
                "resumed": self.folder.resumed,
                "skipped_steps": trainer.skipped,
                "demo": checkpoint.spec.demo,
                "license": checkpoint.spec.license,
                "lora": dataclasses.asdict(recipe.lora) if recipe.tuning == "lora" else None,
                "folder": self.folder.path.name,
            }
            with quiet_transformers():
                self.folder.finish(checkpoint, encoder, history, everything)
        barrier()
        return Trained(
            self.folder.path,
            state.global_step,
            next((line["loss"] for line in reversed(history) if "loss" in line), None),
            trainer.skipped,
            step_of(resumed) if resumed else None,
            time.perf_counter() - self.started,
            self.folder.report,
            history,
        )

    def _resolve(self) -> Checkpoint:
        recipe = self.recipe
        checkpoint = resolve(recipe.model, recipe.revision)
        spec = checkpoint.spec
        # A model's own smaller limits stay: it was not made for more.
        given: dict[str, Any] = {"max_length": min(recipe.max_length, spec.max_length)}
        if spec.min_image_tokens != spec.max_image_tokens:  # LLaVA-NeXT sees every picture alike
            most = min(recipe.max_image_tokens, spec.max_image_tokens)
            given |= {
                "max_image_tokens": most,
                "min_image_tokens": recipe.min_image_tokens or min(spec.min_image_tokens, most),
            }
        for name, value in given.items():
            asked = getattr(recipe, name)
            if asked is not None and value < asked:
                self.tell(f"{name}: {asked} is more than {spec.name} takes; trained with {value}")
        spec = dataclasses.replace(spec, **given)
        check_spec(spec)
        return dataclasses.replace(checkpoint, spec=spec)

    def _read(self) -> list[Rows]:
        sources: list[Rows] = []
        for each in self.recipe.data:
            sources += read(each.format, each.path, **each.options)
        for rows in sources:
            self.tell(f"{rows.name}: {len(rows):,} rows")
        return sources

    def _mixture(self, sources: list[Rows]) -> Mixture:
        recipe = self.recipe
        return Mixture(
            sources,
            sizes={"pictures": recipe.batch.pictures, "text": recipe.batch.text},
            steps=recipe.steps,
            epochs=recipe.epochs,
            class_weights=recipe.weights.classes or None,
            source_weights=recipe.weights.sources or None,
            same_source=recipe.batch.same_source,
            seed=recipe.seed,
        )

    def _check_sizes(self) -> None:
        for kind in ("pictures", "text"):
            size = getattr(self.recipe.batch, kind)
            if size < world_size():
                raise InputError(f"batch.{kind}={size} can't be shared by {world_size()} processes; raise it")

    def _encoder(self, checkpoint: Checkpoint, device: torch.device) -> tuple[TrainableEncoder, int]:
        recipe = self.recipe
        # Weights that are trained stay in float32; bfloat16 is then for what is computed with them.
        frozen = recipe.tuning == "lora"
        dtype = choose_dtype(recipe.precision, checkpoint.spec, device) if frozen else torch.float32
        backbone = load_backbone(checkpoint, device, dtype)
        if recipe.tuning == "lora":
            add_lora(backbone, **dataclasses.asdict(recipe.lora), seed=recipe.seed)
        else:
            if checkpoint.spec.family == "llava_next":
                raise InputError("tuning: full is not offered for LLaVA-NeXT; use tuning: lora")
            train_everything(backbone, vision=recipe.full_vision)
        if recipe.memory.checkpointing:
            keep_no_activations(backbone)
        if too_long := [dim for dim in recipe.loss.matryoshka if not 1 <= dim <= backbone.hidden_size]:
            raise InputError(
                f"loss.matryoshka: {too_long[0]} dimensions can't be trained; {checkpoint.spec.name} has "
                f"{backbone.hidden_size}, so name 1 to {backbone.hidden_size}"
            )
        learned = recipe.loss.temperature if recipe.loss.learn_temperature else None
        encoder = TrainableEncoder(backbone, temperature=learned)
        return encoder, sum(part.numel() for part in encoder.parameters() if part.requires_grad)

    def _lost(self, error: ItemError, trainer: Any) -> TrainingError:
        step = trainer.state.global_step
        if step and not any(step_of(path) == step for path in checkpoints.all_in(self.folder.checkpoints)):
            trainer._save_checkpoint(trainer.model_wrapped, None)
        remedy = (
            "Mend or replace the picture and run the same command again to go on"
            if error.code in ("unreadable", "not_a_file", "corrupt", "empty", "link", "timeout")
            else "Such a row can't be trained on: change it, and begin anew in another --out, since the data "
            "are then others"
        )
        return TrainingError(
            f"step {step + 1}: {error}. {f'Steps up to {step} are saved. ' if step else ''}{remedy}"
        )

    def _shown_recipe(self) -> dict[str, Any]:
        """As the user would write it: paths of data by their names, nothing of this machine."""
        said = self.recipe.as_dict()
        said["data"] = [
            {**each, "path": Path(each["path"]).name, "options": _without_folders(each["options"])}
            for each in said["data"]
        ]
        if Path(said["model"]).is_absolute():
            said["model"] = Path(said["model"]).name
        return said


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    absolute = {key for key, each in options.items() if isinstance(each, str) and Path(each).is_absolute()}
    return {key: Path(each).name if key in absolute else each for key, each in options.items()}


def _described(rows: Rows) -> dict[str, Any]:
    counts = np.bincount(rows.classes, minlength=len(CLASSES))
    return {
        "name": rows.name,
        "rows": len(rows),
        "sha256": rows.sha256,
        "classes": {name: int(count) for name, count in zip(CLASSES, counts, strict=True)},
        "pictures": int(np.sum(rows.pictures)),
    }


def _versions() -> dict[str, str]:
    names = ("umr-plugins", "torch", "transformers", "peft", "accelerate", "tokenizers", "pillow")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git() -> str | None:
    """Revision of the folder that training was started in, with a mark if files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
