"""The snippets of README and docs run as they are written, with umr-tiny in place of the real model."""

from __future__ import annotations

import gc
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode

from umr_plugins.cli.main import main
from umr_plugins.demo import FILES
from umr_plugins.demo import ROOT as DEMO
from umr_plugins.media.images import load_image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("integrations/*/README.md")),
]

# The only thing that is changed: where a snippet would download GME-2B, it gets umr-tiny.
REAL_TO_TINY = {
    "GMEEmbedding()": 'GMEEmbedding("umr-tiny")',
    "GMEEmbedding(embeddings_cache": 'GMEEmbedding("umr-tiny", embeddings_cache',
    "GMEEmbeddings()": 'GMEEmbeddings(model="umr-tiny")',
    "Embedder()": 'Embedder("umr-tiny")',
}
RERANKERS = {
    "Reranker()": 'Reranker("{folder}", dtype="float32")',
    "MLLMRerank(": 'MLLMRerank("{folder}", dtype="float32", ',
    "MLLMReranker(": 'MLLMReranker(model="{folder}", dtype="float32", ',
}
"""These have no demonstration model: a random checkpoint, whose answers mean nothing, judges instead."""


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def snippets(language: str) -> list[object]:
    """Every block as a parameter named after its page and number."""
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT).as_posix()}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds the files which the snippets name."""
    drawings = sorted((FILES / "pictures").glob("*.png"))
    papers = tmp_path / "papers"
    papers.mkdir()
    for drawing in drawings[:3]:
        shutil.copy(drawing, papers)
    shutil.copy(next((FILES / "notes").glob("*.md")), papers / "notes.md")
    shutil.copy(papers / "notes.md", tmp_path)
    shutil.copy(FILES / "guide.pdf", tmp_path / "report.pdf")
    shutil.copy(next((FILES / "photos").glob("*.jpg")), tmp_path / "photo.jpg")
    shutil.copy(next((DEMO / "queries").glob("*.png")), tmp_path / "part.jpg")
    shutil.copy(drawings[4], tmp_path / "key.png")
    shutil.copy(drawings[5], tmp_path / "bicycle.jpg")
    shutil.copy(drawings[6], tmp_path / "a.jpg")
    shutil.copytree(DEMO / "umr-tiny", tmp_path / "parts-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sessions() -> list[object]:
    """Pages with Python in them."""
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", sessions())
def test_python_snippets_run(page: Path, folder: Path, qwen2_vl_folder: Path) -> None:
    # One page is one session; these are the names that pages take for granted.
    names = {"photo": load_image(Path("photo.jpg")), "nodes": [TextNode(text="red")], "__name__": "__main__"}
    for number, snippet in enumerate(blocks(page, "python")):
        for real, tiny in REAL_TO_TINY.items():
            snippet = snippet.replace(real, tiny)
        for real, random in RERANKERS.items():
            made = random.replace("{folder}", str(qwen2_vl_folder))
            snippet = re.sub(rf"\b{re.escape(real)}", lambda _, made=made: made, snippet)
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)
    gc.unfreeze()  # what a page on servers has frozen


@pytest.mark.parametrize("snippet", [one for one in snippets("console") if "$ umr" in one.values[0]])  # type: ignore[attr-defined]
def test_command_lines_run(snippet: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in snippet.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] != ["umr"]:
            continue
        if words[1] == "index":
            words += ["--model", "umr-tiny"]
        assert main(words[1:]) == 0, capsys.readouterr().err


def test_the_figures_of_reranking_are_those_that_were_measured() -> None:
    page = (ROOT / "docs/reranking.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks/results/rerank.json").read_text(encoding="utf-8"))
    assert len(measured["cases"]) == 5
    for name, case in measured["cases"].items():
        ratio = case["ratio"]
        assert f"| {name} | {ratio['loop']} | {ratio['sentence-transformers']} |" in page


def test_the_figures_of_training_are_those_that_were_measured() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks/results/train.json").read_text(encoding="utf-8"))
    assert len(measured["speedup"]) == 2
    for name, ratio in measured["speedup"].items():
        assert f"| {name.removeprefix('sentence-transformers, ')} | {ratio} |" in page
    assert measured["losses_agree_to"] < 1e-6
    for limit in measured["limit_by_arithmetic"].values():
        assert str(limit) in page
    memory = json.loads((ROOT / "benchmarks/results/train_memory.json").read_text(encoding="utf-8"))
    least, most = (f"{peak / 1e9:.2f}" for peak in memory["peak_bytes"].values())
    assert f"is {memory['ratio']} times that with 64 ({least} and {most} GB)" in " ".join(page.split())


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        name
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for name in re.findall(r"(?:\$ |`)make ([a-z-]+)", page.read_text(encoding="utf-8"))
    }
    assert {"demo", "test"} <= named
    assert named <= targets


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"
