"""Rows in JSONL: what is read, what is refused and how, and that a file of rows can be used from anywhere."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umr_plugins.data import lines
from umr_plugins.data.rows import read_rows
from umr_plugins.data.schema import CLASSES, Document, Row, Rows, as_json, parse_row
from umr_plugins.errors import DataError, UMRError
from umr_plugins.types import Item, TarImage

GOOD: dict[str, Any] = {"query": {"text": "red kite"}, "positives": [{"text": "a bird"}]}
FULL: dict[str, Any] = {
    "id": "q1",
    "query": {"text": "the same in blue", "image": "a.jpg"},
    "instruction": ["Find it.", "Show it."],
    "positives": [{"id": "d1", "text": "a blue one", "score": 0.9}],
    "negatives": [{"id": 7, "image": "in/b.jpg", "score": 0.61, "kind": "wrong_modality"}],
    "source": "shop",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "in/b.jpg"):
        (tmp_path / name).write_bytes(b"never decoded here")
    return tmp_path


def write(folder: Path, *rows: object, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return str(caught.value)


def with_part(name: str, value: object, row: dict[str, Any] = GOOD) -> dict[str, Any]:
    return {**copy.deepcopy(row), name: value}


def test_a_full_row_is_read_as_it_stands(folder: Path) -> None:
    [rows] = read_rows(write(folder, GOOD, FULL))[1:]
    assert rows[0] == Row(
        query=Item("the same in blue", folder / "a.jpg"),
        positives=(Document(Item("a blue one"), "d1", 0.9),),
        negatives=(Document(Item(image=folder / "in" / "b.jpg"), "7", 0.61, "wrong_modality"),),
        instructions=("Find it.", "Show it."),
        source="shop",
        id="q1",
        where="train.jsonl:2",
    )
    assert isinstance(rows, Rows)
    assert (len(rows), rows.name) == (1, "shop")
    assert [CLASSES[number] for number in rows.classes] == ["fused"]
    assert (rows.classes.dtype, rows.pictures.dtype, rows.negatives.dtype) == (np.int8, np.bool_, np.int32)
    assert (rows.pictures.tolist(), rows.negatives.tolist()) == ([True], [1])


def test_a_row_is_written_as_it_is_read(folder: Path) -> None:
    several = {
        "query": {"images": ["a.jpg", "in/b.jpg"]},
        "instruction": "Look.",
        "positives": [{"id": "1", "image": "s.tar#x/c.jpg", "pool": "wiki"}],
        "source": "pages",
    }
    full = copy.deepcopy(FULL)
    full["negatives"][0]["id"] = "7"
    for given in (full, several):
        row = parse_row(given, folder, "none", "here:1")
        assert as_json(row, folder) == given
    for outside in (Item(image=folder.parent / "b.jpg"), Item(image=b"in memory")):
        with pytest.raises(DataError, match=r"here:1: the picture .* is no file below"):
            as_json(Row(outside, row.positives, where="here:1"), folder)


@pytest.mark.parametrize(
    ("query", "positive", "expected"),
    [
        ({"text": "a"}, {"text": "b"}, "single"),
        ({"image": "a.jpg"}, {"image": "in/b.jpg"}, "single"),
        ({"text": "a"}, {"image": "a.jpg"}, "cross"),
        ({"image": "a.jpg"}, {"text": "a"}, "cross"),
        ({"text": "a"}, {"text": "b", "image": "a.jpg"}, "fused"),
        ({"text": "a", "image": "a.jpg"}, {"text": "b"}, "fused"),
        ({"text": " ", "image": "a.jpg"}, {"image": "in/b.jpg", "text": ""}, "single"),
    ],
)
def test_what_a_row_trains(folder: Path, query: Any, positive: Any, expected: str) -> None:
    [rows] = read_rows(write(folder, {"query": query, "positives": [positive]}))
    assert rows[0].modality_class == CLASSES[rows.classes[0]] == expected
    assert rows.pictures[0] == rows[0].pictures == ("image" in query or "image" in positive)


def test_a_picture_in_a_negative_counts_as_picture() -> None:
    row = Row(Item("a"), (Document(Item("b")),), (Document(Item(image=b"x")),))
    assert row.pictures
    assert row.modality_class == "single"


def test_keys_are_equal_for_equal_documents_only(folder: Path) -> None:
    a, b = Item("x", folder / "a.jpg"), Item("x", folder / "in" / "b.jpg")
    assert Document(a).key("s") == Document(Item("x", folder / "a.jpg"), score=1.0, kind="k").key("t")
    different = [
        Document(a), Document(b), Document(Item("x")), Document(Item(image=folder / "a.jpg")),
        Document(Item("x", TarImage(folder / "a.tar", "m"))), Document(Item("x", b"bytes")),
        Document(a, "1"), Document(a, "2"), Document(a, "1", pool="p"),
    ]  # fmt: skip
    assert len({document.key("s") for document in different}) == len(different)
    assert Document(a, "1").key("s") == Document(b, "1").key("s")
    assert Document(a, "1").key("s") != Document(a, "1").key("t")
    assert Document(a, "1", pool="p").key("s") == Document(b, "1", pool="p").key("t")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([], r"each line is a JSON object, got a list"),
        ({}, r'there is no "query"'),
        (with_part("query", "red kite"), r"query: must be an object with text, image, images; got a text"),
        (with_part("query", {"text": "  "}), r"query: .*empty or blank"),
        (with_part("query", {"text": 5}), r"query: text must be a string, got a number"),
        (with_part("query", {"txt": "a"}), r"unknown key 'txt'; allowed are .*did you mean 'text'\?"),
        (with_part("query", {"image": "a.jpg", "images": []}), r'"image" or "images", not both'),
        (with_part("query", {"images": "a.jpg"}), r"images is a list of paths, got a text"),
        (with_part("query", {"image": {"path": "a.jpg"}}), r"a picture is the path of a file"),
        (with_part("positives", []), r'"positives" needs at least one document'),
        (with_part("positives", {"text": "a"}), r'"positives" is a list of documents, got an object'),
        (with_part("positives", ["a"]), r"positives\[0\]: must be an object"),
        (with_part("positives", [{"id": "1"}]), r"positives\[0\]: .*empty or blank"),
        (with_part("positives", [{"text": "a", "score": "1"}]), r"score must be a finite number"),
        (with_part("positives", [{"text": "a", "score": True}]), r"score must be a finite number"),
        (with_part("positives", [{"text": "a", "score": 10**400}]), r"score must be a finite number"),
        (with_part("positives", [{"text": "a", "kind": 1}]), r"kind: must be a text"),
        (with_part("positives", [{"text": "a", "id": ""}]), r"id: an id is a text"),
        (with_part("positives", [{"text": "a", "id": 1.5}]), r"id: an id is a text"),
        (with_part("positives", [{"text": "a", "id": "\ud800"}]), r"id: an id is a text"),
        (with_part("positives", [{"text": "a"}, {"text": "a"}]), r"positives\[1\] is given twice"),
        (with_part("negatives", [{"text": "a bird"}]), r"negatives\[0\] is also a positive"),
        (with_part("negatives", [{"text": "a"}, "b"]), r"negatives\[1\]: must be an object"),
        (with_part("instruction", ""), r"instruction: must be a text that is not blank"),
        (with_part("instruction", ["Find it.", 3]), r"instruction: must be a text"),
        (with_part("source", 3), r"source: must be a text"),
        (with_part("postives", []), r"unknown key 'postives'.*did you mean 'positives'\?"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_what_is_allowed(folder: Path, row: object, told: str) -> None:
    message = refused(write(folder, GOOD, row))
    assert message.startswith(f"1 problem in {folder / 'train.jsonl'}:\n  train.jsonl:2: ")
    assert re.search(told, message), message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.jpg", "can't be read (No such file or directory)"),
        ("in", "is no regular file"),
        ("pipe", "is no regular file"),
        ("../b.jpg", "lies outside"),
        ("in/../../b.jpg", "lies outside"),
        ("/etc/passwd", "lies outside"),
        (".", "lies outside"),
        ("a\0.jpg", "a picture is the path of a file"),
        ("", "a picture is the path of a file"),
        ("\ud800.jpg", "a picture is the path of a file"),
        ("https://example.org/a.jpg", "is no path; save the picture"),
        ("data:image/png;base64,AAAA", "is no path; save the picture"),
        ("none.tar#a.jpg", "can't be read (No such file or directory)"),
        ("../s.tar#a.jpg", "lies outside"),
        ("s.tar#", "names no member"),
    ],
)
def test_a_wrong_picture_is_refused(folder: Path, name: str, told: str) -> None:
    os.mkfifo(folder / "pipe")
    (folder.parent / "b.jpg").write_bytes(b"outside")
    message = refused(write(folder, {"query": {"image": name}, "positives": [{"text": "a"}]}))
    assert "train.jsonl:1: " in message
    assert told in message


@pytest.mark.parametrize("name", ["in/../a.jpg", "./a.jpg", "{folder}/a.jpg"])
def test_every_way_to_name_a_file_below_is_taken(folder: Path, name: str) -> None:
    given = {"query": {"image": name.replace("{folder}", str(folder))}, "positives": [{"text": "a"}]}
    [rows] = read_rows(write(folder, given))
    assert rows[0].query.image == folder / "a.jpg"


def test_a_relative_path_of_the_file_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, FULL)
    monkeypatch.chdir(folder / "in")
    [rows] = read_rows("../train.jsonl")
    monkeypatch.chdir("/")
    assert rows[0].query.image == folder / "a.jpg"


def test_pictures_are_only_looked_for_when_that_is_wanted(folder: Path) -> None:
    path = write(folder, {"query": {"image": "none.jpg"}, "positives": [{"text": "a"}]})
    [rows] = read_rows(path, check_pictures=False)
    assert rows[0].query.image == folder / "none.jpg"


def test_ten_problems_are_shown_and_the_rest_counted(folder: Path) -> None:
    rows = [GOOD, *[{"query": 1}] * 13, GOOD]
    message = refused(write(folder, *rows))
    assert message.startswith("13 problems in ")
    assert [int(line) for line in re.findall(r"train\.jsonl:(\d+): query", message)] == list(range(2, 12))
    assert message.endswith("\n  and 3 more")


def test_the_error_is_of_the_library() -> None:
    assert issubclass(DataError, UMRError | ValueError)
    assert DataError("x").code == "data"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'{"query": {"text": "\xff"}}', "byte 21 of the line is not valid UTF-8"),
        (b'{"query": {"text": "a"}, "positi', "was the file cut short?"),
        (b'{"query": {"text": "a"}, "positi\n', "not JSON"),
        (b'{"id": "1", "id": "2"}\n', "the key 'id' is there twice"),
        (b'{"query": {"text": "a"}, "positives": [{"text": "b", "score": NaN}]}\n', "NaN is no number"),
        (b"[" * 200_000 + b"\n", "nested too deeply"),
        ("\ufeff".encode("utf-16"), "not valid UTF-8"),
        (b"null\n", "got null"),
        (b"", "holds no rows"),
        (b"\n \r\n", "holds no rows"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else None,
)
def test_broken_bytes_are_refused(folder: Path, data: bytes, told: str) -> None:
    path = folder / "train.jsonl"
    path.write_bytes(data)
    assert told in refused(path)


def test_marks_line_ends_and_blank_lines_make_no_difference(folder: Path) -> None:
    bare = [json.dumps({**GOOD, "id": str(number)}).encode() for number in range(3)]
    plain, odd = folder / "plain.jsonl", folder / "odd.jsonl"
    plain.write_bytes(b"\n".join(bare) + b"\n")
    odd.write_bytes(b"\xef\xbb\xbf" + bare[0] + b"\r\n\r\n  \n" + bare[1] + b"\n" + bare[2])
    [left], [right] = (read_rows(path, source="s") for path in (plain, odd))
    assert [row.where for row in right] == ["odd.jsonl:1", "odd.jsonl:4", "odd.jsonl:5"]
    assert [row.id for row in left] == [row.id for row in right] == ["0", "1", "2"]
    assert left.sha256 == right.sha256
    assert len(left.sha256) == 64


def test_the_hash_tells_other_rows_apart(folder: Path) -> None:
    found = {
        read_rows(write(folder, *rows))[0].sha256
        for rows in ([GOOD], [GOOD, GOOD], [with_part("id", "1")], [with_part("query", {"text": "x"})])
    }
    assert len(found) == 4


def test_a_line_separator_inside_a_text_ends_no_line(folder: Path) -> None:
    path = folder / "train.jsonl"
    text = "one\u2028two\u0085three"
    path.write_text(json.dumps(with_part("query", {"text": text}), ensure_ascii=False) + "\n", "utf-8")
    [rows] = read_rows(path)
    assert rows[0].query.text == text


def test_an_endless_line_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD", 100)
    assert "more than 100 bytes" in refused(write(folder, with_part("query", {"text": "x" * 200})))


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(folder: Path, make: Any) -> None:
    make(folder / "train.jsonl")
    assert "train.jsonl" in refused(folder / "train.jsonl")


def test_rows_of_several_sources_are_told_apart(folder: Path) -> None:
    given = [with_part("source", name) for name in ("b", "a", "b")] + [GOOD]
    found = read_rows(write(folder, *given), source="rest")
    assert [(rows.name, len(rows)) for rows in found] == [("b", 2), ("a", 1), ("rest", 1)]
    assert [row.where for row in found[0]] == ["train.jsonl:1", "train.jsonl:3"]
    assert {row.source for row in found[0]} == {"b"}
    assert [rows.name for rows in read_rows(write(folder, GOOD))] == ["train"]


def test_rows_are_a_sequence(folder: Path) -> None:
    [rows] = read_rows(write(folder, *(with_part("id", number) for number in range(5))))
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[-1].id == "4"
    assert rows[np.int64(2)].id == "2"
    assert [row.id for row in rows[1:3]] == ["1", "2"]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            rows[outside]


def test_a_file_that_has_changed_is_noticed(folder: Path) -> None:
    path = write(folder, GOOD, GOOD)
    [rows] = read_rows(path)
    assert rows[1].query.text == "red kite"
    write(folder, GOOD, with_part("query", {"text": "red kits"}))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="has changed since it was checked"):
        rows[1]
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        rows[1]


def test_a_file_that_grows_while_it_is_checked_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, GOOD)
    whole = lines.TextFile.scan

    def slowly(self: lines.TextFile, **options: Any) -> Any:
        for found in whole(self, **options):
            with path.open("a") as handle:
                handle.write("\n")
            yield found

    monkeypatch.setattr(lines.TextFile, "scan", slowly)
    assert "has changed" in refused(path)


def numbered(folder: Path, count: int) -> Rows:
    rows = (
        {**GOOD, "id": str(number), "positives": [{"text": "x" * (number % 97 + 1)}]}
        for number in range(count)
    )
    [found] = read_rows(write(folder, *rows))
    return found


def test_rows_survive_pickling_without_their_content(folder: Path) -> None:
    rows = numbered(folder, 2_000)
    data = pickle.dumps(rows)
    assert len(data) < 40 * len(rows)
    again = pickle.loads(data)
    assert again.sha256 == rows.sha256
    assert again[1_234] == rows[1_234]


def test_threads_read_their_own_rows(folder: Path) -> None:
    rows = numbered(folder, 500)
    wanted = random.Random(0).choices(range(500), k=4_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: rows[index].id, wanted))
    assert found == [str(index) for index in wanted]


FORK = """
import os, sys
from umr_plugins.data.rows import read_rows
[rows] = read_rows(sys.argv[1])
assert rows[0].id == "0"
children = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(rows[index].id == str(index) for index in range(child, 200, 3)) else 1)
    children.append(pid)
assert all(rows[index].id == str(index) for index in range(200))
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
"""


def test_forks_read_their_own_rows(folder: Path) -> None:
    numbered(folder, 200)
    # In a process of its own, since others here have threads.
    subprocess.run([sys.executable, "-c", FORK, str(folder / "train.jsonl")], check=True)


def test_opening_twenty_thousand_rows_opens_no_picture_and_keeps_no_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"query": {"image": "a.jpg"}, "positives": [{"text": "word " * 100}]}
    path = folder / "train.jsonl"
    path.write_text((json.dumps(row) + "\n") * 20_000)
    opened: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest: opened.append(self.name) or real(self, *rest))
    monkeypatch.setattr(
        "umr_plugins.media.folder.read_file", lambda *_, **__: pytest.fail("a picture was opened")
    )
    [rows] = read_rows(path)
    assert len(rows) == 20_000
    assert set(opened) == {"train.jsonl"}
    assert len(pickle.dumps(rows)) < 30 * len(rows)


def test_reading_rows_needs_no_torch() -> None:
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, umr_plugins.data.readers\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
