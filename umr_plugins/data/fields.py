"""Checks of single values in training data: texts, ids, pictures, and names that nobody knows."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from umr_plugins.errors import DataError, ItemError
from umr_plugins.types import ImageSource, Item, TarImage, as_item, clean_text


def make_item(text: object, pictures: Sequence[ImageSource], at: str, *, several: bool = False) -> Item:
    """An item of text and pictures; blank text beside a picture is no text.

    Raises:
        DataError: the text is no string, or there is neither.
    """
    if text is not None and not isinstance(text, str):
        raise DataError(f"{at}: text must be a string, got {kind_of(text)}")
    words = text if text is not None and text.strip() else None
    single = pictures[0] if len(pictures) == 1 and not several else None
    try:
        return as_item(Item(words, single, () if single is not None else tuple(pictures)))
    except ItemError as error:
        raise DataError(f"{at}: {error.reason}") from None


def picture_path(name: object, base: Path, at: str) -> Path | TarImage:
    """A picture's path, or its place in a tar for `shard.tar#member`, without looking at the file.

    Args:
        name: a path, relative to `base`; an absolute one is taken if it lies below.
        base: an absolute folder.
        at: where the name stands, for messages.

    Raises:
        DataError: it is no string, is a web address, or leads out of `base`.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or clean_text(name) != name:
        raise DataError(f"{at}: a picture is the path of a file, got {name!r:.80}")
    if "://" in name or name[:5].lower() == "data:":
        raise DataError(
            f"{at}: {name[:80]!r} is no path; save the picture as a file below {base} and name that"
        )
    head, inside, member = name.rpartition(".tar#")
    path = f"{head}.tar" if inside else name
    full = os.path.normpath(path if path.startswith("/") else f"{base}/{path}")
    if not full.startswith(f"{base}/".replace("//", "/")):
        raise DataError(f"{at}: the picture {name[:200]!r} lies outside {base}; pictures must lie below it")
    if not inside:
        return Path(full)
    if not member:
        raise DataError(f"{at}: {name[:200]!r} names no member; write shard.tar#name")
    return TarImage(Path(full), member)


def instructions(value: object, at: str) -> tuple[str, ...]:
    """None, one instruction or a list of them, as a tuple; `DataError` for anything else."""
    if value is None:
        return ()
    return tuple(check_text(each, at) for each in (value if isinstance(value, list | tuple) else [value]))


def check_text(value: object, at: str) -> str:
    """A string that is not blank, or `DataError`."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{at}: must be a text that is not blank, got {value!r:.80}; leave it away for none")
    return clean_text(value) or value


def check_id(value: object, at: str) -> str:
    """An id as string (a whole number becomes its digits), or `DataError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value or clean_text(value) != value:
        raise DataError(f"{at}: an id is a text that is not empty, or a whole number; got {value!r:.80}")
    return value


def nearest(given: object, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown name: what is allowed, and what was probably meant."""
    known = list(allowed)
    near = difflib.get_close_matches(str(given), known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"; allowed are {', '.join(known)}{meant}"


def kind_of(value: object) -> str:
    """What a JSON value is, in plain words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
