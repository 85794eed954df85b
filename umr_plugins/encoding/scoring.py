"""A query and documents in, log-odds out: write prompts, share their beginning, forward, read two answers.

Every prompt is tokenised whole; what all prompts of a query begin with is found, not assumed, and computed
once. Pictures are prepared by threads ahead of the model; equal prompts are judged once.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import torch

from umr_plugins.backbones.base import Backbone, Picture, Piece, Prepared
from umr_plugins.backbones.features import SHARED
from umr_plugins.backbones.prefix import Prefix, common, last_states, part, prefill
from umr_plugins.backbones.tokens import bounded
from umr_plugins.encoding.canvas import side_by_side
from umr_plugins.encoding.engine import media_pool
from umr_plugins.encoding.plan import plan_batches
from umr_plugins.encoding.worker import Worker
from umr_plugins.errors import InputError, ItemError
from umr_plugins.prompts.rerank import CANVAS, CONTENT_FREE, Domain, RerankPrompt
from umr_plugins.types import Item, ItemLike, as_item, chunks

_log = logging.getLogger(__name__)

WINDOW = 32
"""Documents that are prepared and sorted together; bounds memory whatever the number of documents."""

_FAILURES = (RuntimeError, IndexError, ValueError)  # torch.OutOfMemoryError is a RuntimeError

_QUERY_SHARE = 4  # a query's words may take a quarter of the context


@dataclass(frozen=True)
class Judgement:
    """What came of one document.

    Args:
        log_odds: of the positive answer against the negative one; None if it could not be judged.
        prompt: the exact string that was judged.
        error: why not.
    """

    log_odds: float | None = None
    prompt: str | None = None
    error: ItemError | None = None


@dataclass(frozen=True)
class _Side:
    """A query or a document whose pictures are cut."""

    item: Item
    pictures: tuple[Picture, ...]
    canvas: bool = False
    """Whether its picture shares a canvas, which stands in the query."""


@dataclass(frozen=True)
class _Draft:
    side: _Side | None
    canvas: Picture | None = None
    error: ItemError | None = None


@dataclass(frozen=True)
class _Ready:
    prepared: Prepared
    text: str

    @cached_property
    def key(self) -> bytes:
        digest = hashlib.sha256(self.prepared.ids.tobytes())
        for picture in self.prepared.pictures:
            digest.update(picture.key)
        return digest.digest()


class Judge:
    """Runs one backbone as a judge. May be called from any thread.

    Args:
        backbone: the loaded checkpoint; from now on only this judge's worker thread touches it.
        prompt: what it is asked.
        domain: which questions it is asked.
        rows: of the language-model head `[answer tokens, hidden]` float32: those of the positive answer, then
            those of the negative one.
        positives: how many of the rows are the positive answer's.
        max_batch_tokens: budget of a forward pass, shared beginning and padding included.
        share_prefix: whether the beginning is computed once (as it should be) or for each prompt.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: RerankPrompt,
        domain: Domain,
        rows: torch.Tensor,
        positives: int,
        max_batch_tokens: int,
        *,
        share_prefix: bool = True,
    ) -> None:
        self.backbone = backbone
        self.prompt = prompt
        self.domain: Domain = domain
        self.max_batch_tokens = max_batch_tokens
        self.share_prefix = share_prefix
        self.worker = Worker(backbone.spec.name)
        self._rows, self._positives = rows, positives
        self._before, self._after = backbone.spec.template.split("{body}")

    def judge(self, query: Item, documents: Iterable[ItemLike]) -> Iterator[Judgement]:
        """Judge documents, in input order; read lazily, a window ahead.

        Raises:
            ItemError: the query can't be read, or its words and pictures alone fill the context.
        """
        asked = self._side(self._shortened(query))
        self.worker.run(self._check_room, asked)
        call = _Call(self, asked)
        waiting: deque[list[Future[_Draft]]] = deque()
        for window in chunks(enumerate(documents), WINDOW):
            waiting.append([media_pool().submit(call.draft, index, value) for index, value in window])
            if len(waiting) > 1:
                yield from call.judge([future.result() for future in waiting.popleft()])
        while waiting:
            yield from call.judge([future.result() for future in waiting.popleft()])
        if call.truncated:
            _log.warning(
                "%d documents were longer than max_length=%d tokens allow and were cut at the end",
                call.truncated,
                self.backbone.spec.max_length,
            )

    def prior(self, query: Item, document: Item) -> float:
        """Log-odds of a prompt for such a pair with nothing in it: the bias of its form."""
        said = Item(CONTENT_FREE, instruction=query.instruction)
        pieces = self._pieces(_Side(said, ()), _Side(Item(CONTENT_FREE), ()), self._question(query, document))
        ready = self.worker.run(self._prepare, pieces)
        (found,) = self.worker.run(self._log_odds, None, [ready.prepared], 0)
        if isinstance(found, ItemError):
            raise found
        return found

    def close(self) -> None:
        """End the worker thread."""
        self.worker.close()

    def _side(self, item: Item) -> _Side:
        self.backbone.check(item)
        pictures = tuple(self.backbone.picture(source) for source in item.pictures)
        if SHARED.max_bytes:
            for picture in pictures:
                _ = picture.key  # hashed here, on a thread that does not hold up the model
        return _Side(item, pictures)

    def _check_room(self, query: _Side) -> None:
        """Refuse a query that leaves no room for any document; else every document would seem at fault."""
        most = self.backbone.spec.max_length
        empty = _Side(Item(""), ())
        length = self._prepare(
            self._pieces(query, empty, self._question(query.item, empty.item))
        ).prepared.length
        if length >= most:
            raise ItemError(
                "too_large",
                f"its instruction, words and pictures take {length} tokens with the prompt and leave no room "
                f"for a document within max_length={most}; shorten the instruction, lower max_image_tokens "
                "or raise max_length",
            )

    def _shortened(self, query: Item) -> Item:
        limit = self.backbone.spec.max_length // _QUERY_SHARE
        count = self.worker.run(self.backbone.count_tokens, query.text or "")
        if count <= limit:
            return query
        _log.warning(
            "the query has %d tokens; documents are judged by the first %d, a quarter of max_length=%d",
            count,
            limit,
            self.backbone.spec.max_length,
        )
        text = self.worker.run(self.backbone.cut, query.text or "", count - limit)
        return Item(text, query.image, query.images, query.video, query.instruction)

    def _question(self, query: Item, document: Item, *, canvas: bool = False) -> str:
        asked = self.prompt.questions.get((query.modality, document.modality, self.domain), "")
        return (CANVAS if canvas else "") + asked

    def _pieces(self, query: _Side, document: _Side, question: str) -> list[Piece]:
        prompt = self.prompt
        said = query.item.instruction or prompt.instruction
        words = query.item.text or prompt.empty * (not query.pictures)
        if prompt.instruct_query and query.item.instruction:
            words = f"{query.item.instruction} {words}".rstrip()
        if document.canvas and "{question}" not in prompt.template:
            words = CANVAS + words
        shown = document.pictures or document.canvas
        user = {
            "instruction": [Piece(said)],
            "query": [*(Piece(picture=each) for each in query.pictures), Piece(words)],
            "document": [
                *(Piece(picture=each) for each in document.pictures),
                Piece(document.item.text or prompt.empty * (not shown)),
            ],
            "question": [Piece(question, fixed=True)],
            "answers": [Piece(prompt.offered(), fixed=True)],
            "": [],
        }
        pieces = [Piece(self._before, fixed=True)]
        for literal, slot in prompt.parts():
            pieces += [Piece(literal, fixed=True), *user[slot]]
        return [*pieces, Piece(self._after, fixed=True)]

    def _prepare(self, pieces: list[Piece]) -> _Ready:
        slot = self.backbone.spec.image_slot
        text = "".join(slot if piece.picture is not None else piece.text for piece in pieces)
        return _Ready(self.backbone.prompt(pieces), text)

    def _prefill(self, beginning: Prepared) -> Prefix | None:
        try:
            return prefill(self.backbone, beginning)
        except _FAILURES as error:  # too long to keep: each prompt then runs whole
            _log.warning("the query's part could not be computed once: %s", error)
            return None

    def _log_odds(
        self, prefix: Prefix | None, prompts: list[Prepared], shared: int
    ) -> list[float | ItemError]:
        """Run a batch; on failure halve it, so that only the culprit fails and a full memory is survived."""
        try:
            states = last_states(self.backbone, prefix, prompts, shared)
            logits = states @ self._rows.T
            odds = logits[:, : self._positives].logsumexp(1) - logits[:, self._positives :].logsumexp(1)
            return [
                value
                if math.isfinite(value)
                else ItemError(
                    "model",
                    "the model's answer is not a finite number; try dtype='float32'",
                    stage="encode",
                )
                for value in odds.tolist()
            ]
        except _FAILURES as error:
            if len(prompts) == 1:
                _log.warning(
                    "the model failed on a prompt of %d tokens: %s", prompts[0].length, type(error).__name__
                )
                kind = type(error).__name__
                reason = f"the model failed on it ({kind}, {prompts[0].length} tokens)"
                return [ItemError("model", reason, stage="encode")]
        # Outside the handler: a live traceback would pin the failed batch's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(prompts) // 2
        return [
            *self._log_odds(prefix, prompts[:middle], shared),
            *self._log_odds(prefix, prompts[middle:], shared),
        ]


