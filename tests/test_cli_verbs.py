"""Every verb end to end over a fake model: JSON, exit codes, messages, and what must not be created."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from umr_plugins.backbones.rerankers import KNOWN_RERANKERS
from umr_plugins.backbones.spec import FAMILIES, KNOWN
from umr_plugins.cli import index as index_verb
from umr_plugins.cli.main import main
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder


class DemoEncoder(FakeEncoder):
    is_demo = True


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model name loads a fake of that name."""
    monkeypatch.setattr(
        "umr_plugins.embedder.shared_embedder", lambda model, **options: DemoEncoder(name=model)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, a text, and two files that can't be used."""
    root = tmp_path / "files"
    root.mkdir()
    Image.new("RGB", (40, 30), "red").save(root / "red.png")
    Image.new("RGB", (40, 30), "blue").save(root / "blue.png")
    (root / "note.md").write_text("# Boats\n\nA blue boat on the sea.", encoding="utf-8")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "empty.txt").write_bytes(b"")
    return root


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Exit code, the one JSON value on stdout, and stderr."""
    capsys.readouterr()
    code = main([str(word) for word in words] + ["--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


@pytest.fixture
def db(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder, indexed."""
    db = tmp_path / "db"
    assert main(["index", str(folder), "--db", str(db), "--model", "umr-tiny"]) == 3
    capsys.readouterr()
    return db


def test_index_reports_files_and_refusals_as_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("index", folder, "--db", tmp_path / "db", "--model", "umr-tiny")
    code, report, err = run_json(capsys, *words)
    assert code == 3
    assert {key: report[key] for key in ("indexed", "unchanged", "removed", "items")} == {
        "indexed": 3,
        "unchanged": 0,
        "removed": 0,
        "items": 3,
    }
    assert [(row["path"], row["page"], row["code"]) for row in report["refused"]] == [
        (str(folder / "broken.png"), None, "corrupt"),
        (str(folder / "empty.txt"), None, "empty"),
    ]
    assert all(set(row) == {"path", "page", "stage", "code", "reason"} for row in report["refused"])
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines
    assert [list(line) for line in lines] == [["committed"]] * len(lines)
    assert lines[-1] == {"committed": 3}

    (folder / "red.png").unlink()
    code, report, err = run_json(capsys, *words)
    assert (code, report["indexed"], report["unchanged"], report["removed"]) == (3, 0, 2, 1)
    assert "committed" not in err


def test_index_takes_several_sources_and_counts_commits_over_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("a red kite")
    single = folder / "red.png"
    code, report, err = run_json(
        capsys, "index", other, single, folder / "note.md", "--db", tmp_path / "db", "--model", "umr-tiny"
    )
    assert (code, report["indexed"], report["items"], report["refused"]) == (0, 3, 3, [])
    counts = [json.loads(line)["committed"] for line in err.splitlines()]
    assert counts == sorted(set(counts))
    assert counts[-1] == 3


def test_index_for_people_names_refused_files_and_the_demonstration_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(folder), "--db", str(tmp_path / "db"), "--model", "umr-tiny"]) == 3
    out, err = capsys.readouterr()
    assert "3 files indexed" in out
    assert "2 refused" in out
    assert "broken.png" in out
    assert "corrupt" in out
    assert "demonstration model" in err


