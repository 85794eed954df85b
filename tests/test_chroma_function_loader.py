"""The picture loader for Chroma: what it opens, and what it never does."""

from __future__ import annotations

import base64
import copy
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from umr_plugins.chroma import UMRImageLoader
from umr_plugins.errors import BatchError, InputError

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "a.png")
    return folder


def test_paths_file_addresses_and_data_uris_are_loaded_in_order(photos):
    encoded = base64.b64encode((photos / "a.png").read_bytes()).decode()
    Image.new("RGB", (2, 3), "red").save(photos / "b.png")
    uris = ["a.png", str(photos / "b.png"), (photos / "a.png").as_uri(), f"data:image/png;base64,{encoded}"]
    loaded = UMRImageLoader(roots=photos)(uris)
    assert [array.shape for array in loaded] == [(6, 9, 3), (3, 2, 3), (6, 9, 3), (6, 9, 3)]
    for at in (0, 2, 3):
        np.testing.assert_array_equal(loaded[at], PIXELS)
        assert loaded[at].dtype == np.uint8


def test_rows_without_uri_give_none(photos):
    assert UMRImageLoader(roots=photos)([None, "", None]) == [None, None, None]
    assert UMRImageLoader(roots=photos)([]) == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_comes_as_upright_rgb(photos, mode):
    path = photos / ("x.tif" if mode in ("F", "CMYK") else "x.png")
    picture = Image.new(mode, (5, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(path, exif=exif)
    (loaded,) = UMRImageLoader(roots=photos)([path.name])
    assert (loaded.shape, loaded.dtype) == ((5, 3, 3), np.uint8)


def test_transparency_lies_on_white(photos):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(photos / "clear.png")
    assert UMRImageLoader(roots=photos)(["clear.png"])[0].min() == 255


def test_files_outside_the_roots_are_refused_however_they_are_named(photos, tmp_path):
    outside = tmp_path / "secret.png"
    Image.fromarray(PIXELS).save(outside)
    (photos / "link.png").symlink_to(outside)
    (tmp_path / "photos2").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "photos2" / "a.png")
    uris = [str(outside), "../secret.png", outside.as_uri(), "link.png", str(tmp_path / "photos2" / "a.png")]
    loader = UMRImageLoader(roots=[photos])
    for uri in uris:
        with pytest.raises(BatchError, match=r"UMRImageLoader\(roots=\[folder\]\)") as caught:
            loader(["a.png", uri])
        assert [error.index for error in caught.value.errors] == [1]
    with pytest.raises(BatchError, match="no folder is allowed"):
        UMRImageLoader(roots=[])([str(photos / "a.png")])


def test_addresses_are_refused_without_a_connection(photos, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    with pytest.raises(BatchError, match="web addresses are not followed") as caught:
        UMRImageLoader(roots=photos)(["http://127.0.0.1/a.png", "file://host/a.png"])
    assert len(caught.value.errors) == 2


def test_one_error_lists_every_uri_that_fails(photos):
    (photos / "text.png").write_text("no picture")
    with pytest.raises(BatchError) as caught:
        UMRImageLoader(roots=photos)(["text.png", "a.png", "absent.png", 7, b"a.png"])
    found = [(error.index, error.code) for error in caught.value.errors]
    assert found == [(0, "corrupt"), (2, "unreadable"), (3, "unsupported"), (4, "unsupported")]
    assert [error.name and error.name.rpartition("/")[2] for error in caught.value.errors[:2]] == [
        "text.png",
        "absent.png",
    ]
    assert "4 of 5 items can't be loaded" in str(caught.value)
    assert "on_error" not in str(caught.value)


def test_one_uri_is_no_list(photos):
    for wrong in ("a.png", photos / "a.png", 5):
        with pytest.raises(InputError, match="list of paths"):
            UMRImageLoader(roots=photos)(wrong)


def test_roots_must_be_folders():
    for wrong in ([""], [5], 5):
        with pytest.raises(InputError, match="roots are folders"):
            UMRImageLoader(roots=wrong)
    with pytest.raises(TypeError):
        UMRImageLoader()


def test_a_picture_above_the_size_limit_is_refused(photos):
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    (photos / "huge.png").write_bytes(out.getvalue())
    with pytest.raises(BatchError, match="81,000,000 pixels"):
        UMRImageLoader(roots=photos)(["huge.png"])


def test_copies_and_pickles_load_the_same(photos):
    loader = UMRImageLoader(roots=photos)
    for other in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        np.testing.assert_array_equal(other(["a.png"])[0], PIXELS)
