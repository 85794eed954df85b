"""Finds one document among millions by its id, on disk.

Only a hash of each id and its place are kept in memory; the line itself is read when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umr_plugins.data.fields import check_id, nearest
from umr_plugins.data.lines import Place, Problems, Record, TextFile, parse_json
from umr_plugins.errors import DataError


class Lookup:
    """Finds objects of a JSONL file by their id with 24 bytes of memory for each.

    Args:
        path: the file.
        key: the field that holds the id.

    Raises:
        DataError: lines that can't be read, or two objects with the same id.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        self.file = TextFile(path)
        self._key = key
        names, starts, sizes, lines = array("Q"), array("q"), array("i"), array("i")
        problems, digest = Problems(self.file.path), hashlib.sha256()
        for place, record in self.file.scan():
            digest.update(record.data + b"\n")
            try:
                names.append(_hash(self._id(record)))
            except DataError as error:
                problems.add(error)
                continue
            starts.append(place.start)
            sizes.append(place.size)
            lines.append(place.line)
        order = np.argsort(np.array(names, np.uint64), kind="stable")
        self._names: NDArray[np.uint64] = np.array(names, np.uint64)[order]
        self._starts: NDArray[np.int64] = np.array(starts, np.int64)[order]
        self._sizes: NDArray[np.int32] = np.array(sizes, np.int32)[order]
        self._lines: NDArray[np.int32] = np.array(lines, np.int32)[order]
        for index in np.flatnonzero(self._names[1:] == self._names[:-1]):
            first, second = self._record(index), self._record(index + 1)
            if self._id(first) == self._id(second):
                problems.add(f"{second.where}: the {key} {self._id(first)!r} stands in {first.where} too")
        problems.check()
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, id: str) -> bool:
        return self.find(id) is not None

    def find(self, id: str) -> tuple[dict[str, Any], str] | None:
        """The object and where it stands, or None if there is none of this id.

        Raises:
            DataError: the file has changed.
        """
        low, high = (int(self._names.searchsorted(_hash(id), side)) for side in ("left", "right"))
        for index in range(low, high):  # more than one only where hashes collide
            record = self._record(index)
            value = parse_json(record)
            if check_id(value[self._key], record.where) == id:
                return value, record.where
        return None

    def _id(self, record: Record) -> str:
        value = parse_json(record)
        if self._key not in value:
            raise DataError(f"{record.where}: there is no {self._key!r}{nearest(self._key, value)}")
        return check_id(value[self._key], f"{record.where}: {self._key}")

    def _record(self, index: Any) -> Record:
        return self.file.read(
            Place(int(self._starts[index]), int(self._sizes[index]), int(self._lines[index]))
        )


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
