"""Pictures that come as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from umr_plugins.errors import ItemError
from umr_plugins.media.modes import to_uint8

_FORMS = "height x width, or height x width x 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA)"


def from_array(values: NDArray[Any]) -> Image.Image:
    """The picture that an array holds, in the mode its channels say.

    Values are read as those of picture files are (`modes`): 8 bits as they are, wider integers by their real
    depth, floats within 0 to 1 or 0 to 255, booleans as black and white.

    Args:
        values: `[height, width]` or `[height, width, 1..4]`.

    Raises:
        ItemError: `unsupported` for another shape or kind of value, `empty` for no pixels, `corrupt` for
            values that are no number.
    """
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 2, 3, 4)):
        raise ItemError(
            "unsupported",
            f"an array of shape {values.shape} is no picture; allowed is {_FORMS}{_hint(values)}",
            stage="decode",
        )
    if values.dtype.kind not in "buif":
        raise ItemError(
            "unsupported",
            f"an array of {values.dtype} is no picture; allowed are integers, floats and booleans",
            stage="decode",
        )
    if not values.size:
        raise ItemError("empty", f"the picture has no pixels (shape {values.shape})", stage="decode")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype.kind == "b":
        return Image.fromarray(values.astype(np.uint8) * np.uint8(255))
    return Image.fromarray(values if values.dtype == np.uint8 else to_uint8(values))


def _hint(values: NDArray[Any]) -> str:
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        return ". Channels seem to come first: pass array.transpose(1, 2, 0)"
    if values.ndim == 4:
        return ". Several pictures are a list of arrays: pass list(array)"
    return ""
