"""From YAML to a `Recipe`: unknown keys, other types and values out of range are refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from umr_plugins.data.fields import nearest
from umr_plugins.errors import InputError
from umr_plugins.training.recipe import Recipe


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; paths of data are made absolute.

    Raises:
        InputError: no such file, no YAML, an unknown key, or a value that is not allowed; names the key.
    """
    file = Path(path).expanduser()
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"there is no recipe {path}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} can't be read as a recipe, which is a file of YAML in UTF-8: {error}"
        ) from None
    return make_recipe(raw, file.absolute().parent, str(path))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML publishes no types
    """Of a key that is given twice, PyYAML would take the last one without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if (said := str(key.value)) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {said!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(said)
        return node


def make_recipe(raw: object, folder: Path, name: str = "recipe") -> Recipe:
    """A recipe from its JSON form; relative paths start from `folder`.

    Raises:
        InputError: as `read_recipe`.
    """
    recipe: Recipe = _made(Recipe, raw, name, "")
    _check(recipe, name)
    try:
        sources = [
            dataclasses.replace(each, path=str(folder / Path(each.path).expanduser())) for each in recipe.data
        ]
        local = folder / Path(recipe.model).expanduser()
    except RuntimeError as error:  # ~name, and nobody of that name
        raise InputError(f"{name}: {error}") from None
    recipe = dataclasses.replace(recipe, data=sources)
    return dataclasses.replace(recipe, model=str(local)) if local.is_dir() else recipe


def _made(kind: Any, raw: object, name: str, at: str) -> Any:
    """`raw` as a `kind`, keys and types checked; `at` is the dotted place in the file."""
    place = at.rstrip(".")
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise InputError(
                f"{name}: {place or 'a recipe'} must be a mapping of keys to values, got {_shown(raw)}"
            )
        hints = typing.get_type_hints(kind)
        for key in raw:
            if key not in hints:
                raise InputError(f"{name}: unknown key {at}{key!s}{nearest(key, hints)}")
        needed = [
            each.name
            for each in dataclasses.fields(kind)
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        ]
        if missing := [key for key in needed if key not in raw]:
            raise InputError(f"{name}: the key {at}{missing[0]} is missing, and it has no default")
        return kind(**{key: _made(hints[key], value, name, f"{at}{key}.") for key, value in raw.items()})
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if raw is None:
            return None
        return _made(next(part for part in parts if part is not types.NoneType), raw, name, at)
    if origin is Literal:
        if raw not in parts:
            raise InputError(f"{name}: {place} must be {' or '.join(map(repr, parts))}, got {_shown(raw)}")
        return raw
    if origin is list:
        if not isinstance(raw, list):
            raise InputError(f"{name}: {place} must be a list, got {_shown(raw)}")
        return [_made(parts[0], each, name, f"{place}[{number}].") for number, each in enumerate(raw)]
    if origin is dict:
        if not isinstance(raw, dict):
            raise InputError(f"{name}: {place} must be a mapping, got {_shown(raw)}")
        made: dict[Any, Any] = {}
        for key, value in raw.items():
            number = parts[0] is int and isinstance(key, str) and key.isdecimal()  # keys of JSON are texts
            right = _made(parts[0], int(key) if number else key, name, f"{place}: a key")
            made[right] = value if parts[1] is Any else _made(parts[1], value, name, f"{at}{key}.")
        return made
    if kind is float and isinstance(raw, str):
        raw = _number(raw)  # YAML reads 1e-4, without a point, as text
    if kind is float and isinstance(raw, int) and abs(raw) < 1e300 and not isinstance(raw, bool):
        raw = float(raw)
    if not isinstance(raw, kind) or (isinstance(raw, bool) and kind is not bool):
        raise InputError(f"{name}: {place} must be {_NAMES[kind]}, got {_shown(raw)}")
    return raw


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _number(raw: str) -> object:
    try:
        return float(raw)
    except ValueError:
        return raw


def _shown(raw: object) -> str:
    text = "nothing" if raw is None else repr(raw)
    return text if len(text) <= 80 else text[:79] + "…"


_AT_LEAST_ONE = (
    "batch.pictures",
    "batch.text",
    "lora.rank",
    "memory.chunk_tokens",
    "memory.chunk_entries",
    "memory.loss_rows",
    "max_image_tokens",
    "min_image_tokens",
    "max_length",
    "max_text_length",
    "save_every",
    "keep",
    "log_every",
    "max_skipped",
)
# Lowest value, whether it is allowed itself, highest value.
_BOUNDS = {
    **dict.fromkeys(_AT_LEAST_ONE, (1, True, 2**31 - 1)),
    "steps": (1, True, 10**7),  # what is drawn is kept as a table
    "negatives": (0, True, 2**31 - 1),
    "seed": (0, True, 2**32 - 1),
    "epochs": (0, False, 1e6),
    "loss.temperature": (0, False, 100),
    "loss.distillation": (0, True, 1e6),
    "loss.teacher_temperature": (0, False, 1e6),
    "lora.alpha": (0, False, 1e6),
    "lora.dropout": (0, True, 0.999),
    "optimizer.learning_rate": (0, False, 10),
    "optimizer.warmup": (0, True, 1),
    "optimizer.weight_decay": (0, True, 10),
    "optimizer.epsilon": (0, False, 1),
    "optimizer.max_grad_norm": (0, False, 1e9),
    "memory.feature_bytes": (0, True, 2**50),
}


def _check(recipe: Recipe, name: str) -> None:
    def of(key: str) -> Any:
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        return value

    if not recipe.data:
        raise InputError(f"{name}: data is an empty list; name at least one file or folder")
    if recipe.steps is not None and recipe.epochs is not None:
        raise InputError(f"{name}: give steps or epochs, not both")
    for key, (low, included, high) in _BOUNDS.items():
        value = of(key)
        if value is not None and not (low <= value <= high and (included or value > low)):
            raise InputError(
                f"{name}: {key} must be {'at least' if included else 'above'} {low} "
                f"and at most {high:,}, got {value}"
            )
    if len(recipe.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        raise InputError(
            f"{name}: optimizer.betas must be two numbers from 0 to below 1, got {recipe.optimizer.betas}"
        )
    margin = recipe.loss.false_negative_margin
    if margin is not None and not math.isfinite(margin):
        raise InputError(f"{name}: loss.false_negative_margin must be a finite number, got {margin}")
    for dim, weight in recipe.loss.matryoshka.items():
        if dim < 1 or not 0 < weight < math.inf:
            raise InputError(
                f"{name}: loss.matryoshka gives dimensions of at least 1 weights above 0, got {dim}: {weight}"
            )
    try:
        json.dumps(dataclasses.asdict(recipe), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: options and trainer take texts, finite numbers, true, false, lists and mappings with "
            f"texts as keys: {error}"
        ) from None
