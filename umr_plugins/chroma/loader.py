"""`UMRImageLoader`: opens the pictures that a collection's `uris` name, for Chroma."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.media.roots import absolute_roots, below

_THREADS: Final = 8


class UMRImageLoader:
    """A data loader for Chroma collections: RGB pictures, upright, transparency on white, a few formats only.

    `collection.get(include=["data"])` and `query(include=["data"])` make Chroma load the uris that come back
    from the database, and whoever can write to it may have written them. So only files below folders that
    you name are opened, with every link followed; data URIs are decoded; web addresses are refused. A row
    without uri gives None.

    All pictures of a call are held in memory at full size: load a few hundred at a time.

    Args:
        roots: folders below which the pictures lie. A relative uri counts from each in turn. None at all
            leaves data URIs only.

    Example:
        >>> loader = UMRImageLoader(roots=["photos"])  # doctest: +SKIP
        >>> loader(["cat.jpg"])[0].shape  # doctest: +SKIP
        (480, 640, 3)
    """

    def __init__(self, roots: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
        self.roots = absolute_roots(roots)

    def __call__(self, uris: Sequence[str | None]) -> list[NDArray[np.uint8] | None]:
        """One array `[height, width, 3]` of uint8 per uri, None for None or `""`.

        Raises:
            BatchError: lists every uri that can't be loaded: outside `roots`, absent, no picture, damaged.
        """
        if isinstance(uris, str | bytes | os.PathLike) or not isinstance(uris, Iterable):
            raise InputError(f"uris is a list of paths or data URIs, got {type(uris).__name__}")
        listed = list(uris)
        with ThreadPoolExecutor(max_workers=_THREADS) as threads:
            loaded = list(threads.map(self._load, range(len(listed)), listed))
        errors = [one for one in loaded if isinstance(one, ItemError)]
        if errors:
            raise BatchError(
                errors, len(listed), "loaded", 'Mend their uris, or leave "data" out of include.'
            )
        return [one for one in loaded if not isinstance(one, ItemError)]

    def _load(self, index: int, uri: Any) -> NDArray[np.uint8] | ItemError | None:
        if uri is None or uri == "":
            return None
        try:
            if not isinstance(uri, str | os.PathLike):
                raise ItemError("unsupported", f"a uri is a str, got {type(uri).__name__}", stage="open")
            text = os.fspath(uri)
            if text[:5].lower() == "data:":
                return np.asarray(load_image(text))
            path = below(text, self.roots, "A uri", "UMRImageLoader(roots=[folder])")
            return np.asarray(load_image(path))
        except ItemError as error:
            shown = uri if isinstance(uri, str) and uri[:5].lower() != "data:" else None
            return error.at(index, shown)
