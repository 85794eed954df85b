"""GradCache (arXiv 2101.06983) for texts and pictures: the gradient of a whole batch, chunk by chunk.

Contrastive losses need all embeddings of a batch at once, but not all activations. So every chunk is encoded
without gradient first, the loss is taken on the embeddings alone, and then each chunk is encoded again and
pulled by the gradient that the loss left at its embeddings. Memory is that of one chunk.

Chunks are cut by tokens, visual ones included, not by examples: a page costs as much as forty questions.
Pictures are decoded when their chunk's turn comes. Where the vision tower is frozen, features of pictures
are kept from the first pass to the second, up to a number of bytes; beyond it they are computed again. The
last chunk keeps its activations instead of being encoded twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from umr_plugins.backbones.base import Prepared
from umr_plugins.backbones.features import Features
from umr_plugins.encoding.trainable import Entry, TrainableEncoder, without_pixels
from umr_plugins.errors import ItemError
from umr_plugins.training.distributed import any_true
from umr_plugins.training.heap import Heap

Losses = Callable[..., Iterable[torch.Tensor]]
"""From embeddings `[n, hidden]` (and a copy of each shared parameter) to losses that are summed up."""


@dataclass(frozen=True)
class Step:
    """What a step of `GradCache` did, besides leaving gradients.

    Args:
        loss: the sum of the losses.
        embeddings: `[n, hidden]`, detached, in the order of the entries.
        tokens: encoded, visual ones included.
        chunks: how many there were.
        truncated: texts that were cut.
        recomputed: entries whose visual features did not fit between the passes.
    """

    loss: torch.Tensor
    embeddings: torch.Tensor
    tokens: int
    chunks: int
    truncated: int
    recomputed: int


@dataclass
class _Chunk:
    """Entries that are encoded together, and what is kept of them between the passes."""

    entries: list[Entry]
    numbers: list[int]
    items: list[Prepared]
    features: list[Features] | None = None
    random: tuple[torch.Tensor, ...] = ()
    rows: torch.Tensor | None = None  # with activations


@dataclass
class GradCache:
    """Takes training steps.

    Args:
        encoder: what is trained.
        max_tokens: budget of a chunk, padding included; an entry beyond it is a chunk of its own.
        max_entries: most entries of a chunk.
        feature_bytes: memory for visual features between the two passes.
        model: `encoder`, as it is wrapped for several processes.
        no_sync: makes a context in which the wrapper does not exchange gradients.
        backward: `torch.Tensor.backward`, or an accelerator's.
        autocast: makes the context in which `model` computes.
        even: have all processes take the same number of turns, for wrappers that exchange weights in every
            forward pass (FSDP, ZeRO-3); a process with fewer chunks repeats some and gives them no weight.
    """

    encoder: TrainableEncoder
    max_tokens: int = 8192
    max_entries: int | None = None
    feature_bytes: int = 2**30
    model: Callable[[list[Prepared], list[Features] | None], torch.Tensor] | None = None
    no_sync: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    even: bool = False
    _heap: Heap = field(default_factory=Heap)

    def step(
        self, entries: Sequence[Entry], losses: Losses, shared: Sequence[torch.nn.Parameter] = ()
    ) -> Step:
        """Add the gradient of the summed losses to the encoder's parameters.

        Equal to encoding all entries at once and calling backward, up to rounding; with dropout, to doing so
        chunk by chunk under the same random states.

        Args:
            entries: at least one.
            losses: called once with all embeddings `[n, hidden]` and a copy of each shared parameter.
            shared: parameters that the losses use themselves, such as a learned temperature.

        Raises:
            ItemError: an entry can't be encoded; no gradient was added.
        """
        chunks, rows, turns = self._together(entries)
        order = torch.tensor([number for chunk in chunks for number in chunk.numbers])
        leaf = torch.cat(rows)[order.argsort().to(rows[0].device)].requires_grad_()
        copies = [parameter.detach().clone().requires_grad_() for parameter in shared]
        total = torch.zeros((), device=leaf.device)
        for loss in losses(leaf, *copies):
            torch.autograd.backward(loss)
            total += loss.detach()
        also = [
            (parameter * copy.grad).sum()
            for parameter, copy in zip(shared, copies, strict=True)
            if copy.grad is not None
        ]
        pull = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        recomputed = self._second_pass(chunks, turns, pull, also)
        items = [item for chunk in chunks for item in chunk.items]
        return Step(
            total,
            leaf.detach(),
            sum(item.length for item in items),
            len(chunks),
            sum(item.truncated for item in items),
            recomputed,
        )

    def _together(self, entries: Sequence[Entry]) -> tuple[list[_Chunk], list[torch.Tensor], int]:
        """The first pass; an entry that one process can't encode is an error in all of them."""
        problem: ItemError | None = None
        try:
            found = self._first_pass(entries)
        except ItemError as error:
            problem = error
        if any_true(problem is not None, self.encoder.backbone.device):
            raise problem or ItemError("unreadable", "another process can't read its part of the batch")
        return found

    def _first_pass(self, entries: Sequence[Entry]) -> tuple[list[_Chunk], list[torch.Tensor], int]:
        """Embeddings of all chunks; the last one keeps its activations. Also how many turns were taken."""
        chunks: list[_Chunk] = []
        rows: list[torch.Tensor] = []
        room, turns = self.feature_bytes, 0
        coming = self._cut(entries)
        chunk = next(coming, None)
        while self._anywhere(chunk is not None):
            turns += 1
            if chunk is None:
                with torch.no_grad():
                    self._encode(chunks[0])
                continue
            after = next(coming, None)
            keep = after is None and not self.even
            chunk.features = self._features(chunk.items)
            chunk.random = _random_state(self.encoder.backbone.device)
            with self.no_sync() if chunks else contextlib.nullcontext(), torch.set_grad_enabled(keep):
                made = self._run(chunk.items, chunk.features)
            rows.append(made.detach())
            chunk.rows = made if keep else None
            size = sum(part.nbytes for part in chunk.features or ())
            if keep or size > room:
                chunk.features = None
            else:
                room -= size
            chunk.items = [without_pixels(item) for item in chunk.items]
            chunks.append(chunk)
            chunk = after
        return chunks, rows, turns

    def _second_pass(
        self, chunks: list[_Chunk], turns: int, pull: torch.Tensor, also: list[torch.Tensor]
    ) -> int:
        """Pull every chunk by its part of the gradient; wrappers exchange gradients in the last turn only.

        Returns how many entries' visual features were computed again.
        """
        recomputed = 0
        # The one that still holds its activations goes first: they are gone when the next is encoded.
        queue = sorted(chunks, key=lambda chunk: chunk.rows is None)
        for turn in range(turns):
            chunk, final = queue[turn % len(queue)], turn == turns - 1
            with contextlib.nullcontext() if final else self.no_sync():
                rows, chunk.rows = chunk.rows, None
                if rows is None:
                    if chunk.features is None and turn < len(queue) and self.encoder.vision_is_frozen:
                        recomputed += sum(bool(entry.item.pictures) for entry in chunk.entries)
                    rows = self._encode(chunk)
                part = pull[chunk.numbers] if turn < len(queue) else torch.zeros_like(rows)
                surrogate = (rows * part).sum()
                self.backward(sum(also, surrogate) if final else surrogate)
            if turn + len(queue) >= turns:  # not to be repeated
                chunk.features = None
        return recomputed

    def _encode(self, chunk: _Chunk) -> torch.Tensor:
        """Encode a chunk again, as it was encoded before."""
        items, features = chunk.items, chunk.features
        if features is None and any(entry.item.pictures for entry in chunk.entries):
            items = list(self.encoder.prepared(chunk.entries))
            features = self._features(items)
        device = self.encoder.backbone.device
        now = _random_state(device)
        _set_random_state(chunk.random, device)
        try:
            return self._run(items, features)
        finally:
            _set_random_state(now, device)

    def _run(self, items: list[Prepared], features: list[Features] | None) -> torch.Tensor:
        if self.encoder.backbone.device.type == "cpu":
            self._heap.tidy()
        return (self.model or self.encoder)(items, features)

    def _features(self, items: list[Prepared]) -> list[Features] | None:
        """Features of pictures where they need no gradient."""
        if not self.encoder.vision_is_frozen:
            return None
        with torch.no_grad(), self.autocast():
            return self.encoder.features(items)

    def _anywhere(self, flag: bool) -> bool:
        return any_true(flag, self.encoder.backbone.device) if self.even else flag

    def _cut(self, entries: Sequence[Entry]) -> Iterator[_Chunk]:
        """Chunks of neighbours, in an order that is known without opening a picture."""
        order = sorted(range(len(entries)), key=lambda number: _size(entries[number]))
        numbers: list[int] = []
        items: list[Prepared] = []
        ready = self.encoder.prepared([entries[number] for number in order])
        for number, item in zip(order, ready, strict=True):
            if numbers and not self._fits([*items, item]):
                yield _Chunk([entries[each] for each in numbers], numbers, items)
                numbers, items = [], []
            numbers.append(number)
            items.append(item)
        if numbers:
            yield _Chunk([entries[each] for each in numbers], numbers, items)

    def _fits(self, items: list[Prepared]) -> bool:
        lengths = [item.length for item in items]
        tokens = sum(lengths) if self.encoder.packed else len(lengths) * max(lengths)
        return tokens <= self.max_tokens and len(items) <= (self.max_entries or len(items))


def _size(entry: Entry) -> tuple[int, int]:
    return len(entry.item.pictures), len(entry.item.text or "")


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """What dropout draws from: the CPU's generator and the device's own."""
    own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *own)


def _set_random_state(state: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
