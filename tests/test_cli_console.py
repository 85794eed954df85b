"""What the command line prints is safe for a terminal and aligned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umr_plugins.cli import console
from umr_plugins.types import Hit, Item


def test_plain_takes_control_characters_out() -> None:
    assert console.plain("a\x1b[31mb\x00c\nd\t e\u202ef") == "a [31mb c d e f"
    assert console.plain(None) == ""


def test_plain_cuts_to_the_width() -> None:
    assert console.plain("abcdef", 6) == "abcdef"
    assert console.plain("abcdefg", 6) == "abcde…"


def test_table_aligns_and_cuts_the_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = console.table(("n", "text"), [("1", "short"), ("10", "long " * 30)], right=(0,)).splitlines()
    assert lines[0] == " n  text"
    assert lines[2] == " 1  short"
    assert lines[3].startswith("10  long long")
    assert max(map(len, lines)) <= 40


def test_place_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert console.place(tmp_path / "a" / "b.pdf", 3, "id") == "a/b.pdf:3"
    assert console.place(Path("/elsewhere/c.txt"), None, "id") == "/elsewhere/c.txt"
    assert console.place(None, None, "id") == "id"


def test_emit_writes_one_valid_line_whatever_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    hit = Hit("i\ud800d", 0.5, Item(text="naïve\n\x00"), path=Path("/a/\udcff.txt"))
    console.emit([console.hit_row(hit)])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.isascii()
    [row] = json.loads(out)
    assert row == {
        "id": "i\ud800d",
        "score": 0.5,
        "path": "/a/\udcff.txt",
        "page": None,
        "modality": "text",
        "text": "naïve\n\x00",
    }
