"""What the demo is compared with: BM25 over the texts of all items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from umr_plugins.errors import MissingExtraError

TextSearch: TypeAlias = Callable[[str, int], list[str]]
"""Text and k → ids, best first."""


def bm25(ids: Sequence[str], texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> TextSearch:
    """Okapi BM25 over `texts`, with English stop words; items without a common word are never answers.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("BM25 needs bm25s: pip install 'umr-plugins[demo]'") from error
    ranker = bm25s.BM25(k1=k1, b=b)
    ranker.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)

    def search(text: str, k: int) -> list[str]:
        words = bm25s.tokenize([text], stopwords="en", show_progress=False)
        rows, scores = ranker.retrieve(words, k=min(k, len(ids)), show_progress=False)
        return [ids[int(row)] for row, score in zip(rows[0], scores[0], strict=True) if score > 0]

    return search
