"""Changed weights written as a whole checkpoint, in the layout of the one they come from.

A changed tensor keeps its name, type and shape, so files are copied and the bytes of changed tensors written
over: nothing else in a file moves (heads, poolers, order, metadata), and one tensor at a time is in memory.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from umr_plugins.backbones.head import is_tied
from umr_plugins.backbones.lora import HEAD, Change, read_adapter
from umr_plugins.backbones.names import canonical
from umr_plugins.backbones.registry import FILES, Checkpoint, headers, write_sidecar
from umr_plugins.errors import CheckpointError, InputError, StorageError

_TYPES = ("F32", "BF16", "F16")
_HEAD, _TABLE = f"{HEAD}.weight", "language_model.embed_tokens.weight"
# Written anew, telling sentence-transformers of modules in other folders, or figures of the base.
_NOT_COPIED = {
    "results.json",
    "umr.json",
    "umr_sentence_transformers.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
}


@dataclass(frozen=True)
class _Edit:
    """One tensor of a file that changes: its name there, where its bytes begin, and what changes it."""

    name: str
    begin: int
    new: Change | torch.Tensor


def write_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    adapter: Path | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint with changed weights to a new folder, all of it or nothing.

    Args:
        checkpoint: what the weights belong to; its files are copied, and its spec becomes `umr.json`.
        out: new or empty folder.
        adapter: folder of a LoRA adapter that is merged: W + s B A, summed in float32.
        tensors: trained weights by their names in a loaded model, in its shapes; give these or an adapter.

    Returns:
        The folder, absolute. Tensors keep the types they were stored in.

    Raises:
        InputError: `out` has something in it, or not exactly one of `adapter` and `tensors` is given.
        CheckpointError: a changed weight has no place in the checkpoint or more than one, another shape, or
            can't be stored as the type that is there; names it.
        StorageError: the folder can't be written; nothing is left of it.
    """
    if (adapter is None) == (not tensors):
        raise InputError("give an adapter or trained tensors, one of both")
    out = Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give a new folder")
    plan = _Plan(checkpoint)
    if adapter is not None:
        plan.merge(adapter)
    else:
        plan.replace(tensors or {})
    files = checkpoint_files(checkpoint.folder)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        for path in files:
            copy = partial / path.name
            shutil.copyfile(path, copy)
            if path in plan.edits:
                _write_over(copy, path, plan.edits[path])
            sync(copy)
        sync(write_sidecar(partial, dataclasses.replace(checkpoint.spec, name=out.name)))
        sync(partial)
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        size = sum(path.stat().st_size for path in files)
        raise StorageError(
            f"can't write {out}: {error.strerror or error}. It takes {size / 1e9:.1f} GB; nothing was left "
            "there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # has its new name by now, unless something failed
    return out


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint or adapter that its copy needs: nothing hidden, no pickles, no code."""
    found = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    return [
        path
        for path in found
        if path.name not in _NOT_COPIED and not path.name.startswith(".") and not path.is_dir()
    ]


class _Plan:
    """What changes in which file; made, and refused, before anything is written."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model, self._tied = checkpoint.given, is_tied(checkpoint.config)
        self.edits: dict[Path, list[_Edit]] = {}
        self._stored: dict[str, list[tuple[Path, str, dict[str, Any]]]] = {}
        for path, header in headers(checkpoint.folder).items():
            with _opened(path):  # checks the header against the file
                for name, entry in header.items():
                    self._stored.setdefault(canonical(name), []).append((path, name, entry))

    def merge(self, folder: Path) -> None:
        """Plan the changes of an adapter."""
        adapter = read_adapter(folder)
        for module, change in adapter.changes.items():
            name = f"{module}.weight"
            if name == _HEAD and (self._tied or name not in self._stored):
                head = "is its embedding table" if self._tied else "is not stored"
                raise CheckpointError(
                    f"{folder} changes {change.module}, but the head of {self._model} {head}; train an "
                    "adapter that leaves lm_head out"
                )
            adapter.check(change, self._shape(name))
            self._put(name, change)
        if not adapter.changes:
            raise CheckpointError(f"{folder} changes no weight")

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Plan the exchange of tensors by trained ones."""
        named: dict[str, torch.Tensor] = {}
        for given, tensor in tensors.items():
            name = canonical(given)
            if name == _HEAD and self._tied:
                name = _TABLE
            if name in named and not torch.equal(named[name], tensor):
                raise CheckpointError(f"two different tensors are given for {name}, one of them as {given!r}")
            named[name] = tensor
        for name, tensor in named.items():
            shape = self._shape(name)
            if shape is not None and shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{name} has shape {shape} in {self._model}, the trained one {tuple(tensor.shape)}"
                )
            self._put(name, tensor)
            if name == _TABLE and self._tied and _HEAD in self._stored:
                self._put(_HEAD, tensor)  # stored twice, and shall stay the same

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._stored[name][0][2]["shape"]) if name in self._stored else None

    def _put(self, name: str, new: Change | torch.Tensor) -> None:
        places = self._stored.get(name, [])
        if len(places) != 1:
            found = f"as {', '.join(place[1] for place in places)}" if places else "nowhere"
            raise CheckpointError(
                f"a changed weight must be stored once, but {self._model} holds {name} {found}"
            )
        path, stored, entry = places[0]
        if entry["dtype"] not in _TYPES:
            raise CheckpointError(
                f"{path}: {stored} is stored as {entry['dtype']}; only weights stored as one of "
                f"{', '.join(_TYPES)} can be changed"
            )
        self.edits.setdefault(path, []).append(_Edit(stored, entry["data_offsets"][0], new))


def _write_over(copy: Path, source: Path, edits: list[_Edit]) -> None:
    """Replace the bytes of tensors in the copy of a safetensors file."""
    with _opened(source) as stored, copy.open("r+b") as file:
        data = 8 + int.from_bytes(file.read(8), "little")  # behind the header and its length
        for edit in edits:
            old, new = stored.get_tensor(edit.name), edit.new
            tensor = new.added_to(old) if isinstance(new, Change) else new.detach().to("cpu", old.dtype)
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"the changed weight {edit.name} holds values that are not finite in {old.dtype}, the "
                    "type it is stored in; nothing was written"
                )
            file.seek(data + edit.begin)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def sync(path: Path) -> None:
    """Have a file or folder written to the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
