"""Which files a reference that came back from a store may open: those below a folder that the user named.

Whoever can write to a vector database writes the paths that come back from it. Opened by a reranker, or sent
to a remote model, such a path would show any picture or PDF on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from umr_plugins.errors import InputError, ItemError


def absolute_roots(value: Any) -> tuple[Path, ...]:
    """One folder or several as a tuple of absolute paths; None is no folder.

    Raises:
        InputError: a value that is no path, or an empty one.
    """
    listed = [value] if isinstance(value, str | os.PathLike) else value
    if listed is None:
        return ()
    if not isinstance(listed, Iterable):
        raise InputError(f"roots are folders, got {type(value).__name__}; pass roots=[folder]")
    roots = []
    for root in listed:
        if not isinstance(root, str | os.PathLike) or not os.fspath(root):
            raise InputError(f"roots are folders, got {root!r}; name the folder that holds the pictures")
        roots.append(Path(os.fsdecode(root)).expanduser().absolute())
    return tuple(roots)


def below(reference: str | Path, roots: Sequence[Path], origin: str, remedy: str) -> Path:
    """The file that a reference names, if it lies below one of the roots once every link is followed.

    Args:
        reference: a path or a `file:` URL; a relative one counts from each root in turn, and the first that
            exists is taken.
        roots: absolute folders, as `absolute_roots` gives them.
        origin: what may have been written by anyone, for the message: `"Metadata"`.
        remedy: the call that allows a folder, for the message: `"MLLMReranker(roots=[folder])"`.

    Raises:
        ItemError: `unsupported` for a file outside `roots`, a web address, or what is no path.
    """
    named = f"its picture {str(reference)[:200]!r}"
    try:
        path = _path(reference)
        inside = []
        for root in roots:
            real = Path(os.path.realpath(root / path))
            if real.is_relative_to(os.path.realpath(root)):
                inside.append(real)
        existing = next((real for real in inside if real.exists()), None)
    except (OSError, ValueError) as error:
        raise ItemError("unsupported", f"{named} is no path of a file: {error}", stage="open") from None
    if inside:
        return existing or inside[0]
    folders = f"it is not below {[str(root) for root in roots]}" if roots else "no folder is allowed"
    raise ItemError(
        "unsupported",
        f"{named} may not be opened: {folders}. {origin} that comes back from a store may have been written "
        f"by anyone; allow the folder that holds your pictures with {remedy}",
        stage="open",
    )


def _path(reference: str | Path) -> Path:
    if isinstance(reference, Path) or "://" not in reference:
        return Path(reference)
    parts = urlsplit(reference)
    if parts.scheme.lower() == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    raise ValueError("web addresses are not followed; download the file and give its path")
