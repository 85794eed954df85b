"""Finds and reads the files of a folder without ever leaving it or waiting for a device.

Rules of `walk`: names that begin with a dot and `__pycache__` are not looked at, like a shell's `*`. All
else is either yielded or reported: links (never followed), devices, pipes and sockets, folders that can't
be read, and names that are not valid UTF-8 (no store or JSON takes them).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from umr_plugins.errors import InputError, ItemError

MAX_BYTES: Final = 512 * 1024 * 1024
"""Files larger than this are refused (`too_large`)."""

# Non-blocking, since opening a pipe without a writer would wait for ever.
_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
_BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class FoundFile:
    """A regular file below the root: `relative` is its path from the root with forward slashes."""

    path: Path
    relative: str
    size: int
    mtime_ns: int
    inode: int


def walk(root: Path, *, skip: Collection[Path] = ()) -> Iterator[FoundFile | ItemError]:
    """All files below `root`, in the order of their names, and an error for all that can't be read.

    Args:
        root: a folder; may itself be a link, since the user named it.
        skip: folders or files to pass over, such as an index kept inside the root.

    Yields:
        `FoundFile`, or `ItemError` (`link`, `not_a_file`, `unreadable`) whose `name` is the path from the
        root. An error on a folder stands for everything below it.

    Raises:
        InputError: `root` is not a folder.
        ItemError: `unreadable`, the root itself can't be listed.
    """
    base = Path(os.path.realpath(root))
    if not base.is_dir():
        raise InputError(f"{str(root)!r} is not a folder; give an existing folder")
    return _walk(base, {os.path.realpath(path) for path in skip})


def _walk(base: Path, skip: set[str]) -> Iterator[FoundFile | ItemError]:
    first = _entries(base)
    if isinstance(first, ItemError):
        raise first.at(name=str(base))
    # A stack instead of recursion, so that a very deep tree can't exhaust the interpreter's stack.
    stack = [first]
    while stack:
        entry = stack[-1].pop() if stack[-1] else None
        if entry is None:
            stack.pop()
            continue
        if entry.name.startswith(".") or entry.name == "__pycache__" or entry.path in skip:
            continue
        found = _look(entry, base)
        if found is not None:
            yield found
            continue
        below = _entries(Path(entry.path))
        if isinstance(below, ItemError):
            yield below.at(name=Path(entry.path).relative_to(base).as_posix())
        else:
            stack.append(below)


def _entries(folder: Path) -> list[os.DirEntry[str]] | ItemError:
    """What is in `folder`, last name first (it is popped from the end)."""
    try:
        with os.scandir(folder) as listing:
            return sorted(listing, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        return ItemError("unreadable", f"the folder can't be listed ({_why(error)})", stage="open")


def _look(entry: os.DirEntry[str], base: Path) -> FoundFile | ItemError | None:
    """A file, an error, or None for a folder to go into."""
    relative = Path(entry.path).relative_to(base).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError:
        return ItemError(
            "unreadable", "the name is not valid UTF-8; rename it", stage="open", name=_shown(relative)
        )
    try:
        # A fresh lstat: the folder's own answer may be older than a swap of the entry.
        status = os.lstat(entry.path)
    except (OSError, ValueError) as error:
        return ItemError("unreadable", f"it can't be looked at ({_why(error)})", stage="open", name=relative)
    if stat.S_ISDIR(status.st_mode):
        return None
    refusal = _refusal(status.st_mode)
    if refusal is not None:
        return refusal.at(name=relative)
    return FoundFile(Path(entry.path), relative, status.st_size, status.st_mtime_ns, status.st_ino)


def _refusal(mode: int) -> ItemError | None:
    """Why a file of this mode is not opened; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISLNK(mode):
        return ItemError(
            "link", "links are not followed; copy the file here or give its real folder", stage="open"
        )
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    kind = next((name for test, name in kinds if test(mode)), "something special")
    return ItemError("not_a_file", f"it is {kind}; only regular files are read", stage="open")


