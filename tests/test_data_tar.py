"""Pictures inside tar files: read in place, with the codes that files have."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import encoded, picture

from umr_plugins import html
from umr_plugins.data.rows import read_rows
from umr_plugins.errors import DataError, ItemError
from umr_plugins.index.rows import item_of, stored_pictures
from umr_plugins.media import folder, tar
from umr_plugins.media.images import content_key, load_image, read_source
from umr_plugins.types import Item, TarImage, as_item

PNG = encoded(picture(), "PNG")


def pack(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def add(path: Path, name: str, kind: bytes) -> None:
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.linkname = "a.png"
        archive.addfile(info)


def code_of(source: TarImage) -> str:
    with pytest.raises(ItemError) as caught:
        load_image(source)
    assert caught.value.stage in ("open", "decode")
    return caught.value.code


def test_a_member_is_a_picture_like_any_other(tmp_path: Path) -> None:
    long = "folder/" * 30 + "é.png"
    path = pack(tmp_path / "s.tar", {"./a.png": PNG, "b/b.png": PNG, long: PNG})
    for name in ("a.png", "./a.png", "b/b.png", long):
        source = TarImage(path, name)
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(picture()))
        assert read_source(source) == PNG
        assert content_key(source) == content_key(PNG)
        assert as_item(source) == as_item({"image": source}) == Item(image=source)
    assert [each.name for each in tmp_path.iterdir()] == ["s.tar"]


@pytest.mark.parametrize(
    ("member", "code"),
    [
        ("none.png", "unreadable"), ("", "unreadable"), ("\ud800", "unreadable"), ("a\0.png", "unreadable"),
        ("empty.png", "empty"), ("text.png", "corrupt"),
        ("soft.png", "link"), ("hard.png", "link"), ("folder", "not_a_file"), ("pipe", "not_a_file"),
        ("device", "not_a_file"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_has_the_code_of_files(tmp_path: Path, member: str, code: str) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": PNG, "empty.png": b"", "text.png": b"no picture"})
    kinds = {"soft.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "folder": tarfile.DIRTYPE}
    kinds |= {"pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    for name, kind in kinds.items():
        add(path, name, kind)
    assert code_of(TarImage(path, member)) == code


def gzipped(path: Path) -> None:
    pack(path, {"a.png": PNG}, "w:gz")


def shortened(path: Path) -> None:
    pack(path, {"a.png": PNG * 20})
    path.write_bytes(path.read_bytes()[:1_500])


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "unreadable"), (Path.mkdir, "not_a_file"), (gzipped, "corrupt"),
        (shortened, "corrupt"), (lambda path: path.write_bytes(b""), "corrupt"),
        (lambda path: path.write_bytes(PNG), "corrupt"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tar_has_a_code(tmp_path: Path, make: Callable[[Path], object], code: str) -> None:
    path = tmp_path / "s.tar"
    make(path)
    assert code_of(TarImage(path, "a.png")) == code


def test_the_error_names_tar_and_member(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": PNG})
    with pytest.raises(ItemError) as caught:
        read_source(TarImage(path, "b.png"))
    assert caught.value.name == f"{path}#b.png"


def test_a_large_member_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": PNG})
    monkeypatch.setattr(folder, "MAX_BYTES", 10)
    assert code_of(TarImage(path, "a.png")) == "too_large"


def test_a_member_that_ends_early_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": PNG})
    monkeypatch.setattr(tar, "_find", lambda *_: (512, path.stat().st_size))
    assert code_of(TarImage(path, "a.png")) == "corrupt"


def test_headers_are_read_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[object] = []
    real = tar._scan
    monkeypatch.setattr(tar, "_scan", lambda *rest: scans.append(rest) or real(*rest))
    path = pack(tmp_path / "s.tar", {f"{number}.png": PNG + bytes([number]) for number in range(20)})
    for number in range(20):
        assert read_source(TarImage(path, f"{number}.png"))[-1] == number
    assert len(scans) == 1
    pack(path, {"0.png": PNG + b"second", "1.png": PNG})
    assert read_source(TarImage(path, "0.png")).endswith(b"second")
    assert code_of(TarImage(path, "2.png")) == "unreadable"
    assert len(scans) == 2


def test_of_equal_names_the_last_counts(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": PNG})
    pack(path, {"a.png": PNG + b"second"}, "a")
    assert read_source(TarImage(path, "a.png")) == PNG + b"second"


def test_threads_read_their_own_members(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", {str(number): bytes([number]) * 9_000 for number in range(1, 200)})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: read_source(TarImage(path, str(number))), range(1, 200)))
    assert found == [bytes([number]) * 9_000 for number in range(1, 200)]


def test_pages_show_members_of_allowed_tars_only(tmp_path: Path) -> None:
    source = TarImage(pack(tmp_path / "s.tar", {"a.png": PNG}), "a.png")
    assert html.may_open(source, [tmp_path])
    assert not html.may_open(source, [tmp_path / "other"])
    assert not html.may_open(TarImage(tmp_path / "in" / ".." / "s.tar", "a.png"), [tmp_path / "in"])


def test_an_index_keeps_the_bytes_of_a_member(tmp_path: Path) -> None:
    source = TarImage(pack(tmp_path / "s.tar", {"a.png": PNG}), "a.png")
    stored, blobs = stored_pictures(Item("kite", source))
    assert item_of("kite", stored, None, blobs.get) == Item("kite", PNG)


def test_rows_name_members_of_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar#b").mkdir()
    pack(tmp_path / "s.tar", {"x/a.png": PNG})
    pack(tmp_path / "a.tar#b" / "t.tar", {"a.png": PNG})
    names = ["s.tar#x/a.png", "a.tar#b/t.tar#a.png"]
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"query": {"image": name}, "positives": [{"text": "a"}]}) + "\n" for name in names)
    )
    [rows] = read_rows(path)
    sources = [row.query.image for row in pickle.loads(pickle.dumps(rows))]
    assert sources == [
        TarImage(tmp_path / "s.tar", "x/a.png"),
        TarImage(tmp_path / "a.tar#b" / "t.tar", "a.png"),
    ]
    assert all(load_image(source).size == picture().size for source in sources)  # type: ignore[arg-type]
    path.write_text(json.dumps({"query": {"image": "s.tar#y.png"}, "positives": [{"text": "a"}]}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the picture .*s\.tar#y\.png: .*no member"):
        read_rows(path)
