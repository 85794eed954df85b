"""Pictures that come as arrays."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from umr_plugins.errors import ItemError
from umr_plugins.media.arrays import from_array
from umr_plugins.media.images import load_image

RAMP = np.arange(60, dtype=np.uint8).reshape(4, 15) * 4
RGB = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def shown(values: np.ndarray) -> np.ndarray:
    return np.asarray(load_image(from_array(values)))


@pytest.mark.parametrize(
    "values",
    [
        RGB,
        np.asfortranarray(RGB),
        RGB[::1],
        RGB.astype(np.int64),
        RGB.astype(np.uint64),
        RGB.astype(np.float64),
        RGB.astype(np.float32) / 255,
        RGB.astype(np.uint16) * 257,
        np.dstack([RGB, np.full(RAMP.shape, 255, np.uint8)]),
    ],
    ids=["uint8", "fortran", "view", "int64", "uint64", "0-255", "0-1", "uint16", "opaque"],
)
def test_the_same_colours_in_any_kind_of_number_are_the_same_picture(values):
    np.testing.assert_array_equal(shown(values), RGB)


@pytest.mark.parametrize("values", [RAMP, RAMP[:, :, None], RAMP.astype(np.float64) / 255])
def test_grey_arrays_are_grey_pictures(values):
    np.testing.assert_array_equal(shown(values), np.stack([RAMP] * 3, axis=-1))


def test_what_is_transparent_lies_on_white():
    clear = np.zeros((2, 3, 4), np.uint8)
    clear[0, :, 3] = 255
    assert shown(clear)[:, 0].tolist() == [[0, 0, 0], [255, 255, 255]]
    assert shown(clear[:, :, 2:])[:, 0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_booleans_are_black_and_white():
    assert shown(np.array([[True, False]]))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        (np.moveaxis(RGB, -1, 0), "unsupported", r"pass array.transpose\(1, 2, 0\)"),
        (RGB[None], "unsupported", r"pass list\(array\)"),
        (RAMP[0], "unsupported", r"shape \(15,\)"),
        (np.zeros((4, 4, 5)), "unsupported", r"height x width x 1"),
        (RGB.astype(np.complex64), "unsupported", "complex64"),
        (RGB.astype(object), "unsupported", "object"),
        (RGB[:0], "empty", "no pixels"),
        (np.full((3, 3, 3), np.nan), "corrupt", "no number"),
        (np.array([[0.0, np.inf]]), "corrupt", "no number"),
    ],
)
def test_arrays_that_are_no_picture_are_refused(values, code, said):
    with pytest.raises(ItemError, match=said) as caught:
        from_array(values)
    assert caught.value.code == code


def test_an_array_is_what_its_picture_gives(photo):
    array = np.asarray(photo)
    assert isinstance(from_array(array), Image.Image)
    np.testing.assert_array_equal(shown(array), array)
