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
    rows = [{"query": {"text": name}, "positives": [{"image": name}]} for name in ("key.png", "bicycle.jpg")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = "{model: umr-tiny, data: [{path: train.jsonl}], steps: 1, batch: {pictures: 2}}"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def session(page: Path) -> list[tuple[str, str]]:
    """What of a page runs, in its order: language and text of each block."""
    found = re.findall(
        r"^```(python|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [(language, text) for language, text in found if language == "python" or "$ umr " in text]


def run_python(snippet: str, name: str, names: dict[str, object], reranker: Path) -> None:
    for real, tiny in REAL_TO_TINY.items():
        snippet = snippet.replace(real, tiny)
    for real, random in RERANKERS.items():
        made = random.replace("{folder}", str(reranker))
        snippet = re.sub(rf"\b{re.escape(real)}", lambda _, made=made: made, snippet)
    exec(compile(snippet, name, "exec"), names)


def run_commands(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in snippet.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] != ["umr"]:
            continue
        if words[1] == "index":
            words += ["--model", "umr-tiny"]
        assert main(words[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES if session(page)]
)
def test_a_page_runs_from_top_to_bottom(
    page: Path, folder: Path, qwen2_vl_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # These are the names that pages take for granted.
    names = {"photo": load_image(Path("photo.jpg")), "nodes": [TextNode(text="red")], "__name__": "__main__"}
    for number, (language, text) in enumerate(session(page)):
        if language == "python":
            run_python(text, f"{page.name}, block {number}", names, qwen2_vl_folder)
        else:
            run_commands(text, capsys)
    gc.unfreeze()  # what a page on servers has frozen


def test_every_command_of_ours_is_in_a_block_that_runs() -> None:
    for page in PAGES:
        for text in re.findall(
            r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            assert "pip install" in text or "torchrun" in text, f"{page}: use console and $ for {text}"


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
