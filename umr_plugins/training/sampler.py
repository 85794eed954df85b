"""Which rows make up each batch: a mixture of sources and modality classes, fixed by its seed.

Batch number t is computed from the seed alone, not from batches before it, so training goes on anywhere
exactly where it stopped, and every process knows the whole batch without being told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from umr_plugins.data.fields import nearest
from umr_plugins.data.schema import CLASSES, Rows
from umr_plugins.errors import InputError

Kind = Literal["text", "pictures"]
KINDS: tuple[Kind, Kind] = ("text", "pictures")


@dataclass(frozen=True)
class _Stratum:
    """Rows of one source, class and kind; they are gone through in an order of their own, again and again."""

    source: int
    number: int  # of the class
    kind: int
    rows: NDArray[np.int64]
    share: float  # of all rows that are drawn


class Mixture:
    """Batches of rows, by number.

    A batch holds rows with pictures or rows of text only, since their sizes differ. Within a kind rows are
    drawn by weight; each source's rows of a class come in shuffled order, all of them before any comes again.

    Args:
        sources: the rows, one entry a source.
        sizes: rows of a batch, by kind.
        steps: how many batches; or
        epochs: how often all rows are seen, on average.
        class_weights: shares of rows by modality class; by default as many as there are.
        source_weights: shares of rows by source within its class; by default as many as there are.
        same_source: whether all rows of a batch come from one source.
        seed: of the order.

    Raises:
        InputError: an unknown name, a weight below 0, a weight above 0 for something without rows, or a batch
            that is larger than what it is drawn from.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        sizes: Mapping[Kind, int],
        steps: int | None = None,
        epochs: float | None = None,
        class_weights: Mapping[str, float] | None = None,
        source_weights: Mapping[str, float] | None = None,
        same_source: bool = True,
        seed: int = 0,
    ) -> None:
        self.sources = sources
        self._seed = seed
        self.strata = _strata(sources, class_weights, source_weights)
        groups = _groups(sources, self.strata, sizes, same_source=same_source)
        self._check_shares(groups)
        # A group's share of batches: its share of rows over the size of its batches.
        chances = np.array([sum(self.strata[n].share for n in group) / size for group, size in groups])
        if steps is None:
            total = sum(len(stratum.rows) for stratum in self.strata)
            steps = max(1, round((epochs or 1) * total * chances.sum()))
        self.steps = steps
        rng = np.random.default_rng([seed, 0])
        drawn = rng.choice(len(groups), size=steps, p=chances / chances.sum())
        self._counts = np.zeros((steps, len(self.strata)), np.int32)
        for number, (group, size) in enumerate(groups):
            shares = np.array([self.strata[n].share for n in group])
            mine = np.flatnonzero(drawn == number)
            self._counts[mine[:, None], np.array(group)] = rng.multinomial(
                size, shares / shares.sum(), size=len(mine)
            )
        self._starts = np.cumsum(self._counts, axis=0, dtype=np.int64) - self._counts

    def _check_shares(self, groups: Sequence[tuple[list[int], int]]) -> None:
        for group, size in groups:
            whole = sum(self.strata[number].share for number in group)
            for stratum in (self.strata[number] for number in group):
                drawn = size * stratum.share / whole
                if drawn > len(stratum.rows) + 1e-6:
                    name, kind = self.sources[stratum.source].name, CLASSES[stratum.number]
                    raise InputError(
                        f"by the weights a batch of {size} would take {drawn:.0f} rows of class {kind} from "
                        f"{name!r}, which has {len(stratum.rows)}: some would stand in it twice. Lower its "
                        f"weight or batch.{KINDS[stratum.kind]}"
                    )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[tuple[int, int]]:
        """The rows of a batch as (number of the source, number of the row)."""
        if not 0 <= step < self.steps:
            raise IndexError(step)
        found: list[tuple[int, int]] = []
        for number in np.flatnonzero(self._counts[step]):
            stratum, start = self.strata[number], int(self._starts[step, number])
            for place in range(start, start + int(self._counts[step, number])):
                epoch, at = divmod(place, len(stratum.rows))
                found.append((stratum.source, int(stratum.rows[self._order(int(number), epoch)[at]])))
        return found

    def expected(self) -> dict[str, float]:
        """How many rows of each source are drawn in all steps."""
        totals = dict.fromkeys((rows.name for rows in self.sources), 0.0)
        for stratum, count in zip(self.strata, self._counts.sum(0, dtype=np.int64), strict=True):
            totals[self.sources[stratum.source].name] += int(count)
        return totals

    def _order(self, stratum: int, epoch: int) -> NDArray[np.int64]:
        return _permutation(self._seed, stratum, epoch, len(self.strata[stratum].rows))


