"""Opening pictures: every kind of source, and what must never get through."""

from __future__ import annotations

import base64
import io
import random
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import encoded, picture, png_header, text_pdf
from PIL import Image, ImageFile

from umr_plugins.errors import ItemError
from umr_plugins.media.images import LONGEST_STRIP, check_image, content_key, load_image, read_source
from umr_plugins.types import PageImage

PNG = encoded(picture(), "PNG")
PIXELS = np.asarray(picture())


def code_of(source: object, **options: int) -> str:
    with pytest.raises(ItemError) as caught:
        load_image(source, **options)  # type: ignore[arg-type]
    assert caught.value.stage in ("open", "decode")
    return caught.value.code


def test_every_source_gives_the_same_picture(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    (tmp_path / "link.png").symlink_to(path)
    uri = "data:image/png;base64," + base64.b64encode(PNG).decode()
    sources = [
        picture(), Image.open(path), path, str(path), path.as_uri(), tmp_path / "link.png",
        PNG, bytearray(PNG), io.BytesIO(PNG), uri, uri.replace("+", "%2B"), uri[:200] + "\n" + uri[200:],
    ]  # fmt: skip
    for source in sources:
        image = load_image(source)  # type: ignore[arg-type]
        assert type(image) is Image.Image
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
    keys = {content_key(source) for source in sources[2:]}  # type: ignore[arg-type]
    assert len(keys) == 1
    assert len(keys.pop()) == 32


def test_result_is_independent_of_source(tmp_path):
    source = picture()
    image = load_image(source)
    source.paste("black", (0, 0, 10, 10))
    np.testing.assert_array_equal(np.asarray(image), PIXELS)
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    image = load_image(path)
    path.unlink()
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    "url", ["http://example.org/a.png", "HTTPS://example.org/a.png", "s3://b/a.png", "file://host/a.png"]
)
def test_urls_are_refused(url, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    with pytest.raises(ItemError, match="Download the file and give its path") as caught:
        load_image(url)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("no such file.png", "unreadable"), ("a\0b.png", "unreadable"), ("\ud800.png", "unreadable"),
        ("x" * 5000, "unreadable"),
        ("/dev/zero", "not_a_file"), ("/", "not_a_file"), (b"", "empty"), (5, "unsupported"),
        (None, "unsupported"), ("data:image/png;base64,@@@", "corrupt"), ("data:image/png;base64,", "empty"),
        ("data:text/plain,hello", "unsupported"), ("data:", "unsupported"), 
        (Image.new("RGB", (0, 5)), "empty"),
    ],
)  # fmt: skip
def test_bad_sources(source, code):
    assert code_of(source) == code


def test_long_input_is_not_echoed():
    with pytest.raises(ItemError) as caught:
        load_image("data:image/png;base64," + "@" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [(20_000, 20_000), (30_000, 2_000), (2**31 - 1, 1)])
