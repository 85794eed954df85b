"""A training recipe: what is trained, on what, how. Read from YAML; unknown keys are refused.

Defaults are GME's (arXiv 2412.16855) where it gives them: LoRA of rank 8, learning rate 1e-4 falling linearly
after a warm-up over 0.06 of the steps, temperature 0.03, 128 queries a batch with pictures and 512 of text
only, at most 1,024 visual tokens a picture, 1,800 tokens with pictures and 512 of text only. Where the paper
is silent (LoRA's alpha, dropout and layers) or prints what looks like a slip (Adam's epsilon), they are ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from umr_plugins.data.fields import nearest
from umr_plugins.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: file or folder; relative ones start from the recipe's folder.
        format: a layout of `umr_plugins.data.readers.FORMATS`.
        options: further arguments of its reader, such as `name` and `split`.
    """

    path: str
    format: str = "rows"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Shares of rows; what is left out has 0, and without any entry rows count alike.

    Args:
        classes: by modality class: `single`, `cross`, `fused`.
        sources: by name of the source, within its class.
    """

    classes: dict[str, float] = field(default_factory=dict)
    sources: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchSizes:
    """Queries of a batch, over all processes.

    Args:
        pictures: of rows with pictures.
        text: of rows of text only.
        same_source: whether a batch's rows all come from one source.
    """

    pictures: int = 128
    text: int = 512
    same_source: bool = True


@dataclass(frozen=True)
class Loss:
    """See `umr_plugins.training.losses`.

    Args:
        temperature: of the softmax; the starting value if it is learned.
        learn_temperature: whether it is.
        in_batch: whether documents of other queries are negatives too.
        same_source_only: only those of queries of the same source.
        query_query: adds other queries as negatives.
        document_document: adds other documents as negatives of the positive.
        false_negative_margin: documents more similar than the positive by this are no negatives.
        matryoshka: weights by number of leading dimensions (arXiv 2205.13147).
        distillation: weight of a loss that follows the scores of documents.
        teacher_temperature: of those scores.
    """

    temperature: float = 0.03
    learn_temperature: bool = False
    in_batch: bool = True
    same_source_only: bool = False
    query_query: bool = False
    document_document: bool = False
    false_negative_margin: float | None = None
    matryoshka: dict[int, float] = field(default_factory=dict)
    distillation: float = 0.0
    teacher_temperature: float = 1.0


@dataclass(frozen=True)
class Lora:
    """Adapters (arXiv 2106.09685); see `umr_plugins.training.lora.add_lora`."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] | None = None
    vision: bool = False


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and decay.

    Args:
        learning_rate: the highest.
        warmup: part of the steps until it is reached.
        weight_decay: of AdamW.
        betas: of AdamW.
        epsilon: of AdamW.
        max_grad_norm: longer gradients are shortened to this.
    """

    learning_rate: float = 1e-4
    warmup: float = 0.06
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Memory:
    """What a step may hold at once; changes speed, and the result by rounding only.

    Args:
        chunk_tokens: encoded together, visual tokens included.
        chunk_entries: most inputs encoded together.
        feature_bytes: visual features kept from a step's first pass to its second.
        checkpointing: whether activations of the language layers are computed again instead of kept.
        loss_rows: queries whose similarities are in memory at once.
    """

    chunk_tokens: int = 8192
    chunk_entries: int | None = None
    feature_bytes: int = 2**30
    checkpointing: bool = False
    loss_rows: int = 1024


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    Args:
        model: bundled alias, folder or hub id.
        data: where rows come from.
        revision: of a hub id.
        steps: how many; or
        epochs: how often all rows are seen. One epoch if neither is given.
        weights: of classes and sources.
        batch: sizes.
        negatives: hard negatives of each query; by default those a row has, 8 at most.
        loss: what is minimised.
        tuning: `lora`, or `full`: all weights of the language model.
        lora: the adapters.
        full_vision: with `full`, whether the vision tower is trained too.
        optimizer: how weights are moved.
        memory: budgets.
        max_image_tokens: visual tokens of a picture, at most.
        min_image_tokens: at least; None for the model's own.
        max_length: tokens of an input with a picture.
        max_text_length: tokens of an input without one.
        precision: `bfloat16`, `float32`, or None for what the machine computes in.
        device: torch device.
        seed: of everything that is drawn.
        save_every: steps between checkpoints.
        keep: how many of them.
        log_every: steps between lines of the log.
        max_skipped: steps in a row that may be skipped because loss or gradient is not finite.
        tensorboard: whether curves are also written for TensorBoard.
        trainer: further arguments of transformers' TrainingArguments, such as `fsdp` and `deepspeed`.
    """

    model: str
    data: list[Source]
    revision: str | None = None
    steps: int | None = None
    epochs: float | None = None
    weights: Weights = field(default_factory=Weights)
    batch: BatchSizes = field(default_factory=BatchSizes)
    negatives: int | None = None
    loss: Loss = field(default_factory=Loss)
    tuning: Literal["lora", "full"] = "lora"
    lora: Lora = field(default_factory=Lora)
    full_vision: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    memory: Memory = field(default_factory=Memory)
    max_image_tokens: int = 1024
    min_image_tokens: int | None = None
    max_length: int = 1800
    max_text_length: int = 512
    precision: Literal["bfloat16", "float32"] | None = None
    device: str | None = None
    seed: int = 0
    save_every: int = 200
    keep: int = 3
    log_every: int = 10
    max_skipped: int = 5
    tensorboard: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, as `make_recipe` takes them; keys that are numbers become texts."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def sha256(self) -> str:
        """Of everything that changes the result; not of how often is logged and saved."""
        said = {key: value for key, value in self.as_dict().items() if key not in FREE}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


FREE = frozenset({"save_every", "keep", "log_every", "tensorboard", "max_skipped", "memory", "device"})
"""What may change between stopping and going on; `memory` and `device` by rounding and by what dropout draws,
no more."""


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
