"""Which files a reference from a store may open."""

from __future__ import annotations

from pathlib import Path

import pytest

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.roots import absolute_roots, below


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "red.png").write_bytes(b"red")
    return folder


def found(reference: str | Path, *roots: Path) -> Path:
    return below(reference, absolute_roots(roots), origin="Metadata", remedy="reader(roots=[folder])")


def test_a_file_below_a_root_is_found_however_it_is_named(photos: Path) -> None:
    (photos / "inner.png").symlink_to(photos / "red.png")
    for name in (photos / "red.png", str(photos / "red.png"), "red.png", "./red.png", "inner.png"):
        assert found(name, photos) == photos / "red.png"
    assert found(f"file://{photos}/red.png", photos) == photos / "red.png"


def test_a_relative_name_counts_from_each_root_and_the_first_that_exists_is_taken(
    photos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert found("red.png", other, photos) == photos / "red.png"
    assert found("gone.png", other, photos) == other / "gone.png"


def test_a_root_may_itself_be_a_link(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert found("red.png", tmp_path / "link") == photos / "red.png"
    assert found(tmp_path / "link" / "red.png", photos) == photos / "red.png"


def test_nothing_outside_the_roots_is_found(photos: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (photos / "link.png").symlink_to(secret)
    (photos / "outside").symlink_to(tmp_path)
    (tmp_path / "photos-not").mkdir()
    names = [
        str(secret),
        "../secret.png",
        str(photos / ".." / "secret.png"),
        "link.png",
        "outside/secret.png",
        str(tmp_path / "photos-not" / "red.png"),
        f"file://{secret}",
        "file://host/red.png",
        "https://example.org/red.png",
        "red.png\0",
    ]
    for name in names:
        with pytest.raises(ItemError) as caught:
            found(name, photos)
        assert caught.value.code == "unsupported", name


def test_the_message_names_the_file_the_roots_and_what_to_do(photos: Path) -> None:
    with pytest.raises(ItemError, match=r"'/etc/a\.png' may not be opened: it is not below .*photos"):
        found("/etc/a.png", photos)
    with pytest.raises(ItemError, match=r"no folder is allowed.*allow .* reader\(roots=\[folder\]\)"):
        found("/etc/a.png")


def test_roots_are_read_once_as_absolute_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_roots("photos") == absolute_roots(["photos"]) == (tmp_path / "photos",)
    assert absolute_roots(None) == absolute_roots(()) == ()
    assert absolute_roots(Path("~/photos")) == (Path.home() / "photos",)
    for wrong in ("", [""], 7, [7]):
        with pytest.raises(InputError, match="roots"):
            absolute_roots(wrong)