def test_pixel_cap_is_read_from_the_header(size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    assert code_of(png_header(*size)) == "too_large"
    with pytest.raises(ItemError, match="pixels"):
        check_image(png_header(*size))


def test_pixel_cap_is_a_parameter():
    assert load_image(PNG, max_pixels=48 * 40).size == (48, 40)
    assert code_of(PNG, max_pixels=48 * 40 - 1) == "too_large"
    assert code_of(picture(), max_pixels=48 * 40 - 1) == "too_large"


def test_refusals_name_what_was_found():
    for data, word in [
        (b"<html>", "HTML"),
        (b"<svg>", "SVG"),
        (b"8BPS", "PSD"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
    ]:
        with pytest.raises(ItemError, match=word):
            load_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_or_changed_file_gives_a_picture_or_a_typed_error(kind):
    """Never another exception, never a warning (both fail), never words of the decoder."""
    data = encoded(picture(), kind)
    chance = random.Random(kind)
    refused: list[ItemError] = []
    for turn in range(150):
        broken = bytearray(data)
        if turn % 3 == 0:
            del broken[chance.randrange(len(data)) :]
        for _ in range(turn % 5):
            if broken:
                broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            assert load_image(bytes(broken)).mode == "RGB"
        except ItemError as error:
            refused.append(error)
    assert len(refused) > 10
    assert not any("0x" in error.reason for error in refused)
    assert all(error.__suppress_context__ or error.__context__ is None for error in refused)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind, share):
    data = encoded(picture(200, 150), kind)
    assert code_of(data[: int(len(data) * share)]) == "corrupt"


def test_decoder_exceptions_of_any_kind_become_item_errors(monkeypatch):
    for failure in (
        ValueError("secret 0x7f"),
        SyntaxError("x"),
        RuntimeError("x"),
        MemoryError(),
        OSError("x"),
    ):

        def broken(_: object, failure: Exception = failure) -> None:
            raise failure

        monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
        with pytest.raises(ItemError) as caught:
            load_image(PNG)
        assert caught.value.code == ("too_large" if isinstance(failure, MemoryError) else "corrupt")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("size", [(199, 1), (200, 1), (201, 1), (1, 437), (3000, 1), (1, 1), (27, 2)])
def test_strips_are_padded_to_200_to_1(size):
    image = load_image(Image.new("RGB", size, "red"))
    assert max(image.size) <= 200 * min(image.size)
    assert max(image.size) == max(size)
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(axis=1).sum() == size[0] * size[1]
    assert ((pixels == (255, 0, 0)) | (pixels == 255)).all()
    if max(size) <= 200 * min(size):
        assert image.size == size


def test_an_endless_strip_does_not_take_endless_memory():
    image = load_image(Image.new("L", (1, 30_000_000), 0))
    assert image.size == (LONGEST_STRIP // 200, LONGEST_STRIP)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, kind):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = picture().transpose(undo[orientation]) if orientation > 1 else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=exif, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.size == (48, 40)
        assert np.abs(np.asarray(image).astype(int) - PIXELS).mean() < 3


def test_broken_camera_data_do_not_cost_the_picture():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffbroken", quality=95)
    assert load_image(data).size == (48, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_animations(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, blue = load_image(data).getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


def test_key_of_a_pil_image_tells_apart_what_pixels_alone_do_not():
    base = Image.new("P", (4, 2))
    base.putpalette([255, 0, 0])
    other = base.copy()
    other.putpalette([0, 255, 0])
    clear = base.copy()
    clear.info["transparency"] = 0
    turned = Image.new("L", (4, 2))
    turned.getexif()[0x0112] = 3
    images = [
        base,
        other,
        clear,
        Image.new("L", (4, 2)),
        Image.new("L", (2, 4)),
        turned,
        Image.new("L", (8, 1)),
    ]
    assert len({content_key(image) for image in images}) == len(images)
    assert content_key(base) == content_key(base.copy())


def test_page_of_a_pdf_is_a_picture(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(text_pdf("one", "two"))
    image = load_image(PageImage(path, 2))
    assert image.mode == "RGB"
    assert max(image.size) >= 1700
    assert np.asarray(image).min() < 50
    keys = {content_key(PageImage(path, page)) for page in (1, 2)} | {content_key(path)}
    assert len(keys) == 3
    assert code_of(PageImage(path, 3)) == "no_pages"
    assert code_of(path) == "unsupported"


def test_read_source_takes_encoded_pictures_only():
    assert read_source(PNG) == PNG
    with pytest.raises(ItemError) as caught:
        read_source(picture())
    assert caught.value.code == "unsupported"


def test_pillow_warnings_do_not_leak_and_filters_come_back():
    whole = encoded(picture(), "TIFF")
    damaged = whole.replace(b"\x0e\x01", b"\x0e\x09")
    before = list(warnings.filters)
    barrier = threading.Barrier(4)

    def decode(number: int) -> str:
        barrier.wait()
        for data in (PNG, damaged, png_header(9_500, 9_500)) * 5:
            try:
                load_image(data)
            except ItemError as error:
                assert error.code in ("corrupt", "too_large")  # noqa: PT017
        return "done"

    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(pool.map(decode, range(4))) == ["done"] * 4
    assert list(warnings.filters) == before


def test_threads_share_a_lazily_opened_picture(tmp_path):
    path = tmp_path / "big.png"
    path.write_bytes(encoded(picture(600, 500), "PNG"))
    expected = np.asarray(picture(600, 500))
    for _ in range(5):
        lazy = Image.open(path)
        with ThreadPoolExecutor(8) as pool:
            for image in pool.map(load_image, [lazy] * 8):
                np.testing.assert_array_equal(np.asarray(image), expected)


def test_media_loads_neither_torch_nor_the_pdf_library():
    script = (
        "import sys, umr_plugins.media.files, umr_plugins.media.folder\n"
        "bad = {'torch', 'transformers', 'chromadb', 'pypdfium2'} & set(sys.modules)\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
