"""Folders and files: what a second run does, and what unreadable places must not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import text_pdf
from PIL import Image

from umr_plugins.errors import InputError, ItemError
from umr_plugins.index import folder_sync
from umr_plugins.index.index import FolderReport, Index
from umr_plugins.media.folder import FoundFile
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item, PageImage


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten texts, five pictures, a PDF of three pages (the last without text) in a sub-folder."""
    root = tmp_path / "source"
    (root / "sub").mkdir(parents=True)
    for number in range(10):
        (root / f"{number}.txt").write_text(f"text number {number}")
    for number in range(5):
        Image.new("RGB", (9, 9), (number * 40, 0, 0)).save(root / "sub" / f"{number}.png")
    (root / "sub" / "paper.pdf").write_bytes(text_pdf("first page", "second page", ""))
    return root


@pytest.fixture
def index(tmp_path: Path, encoder: FakeEncoder) -> Iterator[Index]:
    with Index(tmp_path / "db", encoder) as opened:
        yield opened


def counts(report: FolderReport) -> tuple[int, int, int, int]:
    return report.indexed, report.unchanged, report.removed, report.items


def codes(report: FolderReport) -> list[tuple[str, int | None, str]]:
    return [(row.path.name, row.page, row.code) for row in report.refused]


def embedded(encoder: FakeEncoder) -> list[Item]:
    return [item for role, items, _ in encoder.calls if role == "document" for item in items]


def paths(index: Index) -> list[str]:
    return sorted(str(hit.path) for hit in index.get(index.ids()))


def test_first_and_second_run(index: Index, encoder: FakeEncoder, source: Path) -> None:
    commits: list[int] = []
    assert counts(index.add_folder(source, on_commit=commits.append)) == (16, 0, 0, 18)
    assert commits == [18]
    ids = index.ids()
    encoder.calls.clear()
    assert counts(index.add_folder(source, on_commit=commits.append)) == (0, 16, 0, 18)
    assert (encoder.calls, index.ids(), commits) == ([], ids, [18])
    assert index.roots() == [source]
    assert index.verify().ok


def test_hits_tell_where_they_come_from(index: Index, source: Path) -> None:
    index.add_folder(source)
    hit = index.search("text number 3", 1)[0]
    assert (hit.path, hit.page, hit.modality, hit.metadata) == (source / "3.txt", None, "text", {})
    picture = index.search(source / "sub" / "2.png", 1)[0]
    assert (picture.item, picture.modality) == (Item(image=source / "sub" / "2.png"), "image")
    pages = sorted(index.search("x", 9, where={"page": {"$gte": 1}}), key=lambda hit: hit.page or 0)
    pdf = source / "sub" / "paper.pdf"
    assert [(hit.page, hit.path, hit.modality) for hit in pages] == [
        (1, pdf, "fused"),
        (2, pdf, "fused"),
        (3, pdf, "image"),
    ]
    assert pages[0].item == Item(text="first page", image=PageImage(pdf, 1))
    assert len(index.search("x", 50, where={"path": str(pdf)})) == 3


def test_ids_depend_on_path_and_content_only(tmp_path: Path, encoder: FakeEncoder, source: Path) -> None:
    with Index(tmp_path / "one", encoder) as one, Index(None, encoder) as two:
        one.add_folder(source)
        two.add_files(sorted(source.rglob("*.*"), reverse=True))
        assert sorted(one.ids()) == sorted(two.ids())


def test_edits_deletions_and_new_files(index: Index, encoder: FakeEncoder, source: Path) -> None:
    index.add_folder(source)
    before = set(index.ids())
    encoder.calls.clear()
    (source / "3.txt").write_text("edited")
    (source / "4.txt").unlink()
    (source / "new.txt").write_text("brand new")
    assert counts(index.add_folder(source)) == (2, 14, 1, 18)
    assert sorted(item.text or "" for item in embedded(encoder)) == ["brand new", "edited"]
    assert len(before & set(index.ids())) == 16
    assert index.search("text number 4", 1)[0].score < 0.99
    assert index.verify().ok


