"""What goes into a reranking, and what comes out: requests, first-stage scores, judged documents."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from langchain_core.documents import Document

from umr_plugins.errors import InputError, ItemError

log = logging.getLogger(__name__)

RELEVANCE_KEY = "relevance_score"
"""Metadata key of a document's relevance in [0, 1]; None if it could not be judged."""
MODEL_KEY = "rerank_model"
"""Metadata key of the name of the model that judged."""
ERROR_KEY = "rerank_error"
"""Metadata key of the reason why a document could not be judged; absent from all others."""

Scores = Sequence[float | None]


def read_request(given: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any, Scores | None]:
    """Query, documents and first-stage scores of what a chain passes on.

    Raises:
        InputError: it is neither a mapping with `query` and `documents` nor a tuple of the two.
    """
    if kwargs:
        raise InputError(f"unknown arguments {sorted(kwargs)}; options such as top_n are set on the reranker")
    if isinstance(given, tuple) and len(given) == 2:
        return given[0], given[1], None
    if isinstance(given, Mapping) and "query" in given and "documents" in given:
        return given["query"], given["documents"], given.get("scores")
    what = f"the keys {sorted(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
    raise InputError(f'reranking needs {{"query": ..., "documents": [...]}}, got {what}')


def listed_documents(documents: Any) -> list[Document]:
    """The documents as a list; raises `InputError` for anything that is none."""
    listed = list(documents) if isinstance(documents, Iterable) else [documents]
    wrong = next((one for one in listed if not isinstance(one, Document)), None)
    if wrong is not None or isinstance(documents, Document):
        got = documents if isinstance(documents, Document) else wrong
        raise InputError(f"documents is a list of Documents, got {type(got).__name__}")
    return listed


def first_stage(documents: Sequence[Document], scores: Scores | None, key: str | None) -> list[float] | None:
    """The scores of the first stage, given or from the metadata; None unless every document has one.

    Raises:
        InputError: `scores` are given, but not one per document.
    """
    given = one_each("scores", scores, documents)
    if given is None:
        given = [_score(document, key) for document in documents]
    known = [float(score) for score in given if score is not None]
    return known if len(known) == len(documents) else None


def one_each(name: str, values: Sequence[Any] | None, documents: Sequence[Document]) -> Sequence[Any] | None:
    """`values`, if there is one per document, or None; raises `InputError` otherwise."""
    if values is not None and len(values) != len(documents):
        raise InputError(f"{name} needs one per document: {len(documents)} documents, {len(values)} {name}")
    return values


def _score(document: Document, key: str | None) -> float | None:
    value = document.metadata.get(key) if key is not None else None
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def judged(document: Document, outcome: float | ItemError, model: str) -> Document:
    """A copy of the document with what the model said of it; the document itself is not touched.

    Args:
        document: as the first stage found it.
        outcome: relevance in [0, 1], or why there is none.
        model: name of the model.
    """
    metadata = {**document.metadata, RELEVANCE_KEY: None, MODEL_KEY: model}
    metadata.pop(ERROR_KEY, None)
    if isinstance(outcome, ItemError):
        metadata[ERROR_KEY] = _why(outcome)
    else:
        metadata[RELEVANCE_KEY] = outcome
    return document.model_copy(update={"metadata": metadata})


def _why(error: ItemError) -> str:
    return f"{error.name}: {error.reason} [{error.code}]" if error.name else f"{error.reason} [{error.code}]"


def warn_unjudged(outcomes: Mapping[int, float | ItemError]) -> None:
    """One warning for all documents that have no relevance, by their place in the caller's list."""
    errors = [(place, one) for place, one in sorted(outcomes.items()) if isinstance(one, ItemError)]
    if errors:
        first = "; ".join(f"{place}: {_why(error)}" for place, error in errors[:3])
        log.warning(
            "%d of %d documents could not be judged and keep their first-stage rank: %s%s",
            *(len(errors), len(outcomes), first, "; …" if len(errors) > 3 else ""),
        )
