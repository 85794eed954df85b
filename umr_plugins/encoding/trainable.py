"""A backbone as a module that can be trained: prompt, positions and pooled token are those of `Embedder`."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import nn

from umr_plugins.backbones.base import Backbone, Input, Picture, Prepared
from umr_plugins.backbones.features import Features
from umr_plugins.encoding.engine import media_pool
from umr_plugins.encoding.instructions import instruction_for
from umr_plugins.errors import ItemError
from umr_plugins.types import Item, Role

_AHEAD = 32  # entries whose pictures are being decoded while the model works


@dataclass(frozen=True)
class Entry:
    """One input of a training batch.

    Args:
        item: text, picture or both.
        role: queries and documents may be written differently.
        instruction: of queries; None for the model's own.
        max_length: tokens of the whole input, where it is less than the model's own limit.
        where: the row it came from, for messages.
    """

    item: Item
    role: Role = "query"
    instruction: str | None = None
    max_length: int | None = None
    where: str = ""


class TrainableEncoder(nn.Module):
    """Runs a backbone with gradients.

    Args:
        backbone: loaded; which of its parameters are trained is up to whoever sets `requires_grad`.
        temperature: starting value of a learned one; None if it is not learned.
        pack: whether sequences may lie end to end in one row, without padding, where the family allows it.
    """

    def __init__(self, backbone: Backbone, *, temperature: float | None = None, pack: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.model: nn.Module = backbone.model
        self.packed = pack and backbone.use_packing()
        self.log_temperature = (
            None
            if temperature is None
            else nn.Parameter(torch.tensor(math.log(temperature), device=backbone.device))
        )

    @property
    def vision_is_frozen(self) -> bool:
        """Whether a picture's features stay the same while the rest is trained."""
        return not any(parameter.requires_grad for parameter in self._vision().parameters())

    def _vision(self) -> nn.Module:
        for name in ("visual", "vision_tower"):
            if isinstance(found := getattr(self.model, name, None), nn.Module):
                parts = [found, getattr(self.model, "multi_modal_projector", None)]
                return nn.ModuleList(part for part in parts if part is not None)
        raise AssertionError("a family without a vision tower")

    def train(self, mode: bool = True) -> TrainableEncoder:
        """As always, but what is frozen keeps computing as it does for `Embedder`."""
        super().train(mode)
        if self.vision_is_frozen:
            self._vision().eval()
        return self

    def forward(self, items: list[Prepared], features: Sequence[Features] | None = None) -> torch.Tensor:
        """Pooled states `[n, hidden]`, float32, not normalised.

        Args:
            items: prepared; they need their pixels only if `features` is not given.
            features: of all their pictures, in order.
        """
        parts = self.features(items) if features is None else features
        rows = self.backbone.pooled(items, parts, packed=self.packed)
        if self.log_temperature is not None:
            # The loss uses it, not this; but wrappers for several processes look for parameters here.
            rows = rows + 0 * self.log_temperature
        return rows

    def features(self, items: Iterable[Prepared]) -> list[Features]:
        """Features of all pictures of some items, in order; without gradient where vision is frozen."""
        pictures = [picture for item in items for picture in item.pictures]
        if not pictures:
            return []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            return self.backbone.features(pictures)

    def prepared(self, entries: Sequence[Entry]) -> Iterator[Prepared]:
        """Entries made ready, in order; pictures are decoded in threads, a few entries ahead.

        Raises:
            ItemError: an entry can't be encoded; its `name` is the row.
        """
        pool = media_pool()
        waiting: deque[tuple[Entry, Future[tuple[Picture, ...]]]] = deque()
        rest = iter(entries)
        while True:
            while len(waiting) < _AHEAD and (entry := next(rest, None)) is not None:
                waiting.append((entry, pool.submit(self._pictures, entry)))
            if not waiting:
                return
            entry, future = waiting.popleft()
            yield self._finish(entry, future.result())

    def _pictures(self, entry: Entry) -> tuple[Picture, ...]:
        try:
            self.backbone.check(entry.item)
            return tuple(self.backbone.picture(source) for source in entry.item.pictures)
        except ItemError as error:
            raise _at(entry, error) from None

    def _finish(self, entry: Entry, pictures: tuple[Picture, ...]) -> Prepared:
        instruction = instruction_for(self.backbone.spec, entry.instruction, entry.role)
        text = entry.item.text or ""
        given = Input(text, pictures, instruction, entry.role, max_length=entry.max_length)
        (outcome,) = self.backbone.prepare([given])
        if isinstance(outcome, ItemError):
            raise _at(entry, outcome)
        return outcome


def _at(entry: Entry, error: ItemError) -> ItemError:
    """The error with the row it is of, and the file if it names one."""
    reason = error.reason if error.name is None else f"{error.name}: {error.reason}"
    return ItemError(error.code, reason, stage=error.stage, name=entry.where or None)


def without_pixels(item: Prepared) -> Prepared:
    """The same ids and positions; pictures are left out, so that a whole batch can be kept."""
    return dataclasses.replace(item, pictures=())
