"""Walking and reading a folder: never out of it, never blocked, nothing lost in silence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media import folder
from umr_plugins.media.folder import FoundFile, read_file, walk


def fill(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names(root: Path, **options: object) -> list[str]:
    found = list(walk(root, **options))  # type: ignore[arg-type]
    return [f"{item.code} {item.name}" if isinstance(item, ItemError) else item.relative for item in found]


def code_of(path: Path, **options: object) -> str:
    with pytest.raises(ItemError) as caught:
        read_file(path, **options)  # type: ignore[arg-type]
    assert caught.value.stage == "open"
    assert caught.value.name is not None
    return caught.value.code


def test_order_and_hidden_names(tmp_path):
    fill(
        tmp_path,
        "b.txt",
        "a/z.txt",
        "a/B.txt",
        "é.txt",
        ".git/config",
        ".hidden",
        "__pycache__/x.pyc",
        "c/.x/y",
    )
    assert names(tmp_path) == ["a/B.txt", "a/z.txt", "b.txt", "é.txt"]


def test_what_is_known_of_a_file(tmp_path):
    fill(tmp_path, "sub/a.txt")
    (found,) = walk(tmp_path)
    status = (tmp_path / "sub/a.txt").stat()
    assert found == FoundFile(
        tmp_path / "sub" / "a.txt", "sub/a.txt", status.st_size, status.st_mtime_ns, status.st_ino
    )


def test_skip(tmp_path):
    fill(tmp_path, "a.txt", "db/ledger", "sub/b.txt")
    assert names(tmp_path, skip=[tmp_path / "sub" / ".." / "db", tmp_path / "a.txt"]) == ["sub/b.txt"]


def test_links_are_reported_and_never_followed(tmp_path):
    outside = tmp_path / "outside"
    fill(outside, "secret.txt")
    root = tmp_path / "root"
    fill(root, "a.txt")
    (root / "file").symlink_to(outside / "secret.txt")
    (root / "folder").symlink_to(outside)
    (root / "self").symlink_to(root)
    (root / "inside").symlink_to("a.txt")
    assert names(root) == ["a.txt", "link file", "link folder", "link inside", "link self"]


def test_the_root_itself_may_be_a_link(tmp_path):
    fill(tmp_path / "real", "a.txt")
    (tmp_path / "link").symlink_to("real")
    (found,) = walk(tmp_path / "link")
    assert isinstance(found, FoundFile)
    assert found.path == tmp_path / "real" / "a.txt"


@pytest.mark.parametrize("name", ["nothing", "file.txt"])
def test_root_must_be_a_folder(name, tmp_path):
    fill(tmp_path, "file.txt")
    with pytest.raises(InputError, match="not a folder"):
        walk(tmp_path / name)


def test_unreadable_folders_are_reported(tmp_path, monkeypatch):
    fill(tmp_path, "a.txt", "locked/b.txt", "open/c.txt")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "no", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == ["a.txt", "unreadable locked", "open/c.txt"]
    with pytest.raises(ItemError, match="Permission denied") as caught:
        list(walk(tmp_path / "locked"))
    assert caught.value.code == "unreadable"


def test_names_that_are_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path)
    Path(os.fsdecode(raw + b"/folder\xff")).mkdir()
    os.close(os.open(raw + b"/folder\xff/a.txt", os.O_CREAT))
    os.close(os.open(raw + b"/b\xe9\nc.txt", os.O_CREAT))
    fill(tmp_path, "new\nline.txt")
    assert names(tmp_path) == ["unreadable b\\xe9\nc.txt", "unreadable folder\\xff", "new\nline.txt"]


def test_a_file_that_vanishes_while_walking(tmp_path, monkeypatch):
    fill(tmp_path, "a.txt", "b.txt")
    steps = walk(tmp_path)
    next(steps)
    (tmp_path / "b.txt").unlink()
    (error,) = steps
    assert isinstance(error, ItemError)
    assert (error.code, error.name) == ("unreadable", "b.txt")


@pytest.fixture
def deepest(tmp_path: Path) -> Iterator[Path]:
    """A folder deeper than Python may call itself."""
    here = tmp_path
    for _ in range(1200):
        here /= "d"
        here.mkdir()
    yield here
    (here / "a.txt").unlink(missing_ok=True)
    while here != tmp_path:  # pytest's own clean-up calls itself
        here.rmdir()
        here = here.parent


def test_a_very_deep_tree(deepest, tmp_path):
    fill(deepest, "a.txt")
    (found,) = walk(tmp_path)
    assert isinstance(found, FoundFile)
    assert read_file(found.path, root=tmp_path) == b"a.txt"


def test_read_file(tmp_path):
    data = os.urandom(3 * folder._BLOCK + 17)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a.bin"
    path.write_bytes(data)
    assert read_file(path) == data
    assert read_file(path, root=tmp_path) == data
    assert read_file(path, max_bytes=len(data)) == data
    assert code_of(path, max_bytes=len(data) - 1) == "too_large"


def test_refused_files(tmp_path):
    fill(tmp_path, "a.txt")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("a.txt")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert code_of(tmp_path / "empty") == "empty"
    assert code_of(tmp_path / "link") == "link"
    assert read_file(tmp_path / "link", follow_link=True) == b"a.txt"
    assert code_of(tmp_path / "loop", follow_link=True) == "link"
    assert code_of(tmp_path / "pipe") == "not_a_file"
    assert code_of(tmp_path) == "not_a_file"
    assert code_of(Path("/dev/zero")) == "not_a_file"
    assert code_of(tmp_path / "nothing") == "unreadable"
    assert code_of(tmp_path / "a\0b") == "unreadable"


def test_no_folder_on_the_way_may_be_a_link(tmp_path):
    fill(tmp_path / "outside", "secret.txt")
    root = tmp_path / "root"
    root.mkdir()
    (root / "sub").symlink_to(tmp_path / "outside")
    assert code_of(root / "sub" / "secret.txt", root=root) == "link"
    assert code_of(tmp_path / "outside" / "secret.txt", root=root) == "unreadable"
    assert code_of(root / ".." / "outside" / "secret.txt", root=root) == "unreadable"


def test_a_file_swapped_for_a_pipe_or_link_before_it_is_opened(tmp_path, monkeypatch):
    fill(tmp_path, "a.txt", "secret")
    path = tmp_path / "a.txt"
    honest = path.lstat()
    monkeypatch.setattr(os, "lstat", lambda _: honest)
    path.unlink()
    os.mkfifo(path)
    assert code_of(path) == "not_a_file"
    path.unlink()
    path.symlink_to("secret")
    assert code_of(path) == "link"


@pytest.mark.parametrize("changes", [1, 2])
def test_a_file_that_changes_while_it_is_read(changes, tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    path.write_bytes(b"first")
    read, left = os.read, [changes]

    def meanwhile(handle: int, size: int) -> bytes:
        block = read(handle, size)
        if not block and left[0]:
            left[0] -= 1
            with path.open("ab") as file:
                file.write(b" more")
        return block

    monkeypatch.setattr(os, "read", meanwhile)
    if changes == 1:
        assert read_file(path) == b"first more"
    else:
        assert code_of(path) == "unreadable"


def test_an_endless_file_stops_at_the_cap(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    monkeypatch.setattr(os, "read", lambda _, size: b"x" * size)
    assert code_of(path, max_bytes=1000) == "too_large"


def test_no_handle_is_left_open(tmp_path):
    fill(tmp_path, "a/b/c.txt")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        read_file(tmp_path / "a/b/c.txt", root=tmp_path)
        code_of(tmp_path / "a/b", root=tmp_path)
        code_of(tmp_path / "a/x/c.txt", root=tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
