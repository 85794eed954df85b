"""Two pictures on one canvas, for models that take a single one."""

from __future__ import annotations

from PIL import Image

from umr_plugins.media.images import load_image
from umr_plugins.types import ImageSource

_GAP = 16


def side_by_side(left: ImageSource, right: ImageSource) -> Image.Image:
    """Both pictures at the height of the lower one, with a white gap between them.

    Raises:
        ItemError: one of them can't be read.
    """
    pictures = [load_image(source) for source in (left, right)]
    height = min(picture.height for picture in pictures)
    scaled = [
        picture
        if picture.height == height
        else picture.resize(
            (max(1, round(picture.width * height / picture.height)), height), Image.Resampling.BICUBIC
        )
        for picture in pictures
    ]
    canvas = Image.new("RGB", (sum(each.width for each in scaled) + _GAP, height), "white")
    canvas.paste(scaled[0], (0, 0))
    canvas.paste(scaled[1], (scaled[0].width + _GAP, 0))
    return canvas
