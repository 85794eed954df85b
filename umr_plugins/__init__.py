"""One vector space for text, pictures, picture-with-text and document pages.

Public names are resolved on first use: importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umr_plugins.embedder import Embedder as Embedder
    from umr_plugins.index.index import Index as Index
    from umr_plugins.reranker import Reranker as Reranker
    from umr_plugins.types import Encoded as Encoded
    from umr_plugins.types import Hit as Hit
    from umr_plugins.types import Item as Item
    from umr_plugins.types import PageImage as PageImage
    from umr_plugins.types import RankedItem as RankedItem

__version__ = "0.1.0"

_LAZY = {
    "Embedder": "umr_plugins.embedder",
    "Index": "umr_plugins.index.index",
    "Encoded": "umr_plugins.types",
    "Hit": "umr_plugins.types",
    "Item": "umr_plugins.types",
    "PageImage": "umr_plugins.types",
    "RankedItem": "umr_plugins.types",
    "Reranker": "umr_plugins.reranker",
}

__all__ = [
    "Embedder",
    "Encoded",
    "Hit",
    "Index",
    "Item",
    "PageImage",
    "RankedItem",
    "Reranker",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
