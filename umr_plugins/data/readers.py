"""Every layout that training data are read from, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Final

from umr_plugins.data.beir import read_beir, read_triples
from umr_plugins.data.fields import nearest
from umr_plugins.data.hub import from_dataset, read_dataset
from umr_plugins.data.mbeir import read_mbeir
from umr_plugins.data.pictures import read_captions, read_image_folders, read_pages
from umr_plugins.data.rows import read_rows
from umr_plugins.data.schema import Rows
from umr_plugins.errors import InputError

__all__ = [
    "FORMATS",
    "from_dataset",
    "read",
    "read_beir",
    "read_captions",
    "read_dataset",
    "read_image_folders",
    "read_mbeir",
    "read_pages",
    "read_rows",
    "read_triples",
]

FORMATS: Final[dict[str, Callable[..., list[Rows]]]] = {
    "rows": read_rows,
    "mbeir": read_mbeir,
    "beir": read_beir,
    "triples": read_triples,
    "image_folders": read_image_folders,
    "captions": read_captions,
    "pages": read_pages,
    "dataset": read_dataset,
}
"""Readers of files and folders; the first argument of each is the path."""


def read(format: str, path: str | os.PathLike[str], **options: Any) -> list[Rows]:
    """Read training data of any layout.

    Args:
        format: a key of `FORMATS`.
        path: of the file or folder.
        options: further arguments of the reader.

    Returns:
        One `Rows` for each source.

    Raises:
        InputError: an unknown format or option, or a missing one.
        DataError: what the reader says about the data.
    """
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not known{nearest(format, FORMATS)}")
    reader = FORMATS[format]
    _, *parameters = inspect.signature(reader).parameters.values()
    allowed = [each.name for each in parameters]
    for name in options:
        if name not in allowed:
            raise InputError(f"the format {format!r} has no option {name!r}{nearest(name, allowed)}")
    missing = [each.name for each in parameters if each.default is each.empty and each.name not in options]
    if missing:
        raise InputError(f"the format {format!r} needs {', '.join(missing)}")
    return reader(path, **options)
