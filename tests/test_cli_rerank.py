"""`umr rerank` and `umr search --rerank` over a fake judge: JSON, tables, exit codes, messages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from umr_plugins.cli.main import main
from umr_plugins.testing import FakeEncoder, FakeReranker


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model name loads a fake of that name."""
    monkeypatch.setattr("umr_plugins.embedder.shared_embedder", lambda model, **_: FakeEncoder(name=model))
    monkeypatch.setattr("umr_plugins.reranker.Reranker", FakeReranker)


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Exit code, the one JSON value on stdout, and stderr."""
    capsys.readouterr()
    code = main([str(word) for word in words] + ["--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """A text, a picture with a name, and one whose picture is gone; one object a line."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    rows = [
        {"id": "a", "text": "a green field", "score": 0.5},
        {"id": "b", "image": str(tmp_path / "gone.png"), "score": 0.4},
        {"id": "c", "text": "a blue boat", "image": str(tmp_path / "red.png"), "score": 0.3},
    ]
    path = tmp_path / "candidates.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


def test_candidates_are_judged_and_none_is_lost(
    candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = ["rerank", "a blue boat", "--image", tmp_path / "red.png", "--candidates", candidates]
    code, rows, err = run_json(capsys, *query)
    assert code == 3
    assert [row["id"] for row in rows] == ["c", "b", "a"]
    assert (rows[0]["relevance"], rows[0]["score"]) == (1.0, pytest.approx(1.3))
    assert rows[1]["relevance"] is None
    assert "gone.png" in rows[1]["error"]
    assert "not judged" in err
    assert set(rows[0]) == {"id", "path", "page", "modality", "text", "score", "relevance", "error", "image"}
    _, pure, _ = run_json(capsys, *query, "--weight", "pure", "-n", 1, "--explain")
    assert [(row["id"], row["score"]) for row in pure] == [("c", 1.0)]
    assert pure[0]["prompt"] == "a blue boat|a blue boat"


def test_an_array_on_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('[{"text": "a field"}, {"text": "a boat"}]'))
    code, rows, _ = run_json(capsys, "rerank", "boat")
    assert (code, [row["text"] for row in rows]) == (0, ["a boat", "a field"])


def test_a_table_for_people(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerank", "green", "--candidates", str(candidates)]) == 3
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["score", "relevance", "where", "text"]
    assert lines[2].split() == ["1", "1.500", "1.000", "a", "a", "green", "field"]
    assert "not judged" in err


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "line 1: not valid JSON"),
        ('{"text": "a"}\n{"txt": "b"}', r"candidate 2: got ['txt']; allowed are"),
        ("[1]", "candidate 1: got int"),
        ('{"text": "a", "score": "high"}', "candidate 1: score must be int or float"),
        ('{"text": 5}', "text must be str"),
        ('{"path": "a.pdf", "page": "x"}', "page must be int"),
        ("\xff", "not valid JSON"),
    ],
)
def test_candidates_of_another_form_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, said: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(written)
    code, value, _ = run_json(capsys, "rerank", "x", "--candidates", path)
    assert (code, value["error"]["code"]) == (1, "input")
    assert said in value["error"]["message"]


def test_lines_are_those_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028boat"}\n'.encode())
    assert run_json(capsys, "rerank", "boat", "--candidates", path)[1][0]["relevance"] == 1.0
    path.write_bytes(b"\xff\xfe")
    code, value, _ = run_json(capsys, "rerank", "boat", "--candidates", path)
    assert (code, value["error"]["code"]) == (1, "input")
    assert "is not UTF-8" in value["error"]["message"]


def test_no_candidates_and_no_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    assert run_json(capsys, "rerank", "x", "--candidates", tmp_path / "none.jsonl")[:2] == (0, [])
    code, value, _ = run_json(capsys, "rerank", "x", "--candidates", tmp_path / "absent")
    assert code == 1
    assert "there is no file" in value["error"]["message"]
    with pytest.raises(SystemExit) as caught:
        main(["rerank", " ", "--candidates", str(tmp_path / "none.jsonl")])
    assert caught.value.code == 2
    for weight in ("-1", "much"):
        with pytest.raises(SystemExit):
            main(["rerank", "x", "--weight", weight])


@pytest.fixture
def db(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Twelve notes and a picture."""
    root = tmp_path / "files"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}.md").write_text(f"Note {number} tells of a boat.", encoding="utf-8")
    Image.new("RGB", (40, 30), "red").save(root / "red.png")
    assert main(["index", str(root), "--db", str(tmp_path / "db"), "--model", "umr-tiny"]) == 0
    capsys.readouterr()
    return tmp_path / "db"


def test_search_and_rerank(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "search", "note 7", "--db", db, "-k", 13)[1]
    code, rows, _ = run_json(capsys, "search", "note 7", "--db", db, "-k", 13, "--rerank")
    assert code == 0
    assert {row["id"] for row in rows} == {row["id"] for row in found}
    assert "Note 7" in rows[0]["text"]
    assert rows[0]["relevance"] == 1.0
    before = {row["id"]: row["score"] for row in found}
    assert all(row["score"] == pytest.approx(before[row["id"]] + row["relevance"]) for row in rows)
    # Ten are judged although three are wanted.
    three = run_json(capsys, "search", "note 7", "--db", db, "-k", 3, "--rerank", "--weight", "pure")[1]
    best = sorted(
        (row["relevance"] for row in rows if row["id"] in {r["id"] for r in found[:10]}), reverse=True
    )
    assert [row["relevance"] for row in three] == best[:3]


def test_the_table_of_a_reranked_search_shows_the_relevance(
    db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "found.html"
    assert main(["search", "note 7", "--db", str(db), "-k", "2", "--rerank", "--html", str(page)]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[0].split() == ["score", "relevance", "kind", "where", "text"]
    assert len(out.splitlines()) == 4
    assert "2 answers" in page.read_text(encoding="utf-8")


def test_options_of_the_reranker_need_it(db: Path) -> None:
    for option in (["--weight", "0.5"], ["--rerank-model", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["search", "x", "--db", str(db), *option])
        assert caught.value.code == 2