def test_touched_files_are_not_embedded_again(index: Index, encoder: FakeEncoder, source: Path) -> None:
    index.add_folder(source)
    encoder.calls.clear()
    for path in source.glob("*.txt"):
        os.utime(path, ns=(1, 1))
    reads: list[Path] = []
    real = folder_sync.read_file

    def counted(path: Path, **options: Any) -> bytes:
        reads.append(path)
        return real(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_sync, "read_file", counted)
        assert counts(index.add_folder(source)) == (0, 16, 0, 18)
        assert len(reads) == 10
        assert counts(index.add_folder(source)) == (0, 16, 0, 18)
        assert len(reads) == 10  # the new times were recorded
    assert encoder.calls == []


def test_renamed_and_copied_files_are_not_embedded_again(
    index: Index, encoder: FakeEncoder, source: Path
) -> None:
    index.add_folder(source)
    encoder.calls.clear()
    (source / "sub").rename(source / "moved")
    shutil.copy(source / "1.txt", source / "copy.txt")
    assert counts(index.add_folder(source)) == (7 + 0, 10, 6, 19)
    assert embedded(encoder) == []
    twins = [hit for hit in index.search("text number 1", 2)]
    assert {hit.path for hit in twins} == {source / "1.txt", source / "copy.txt"}
    assert twins[0].id != twins[1].id
    assert index.verify().ok


def test_other_pages_mode_embeds_pdfs_again_and_nothing_else(
    index: Index, encoder: FakeEncoder, source: Path
) -> None:
    index.add_folder(source)
    encoder.calls.clear()
    report = index.add_folder(source, pages="text")
    assert counts(report) == (1, 15, 0, 17)
    assert codes(report) == [("paper.pdf", 3, "no_text")]
    assert [item.modality for item in embedded(encoder)] == ["text", "text"]
    again = index.add_folder(source, pages="text")
    assert (counts(again), codes(again)) == ((0, 16, 0, 17), [("paper.pdf", 3, "no_text")])
    with pytest.raises(InputError, match="pages must be"):
        index.add_folder(source, pages="pictures")  # type: ignore[arg-type]


def test_refused_files_are_reported_on_every_run_and_read_once(
    index: Index, encoder: FakeEncoder, source: Path
) -> None:
    (source / "broken.png").write_bytes(b"no picture")
    (source / "bad.txt").write_text("poison")
    (source / "letter.docx").write_bytes(b"PK")
    (source / "link.txt").symlink_to("1.txt")
    expected = [
        ("bad.txt", None, "model"),
        ("broken.png", None, "corrupt"),
        ("letter.docx", None, "unsupported"),
        ("link.txt", None, "link"),
    ]
    first = index.add_folder(source)
    assert (counts(first), codes(first)) == ((16, 0, 0, 18), expected)
    encoder.calls.clear()
    second = index.add_folder(source)
    assert (counts(second), codes(second), encoder.calls) == ((0, 16, 0, 18), expected, [])
    assert codes(index.add_folder(source, retry_refused=True)) == expected
    assert encoder.calls != []
    Image.new("RGB", (5, 5), "blue").save(source / "broken.png")
    (source / "bad.txt").unlink()
    third = index.add_folder(source)
    assert (counts(third), codes(third)) == ((1, 16, 0, 19), expected[2:])


def test_a_file_that_becomes_bad_leaves_the_index(index: Index, source: Path) -> None:
    index.add_folder(source)
    (source / "sub" / "1.png").write_bytes(b"now broken")
    report = index.add_folder(source)
    assert (counts(report), codes(report)) == ((0, 15, 0, 17), [("1.png", None, "corrupt")])
    assert str(source / "sub" / "1.png") not in paths(index)


def test_one_bad_page_costs_only_itself(index: Index, encoder: FakeEncoder, source: Path) -> None:
    (source / "p.pdf").write_bytes(text_pdf("fine", "poison here", "also fine"))
    report = index.add_files([source / "p.pdf"])
    assert (counts(report), codes(report)) == ((1, 0, 0, 2), [("p.pdf", 2, "model")])
    assert counts(index.add_files([source / "p.pdf"])) == (0, 1, 0, 2)


def refuses(monkeypatch: pytest.MonkeyPatch, folder: Path, root: Path) -> None:
    """Make the walk say that a folder can't be read (the tests may run as root, whom modes don't stop)."""
    real = folder_sync.walk

    def walk(base: Path, **options: Any) -> Iterator[FoundFile | ItemError]:
        if folder == root:
            raise ItemError("unreadable", "the folder can't be listed", stage="open", name=str(root))
        for found in real(base, **options):
            if not (isinstance(found, FoundFile) and found.path.is_relative_to(folder)):
                yield found
        yield ItemError("unreadable", "no", stage="open", name=folder.relative_to(root).as_posix())

    monkeypatch.setattr(folder_sync, "walk", walk)


