"""Checkpoints that are whole or not there: written aside, hashed, and renamed into place.

A checkpoint is a folder `checkpoint-STEP` with a `manifest.json` that holds size and SHA-256 of every file.
The newest one whose files agree with it is where training goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umr_plugins.backbones.merge import sync
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
        if path.is_file() and path != written / MANIFEST:
            files[path.relative_to(written).as_posix()] = {
                "sha256": _sha256(path),
                "bytes": path.stat().st_size,
            }
            sync(path)
    manifest = {"format": 1, **facts, "files": files}
    manifest["sha256"] = _own_sha256(manifest)
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(written / MANIFEST)
    for folder in {written, *(path for path in written.rglob("*") if path.is_dir())}:
        sync(folder)
    old = target.with_name(f"{_ASIDE}old-{target.name}")
    if target.exists():
        target.rename(old)
    written.rename(target)
    sync(target.parent)
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
        CheckpointError: names the file that is missing, was added, differs, or can't be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        own = manifest.pop("sha256")
        listed = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it was not finished") from None
    except KeyError as error:
        raise CheckpointError(f"{path / MANIFEST} can't be read: it has no {error}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} can't be read: {error}") from None
    if _own_sha256(manifest) != own:
        raise CheckpointError(f"{path / MANIFEST} is not as it was written: its own SHA-256 differs")
    there = {
        found.relative_to(path).as_posix()
        for found in path.rglob("*")
        if found.is_file() and found != path / MANIFEST
    }
    for name in sorted(there ^ set(listed)):
        raise CheckpointError(f"{path / name} {'was added later' if name in there else 'is missing'}")
    for name, (digest, size) in listed.items():
        try:
            same = (path / name).stat().st_size == size and _sha256(path / name) == digest
        except OSError as error:
            raise CheckpointError(f"{path / name} can't be read: {error}") from None
        if not same:
            raise CheckpointError(
                f"{path / name} is not as it was written: its content differs from {MANIFEST}"
            )
    return manifest


def clean(folder: Path) -> None:
    """Remove what a process that was killed left half written."""
    for path in folder.glob(f"{_ASIDE}*") if folder.is_dir() else ():
        old = path.name.removeprefix(f"{_ASIDE}old-")
        if old != path.name and not (folder / old).exists():
            path.rename(folder / old)  # killed between two renames: the old one is still good
        else:
            shutil.rmtree(path, ignore_errors=True)


def put_away(folder: Path, good: Path | None) -> list[Path]:
    """Rename checkpoints that are newer than the newest whole one, so that they count no more.

    Else `rotate` would take them, damaged as they are, for the ones to keep.

    Args:
        folder: of checkpoints.
        good: the newest whole one, if there is any.

    Returns:
        Where they are now.
    """
    damaged = all_in(folder)
    damaged = damaged[: damaged.index(good)] if good is not None else damaged
    moved = []
    for path in damaged:
        target = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        moved.append(path.rename(target))
    return moved


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in all_in(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
