"""A picture as bytes for a chat model: nothing but pixels leave the machine, and no more than are read."""

from __future__ import annotations

import io
from typing import Final

from umr_plugins.errors import InputError
from umr_plugins.media.images import load_image
from umr_plugins.types import ImageSource

MAX_SIDE: Final = 1568
"""Pixels of the longer side that chat models look at; larger pictures are shrunk by the service anyway."""


def as_jpeg(source: ImageSource, max_side: int = MAX_SIDE) -> bytes:
    """The picture as JPEG, opened as `load_image` does and shrunk if it is larger.

    It is encoded anew: place, camera and comments that the file holds stay behind, and a file that is no
    picture can't be sent.

    Args:
        source: whatever names a picture.
        max_side: pixels of the longer side at most; smaller pictures keep their size.

    Raises:
        ItemError: as `load_image`.
        InputError: `max_side` is no whole number of at least 1.
    """
    if isinstance(max_side, bool) or not isinstance(max_side, int) or max_side < 1:
        raise InputError(f"max_side must be a whole number of pixels, at least 1; got {max_side!r}")
    image = load_image(source)
    image.thumbnail((max_side, max_side))
    image.info.clear()  # Pillow would write the file's comment into the new one
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling=0)  # whole colours: thin coloured print stays legible
    return out.getvalue()
