"""One owner process per index folder.

Chroma is thread-safe but not process-safe: two writers lose vectors without an error. So the folder is
locked with `flock`, which the kernel releases however the process ends; a stale lock can't exist.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from umr_plugins.errors import IndexLockedError, StorageError

try:
    import fcntl
except ImportError:  # a platform without flock
    fcntl = None  # type: ignore[assignment]

NAME = ".umr.lock"


class FolderLock:
    """Holds the lock of `folder` from creation until `release`.

    Raises:
        IndexLockedError: another process has it; raised at once, naming its pid.
        StorageError: the lock file can't be written.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            raise StorageError(
                "indexes on disk need a POSIX system (flock); use Index(None) or a Chroma server URL"
            )
        self.path = folder / NAME
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"can't write in the index folder {folder}: {error.strerror}. An index needs write access, "
                "also for searching (opening repairs it); copy it to a folder you can write"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            os.close(self._descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(f"can't lock {self.path}: {error.strerror}") from error
            raise IndexLockedError(
                f"the index {folder} is open in another process{holder}. Only one process at a time may have "
                "it; close that one, or let it serve (umr serve) and send your requests there"
            ) from None
        with contextlib.suppress(OSError):  # the pid is only for the message above; a full disk may refuse it
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _holder(self) -> str:
        try:
            pid = os.pread(self._descriptor, 20, 0).decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return ""
        return f" (pid {pid})" if pid.isdigit() else ""

    def release(self) -> None:
        """Give the folder free. The file stays: deleting it would let two processes lock two files."""
        os.close(self._descriptor)
