"""From judgements to an order: interpolation with the first stage, ties, and documents nobody could judge.

Reranking alone can hurt (LamRA adds its relevance to the first stage's cosine, and less of it on captions),
so both count. Imports no torch; `Reranker` and the test double share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal

from umr_plugins.errors import InputError, ItemError
from umr_plugins.types import Item, Modality, RankedItem

Weight = float | Literal["pure"] | None
"""How much a relevance in [0, 1] counts beside a first-stage score: a number, by the task (None), or all."""

DEFAULT_WEIGHT = 1.0
TASK_WEIGHTS: dict[tuple[Modality, Modality], float] = {("text", "image"): 0.5, ("image", "text"): 0.3}
"""Where the first stage is to be trusted more: captions, after LamRA's weights for MSCOCO."""


def check_rank(
    total: int, top_n: int | None, first_stage: Sequence[float | None] | None, weight: Weight
) -> list[float] | None:
    """The first stage's scores as similarities, or None if there are none; raises `InputError`.

    Scores beyond [-1, 1] (BM25, say) are scaled to [0, 1] by their least and greatest, so that a weight means
    the same whatever the first stage was. If a score is missing, none is used.
    """
    if top_n is not None and not (_is(top_n, Integral) and top_n >= 1):
        raise InputError(f"top_n must be a whole number of at least 1, or None for all, got {top_n!r}")
    if weight is not None and weight != "pure" and not (_is(weight, Real) and 0 <= float(weight) < 1e9):
        raise InputError(
            'weight must be a number of at least 0, "pure" to order by relevance alone, or None for the '
            f"task's own; got {weight!r}"
        )
    if first_stage is None:
        return None
    if len(first_stage) != total:
        raise InputError(f"first_stage needs a score per document: {total} documents, {len(first_stage)}")
    if any(score is None for score in first_stage):
        return None
    try:
        scores = [float(score) for score in first_stage if score is not None]
    except (TypeError, ValueError):
        raise InputError(f"first_stage scores must be numbers, got {list(first_stage)[:5]!r}") from None
    bad = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise InputError(f"first_stage scores must be finite numbers; those of documents {bad[:10]} are not")
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    if -1.001 <= low and high <= 1.001:
        return scores
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def _is(value: object, kind: type) -> bool:
    """Whether it is a number of a kind; numpy's count, truth values do not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def weight_of(weight: Weight, query: Modality, documents: Sequence[Item]) -> float:
    """The number behind a weight: one for the whole list, so that scores in it can be compared.

    `None` is `DEFAULT_WEIGHT`, or the task's of `TASK_WEIGHTS` where all documents that were judged are of
    one modality.
    """
    if weight is not None and weight != "pure":
        return float(weight)
    found = {item.modality for item in documents}
    return TASK_WEIGHTS.get((query, found.pop()), DEFAULT_WEIGHT) if len(found) == 1 else DEFAULT_WEIGHT


def order(
    items: Sequence[Item],
    outcomes: Sequence[float | ItemError],
    *,
    query: Modality,
    top_n: int | None = None,
    first_stage: Sequence[float | None] | None = None,
    weight: Weight = None,
    prompts: Sequence[str | None] | None = None,
) -> list[RankedItem]:
    """Documents, best first; see `Reranker.rank`.

    Args:
        items: the documents, in input order.
        outcomes: of each, its relevance in [0, 1] or why it could not be judged.
        query: the query's modality, for the task's weight.
        top_n: most documents to return.
        first_stage: a score of each document, higher is better.
        weight: see `Weight`.
        prompts: the strings that were judged.
    """
    scores = check_rank(len(items), top_n, first_stage, weight)
    judged_items = [
        item for item, outcome in zip(items, outcomes, strict=True) if not isinstance(outcome, ItemError)
    ]
    share = weight_of(weight, query, judged_items)
    base = sorted(range(len(items)), key=lambda index: 0.0 if scores is None else -scores[index])

    def ranked(index: int) -> RankedItem:
        outcome = outcomes[index]
        prompt = prompts[index] if prompts is not None else None
        first = None if scores is None else scores[index]
        if isinstance(outcome, ItemError):
            return RankedItem(index, first or 0.0, None, items[index], prompt, outcome)
        pure = first is None or weight == "pure"
        score = outcome if pure else (first or 0.0) + share * outcome
        return RankedItem(index, score, outcome, items[index], prompt)

    first_order = [ranked(index) for index in base]
    judged = iter(
        sorted((each for each in first_order if each.relevance is not None), key=lambda each: -each.score)
    )
    # One that could not be judged keeps the place the first stage gave it.
    final = [each if each.relevance is None else next(judged) for each in first_order]
    return final[:top_n]
