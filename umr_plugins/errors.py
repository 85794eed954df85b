"""Every error a user can cause, in one small tree.

Each message says what was given, what is allowed and what to do. `code` is a stable word for programs
(the command line prints it as JSON). Holds no logic and imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

ItemCode = Literal[
    "empty",
    "unreadable",
    "not_a_file",
    "link",
    "unsupported",
    "corrupt",
    "too_large",
    "timeout",
    "encrypted",
    "no_pages",
    "no_text",
    "not_text",
    "model",
]
"""Why one item or file was refused."""

Stage = Literal["open", "decode", "prepare", "encode", "store"]
"""Where on its way an item was refused."""


class UMRError(Exception):
    """Base of all errors of this library. `code` names the kind for programs."""

    code: str = "error"


class InputError(UMRError, ValueError):
    """An argument is not one of the allowed values."""

    code = "input"


class ItemError(UMRError, ValueError):
    """One item (or file) can't be embedded. It costs only itself.

    Args:
        code: why, one of `ItemCode`.
        reason: a sentence for people: what was given, what is allowed, what to do.
        stage: where it was refused.
        index: position of the item in the caller's list, where there is one.
        name: the file or id the item came from, where there is one.
    """

    def __init__(
        self,
        code: ItemCode,
        reason: str,
        *,
        stage: Stage = "prepare",
        index: int | None = None,
        name: str | None = None,
    ) -> None:
        self.code: ItemCode = code
        self.reason = reason
        self.stage: Stage = stage
        self.index = index
        self.name = name
        super().__init__(code, reason, stage, index, name)

    def __str__(self) -> str:
        where = "".join(
            [
                f"item {self.index}: " if self.index is not None else "",
                f"{self.name}: " if self.name is not None else "",
            ]
        )
        return f"{where}{self.reason} [{self.code}]"

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default
        return (_rebuild_item_error, (self.code, self.reason, self.stage, self.index, self.name))

    def at(self, index: int | None = None, name: str | None = None) -> ItemError:
        """The same error, with the position or name filled in where it is still missing."""
        return ItemError(
            self.code,
            self.reason,
            stage=self.stage,
            index=self.index if self.index is not None else index,
            name=self.name if self.name is not None else name,
        )


def _rebuild_item_error(
    code: ItemCode, reason: str, stage: Stage, index: int | None, name: str | None
) -> ItemError:
    return ItemError(code, reason, stage=stage, index=index, name=name)


class BatchError(UMRError, ValueError):
    """Some items of a call can't be embedded (or judged); lists all of them, in input order.

    Raised after the good items were checked, so that one call shows every problem.
    """

    code = "batch"

    def __init__(
        self,
        errors: Sequence[ItemError],
        total: int,
        done: str = "embedded",
        remedy: str = 'Mend them, or pass on_error="skip" to go on without them.',
    ) -> None:
        self.errors = list(errors)
        self.total = total
        self._done, self._remedy = done, remedy
        super().__init__(self.errors, total, done, remedy)

    def __reduce__(self) -> tuple[object, ...]:  # Chroma replaces the arguments by its own message
        return (type(self), (self.errors, self.total, self._done, self._remedy))

    def __str__(self) -> str:
        shown = "\n".join(f"  {error}" for error in self.errors[:10])
        more = f"\n  and {len(self.errors) - 10} more" if len(self.errors) > 10 else ""
        return (
            f"{len(self.errors)} of {self.total} items can't be {self._done}:\n{shown}{more}\n{self._remedy}"
        )


class DataError(UMRError, ValueError):
    """Training data that can't be read: names the file and line, what is wrong and what is allowed."""

    code = "data"


class TrainingError(UMRError, RuntimeError):
    """Training can't go on: says why, and where the last good checkpoint is."""

    code = "training"


class ModelNotFoundError(UMRError, LookupError):
    """No checkpoint under that name: says what was tried and what can be used instead."""

    code = "model_not_found"


class CheckpointError(UMRError, ValueError):
    """A checkpoint is there but can't be loaded: names the file, tensor or setting."""

    code = "checkpoint"


class IndexLockedError(UMRError, RuntimeError):
    """Another process owns this index folder."""

    code = "locked"


class FingerprintError(UMRError, ValueError):
    """The index was made by another model, or with other vector options."""

    code = "fingerprint"


class StorageError(UMRError, OSError):
    """The index can't be read or written (disk full, read-only folder, damaged file)."""

    code = "storage"


class MissingExtraError(UMRError, ImportError):
    """An optional dependency is not installed; the message holds the command that installs it."""

    code = "missing_extra"