class _Call:
    """State of one query: its prompts' common beginning, and what was judged already."""

    def __init__(self, judge: Judge, query: _Side) -> None:
        self.owner = judge
        self.query = query
        self.truncated = 0
        self._prefix: Prefix | None = None
        self._tried = False
        self._known: dict[bytes, float | ItemError] = {}

    def draft(self, index: int, value: ItemLike) -> _Draft:
        """On a pool thread: read, check and cut. Never raises for a bad document."""
        backbone, query = self.owner.backbone, self.query
        try:
            item = as_item(value, index)
            count = len(query.item.pictures) + len(item.pictures)
            if count <= backbone.spec.max_images:
                return _Draft(self.owner._side(item))
            if len(query.item.pictures) == len(item.pictures) == 1:
                backbone.check(item)
                both = side_by_side(query.item.pictures[0], item.pictures[0])
                return _Draft(_Side(item, (), canvas=True), backbone.picture(both))
            raise ItemError(
                "unsupported",
                f"{backbone.spec.name} takes {backbone.spec.max_images} pictures in a prompt at most; query "
                f"and document have {count}",
            )
        except ItemError as error:
            return _Draft(None, error=error.at(index))
        except InputError as error:
            return _Draft(None, error=ItemError("unsupported", str(error), index=index))

    def judge(self, drafts: list[_Draft]) -> list[Judgement]:
        """Write, plan and run one window."""
        ready = self.owner.worker.run(lambda: [self._compose(draft) for draft in drafts])
        fresh = {
            each.key: each.prepared
            for each in ready
            if isinstance(each, _Ready) and each.key not in self._known
        }
        self._run(fresh)
        return [
            Judgement(error=each)
            if isinstance(each, ItemError)
            else self._judgement(each, self._known[each.key])
            for each in ready
        ]

    def _judgement(self, ready: _Ready, found: float | ItemError) -> Judgement:
        if isinstance(found, ItemError):
            return Judgement(None, ready.text, found)
        return Judgement(found, ready.text)

    def _compose(self, draft: _Draft) -> _Ready | ItemError:
        """The prompt of a document, its text cut to what the context leaves."""
        if draft.side is None:
            return draft.error or ItemError("unsupported", "unreadable document")
        owner, document, query = self.owner, draft.side, self.query
        question = owner._question(query.item, document.item, canvas=draft.canvas is not None)
        if draft.canvas is not None:
            query = _Side(query.item, (draft.canvas,))
        most = owner.backbone.spec.max_length

        def written(text: str) -> _Ready:
            item = Item(text, document.item.image, document.item.images)
            side = _Side(item, document.pictures, document.canvas)
            return owner._prepare(owner._pieces(query, side, question))

        whole = document.item.text or ""
        text = bounded(whole, most)  # a book in one string costs milliseconds
        ready = written(text)
        if text != whole and ready.prepared.length <= most:  # long runs of blanks: the prefix decides nothing
            text, ready = whole, written(whole)
        cut = ready.prepared.length > most
        while ready.prepared.length > most and text:
            # A token more or less can come of the joints, so it may take another round.
            text = owner.backbone.cut(text, ready.prepared.length - most)
            ready = written(text)
        if ready.prepared.length > most or (document.item.text and not text):
            return ItemError(
                "too_large",
                f"the prompt, the query and the pictures take {ready.prepared.length} tokens and leave no "
                f"room for the document within max_length={most}; raise max_length or lower "
                "max_image_tokens",
            )
        self.truncated += cut
        return ready

    def _run(self, fresh: dict[bytes, Prepared]) -> None:
        if not fresh:
            return
        owner, keys, prompts = self.owner, list(fresh), list(fresh.values())
        if owner.share_prefix and not self._tried and len(prompts) > 1:
            self._tried = True
            shared = min(common(prompts[0], prompt) for prompt in prompts[1:])
            beginning = part(prompts[0], 0, min([shared, *(prompt.length - 1 for prompt in prompts)]))
            if beginning.length:
                self._prefix = owner.worker.run(owner._prefill, beginning)
        prefix = self._prefix
        starts = [
            0 if prefix is None else min(common(prefix.prompt, prompt), prompt.length - 1)
            for prompt in prompts
        ]
        plan = plan_batches([prompt.length for prompt in prompts], owner.max_batch_tokens)
        running = []
        for batch in plan:
            members = [prompts[number] for number in batch]
            shared = _whole(members, [starts[number] for number in batch])
            running.append(owner.worker.submit(owner._log_odds, prefix, members, shared))
        try:
            for batch, future in zip(plan, running, strict=True):
                self._known.update(zip([keys[n] for n in batch], future.result(), strict=True))
        except BaseException:
            for future in running:  # an interrupted call leaves no work behind in the queue
                future.cancel()
            raise


def _whole(prompts: list[Prepared], starts: list[int]) -> int:
    """The longest beginning that all prompts of a batch share and that cuts no picture."""
    shared = min(starts)
    for prompt in prompts:
        for first, stop in prompt.spans:
            if first < shared < stop:
                shared = first
    return shared
