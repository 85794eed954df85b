"""Pictures as they are sent to a chat model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.jpeg import as_jpeg


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_large_pictures_are_shrunk_in_proportion_and_small_ones_keep_their_size() -> None:
    for size, expected in (((400, 200), (100, 50)), ((200, 400), (50, 100)), ((80, 60), (80, 60))):
        image = opened(as_jpeg(Image.new("RGB", size, "navy"), max_side=100))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", expected)


def test_colours_stay_and_what_is_clear_becomes_white() -> None:
    image = opened(as_jpeg(Image.new("RGBA", (20, 20), (255, 0, 0, 0))))
    assert min(image.getpixel((10, 10))) > 250  # type: ignore[type-var]  # a colour of three parts
    red, green, blue = opened(as_jpeg(Image.new("RGB", (20, 20), "red"))).getpixel((10, 10))  # type: ignore[misc]
    assert (red > 245, green < 10, blue < 10) == (True, True, True)


def test_what_the_camera_wrote_stays_behind(tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 20), "green")
    exif = photo.getexif()
    exif[0x0112], exif[0x010F] = 6, "secret maker"  # turned a quarter; the camera's name
    photo.save(tmp_path / "photo.jpg", exif=exif, comment=b"secret comment")
    data = as_jpeg(tmp_path / "photo.jpg")
    assert b"secret" in (tmp_path / "photo.jpg").read_bytes()
    assert b"secret" not in data
    assert opened(data).size == (20, 40), "the picture lies on its side"


def test_a_file_that_is_no_picture_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "key.png").write_text("-----BEGIN PRIVATE KEY-----")
    with pytest.raises(ItemError, match="no picture"):
        as_jpeg(tmp_path / "key.png")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "100"])
def test_a_side_that_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="max_side"):
        as_jpeg(Image.new("RGB", (4, 4)), max_side=wrong)  # type: ignore[arg-type]  # that is the mistake
