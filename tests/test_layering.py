"""Imports point down only (the table below has the layers); heavy libraries stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "umr_plugins"

# A module may import from its own row and from rows below. Names are relative to umr_plugins.
LAYERS: list[set[str]] = [
    {"cli", "demo"},
    {"serving", "evaluation", "synthesis", "training"},
    {"mining", "index", "chroma", "remote", "sentence_transformers", "st_files", "html"},
    {"data"},
    {"embedder", "reranker"},
    {"encoding"},
    {"backbones", "prompts"},
    {"testing"},
    {"ranking"},
    {"media"},
    {"types"},
    {"errors"},
]
NEVER_ONE_ANOTHER = {"training", "evaluation", "synthesis", "serving"}
HEAVY = {"chromadb": {"index/chroma.py", "chroma/function.py", "chroma/opening.py"}}


def level(unit: str) -> int:
    """0 is the top row."""
    return next(row for row, units in enumerate(LAYERS) if unit in units)


def unit_of(module: str) -> str | None:
    """`umr_plugins.media.images` → `media`; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not used here"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def upward(unit: str, source: str) -> list[str]:
    """What a file of `unit` imports that it may not."""
    wrong = []
    for line, name in imports(source):
        target = unit_of(name) if name.split(".")[0] == "umr_plugins" else None
        if target is None or target == "__version__":
            continue
        if level(target) < level(unit) or (target != unit and {target, unit} <= NEVER_ONE_ANOTHER):
            wrong.append(f"line {line}: {unit} may not import {name}")
    return wrong


def modules() -> list[Path]:
    """Every file but the front door, which names modules of every row, lazily."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    unit = relative.parts[0].removesuffix(".py")
    assert upward(unit, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_libraries_stay_in_their_place(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    for line, name in imports(path.read_text(encoding="utf-8")):
        top, _, rest = name.partition(".")
        if top in HEAVY:
            assert relative in HEAVY[top], f"line {line}: {name} belongs in {HEAVY[top]}"
        if top == "transformers" and not relative.startswith("backbones/"):
            last = rest.rpartition(".")[2]
            model_class = last.endswith(("Model", "ForConditionalGeneration", "ForCausalLM"))
            belongs = rest.startswith("models.") or model_class
            assert not belongs, f"line {line}: {name}: transformers' model classes belong in backbones/"
        adapter = top in {"llama_index", "langchain_core", "langchain_umr"}
        assert not adapter or relative.startswith("demo/"), f"line {line}: only the demo shows {name}"


def test_the_check_finds_an_upward_import() -> None:
    assert upward("media", "from umr_plugins.index.index import Index\n")
    assert upward("encoding", "def f():\n    import umr_plugins.embedder\n")
    assert upward("training", "from umr_plugins.evaluation import metrics\n")
    assert upward("types", "import importlib\nimportlib.import_module('umr_plugins.media.images')\n")
    assert not upward("index", "from umr_plugins.media.images import load_image\nimport json\n")
