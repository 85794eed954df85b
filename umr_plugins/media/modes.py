"""Makes an RGB picture of any Pillow mode without losing what a person would see.

`Image.convert("RGB")` alone turns 16-bit grey white, floats black and shows colours hidden by transparency.
The rules here:

- transparency (alpha channels, palettes, a transparent colour) is laid on white;
- integers wider than 8 bits are scaled by their real depth: the smallest of 8, 10, 12, 14 and 16 bits that
  holds the largest value; an 8-bit picture that was only widened (all values multiples of 256 or 257) gets
  back its 8-bit values; negative or wider values are scaled from their own minimum to maximum;
- floats within 0 to 1 are scaled by 255, within 0 to 255 taken as they are, others scaled from their own
  minimum to maximum; NaN and infinity are refused;
- all other modes (grey, 1 bit, palette, CMYK, LAB, YCbCr, HSV) by Pillow's own conversion.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from umr_plugins.errors import ItemError

_DEPTHS: Final = (8, 10, 12, 14, 16)


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB picture, transparency on white.

    Raises:
        ItemError: `corrupt`, values that are no number.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _from_numbers(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def to_uint8(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Integers or floats as 8 bits, by the rules above.

    Raises:
        ItemError: `corrupt`, values that are no number.
    """
    return _floats(values) if values.dtype.kind == "f" else _integers(values)


def _on_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        # A 16-bit PNG: Pillow keeps the high byte of the pixels but all of the transparent colour.
        image = image.copy()
        image.info["transparency"] = tuple(part >> 8 for part in key)
    if image.mode == "La":  # premultiplied; no direct way to RGBA
        image = image.convert("LA")
    above = image.convert("RGBA")
    white = Image.new("RGBA", above.size, "white")
    return Image.alpha_composite(white, above).convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = to_uint8(values)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _integers(values: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        return _stretch(values, low, high)
    if high > 255:
        for step in (257, 256):
            if not (values % step).any():
                return (values // step).astype(np.uint8)
    depth = next(bits for bits in _DEPTHS if high < 1 << bits)
    return _scaled(values, 255 / ((1 << depth) - 1))


def _floats(values: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ItemError(
            "corrupt", "the picture holds values that are no number (NaN or infinity)", stage="decode"
        )
    if low < 0 or high > 255:
        return _stretch(values, low, high)
    return _scaled(values, 255 if high <= 1 else 1)


def _stretch(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if low == high:  # one even tone: nothing to scale by
        return np.full(values.shape, 255 if high > 0 else 0, np.uint8)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def _scaled(values: NDArray[Any], factor: float) -> NDArray[np.uint8]:
    scaled: NDArray[np.float32] = values.astype(np.float32) * np.float32(factor)
    return np.rint(scaled).astype(np.uint8)
