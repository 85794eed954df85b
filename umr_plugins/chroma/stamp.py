"""What a collection says of the model that fills it, compared with the model before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from umr_plugins.errors import FingerprintError
from umr_plugins.types import Encoder

FINGERPRINT_KEY: Final = "umr_fingerprint"
"""Key of a collection's metadata: fingerprint of the model that fills it."""
DIM_KEY: Final = "umr_dim"
"""Key of a collection's metadata: length of its vectors."""


@dataclass(frozen=True)
class Stamp:
    """The model of a collection, as far as it is recorded.

    Args:
        collection: its name.
        fingerprint: of the model; None if nobody wrote it down.
        dim: length of its vectors; None if it is empty and nobody wrote it down.
        differs: in words, what its recorded options and those of the model differ in; empty if nothing.
    """

    collection: str
    fingerprint: str | None
    dim: int | None
    differs: str = ""

    @classmethod
    def read(
        cls, collection: str, metadata: Mapping[str, Any] | None, dim: int | None, differs: str = ""
    ) -> Self:
        """From a collection's metadata; `dim` is the length of a vector that it holds, if any."""
        written = metadata or {}
        fingerprint, recorded = written.get(FINGERPRINT_KEY), written.get(DIM_KEY)
        return cls(
            collection,
            None if fingerprint is None else str(fingerprint),
            dim if dim is not None else recorded if type(recorded) is int else None,
            differs,
        )

    @staticmethod
    def write(encoder: Encoder) -> dict[str, Any]:
        """The metadata that records a model."""
        return {FINGERPRINT_KEY: encoder.fingerprint, DIM_KEY: encoder.dim}

    def check_dim(self, dim: int) -> None:
        """Raise `FingerprintError` if vectors of this length are not those of the collection."""
        if self.dim is not None and self.dim != dim:
            raise FingerprintError(
                f"the vectors of collection {self.collection!r} have length {self.dim}, this model gives "
                f"{dim}{self._options()}. Give the model and dim that it was filled with, or make a new "
                "collection"
            )

    def check(self, encoder: Encoder) -> None:
        """Raise `FingerprintError` if the vectors of `encoder` can't be compared with the collection's."""
        self.check_dim(encoder.dim)
        if self.fingerprint is not None and self.fingerprint != encoder.fingerprint:
            raise FingerprintError(
                f"collection {self.collection!r} was filled by a model with the fingerprint "
                f"{self.fingerprint[:12]}; this one has {encoder.fingerprint[:12]}: the weights under its "
                f"name have changed, or its options are others{self._options()}. Their vectors can't be "
                "compared. Give the model that it was filled with, or make a new collection"
            )

    def _options(self) -> str:
        return f" ({self.differs})" if self.differs else ""
