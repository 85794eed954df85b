"""One call of `Index.add`: its arguments checked together, its items turned into rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from umr_plugins.errors import InputError, ItemError
from umr_plugins.index.arguments import check_unique, listed
from umr_plugins.index.encode import Known, checked_matrix, document_vectors, vector_bytes
from umr_plugins.index.rows import Row, check_id, check_metadata, content_hash, stored_pictures
from umr_plugins.types import Encoder, FloatArray, Item, as_item


class AddCall:
    """The checked arguments of one call.

    Raises:
        InputError: ids twice, lengths that differ, metadata that JSON can't hold, useless vectors.
        FingerprintError: vectors of another length than the index has.
    """

    def __init__(
        self,
        values: Sequence[Any],
        ids: Iterable[str | None] | None,
        metadatas: Iterable[Mapping[str, Any] | None] | None,
        payloads: Iterable[str | None] | None,
        vectors: Any,
        dim: int | None,
    ) -> None:
        self.values = values
        count = len(values)
        self._names: list[str | None] = listed("ids", ids, count)
        check_unique([check_id(name) for name in self._names if name is not None])
        self._metadatas = [
            check_metadata(value, at) for at, value in enumerate(listed("metadatas", metadatas, count))
        ]
        self._payloads: list[str | None] = listed("payloads", payloads, count)
        if any(load is not None and not isinstance(load, str) for load in self._payloads):
            raise InputError("payloads must be strings or None")
        self._vectors = None if vectors is None or not count else _own_vectors(vectors, count, dim)

    @property
    def dim(self) -> int | None:
        """Length of the vectors that the caller brought, if it did."""
        return None if self._vectors is None else int(self._vectors.shape[1])

    def spans(self, size: int | None) -> Iterator[range]:
        """Parts of the call that are committed together; the whole call without a size."""
        step = size or max(len(self.values), 1)
        for start in range(0, len(self.values), step):
            yield range(start, min(start + step, len(self.values)))

    def rows(
        self, span: range, encoder: Callable[[], Encoder], known: Known, *, show_progress: bool
    ) -> tuple[list[Row], list[ItemError]]:
        """Rows of a part of the call, ready to commit, and all that is wrong in it, in input order."""
        errors: list[ItemError] = []
        good: list[tuple[int, Item, Row]] = []
        for at in span:
            try:
                value = self.values[at]
                if isinstance(value, ItemError):
                    raise value  # what could not even be read; it keeps its place among the others
                item = as_item(value, at)
                good.append((at, item, self._row(at, item)))
            except ItemError as error:
                errors.append(error.at(at, self._names[at]))
        made = self._made(good, encoder, known, show_progress)
        rows: list[Row] = []
        for (at, _, row), vector in zip(good, made, strict=True):
            if isinstance(vector, ItemError):
                errors.append(_placed(vector, at, self._names[at]))
            else:
                rows.append(row.with_vector(vector))
        return rows, sorted(errors, key=lambda error: error.index or 0)

    def _row(self, at: int, item: Item) -> Row:
        pictures, blobs = stored_pictures(item)
        own = self._vectors is not None
        content = _own_content(item, pictures) if own else content_hash(item)
        name = self._names[at] or content.hex()[:32]
        return Row(
            *(
                name,
                item.modality,
                item.text,
                pictures,
                content,
                b"",
                self._metadatas[at],
                self._payloads[at],
                own,
            ),
            blobs=blobs,
        )

    def _made(
        self,
        good: Sequence[tuple[int, Item, Row]],
        encoder: Callable[[], Encoder],
        known: Known,
        show_progress: bool,
    ) -> Sequence[bytes | ItemError]:
        if self._vectors is not None:
            return [vector_bytes(self._vectors[at]) for at, _, _ in good]
        items, contents = [item for _, item, _ in good], [row.content for _, _, row in good]
        return document_vectors(encoder, items, contents, known, show_progress)


def _own_vectors(vectors: Any, count: int, dim: int | None) -> FloatArray:
    matrix = checked_matrix(vectors, dim)
    if len(matrix) != count:
        raise InputError(f"vectors has {len(matrix)} rows for {count} items")
    bad = np.flatnonzero(~np.isfinite(matrix[:, 0])).tolist()
    if bad:
        raise InputError(f"vectors {bad[:10]} are zero or hold NaN or infinity; they can't be searched")
    return matrix


def _own_content(item: Item, pictures: str | None) -> bytes:
    """Names an item whose vector the caller brings; its pictures need not be readable then."""
    try:
        return content_hash(item)
    except ItemError:
        return hashlib.sha256(json.dumps([item.text, pictures]).encode()).digest()


def _placed(error: ItemError, index: int, name: str | None) -> ItemError:
    # The encoder counts within the batch it was given; the caller knows positions in the call.
    return ItemError(error.code, error.reason, stage=error.stage, index=index, name=error.name or name)
