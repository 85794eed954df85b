"""Items in, unit vectors out: prepare, plan, forward, pool, check.

Pictures are decoded and cut by a small thread pool ahead of the model; identical inputs are encoded once; a
bad item costs only itself. Inference, training, mining and evaluation share this path.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from umr_plugins.backbones.base import Backbone, Input, Picture, Prepared
from umr_plugins.encoding.instructions import instruction_for
from umr_plugins.encoding.plan import plan_batches
from umr_plugins.encoding.worker import Worker, compute_with
from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.images import content_key
from umr_plugins.types import Encoded, FloatArray, Item, ItemLike, Role, as_item, chunks

_log = logging.getLogger(__name__)

WINDOW = 256
"""Items that are prepared and sorted together. Bounds memory (a page of 1,280 tokens is 3 MB of patches)."""

_AHEAD = 2  # windows being prepared while the model works on the one before
_CACHE_BYTES = 256 * 2**20  # vectors kept to answer repeated inputs within one call


@dataclass
class _Draft:
    """One item on its way: what its pool thread found out, or why it was refused."""

    index: int
    item: Item | None = None
    key: bytes = b""
    pictures: tuple[Picture, ...] = ()
    video: tuple[Picture, ...] = ()
    error: ItemError | None = None


class Engine:
    """Runs one backbone. All public methods may be called from any thread.

    Args:
        backbone: the loaded checkpoint; from now on only this engine's worker thread touches it.
        dim: length of the vectors; shorter than the hidden size cuts and renormalises.
        max_batch_tokens: budget of a forward pass, padding included.
    """

    def __init__(self, backbone: Backbone, dim: int, max_batch_tokens: int) -> None:
        self.backbone = backbone
        self.dim = dim
        self.max_batch_tokens = max_batch_tokens
        self.worker = Worker(backbone.spec.name)

    def stream(
        self, values: Iterable[ItemLike], role: Role, instruction: str | None = None
    ) -> Iterator[Encoded]:
        """Encode any number of items; yields one `Encoded` per window, positions over the whole input.

        Args:
            values: items; read lazily, at most a few windows ahead.
            role: `query` or `document`.
            instruction: for queries, see `Embedder.encode_queries`.
        """
        call = _Call(self, role, instruction_for(self.backbone.spec, instruction, role))
        pool = media_pool()
        waiting: deque[list[Future[_Draft]]] = deque()
        for window in chunks(enumerate(values), WINDOW):
            waiting.append([pool.submit(call.draft, index, value) for index, value in window])
            if len(waiting) > _AHEAD:
                yield call.encode([future.result() for future in waiting.popleft()])
        while waiting:
            yield call.encode([future.result() for future in waiting.popleft()])
        if call.truncated:
            _log.warning(
                "%d texts were longer than max_length=%d tokens and were cut at the end",
                call.truncated,
                self.backbone.spec.max_length,
            )

    def render(self, item: Item, role: Role, instruction: str | None = None) -> str:
        """The exact string that is encoded, special tokens and all; one picture token per picture.

        Of a video there is one slot for every two frames.
        """
        spec = self.backbone.spec
        self.backbone.check(item)
        chosen = instruction_for(spec, item.instruction or instruction, role)
        body = "".join(spec.video_slots(len(item.video)))
        body += spec.image_slot * len(item.pictures) + (item.text or "")
        before, after = spec.form(role, chosen).split("{body}")
        return before.replace("{instruction}", chosen or "") + body + after

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without template."""
        return self.worker.run(self.backbone.count_tokens, text)

    def close(self) -> None:
        """End the worker thread."""
        self.worker.close()