@lru_cache(maxsize=64)
def _permutation(seed: int, stratum: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1, stratum, epoch]).permutation(count)


def _strata(
    sources: Sequence[Rows],
    class_weights: Mapping[str, float] | None,
    source_weights: Mapping[str, float] | None,
) -> list[_Stratum]:
    names = [rows.name for rows in sources]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"two sources are called {', '.join(twice)}; give each a name of its own")
    counts = np.array([np.bincount(rows.classes, minlength=len(CLASSES)) for rows in sources], float)
    if not counts.sum():
        raise InputError("the data have no row at all")
    by_class = _weights("class", class_weights, CLASSES, counts.sum(0))
    by_source = _weights("source", source_weights, names, counts.sum(1))
    # Within a class: by the weights given, else by rows.
    inside = (np.array(by_source)[:, None] * (counts > 0)) if source_weights else counts
    if class_weights:
        for name, weight, total in zip(CLASSES, by_class, inside.sum(0), strict=True):
            if weight and not total:
                raise InputError(
                    f"class {name!r} has weight {weight:g}, but no source with a weight has such rows; "
                    "give one that has some a weight too, or leave the class away"
                )
        shares = inside / np.where(inside.sum(0), inside.sum(0), 1) * (np.array(by_class) / sum(by_class))
        for source, (weight, share) in enumerate(zip(by_source, shares.sum(1), strict=True)):
            if source_weights and weight and not share:
                raise InputError(
                    f"source {names[source]!r} has weight {weight:g}, but its rows are of classes without "
                    "weight; give these a weight too, or leave the source away"
                )
    elif source_weights:
        own = counts / np.where(counts.sum(1), counts.sum(1), 1)[:, None]
        shares = own * (np.array(by_source) / sum(by_source))[:, None]
    else:
        shares = counts / counts.sum()
    strata = []
    for source, rows in enumerate(sources):
        for number in range(len(CLASSES)):
            if not shares[source, number]:
                continue
            mine = np.asarray(rows.classes) == number
            for kind in range(len(KINDS)):
                chosen = np.flatnonzero(mine & (np.asarray(rows.pictures) == bool(kind)))
                if len(chosen):
                    part = len(chosen) / counts[source, number]
                    strata.append(
                        _Stratum(source, number, kind, chosen, float(shares[source, number] * part))
                    )
    return strata


def _weights(
    what: str, given: Mapping[str, float] | None, names: Sequence[str], counts: NDArray[np.float64]
) -> list[float]:
    for name, weight in (given or {}).items():
        if name not in names:
            raise InputError(f"weights: there is no {what} {name!r}{nearest(name, names)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9:
            raise InputError(
                f"the weight of {what} {name!r} must be a number from 0 to below 1e9, got {weight!r}"
            )
        if weight and not counts[list(names).index(name)]:
            raise InputError(
                f"{what} {name!r} has weight {weight:g}, but the data have no rows of it; leave it away"
            )
    found = [float((given or {}).get(name, 0.0 if given else 1.0)) for name in names]
    if not sum(found):
        raise InputError(f"all weights by {what} are 0; give one of {', '.join(names)} a weight above 0")
    return found


def _groups(
    sources: Sequence[Rows], strata: Sequence[_Stratum], sizes: Mapping[Kind, int], *, same_source: bool
) -> list[tuple[list[int], int]]:
    """What batches are drawn from: strata of one kind (and one source), with their batch size."""
    keys = [(stratum.kind, stratum.source if same_source else -1) for stratum in strata]
    groups = []
    for key in dict.fromkeys(keys):
        members = [number for number, each in enumerate(keys) if each == key]
        kind, size = KINDS[key[0]], sizes[KINDS[key[0]]]
        count = sum(len(strata[number].rows) for number in members)
        if count < size:
            of = f"source {sources[key[1]].name!r} has" if same_source else "the data have"
            rows = "with pictures" if kind == "pictures" else "of text only"
            raise InputError(
                f"{of} {count} rows {rows}, fewer than a batch of {size}; lower batch.{kind}"
                + (", or set batch.same_source to false" if same_source else "")
            )
        groups.append((members, size))
    return groups


__all__ = ["KINDS", "Kind", "Mixture"]