def read_file(
    path: Path, *, root: Path | None = None, follow_link: bool = False, max_bytes: int | None = None
) -> bytes:
    """The bytes of a regular file, read without following links or waiting for a pipe or device.

    A file that changes while it is read is read once more, then refused. A hard link is the file itself.

    Args:
        path: the file.
        root: a folder the file lies under; then no folder between the two may be a link either.
        follow_link: follow links, for a path that the user named in so many words.
        max_bytes: refuse larger files; None means `MAX_BYTES`.

    Raises:
        ItemError: `link`, `not_a_file`, `unreadable`, `too_large` or `empty`, with stage `"open"`.
    """
    limit = MAX_BYTES if max_bytes is None else max_bytes
    try:
        for _ in range(2):
            data = _read_once(path, root, follow_link, limit)
            if data is not None:
                break
        else:
            raise ItemError("unreadable", "it changed while it was being read; try again later", stage="open")
    except ItemError as error:
        raise error.at(name=_shown(path)) from None
    except (OSError, ValueError) as error:
        raise _open_error(error, path) from None
    if not data:
        raise ItemError("empty", "the file has no bytes", stage="open", name=_shown(path))
    return data


def _read_once(path: Path, root: Path | None, follow_link: bool, limit: int) -> bytes | None:
    """The file's bytes, or None if it changed meanwhile."""
    handle = _open(path, root, follow_link)
    try:
        before = os.fstat(handle)
        refusal = _refusal(before.st_mode)
        if refusal is not None:
            raise refusal
        blocks: list[bytes] = []
        size = 0
        while block := os.read(handle, _BLOCK) if before.st_size <= limit else b"":
            blocks.append(block)
            size += len(block)
            if size > limit:
                break
        if max(size, before.st_size) > limit:
            raise ItemError(
                "too_large",
                f"it has {max(size, before.st_size):,} bytes; at most {limit:,} are read",
                stage="open",
            )
        after = os.fstat(handle)
    finally:
        os.close(handle)
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return b"".join(blocks) if unchanged and size == before.st_size else None


def _open(path: Path, root: Path | None, follow_link: bool) -> int:
    # Looked at before it is opened, since opening a device can have effects of its own; what was really
    # opened is checked again by the caller.
    refusal = _refusal((os.stat if follow_link else os.lstat)(path).st_mode)
    if refusal is not None:
        raise refusal
    if follow_link:
        return os.open(path, _FLAGS)
    if root is None or os.open not in os.supports_dir_fd:
        return os.open(path, _FLAGS | _NO_LINK)
    return _open_below(path, root)


def _open_below(path: Path, root: Path) -> int:
    """Opens folder by folder from the root, so that none of them can be swapped for a link."""
    *folders, name = Path(path).absolute().relative_to(Path(root).absolute()).parts
    if ".." in folders:
        raise ValueError("a path that leaves the root")
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(name, _FLAGS | _NO_LINK, dir_fd=folder)
    finally:
        os.close(folder)


def _open_error(error: OSError | ValueError, path: Path) -> ItemError:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ELOOP, errno.ENOTDIR):
        return ItemError(
            "link", "a folder or file on its path is a link or no folder", stage="open", name=_shown(path)
        )
    if number == errno.ENXIO:
        return ItemError(
            "not_a_file",
            "it is a socket or device; only regular files are read",
            stage="open",
            name=_shown(path),
        )
    return ItemError("unreadable", f"it can't be read ({_why(error)})", stage="open", name=_shown(path))


def _shown(path: Path | str) -> str:
    """A path that can be printed and stored, whatever bytes it is made of."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no file's name: half of a surrogate pair that stands for no byte
        return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def _why(error: OSError | ValueError) -> str:
    """The system's words without the path, which the error carries already."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return "not a valid path"