class _Call:
    """State of one `stream` call: its instruction, and the vectors already known."""

    def __init__(self, engine: Engine, role: Role, instruction: str | None) -> None:
        self.engine = engine
        self.role: Role = role
        self.instruction = instruction
        self.truncated = 0
        self._known: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._capacity = max(1024, _CACHE_BYTES // (4 * engine.dim))

    def draft(self, index: int, value: object) -> _Draft:
        """On a pool thread: read, check, hash and cut. Never raises for a bad item."""
        try:
            item = as_item(value, index)
            self.engine.backbone.check(item)
            instruction = self._instruction_of(item)
            key = hashlib.sha256()
            for part in (instruction or "", item.text or ""):
                raw = part.encode()
                key.update(len(raw).to_bytes(8, "big") + raw)
            key.update(len(item.video).to_bytes(8, "big"))
            for picture in (*item.video, *item.pictures):
                key.update(content_key(picture))
            pictures = tuple(self.engine.backbone.picture(source) for source in item.pictures)
            video = self.engine.backbone.video(item.video) if item.video else ()
        except ItemError as error:
            return _Draft(index, error=error.at(index))
        except InputError as error:
            return _Draft(index, error=ItemError("unsupported", str(error), index=index))
        return _Draft(index, item, key.digest(), pictures, video)

    def _instruction_of(self, item: Item) -> str | None:
        if item.instruction is None:
            return self.instruction
        return instruction_for(self.engine.backbone.spec, item.instruction, self.role)

    def encode(self, drafts: list[_Draft]) -> Encoded:
        """Tokenise, plan, run and check one window."""
        errors = [draft.error for draft in drafts if draft.error is not None]
        firsts: dict[bytes, _Draft] = {}  # one of each content that is not known yet
        for draft in drafts:
            if draft.error is None and draft.key not in self._known:
                firsts.setdefault(draft.key, draft)
        ready, refused = self._compose(list(firsts.values()))
        vectors, failed = self._run(ready)
        refused.update(failed)
        rows: list[FloatArray] = []
        kept: list[int] = []
        for draft in drafts:
            if draft.error is not None:
                continue
            if draft.key in refused:
                error = refused[draft.key]
                errors.append(ItemError(error.code, error.reason, stage=error.stage, index=draft.index))
                continue
            rows.append(vectors[draft.key] if draft.key in vectors else self._known[draft.key])
            kept.append(draft.index)
        self._remember(vectors)
        errors.sort(key=lambda error: error.index or 0)
        matrix = np.stack(rows) if rows else np.zeros((0, self.engine.dim), np.float32)
        return Encoded(matrix, tuple(kept), tuple(errors))

    def _remember(self, vectors: dict[bytes, FloatArray]) -> None:
        # Old entries go only between windows: within one, every row is still needed.
        self._known.update(vectors)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def _compose(self, drafts: list[_Draft]) -> tuple[dict[bytes, Prepared], dict[bytes, ItemError]]:
        inputs = [
            Input(
                draft.item.text or "",
                draft.pictures,
                self._instruction_of(draft.item),
                self.role,
                draft.video,
                len(draft.item.video),
            )
            for draft in drafts
            if draft.item is not None
        ]
        outcomes = self.engine.worker.run(self.engine.backbone.prepare, inputs)
        ready: dict[bytes, Prepared] = {}
        refused: dict[bytes, ItemError] = {}
        for draft, outcome in zip(drafts, outcomes, strict=True):
            if isinstance(outcome, ItemError):
                refused[draft.key] = outcome
            else:
                self.truncated += outcome.truncated
                ready[draft.key] = outcome
        return ready, refused

    def _run(self, ready: dict[bytes, Prepared]) -> tuple[dict[bytes, FloatArray], dict[bytes, ItemError]]:
        keys = list(ready)
        plan = plan_batches([ready[key].length for key in keys], self.engine.max_batch_tokens)
        batches = [[keys[position] for position in batch] for batch in plan]
        vectors: dict[bytes, FloatArray] = {}
        failed: dict[bytes, ItemError] = {}
        running = [
            self.engine.worker.submit(_forward, self.engine, [ready[key] for key in batch])
            for batch in batches
        ]
        try:
            for batch, future in zip(batches, running, strict=True):
                for key, outcome in zip(batch, future.result(), strict=True):
                    if isinstance(outcome, ItemError):
                        failed[key] = outcome
                    else:
                        vectors[key] = outcome
        except BaseException:
            for future in running:  # an interrupted call leaves no work behind in the queue
                future.cancel()
            raise
        return vectors, failed


def _forward(engine: Engine, items: list[Prepared]) -> list[FloatArray | ItemError]:
    """Run a batch; on failure halve it, so that only the culprit fails and a full memory is survived."""
    try:
        rows = _checked(engine, engine.backbone.forward(items))
    except RuntimeError as error:  # torch.OutOfMemoryError among them
        if len(items) == 1:
            _log.warning(
                "the model failed on an item of %d tokens: %s", items[0].length, type(error).__name__
            )
            reason = f"the model failed on it ({type(error).__name__}, {items[0].length} tokens)"
            return [ItemError("model", reason, stage="encode")]
        rows = None
    if rows is None:  # outside the handler: a live traceback would pin the failed batch's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(items) // 2
        return [*_forward(engine, items[:middle]), *_forward(engine, items[middle:])]
    return rows


def _checked(engine: Engine, hidden: torch.Tensor) -> list[FloatArray | ItemError]:
    """Cut, normalise in float32, and refuse rows that are not finite or have no direction."""
    pooled = hidden[:, : engine.dim].float()
    norms = pooled.norm(dim=1, keepdim=True)
    good = (torch.isfinite(pooled).all(1) & (norms[:, 0] > 1e-6)).cpu().tolist()
    unit: FloatArray = (pooled / norms).cpu().numpy()
    return [
        np.array(row)
        if fine
        else ItemError(
            "model",
            "the model gave a vector that is not finite or has no length; try dtype='float32'",
            stage="encode",
        )
        for row, fine in zip(unit, good, strict=True)
    ]


_pools: dict[int, ThreadPoolExecutor] = {}
_pool_lock = threading.Lock()


def media_pool() -> ThreadPoolExecutor:
    """The threads that prepare pictures for every model of this process."""
    with _pool_lock:
        if os.getpid() not in _pools:  # threads do not survive fork
            _pools[os.getpid()] = _started_pool()
        return _pools[os.getpid()]


def _unlock_child() -> None:
    global _pool_lock
    _pool_lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_child)


def _started_pool() -> ThreadPoolExecutor:
    """Decoding and resizing release the interpreter lock; one intra-op thread each spares the model."""
    size, threads = min(8, os.cpu_count() or 1), torch.get_num_threads()
    pool = ThreadPoolExecutor(size, "umr-media", initializer=compute_with, initargs=(1,))
    # Setting the number sets it for threads to come, too: start ours, then set it back.
    together = threading.Barrier(size + 1)
    for _ in range(size):
        pool.submit(together.wait)
    together.wait()
    torch.set_num_threads(threads)
    return pool


def with_progress(batches: Iterator[Encoded], total: int | None) -> Iterator[Encoded]:
    """Show a progress bar on stderr while batches arrive."""
    from tqdm import tqdm

    with tqdm(total=total, unit="item", desc="encoding") as bar:
        for batch in batches:
            bar.update(len(batch.kept) + len(batch.errors))
            yield batch


def join(batches: Iterable[Encoded], dim: int) -> Encoded:
    """One `Encoded` of many, in order."""
    parts = list(batches)
    vectors = [part.vectors for part in parts if len(part.vectors)]
    return Encoded(
        np.concatenate(vectors) if vectors else np.zeros((0, dim), np.float32),
        tuple(itertools.chain.from_iterable(part.kept for part in parts)),
        tuple(itertools.chain.from_iterable(part.errors for part in parts)),
    )
