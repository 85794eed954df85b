"""The recipes that users read are complete, and the one that calls itself the defaults is that."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from umr_plugins.training.reading import make_recipe, read_recipe
from umr_plugins.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/finetune/recipe.yaml"


def shown() -> str:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/training.md").read_text("utf-8"), re.M | re.S)
    return str(block)


def keys(value: Any, at: str = "") -> set[str]:
    """Dotted keys of nested mappings; those that users name themselves are left out."""
    if not isinstance(value, dict) or at in ("weights.classes.", "weights.sources.", "loss.matryoshka."):
        return {at.rstrip(".")}
    return {key for name, part in value.items() for key in keys(part, f"{at}{name}.")} or {at.rstrip(".")}


@pytest.mark.parametrize("text", [shown(), EXAMPLE.read_text("utf-8")], ids=["docs", "example"])
def test_a_recipe_that_is_shown_has_every_key(text: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(text)
    assert keys(raw) == keys(Recipe("m", []).as_dict())
    assert set(raw["data"][0]) == {"path", "format", "options"}
    make_recipe(raw, tmp_path)


def test_the_recipe_of_the_page_holds_the_defaults(tmp_path: Path) -> None:
    recipe = make_recipe(yaml.safe_load(shown()), tmp_path)
    assert recipe == Recipe(recipe.model, recipe.data)


def test_the_example_opens_and_leaves_what_it_does_not_explain_at_the_defaults() -> None:
    recipe = read_recipe(EXAMPLE)
    default = Recipe(recipe.model, recipe.data)
    changed = {
        each.name
        for each in dataclasses.fields(Recipe)
        if getattr(recipe, each.name) != getattr(default, each.name)
    }
    assert changed == {"epochs", "batch", "loss", "memory"}
