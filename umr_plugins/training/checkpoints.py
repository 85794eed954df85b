"""Checkpoints that are whole or not there: written aside, hashed, and renamed into place.

A checkpoint is a folder `checkpoint-STEP` with a `manifest.json` that holds size and SHA-256 of every file.
The newest one whose files agree with it is where training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umr_plugins.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = "tmp-checkpoint-"


def aside(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete; the same in every process."""
    return folder / f"{_ASIDE}{step}"


def publish(written: Path, target: Path, facts: Mapping[str, Any]) -> Path:
    """Hash and sync a written checkpoint, and give it its name.

    Args:
        written: the finished folder, on the same file system.
        target: `checkpoint-STEP`; one that is there already (from before a resume) is replaced.
        facts: JSON values that go into the manifest.
    """
    files = {}
    for path in sorted(written.rglob("*")):
        if path.is_file():
            files[path.relative_to(written).as_posix()] = {
                "sha256": _sha256(path),
                "bytes": path.stat().st_size,
            }
            _sync(path)
    manifest = {"format": 1, **facts, "files": files}
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(written / MANIFEST)
    for folder in {written, *(path for path in written.rglob("*") if path.is_dir())}:
        _sync(folder)
    old = target.with_name(f"{_ASIDE}old-{target.name}")
    if target.exists():
        target.rename(old)
    written.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def all_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    found = {
        path: match for path in folder.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))
    }
    return sorted(found, key=lambda path: -int(found[path][1]))


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer."""
    problems = []
    for path in all_in(folder):
        try:
            check(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def check(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, after comparing every file with it.

    Raises:
        CheckpointError: names the file that is missing, was added, or differs.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        listed = {name: (entry["sha256"], entry["bytes"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it was not finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} can't be read: {error}") from None
    there = {
        found.relative_to(path).as_posix()
        for found in path.rglob("*")
        if found.is_file() and found.name != MANIFEST
    }
    for name in sorted(there ^ set(listed)):
        raise CheckpointError(f"{path / name} {'was added later' if name in there else 'is missing'}")
    for name, (digest, size) in listed.items():
        if (path / name).stat().st_size != size or _sha256(path / name) != digest:
            raise CheckpointError(
                f"{path / name} is not as it was written: its content differs from {MANIFEST}"
            )
    found_manifest: dict[str, Any] = manifest
    return found_manifest


def clean(folder: Path) -> None:
    """Remove what a process that was killed left half written."""
    for path in folder.glob(f"{_ASIDE}*") if folder.is_dir() else ():
        old = path.name.removeprefix(f"{_ASIDE}old-")
        if old != path.name and not (folder / old).exists():
            path.rename(folder / old)  # killed between two renames: the old one is still good
        else:
            shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in all_in(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