def test_index_uses_the_real_model_by_default_and_the_recorded_one_later(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_json(capsys, "index", folder, "--db", tmp_path / "real")
    run_json(capsys, "index", folder, "--db", tmp_path / "tiny", "--model", "umr-tiny")
    run_json(capsys, "index", folder, "--db", tmp_path / "tiny")
    _, real, _ = run_json(capsys, "info", "--db", tmp_path / "real")
    _, tiny, _ = run_json(capsys, "info", "--db", tmp_path / "tiny")
    assert real["index"]["model"] == "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
    assert tiny["index"]["model"] == "umr-tiny"


def test_another_model_is_an_error_with_its_code(
    db: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer, err = run_json(
        capsys, "index", folder, "--db", db, "--model", "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
    )
    assert code == 1
    assert answer["error"]["code"] == "fingerprint"
    assert answer["error"]["message"] in err


def test_search_by_text_picture_and_both(db: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, _ = run_json(capsys, "search", "--image", folder / "red.png", "--db", db, "-k", 2)
    assert code == 0
    assert len(rows) == 2
    assert set(rows[0]) == {"id", "score", "path", "page", "modality", "text"}
    assert rows[0]["path"] == str(folder / "red.png")
    assert rows[0]["modality"] == "image"
    assert rows[0]["text"] is None
    assert rows[0]["score"] == pytest.approx(1, abs=1e-4)
    assert rows[0]["score"] >= rows[1]["score"]
    _, fused, _ = run_json(capsys, "search", "words", "--image", folder / "red.png", "--db", db)
    assert fused[0]["score"] < 0.99
    _, filtered, _ = run_json(capsys, "search", "boat", "--db", db, "--where", '{"modality": "text"}')
    assert [row["path"] for row in filtered] == [str(folder / "note.md")]


def test_search_passes_the_instruction_on(
    db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = DemoEncoder(name="umr-tiny")
    monkeypatch.setattr("umr_plugins.embedder.shared_embedder", lambda model, **options: encoder)
    run_json(capsys, "search", "boat", "--db", db, "--instruction", "Find boats.")
    [(role, [item], instruction)] = encoder.calls
    assert (role, item.text) == ("query", "boat")
    assert "Find boats." in (instruction, item.instruction)


def test_search_prints_a_table(
    db: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["search", "boat", "--db", str(db)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["score", "kind", "where", "text"]
    assert len(out.splitlines()) == 5
    assert "note.md" in out
    assert str(folder) not in out
    assert "A blue boat on the sea." in out
    assert "demonstration model" in err


def test_search_writes_a_page_with_previews(db: Path, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "sub" / "page.html"
    words = [
        "search",
        "<b>boat</b>",
        "--image",
        str(folder / "red.png"),
        "--db",
        str(db),
        "--html",
        str(page),
    ]
    assert main(words) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count('src="data:image/webp') == 3  # the query's picture and two found ones
    assert "&lt;b&gt;boat&lt;/b&gt;" in html
    assert "A blue boat on the sea." in html
    assert "demonstration model" in html


def test_a_page_opens_no_picture_outside_the_indexed_folders(
    db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (20, 20), "black").save(secret)
    with Index(db, DemoEncoder(name="umr-tiny")) as index:
        index.add([{"image": secret}], ids=["secret"])
    page = tmp_path / "page.html"
    assert main(["search", "x", "--db", str(db), "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count('src="data:image/webp') == 2
    assert "not opened" in html


def test_verify_info_and_rebuild(db: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "verify", "--db", db)[:2] == (0, {"ok": True, "items": 3, "problems": []})
    assert run_json(capsys, "rebuild", "--db", db)[:2] == (0, {"ok": True, "items": 3, "problems": []})
    code, facts, _ = run_json(capsys, "info", "--db", db)
    assert (code, facts["ok"], facts["items"]) == (0, True, 3)
    assert facts["index"]["roots"] == [str(folder)]
    for verb in ("verify", "rebuild", "info"):
        assert main([verb, "--db", str(db)]) == 0
        assert "3" in capsys.readouterr().out


def test_verify_says_what_is_wrong(
    db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from umr_plugins.index.verify import VerifyReport

    monkeypatch.setattr(Index, "verify", lambda self: VerifyReport(False, 3, problems=("one is missing",)))
    code, report, _ = run_json(capsys, "verify", "--db", db)
    assert (code, report) == (1, {"ok": False, "items": 3, "problems": ["one is missing"]})
    assert main(["verify", "--db", str(db)]) == 1
    assert "one is missing" in capsys.readouterr().out


def test_info_of_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, _ = run_json(capsys, "info")
    assert code == 0
    assert "chromadb" in facts["libraries"]
    assert main(["info"]) == 0
    assert "umr-plugins" in capsys.readouterr().out


def test_info_of_a_model_folder(gme_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, _ = run_json(capsys, "info", gme_folder)
    assert (code, facts["ok"], facts["items"]) == (0, True, None)
    assert facts["model"]["folder"] == str(gme_folder)
    assert facts["model"]["positions"] == "sequential"


def test_info_says_what_loading_would_do(gme_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, facts, _ = run_json(capsys, "info", gme_folder)
    with safe_open(gme_folder / "model.safetensors", framework="np") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    assert (facts["model"]["parameters"], facts["model"]["memory_bytes"]) == (count, 2 * count)
    assert facts["model"]["would"].startswith("load ")
    code, facts, _ = run_json(capsys, "info", "nvidia/MM-Embed")  # not here, and not fetched to be told about
    assert (code, facts["model"]["license"], facts["model"]["dim"]) == (0, "cc-by-nc-4.0", 4096)
    assert "download it from the Hugging Face hub" in facts["model"]["would"]
    code, facts, _ = run_json(capsys, "info", "someone/unheard-of")
    assert (code, facts["error"]["code"]) == (1, "model_not_found")


def test_models_lists_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, _ = run_json(capsys, "models")
    assert code == 0
    assert {each["model"] for each in facts["known"]} == set(KNOWN)
    assert all(each["dim"] and each["memory_bytes"] for each in facts["known"])
    assert [each["model_type"] for each in facts["families"]] == list(FAMILIES)
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "cc-by-nc-4.0" in shown
    assert "demonstration model" in shown
    assert {each["model"] for each in facts["rerankers"]} == set(KNOWN_RERANKERS)
    assert "Qwen/Qwen2-VL-2B-Instruct" in shown


def test_info_on_rerankers_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, _ = run_json(capsys, "info", "Qwen/Qwen2-VL-2B-Instruct")
    assert (code, facts["model"]["role"]) == (0, "reranker")
    assert "then load 4.4 GB" in facts["model"]["would"]
    _, facts, _ = run_json(capsys, "info", "code-kunkun/LamRA-Rank")
    assert "its size is not recorded" in facts["model"]["would"]


@pytest.mark.parametrize("verb", [["search", "x"], ["verify"], ["rebuild"], ["info"]])
def test_an_absent_index_is_an_error_and_is_not_created(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer, err = run_json(capsys, *verb, "--db", tmp_path / "none")
    assert code == 1
    assert set(answer["error"]) == {"code", "message"}
    assert "umr index" in answer["error"]["message"]
    assert "umr index" in err
    assert not (tmp_path / "none").exists()


def test_a_missing_source_is_an_error_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer, _ = run_json(capsys, "index", tmp_path / "typo", "--db", tmp_path / "db")
    assert (code, answer["error"]["code"]) == (1, "input")
    assert "typo" in answer["error"]["message"]
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["search", "--db", "d"],
        ["search", "  ", "--db", "d"],
        ["search", "x"],
        ["search", "x", "--db", "d", "-k", "0"],
        ["search", "x", "--db", "d", "-k", "many"],
        ["search", "x", "--db", "d", "--where", "{"],
        ["search", "x", "--db", "d", "--where", "[1]"],
        ["index", "--db", "d"],
        ["index", "x", "--db", "d", "--pages", "sideways"],
        ["fly"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert "usage: umr" in capsys.readouterr().err


def test_ctrl_c_is_130_and_says_that_a_second_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index_verb, "index_sources", interrupted)
    code, answer, err = run_json(capsys, "index", folder, "--db", tmp_path / "db", "--model", "umr-tiny")
    assert code == 130
    assert answer["error"]["code"] == "interrupted"
    assert "again" in err
    assert run_json(capsys, "verify", "--db", tmp_path / "db")[0] == 0  # the folder was given free


def test_errors_of_the_system_are_messages_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, answer, _ = run_json(capsys, "index", tmp_path, "--db", tmp_path / "file", "--model", "umr-tiny")
    assert code == 1
    assert answer["error"]["code"] in {"storage", "input"}


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = [sys.executable, "-m", "umr_plugins.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
