"""Reads single members of uncompressed tar files, where large picture collections are kept.

The headers of a tar are read once; after that a member costs one seek. Nothing is extracted to disk.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from umr_plugins.errors import ItemCode, ItemError
from umr_plugins.media import folder

_LINK: Final = -1
_OTHER: Final = -2


class _Members(NamedTuple):
    """24 bytes for each member, since collections have millions: the hash of its name, and where it is."""

    stamp: tuple[int, int]
    names: NDArray[np.uint64]  # sorted
    starts: NDArray[np.int64]  # byte offset of the content; `_LINK` or `_OTHER` for what is no file
    sizes: NDArray[np.int64]


_KNOWN: dict[str, _Members] = {}


def read_member(path: Path, member: str) -> bytes:
    """The bytes of a regular file inside a tar.

    Args:
        path: an uncompressed tar; links are followed, since the user named it.
        member: the name in there; a leading `./` makes no difference. Of members with the same name the
            last counts, as when a tar is unpacked.

    Raises:
        ItemError: `unreadable` (no such tar or member), `not_a_file`, `link`, `corrupt`, `too_large` or
            `empty`, with stage `"open"`; its `name` is `path#member`.
    """
    with _named(path, member):
        start, size = _find(path, member)
        with path.open("rb") as handle:
            handle.seek(start)
            data = handle.read(size)
        if len(data) != size:
            raise _refuse("corrupt", "the tar is cut short inside this member; fetch it again")
        return data


def check_member(path: Path, member: str) -> None:
    """Check that the tar has the member and that it is a regular file, without reading it.

    Raises:
        ItemError: as `read_member`.
    """
    with _named(path, member):
        _find(path, member)


@contextmanager
def _named(path: Path, member: str) -> Iterator[None]:
    """Turns whatever goes wrong into an `ItemError` that names tar and member."""
    try:
        try:
            yield
        except ItemError:
            raise
        except tarfile.TarError:
            raise _refuse(
                "corrupt", "this is no uncompressed tar, or it is damaged; unpack .gz and the like first"
            ) from None
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            why = os.strerror(number) if number else "not a valid path"
            raise _refuse("unreadable", f"the tar can't be read ({why})") from None
    except ItemError as error:
        shown = f"{path}#{member}".encode("utf-8", "backslashreplace").decode()
        raise error.at(name=shown) from None


def _find(path: Path, member: str) -> tuple[int, int]:
    """Offset and size of a regular member."""
    known, wanted = _members(path), _hash(member)
    place = int(known.names.searchsorted(wanted))
    if place == len(known.names) or known.names[place] != wanted:
        raise _refuse("unreadable", "the tar has no member of this name")
    start, size = int(known.starts[place]), int(known.sizes[place])
    if start == _LINK:
        raise _refuse("link", "the member is a link; links are not followed, pack the file itself")
    if start == _OTHER:
        raise _refuse("not_a_file", "the member is no regular file; only regular files are read")
    if size > folder.MAX_BYTES:
        raise _refuse("too_large", f"it has {size:,} bytes; at most {folder.MAX_BYTES:,} are read")
    if size == 0:
        raise _refuse("empty", "the member has no bytes")
    return start, size


def _members(path: Path) -> _Members:
    """What is in the tar, from memory unless the file has changed."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise _refuse("not_a_file", "the tar is no regular file; only regular files are read")
    stamp = (status.st_size, status.st_mtime_ns)
    known = _KNOWN.get(str(path))
    if known is None or known.stamp != stamp:
        with path.open("rb") as handle:
            # Two threads may both do this once; a lock could be held for ever in a forked child.
            known = _KNOWN[str(path)] = _scan(handle, stamp)
    return known


def _scan(handle: BinaryIO, stamp: tuple[int, int]) -> _Members:
    places: dict[int, tuple[int, int]] = {}
    with tarfile.open(fileobj=handle, mode="r:") as archive:
        while (info := archive.next()) is not None:
            regular = info.isreg() and not info.issparse()
            start = info.offset_data if regular else _LINK if info.issym() or info.islnk() else _OTHER
            places[_hash(info.name)] = (start, info.size)
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
    names = np.fromiter(places, np.uint64, len(places))
    order = np.argsort(names)
    offsets = np.array(list(places.values()), np.int64).reshape(-1, 2)[order]
    return _Members(stamp, names[order], offsets[:, 0].copy(), offsets[:, 1].copy())


def _hash(name: str) -> int:
    plain = name.removeprefix("./").encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big")


def _refuse(code: ItemCode, reason: str) -> ItemError:
    return ItemError(code, reason, stage="open")
