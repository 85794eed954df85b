"""Every Pillow mode shows in RGB what a person would see."""

from __future__ import annotations

import numpy as np
import pytest
from bad_inputs import encoded, picture
from PIL import Image

from umr_plugins.errors import ItemError
from umr_plugins.media.images import load_image
from umr_plugins.media.modes import to_rgb

COLOUR = picture()
GREY = np.asarray(COLOUR.convert("L"))
DARK = (GREY // 8).astype(np.uint8)


def grey_of(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(to_rgb(image))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0].astype(int)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize("values", [GREY, DARK], ids=["full", "dark"])
def test_a_widened_8_bit_picture_comes_back_exactly(dtype, factor, values):
    wide = Image.fromarray((values.astype(np.int64) * factor).astype(dtype))
    assert wide.mode.startswith("I")
    np.testing.assert_array_equal(grey_of(wide), values)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_integers_are_scaled_by_their_depth(bits):
    top = (1 << bits) - 1
    values = np.linspace(0, top, 256).round().astype(np.uint16).reshape(16, 16)
    np.testing.assert_allclose(grey_of(Image.fromarray(values)), np.arange(256).reshape(16, 16), atol=1)


def test_8_bit_values_in_a_wide_picture_stay():
    np.testing.assert_array_equal(grey_of(Image.fromarray(GREY.astype(np.uint16))), GREY)


@pytest.mark.parametrize(("low", "high"), [(-1000, 1000), (0, 10_000_000)])
def test_other_integers_are_stretched(low, high):
    values = np.linspace(low, high, 256).round().astype(np.int32).reshape(16, 16)
    np.testing.assert_allclose(grey_of(Image.fromarray(values)), np.arange(256).reshape(16, 16), atol=1)


@pytest.mark.parametrize(("factor", "shift"), [(1 / 255, 0), (1, 0), (100, 0), (1, -128)])
def test_floats_are_scaled_by_their_range(factor, shift):
    values = GREY.astype(np.float32)
    values.flat[:2] = 0, 255
    image = Image.fromarray((values * np.float32(factor) + np.float32(shift)).astype(np.float32))
    np.testing.assert_allclose(grey_of(image), values, atol=1)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(odd):
    values = np.ones((4, 4), np.float32)
    values[1, 2] = odd
    with pytest.raises(ItemError) as caught:
        load_image(Image.fromarray(values))
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize("value", [0, 77, 300.0, -5.0, 70_000])
def test_one_even_tone(value):
    image = Image.new("F" if isinstance(value, float) else "I", (3, 3), value)
    assert grey_of(image).std() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_hidden_colour_is_white(mode):
    if mode == "PA":
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30])
        image.putalpha(Image.frombytes("L", (2, 1), b"\x00\xff"))
    else:
        source = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
        source.putpixel((0, 0), (10, 20, 30, 0))
        image = source.convert("LA") if mode in ("LA", "La") else source
        image = image.convert(mode)
    assert image.mode == mode
    rgb = to_rgb(image)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    shown = rgb.getpixel((1, 0))
    assert shown == ((18, 18, 18) if mode in ("LA", "La") else (10, 20, 30))


def test_half_transparent_is_mixed_with_white():
    (value, *_) = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))  # type: ignore[misc]
    assert value in (127, 128)


@pytest.mark.parametrize("clear", [1, bytes([255, 0, 255])], ids=["one index", "table"])
def test_palette_transparency(clear):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([9, 9, 9, 50, 60, 70, 8, 8, 8])
    data = encoded(image, "PNG", transparency=clear)
    rgb = load_image(data)
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(9, 9, 9), (255, 255, 255), (8, 8, 8)]


@pytest.mark.parametrize(
    ("mode", "clear"),
    [("L", 40), ("RGB", (40, 40, 40)), ("I;16", 40), ("1", 1)],
    ids=["L", "RGB", "I;16", "1"],
)
def test_transparent_colour(mode, clear):
    if mode == "I;16":
        image = Image.fromarray(np.array([[40, 200]], np.uint16))
    elif mode == "1":
        image = Image.frombytes("1", (2, 1), b"\x80")
    else:
        image = Image.frombytes("L", (2, 1), bytes([40, 200])).convert(mode)
    image.info["transparency"] = clear
    rgb = to_rgb(image)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((1, 0)) != (255, 255, 255)


def test_16_bit_transparent_colour():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.info["transparency"] = (0x0102, 0x0203, 0x0304)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert image.info["transparency"] == (0x0102, 0x0203, 0x0304)


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "RGBA"])
def test_colour_modes_keep_their_colours(mode):
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(COLOUR, srgb, lab, outputMode="LAB")
    else:
        image = COLOUR.convert(mode)
    assert image is not None
    assert image.mode == mode
    shown = np.asarray(to_rgb(image)).astype(int)
    assert np.abs(shown - np.asarray(COLOUR)).mean() < 4


def test_adobe_cmyk_jpeg_is_not_inverted():
    data = encoded(COLOUR.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(np.asarray(load_image(data)).astype(int) - np.asarray(COLOUR)).mean() < 6


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_simple_modes(mode):
    image = COLOUR.convert(mode)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_files(kind):
    data = encoded(Image.fromarray(GREY.astype(np.uint16) * 257), kind)
    np.testing.assert_array_equal(np.asarray(load_image(data))[..., 0], GREY)