@pytest.mark.parametrize("which", ["sub", "."])
def test_unreadable_folders_keep_what_was_there(
    index: Index, source: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    index.add_folder(source)
    refuses(monkeypatch, source / which, source)
    report = index.add_folder(source)
    assert [row.code for row in report.refused] == ["unreadable"]
    assert (report.removed, report.items, index.count()) == (0, 18, 18)


def test_a_missing_root_keeps_what_was_there(index: Index, source: Path, tmp_path: Path) -> None:
    index.add_folder(source)
    source.rename(tmp_path / "elsewhere")
    report = index.add_folder(source)
    assert (counts(report), codes(report)) == ((0, 0, 0, 18), [("source", None, "unreadable")])
    (tmp_path / "elsewhere").rename(source)
    assert counts(index.add_folder(source)) == (0, 16, 0, 18)
    with pytest.raises(InputError, match="folder"):
        index.add_folder(tmp_path / "never was")


def test_an_empty_mount_point_keeps_what_was_there(index: Index, source: Path) -> None:
    index.add_folder(source)
    shutil.rmtree(source)
    source.mkdir()
    index._store.ledger.write("UPDATE roots SET device = device + 1")
    assert codes(index.add_folder(source)) == [("source", None, "unreadable")]
    assert index.count() == 18
    index._store.ledger.write("UPDATE roots SET device = device - 1")
    assert counts(index.add_folder(source)) == (0, 0, 16, 0)
    assert index.count() == 0


def test_a_file_that_can_not_be_read_for_now_is_kept(
    index: Index, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add_folder(source)
    os.utime(source / "1.txt", ns=(1, 1))

    def fails(path: Path, **options: Any) -> bytes:
        raise ItemError("unreadable", "it changed while it was being read", stage="open", name=str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folder_sync, "read_file", fails)
        report = index.add_folder(source)
    assert (counts(report), codes(report)) == ((0, 15, 0, 18), [("1.txt", None, "unreadable")])
    assert counts(index.add_folder(source)) == (0, 16, 0, 18)


def test_only_what_is_below_the_root_is_removed(index: Index, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "source-2"  # shares the beginning of its name
    other.mkdir()
    (other / "x.txt").write_text("elsewhere")
    index.add_folder(source)
    index.add_folder(other)
    index.add(["an item of its own"], ids=["mine"])
    (source / "1.txt").unlink()
    assert counts(index.add_folder(source)) == (0, 15, 1, 17)
    assert index.count() == 19
    assert index.remove_folder(source) == 17
    assert paths(index) == sorted(["None", str(other / "x.txt")])
    assert index.roots() == [other]
    assert index.verify().ok


def test_roots_within_roots_hold_each_file_once(index: Index, encoder: FakeEncoder, source: Path) -> None:
    index.add_folder(source)
    encoder.calls.clear()
    assert counts(index.add_folder(source / "sub")) == (0, 6, 0, 8)
    assert (index.count(), encoder.calls) == (18, [])


def test_an_index_inside_its_own_source(source: Path, encoder: FakeEncoder) -> None:
    with Index(source / "db", encoder) as index:
        assert counts(index.add_folder(source)) == (16, 0, 0, 18)
        report = index.add_folder(source)
        assert (counts(report), codes(report)) == ((0, 16, 0, 18), [])


def test_single_files(index: Index, source: Path, tmp_path: Path) -> None:
    one, two = source / "1.txt", source / "sub" / "2.png"
    assert counts(index.add_files([one, str(two), one])) == (2, 0, 0, 2)
    assert counts(index.add_folder(one)) == (0, 1, 0, 1)
    two.unlink()
    assert counts(index.add_files([one, two])) == (0, 1, 1, 1)
    report = index.add_files([tmp_path / "nothing.txt"])
    assert codes(report) == [("nothing.txt", None, "unreadable")]
    with pytest.raises(InputError, match="list of paths"):
        index.add_files(str(one))


def long_text(first: int, last: int) -> str:
    """Paragraphs that become one part each."""
    return "\n\n".join(f"{number} " * 400 for number in range(first, last))


def test_long_files_are_committed_in_steps_and_resumed(
    index: Index, encoder: FakeEncoder, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source / "long.txt"
    path.write_text(long_text(0, 100))
    commits: list[int] = []
    real = encoder.encode_documents

    def fails_at_third(*args: Any, **options: Any) -> Any:
        if len(commits) == 2:
            raise RuntimeError("killed")
        return real(*args, **options)

    monkeypatch.setattr(encoder, "encode_documents", fails_at_third)
    with pytest.raises(RuntimeError, match="killed"):
        index.add_files([path], on_commit=commits.append)
    assert commits == [32, 64]
    assert index.count() == 64
    assert index.verify().problems[0].startswith("Chroma is behind") or index.verify().ok
    monkeypatch.setattr(encoder, "encode_documents", real)
    encoder.calls.clear()
    assert counts(index.add_files([path])) == (1, 0, 0, 100)
    assert len(embedded(encoder)) == 36
    assert (index.count(), index.verify().ok) == (100, True)


def test_a_new_version_of_a_long_file_shows_only_when_it_is_whole(
    index: Index, encoder: FakeEncoder, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source / "long.txt"
    path.write_text(long_text(0, 100))
    index.add_files([path])
    old = set(index.ids())
    path.write_text(long_text(1000, 1080))
    real, calls = encoder.encode_documents, []

    def fails_at_second(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(*args, **options)

    monkeypatch.setattr(encoder, "encode_documents", fails_at_second)
    commits: list[int] = []
    with pytest.raises(RuntimeError, match="killed"):
        index.add_files([path], on_commit=commits.append)
    assert (set(index.ids()), commits) == (old, [])
    assert index.verify().ok
    encoder.calls.clear()
    assert counts(index.add_files([path], on_commit=commits.append)) == (1, 0, 0, 80)
    assert len(embedded(encoder)) == 48
    assert (commits, index.count(), set(index.ids()) & old) == ([80], 80, set())
    # A version that was begun and then overtaken by a third one leaves nothing behind.
    calls.clear()
    path.write_text(long_text(2000, 2080))
    with pytest.raises(RuntimeError, match="killed"):
        index.add_files([path])
    path.write_text("short now")
    assert counts(index.add_files([path])) == (1, 0, 0, 1)
    assert index.count() == 1
    assert index._store.ledger.read("SELECT count(*) FROM items") == [(1,)]
    assert index.verify().ok


def test_an_edit_in_a_long_file_embeds_the_changed_part_only(
    index: Index, encoder: FakeEncoder, source: Path
) -> None:
    path = source / "long.txt"
    path.write_text(long_text(0, 50))
    index.add_files([path])
    before = set(index.ids())
    encoder.calls.clear()
    path.write_text(long_text(0, 50).replace("7 " * 400, "seven " * 400, 1))
    index.add_files([path])
    assert len(embedded(encoder)) == 1
    assert len(before & set(index.ids())) == 49


def test_deleted_items_of_files_stay_deleted_until_the_file_changes(index: Index, source: Path) -> None:
    index.add_folder(source)
    assert index.delete(where={"path": str(source / "1.txt")}) == 1
    assert counts(index.add_folder(source)) == (0, 16, 0, 17)
    (source / "1.txt").write_text("changed")
    assert counts(index.add_folder(source)) == (1, 15, 0, 18)


def test_a_reused_vector_is_the_same_vector(index: Index, source: Path) -> None:
    index.add_folder(source)
    shutil.copy(source / "1.txt", source / "copy.txt")
    index.add_folder(source)
    first, second = (hit.id for hit in index.search("text number 1", 2))
    np.testing.assert_array_equal(*index.vectors([first, second]))


def test_the_encoder_is_not_loaded_for_a_run_that_changes_nothing(
    tmp_path: Path, encoder: FakeEncoder, source: Path
) -> None:
    with Index(tmp_path / "db", encoder) as index:
        index.add_folder(source)
    with Index(tmp_path / "db") as index:  # a fake can't be recreated, so loading it would fail
        assert counts(index.add_folder(source)) == (0, 16, 0, 18)
        (source / "1.txt").write_text("now it is needed")
        with pytest.raises(InputError, match="needs its model"):
            index.add_folder(source)
