"""The folder of a run: which recipe and data it belongs to, where it goes on, and the model it ends with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from umr_plugins.backbones.merge import sync, write_checkpoint
from umr_plugins.backbones.registry import Checkpoint, write_sidecar
from umr_plugins.encoding.trainable import TrainableEncoder
from umr_plugins.errors import IndexLockedError, InputError, StorageError
from umr_plugins.index import lock
from umr_plugins.st_files import add_to
from umr_plugins.training import checkpoints
from umr_plugins.training.card import write_card
from umr_plugins.training.lora import save_adapter
from umr_plugins.training.recipe import FREE, Recipe
from umr_plugins.training.report import write_report

RUN = "run.json"
"""The recipe and the data of a run, to go on with the same ones only."""


@dataclasses.dataclass
class RunFolder:
    """A run's folder; one process at a time has it, from `begin` to `release`.

    Args:
        path: absolute.
        tell: called with lines for people.
    """

    path: Path
    tell: Callable[[str], object]
    resumed: list[int] = dataclasses.field(default_factory=list)
    _lock: lock.FolderLock | None = None

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page with curves."""
        return self.path / "report.html"

    def begin(
        self, recipe: Recipe, data: list[dict[str, Any]], base: Mapping[str, Any] | None = None
    ) -> Path | None:
        """Check that the folder is free or of this run; the checkpoint to go on from.

        A run that failed before its first checkpoint left nothing to protect: any recipe may follow it.

        Raises:
            InputError: another recipe's or other data's run, a finished one, or a folder of something else.
            StorageError: the folder can't be read or written.
        """
        try:
            return self._begin(recipe, data, base or {})
        except OSError as error:
            raise StorageError(
                f"{self.path} can't be used as --out: {error.strerror or error}. Mend that, or give "
                "another --out"
            ) from error

    def _begin(self, recipe: Recipe, data: list[dict[str, Any]], base: Mapping[str, Any]) -> Path | None:
        file, finished = self.path / RUN, (self.path / "config.json").is_file()
        before = self._before(file) if file.is_file() else None
        aside = file.with_name(f".{RUN}.new")
        there = set(self.path.iterdir()) if self.path.exists() else set()
        if before is None and there - {aside, self.path / lock.NAME}:
            raise InputError(f"{self.path} is not empty and holds no run of umr train; give another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        checkpoints.clean(self.checkpoints)
        if before is not None and (finished or checkpoints.all_in(self.checkpoints)):
            self._compare(before, recipe, data, base)
            self.resumed = list(before["resumed"])
        if finished:
            raise InputError(
                f"{self.path} holds the finished model of this recipe; there is nothing left to train. "
                "To train again, give another --out"
            )
        found, problems = checkpoints.newest_valid(self.checkpoints)
        for problem in problems:
            self.tell(f"not used: {problem}")
        for path in checkpoints.put_away(self.checkpoints, found):
            self.tell(f"kept aside as {path.name}")
        if found is not None:
            self.tell(f"going on from {found.name}")
            self.resumed.append(step_of(found))
        elif problems:
            self.tell("no whole checkpoint is left: starting anew")
        # Before the first checkpoint: without it the folder would be taken for somebody else's.
        said = {"recipe": recipe.as_dict(), "data": data, "base": dict(base), "resumed": self.resumed}
        aside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        sync(aside)
        aside.replace(file)
        self.checkpoints.mkdir(exist_ok=True)
        return found

    def _locked(self) -> lock.FolderLock:
        try:
            return lock.FolderLock(self.path)
        except IndexLockedError:
            raise InputError(
                f"another umr train is at work in {self.path}; wait for it, or stop it"
            ) from None

    def release(self) -> None:
        """Give the folder free for another process."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _before(self, file: Path) -> dict[str, Any]:
        try:
            before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if before.keys() >= {"recipe", "data", "base", "resumed"}:
                return before
        except (ValueError, AttributeError):
            pass
        raise InputError(f"{file} was not written by umr train, or is damaged; give another --out")

    def _compare(
        self,
        before: Mapping[str, Any],
        recipe: Recipe,
        data: list[dict[str, Any]],
        base: Mapping[str, Any],
    ) -> None:
        if keys := changed(before["recipe"], recipe.as_dict()):
            raise InputError(
                f"{self.path} holds a run of another recipe; changed are {', '.join(keys)}. Go on with the "
                "recipe as it was, or give another --out"
            )
        first, now = before["base"], dict(base)
        if first.get("precision") != now.get("precision"):
            raise InputError(
                f"{self.path} was begun in {first.get('precision')}, and here it would go on in "
                f"{now.get('precision')}; go on where it was begun, or give another --out"
            )
        if first != now:
            raise InputError(
                f"the weights of {recipe.model} are not those that {self.path} was begun with; go on with "
                "the same model (a hub id can be pinned by revision), or give another --out"
            )
        old, new = ({each["name"]: each for each in rows} for rows in (before["data"], data))
        if names := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            raise InputError(
                f"the data of {self.path} have changed since it was begun: {', '.join(names)}. Go on "
                "with the data as they were, or give another --out"
            )

    def finish(
        self,
        checkpoint: Checkpoint,
        encoder: TrainableEncoder,
        history: list[dict[str, Any]],
        facts: Mapping[str, Any],
    ) -> None:
        """Write the whole model aside and move it in place, `config.json` last: it marks a finished model.

        Raises:
            StorageError: it can't be written; the checkpoints stay.
        """
        work = self.path / ".model"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            self._finish(work, checkpoint, encoder, history, facts)
        except OSError as error:  # StorageError among them
            raise StorageError(
                f"the model can't be written to {self.path}: {error.strerror or error}. All steps are saved "
                f"in {self.checkpoints.name}; make room and run the same command again"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _finish(
        self,
        work: Path,
        checkpoint: Checkpoint,
        encoder: TrainableEncoder,
        history: list[dict[str, Any]],
        facts: Mapping[str, Any],
    ) -> None:
        adapter = work / "adapter" if facts["lora"] else None
        if adapter is not None:
            save_adapter(encoder.model, adapter, checkpoint)
            made = write_checkpoint(checkpoint, work / "model", adapter=adapter)
        else:
            named = encoder.model.named_parameters()
            tensors = {name: part.detach() for name, part in named if part.requires_grad}
            made = write_checkpoint(checkpoint, work / "model", tensors=tensors)
        write_sidecar(made, dataclasses.replace(checkpoint.spec, name=self.path.name))
        add_to(made, dim=encoder.backbone.hidden_size)
        write_card(made, history, facts)
        write_report(self.report, history, facts)
        if adapter is not None:
            shutil.rmtree(self.path / "adapter", ignore_errors=True)
            adapter.rename(self.path / "adapter")
        for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(self.path / path.name)


def changed(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """Dotted keys whose values differ, without those that may."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new or (not at and key in FREE):
            continue
        if isinstance(old, dict) and isinstance(new, dict) and set(old) == set(new):
            found += changed(old, new, f"{at}{key}.")
        else:
            found.append(f"{at}{key}")
    return found


def step_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(path.name.rpartition("-")[2])
