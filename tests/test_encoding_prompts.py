"""The exact strings that are encoded, pinned as a golden file."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest

from umr_plugins.backbones.base import Input, Prepared
from umr_plugins.embedder import Embedder

GOLDEN = Path(__file__).parent / "golden" / "gme_prompts.json"


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: str(case["name"]))
def test_rendered_strings_are_pinned(gme_folder: Path, case: dict[str, object]) -> None:
    embedder = Embedder(gme_folder)
    assert embedder.render(case["item"], case["role"], case["instruction"]) == case["string"]


def test_the_ids_are_those_of_the_rendered_string(gme_folder: Path) -> None:
    """Template pieces tokenised apart give what the whole string gives."""
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(gme_folder)
    backbone = Embedder(gme_folder)._engine.backbone
    for case in json.loads(GOLDEN.read_text()):
        if case["item"].get("image"):
            continue
        system = case["instruction"] or backbone.spec.default_instruction
        (made,) = backbone.prepare([Input(case["item"]["text"], (), system, case["role"])])
        assert isinstance(made, Prepared)
        assert made.ids.tolist() == whole(case["string"]).input_ids


@pytest.mark.parametrize(
    "case",
    json.loads((GOLDEN.parent / "family_prompts.json").read_text()),
    ids=lambda case: f"{case['family']}-{case['name']}",
)
def test_rendered_strings_of_all_families_are_pinned(
    request: pytest.FixtureRequest, case: dict[str, object]
) -> None:
    embedder = _embedder(request.getfixturevalue(str(case["family"])))
    assert embedder.render(case["item"], case["role"], case["instruction"]) == case["string"]


@lru_cache(maxsize=8)
def _embedder(folder: Path) -> Embedder:
    return Embedder(folder, dtype="float32")
