"""`Reranker`: a multimodal model judges which documents answer a query (MM-Embed, arXiv 2411.02571)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umr_plugins.backbones.features import SHARED
from umr_plugins.backbones.head import head_rows
from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.registry import describe, resolve, resolve_adapter
from umr_plugins.backbones.rerankers import QWEN3_VL_RERANKER
from umr_plugins.encoding.answers import answer_ids, check_rendering
from umr_plugins.encoding.options import check_spec, choose_device, choose_dtype, positive
from umr_plugins.encoding.scoring import Judge, Judgement
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.prompts.rerank import DOMAINS, Domain, RerankPrompt, choose_prompt
from umr_plugins.ranking import Weight, check_rank, order
from umr_plugins.types import FloatArray, Item, ItemLike, Modality, RankedItem, as_item

_PRIORS = 256  # biases kept, by modalities and instruction

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
FEATURE_CACHE_BYTES = 256 * 2**20
"""Room for visual features, about 80 pages of 1,024 tokens with a 2B model in bfloat16."""


class Reranker:
    """A model that judges query and document together, loaded once, usable from any number of threads.

    The model is asked a question about the pair; the relevance is the probability of its positive answer
    against the negative one, from just those rows of its head in float32. What the prompts of one query have
    in common, the query's picture above all, is computed once, and visual features are kept for the next
    query, or taken from an `Embedder` of the same process whose vision weights are equal.

    Args:
        model: folder or Hugging Face id of an instruct checkpoint (Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
            LLaVA-NeXT), of Qwen3-VL-Reranker or LamRA-Rank.
        prompt: `"judge"`, `"qwen3-vl-reranker"`, `"lamra"`, a template of your own with `{query}` before
            `{document}` (and `{instruction}`, `{question}`, `{answers}`), or a `RerankPrompt`; by default the
            model's own.
        answers: the positive and the negative answer; `("Yes", "No")`, or `("A", "B")` for a multiple choice.
        domain: which questions are asked: `"general"`, `"news"`, `"fashion"`, `"everyday"`.
        calibrate: subtract the log-odds of a prompt with nothing in it (arXiv 2102.09690), so that questions
            of different bias can be compared.
        device: torch device; the GPU when there is one.
        dtype: `"float32"`, `"bfloat16"` or a torch dtype; bfloat16 where the machine computes in it.
        min_image_tokens: fewest visual tokens of a picture.
        max_image_tokens: most visual tokens of a picture.
        max_images: most pictures in one prompt; with 1, a query's and a document's go onto one canvas.
        max_length: tokens of a prompt; a longer document is cut at its end, with a warning.
        max_batch_tokens: budget of one forward pass; lower it when memory is short.
        feature_cache_bytes: room for visual features in this process, shared by all its models: the largest
            wish counts, and stays for the life of the process; 0 asks for none.
        revision: branch, tag or commit of a hub id.
        adapter: folder or hub id of a LoRA adapter as peft saves it, merged into the weights.

    Raises:
        ModelNotFoundError: no such model; says what was tried.
        CheckpointError: the checkpoint is incomplete, can't judge, or its chat form can't be written.
        InputError: an option has a value that is not allowed.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        prompt: str | RerankPrompt | None = None,
        answers: tuple[str, str] | None = None,
        domain: Domain = "general",
        calibrate: bool = False,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_images: int | None = None,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        revision: str | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        checked = choose_prompt(prompt, answers, "judge")  # before anything is downloaded
        if domain not in DOMAINS:
            near = difflib.get_close_matches(str(domain), DOMAINS, n=1)
            raise InputError(
                f"domain must be one of {list(DOMAINS)}, got {domain!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        wrong = isinstance(feature_cache_bytes, bool) or not isinstance(feature_cache_bytes, int)
        if wrong or feature_cache_bytes < 0:
            raise InputError(f"feature_cache_bytes must be 0 or more, got {feature_cache_bytes!r}")
        checkpoint = resolve(model, revision, role="reranker")
        if adapter is not None:
            checkpoint = dataclasses.replace(checkpoint, adapter=resolve_adapter(adapter))
        options = {
            "min_image_tokens": min_image_tokens,
            "max_image_tokens": max_image_tokens,
            "max_images": max_images,
            "max_length": max_length,
        }
        given = {name: value for name, value in options.items() if value is not None}
        spec = dataclasses.replace(checkpoint.spec, **given)  # type: ignore[arg-type]  # checked just below
        if prompt == QWEN3_VL_RERANKER.prompt and spec.family == QWEN3_VL_RERANKER.family:
            # The system turn is part of what it was trained with.
            spec = dataclasses.replace(spec, template=QWEN3_VL_RERANKER.template)
        check_spec(spec)
        positive("max_images", spec.max_images)
        self.prompt = checked if prompt is not None else choose_prompt(None, answers, spec.prompt)
        """What the model is asked."""
        if domain != "general" and "{question}" not in self.prompt.template:
            raise InputError(
                f"the prompt {self.prompt.name!r} asks no question of ours, so domain={domain!r} would "
                'change nothing; leave it away, or use prompt="judge"'
            )
        self.calibrate = calibrate
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, spec, self.device)
        checkpoint = dataclasses.replace(checkpoint, spec=spec)
        backbone = load_backbone(checkpoint, self.device, self.dtype)
        self.spec = spec
        """What the model is and how it is asked."""
        self.checkpoint = checkpoint
        """Where its files are."""
        check_rendering(backbone, self.prompt)
        ids = answer_ids(backbone, self.prompt)
        rows = head_rows(checkpoint, backbone, [*ids[0], *ids[1]])
        budget = max_batch_tokens
        if budget is None:
            budget = 32_768 if self.device.type == "cuda" else 8_192
        SHARED.reserve(feature_cache_bytes)
        self._judge = Judge(
            backbone, self.prompt, domain, rows, len(ids[0]), positive("max_batch_tokens", budget)
        )
        self._priors: OrderedDict[tuple[Modality, Modality, str | None], float] = OrderedDict()
        said: dict[str, Any] = {
            "prompt": prompt,
            "answers": answers,
            "domain": None if domain == "general" else domain,
            "calibrate": calibrate or None,
            **given,
            "revision": revision,
            "adapter": None if adapter is None else str(checkpoint.adapter),
        }
        folder = checkpoint.origin == "folder"
        self.config: dict[str, Any] = {
            "model": str(checkpoint.folder) if folder else checkpoint.given,
            **{name: value for name, value in said.items() if value is not None},
        }
        """Keyword arguments that make a reranker of the same judgements."""
        self._machine: dict[str, Any] = {
            "device": None if device is None else str(self.device),
            "dtype": None if dtype is None else str(self.dtype).removeprefix("torch."),
            "max_batch_tokens": max_batch_tokens,
        }
        if feature_cache_bytes != FEATURE_CACHE_BYTES:
            self._machine["feature_cache_bytes"] = feature_cache_bytes

    def __copy__(self) -> Reranker:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Reranker:
        return self  # nothing of it changes but caches; a copy would load the weights again

    def __reduce__(self) -> tuple[Any, ...]:
        # Weights and threads don't travel: the receiving process loads the model, once.
        return (_restored, ({**self.config, **self._machine},))

    @property
    def model(self) -> str:
        """The model's name as it was given."""
        return self.checkpoint.given

    def score(self, query: ItemLike, documents: Sequence[ItemLike]) -> FloatArray:
        """Relevance of each document to the query: float32 `[n]` in [0, 1], input order.

        Args:
            query: text, picture or both; its `instruction` says what counts as an answer.
            documents: any mix of texts, pictures and both.

        Raises:
            BatchError: names every document that can't be judged; `rank` goes on without them.
            ItemError: the query can't be read.
        """
        _, _, outcomes, _ = self._outcomes(query, documents)
        errors = [outcome for outcome in outcomes if isinstance(outcome, ItemError)]
        if errors:
            raise BatchError(
                errors, len(outcomes), "judged", "Mend them, or use rank(), which keeps them in their places."
            )
        return np.array(outcomes, np.float32)

    def rank(
        self,
        query: ItemLike,
        documents: Sequence[ItemLike],
        top_n: int | None = None,
        first_stage: Sequence[float | None] | None = None,
        weight: Weight = None,
        explain: bool = False,
    ) -> list[RankedItem]:
        """Documents, best first, by `first_stage + weight * relevance`; without a first stage by relevance.

        No document is lost: one that can't be judged has `relevance=None` and an `error`, and keeps its
        first-stage rank before `top_n` is applied. Ties keep the first stage's order.

        Args:
            query: as in `score`.
            documents: as in `score`, usually the first stage's best 10 to 100.
            top_n: most documents to return; all of them by default.
            first_stage: the first stage's score of each document, higher is better. Cosines count as they
                are; scores beyond [-1, 1] are scaled to [0, 1]; if one is None, none is used.
            weight: how much the relevance counts. None is 1.0, or 0.5 where all documents are pictures and
                the query is text, and 0.3 where all are texts and the query is a picture (LamRA weighs its
                reranker down on captions, where reranking alone can hurt). `"pure"` orders by relevance only.
            explain: give the exact prompts that were judged.

        Raises:
            ItemError: the query can't be read.
            InputError: an argument has a value that is not allowed.
        """
        check_rank(len(documents), top_n, first_stage, weight)
        asked, items, outcomes, prompts = self._outcomes(query, documents)
        return order(
            items,
            outcomes,
            query=asked.modality,
            top_n=top_n,
            first_stage=first_stage,
            weight=weight,
            prompts=prompts if explain else None,
        )

    def _outcomes(
        self, query: ItemLike, documents: Sequence[ItemLike]
    ) -> tuple[Item, list[Item], list[float | ItemError], list[str | None]]:
        if isinstance(documents, str | bytes | Path | Item) or not isinstance(documents, Sequence):
            raise InputError(
                f"documents is a list of items, got {type(documents).__name__}; for one item pass [item]"
            )
        try:
            asked = as_item(query)
            judged = list(self._judge.judge(asked, documents))
        except ItemError as error:
            named = f"the query: {error.name}" if error.name else "the query"
            raise ItemError(error.code, error.reason, stage=error.stage, name=named) from None
        items = [_shown(document) for document in documents]
        outcomes = [
            self._relevance(asked, item, each, index)
            for index, (item, each) in enumerate(zip(items, judged, strict=True))
        ]
        return asked, items, outcomes, [each.prompt for each in judged]

    def _relevance(self, query: Item, document: Item, judged: Judgement, index: int) -> float | ItemError:
        if judged.log_odds is None:
            return (judged.error or ItemError("model", "it was not judged")).at(index)
        odds = judged.log_odds
        if self.calibrate:
            key = (query.modality, document.modality, query.instruction)
            try:
                odds -= self._prior(key, query, document)
            except ItemError as error:
                return error.at(index)
        return sigmoid(odds)

    def _prior(self, key: tuple[Modality, Modality, str | None], query: Item, document: Item) -> float:
        found = self._priors.get(key)
        if found is None:
            found = self._priors[key] = self._judge.prior(query, document)
            if len(self._priors) > _PRIORS:
                self._priors.popitem(last=False)
        return found

    def info(self) -> dict[str, Any]:
        """What is loaded, as JSON values."""
        return {
            **describe(self.checkpoint),
            "asked": self.prompt.template,
            "answers": list(self.prompt.answers),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._judge.worker.closed

    def close(self) -> None:
        """End the worker thread. Later calls raise."""
        self._judge.close()


def sigmoid(log_odds: float) -> float:
    """The probability of log-odds, without overflow."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    return math.exp(log_odds) / (1 + math.exp(log_odds))


def _shown(document: ItemLike) -> Item:
    """The document as an item, also one that is refused: nothing is lost from a ranking."""
    try:
        return as_item(document)
    except ItemError:
        if isinstance(document, Item):
            return document
        return Item(document if isinstance(document, str) else repr(document))


_shared: dict[str, Reranker] = {}
_shared_lock = threading.Lock()


def shared_reranker(model: str | Path = DEFAULT_MODEL, **options: Any) -> Reranker:
    """The one reranker of this process for these arguments, loaded on first use.

    Framework objects are copied, pickled and rebuilt freely; through this they share one set of weights.
    """
    given = {name: value for name, value in options.items() if value is not None}
    folder = Path(model).expanduser()
    named = str(folder.resolve() if folder.is_dir() else model)
    key = json.dumps(
        {"model": named, **given}, sort_keys=True, default=lambda value: str(value).removeprefix("torch.")
    )
    with _shared_lock:
        if key not in _shared or _shared[key].closed:
            _shared[key] = Reranker(model, **given)
        return _shared[key]


def _restored(options: dict[str, Any]) -> Reranker:
    return shared_reranker(**options)


__all__ = ["DEFAULT_MODEL", "Reranker", "shared_reranker"]
