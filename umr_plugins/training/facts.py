"""What a run did, in the words that its report and its model card share. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from umr_plugins.training.curves import kept, number, series, smooth

NOT_EVALUATED = (
    "Not evaluated: this run measured the loss on its training data only, which does not tell how well the "
    "model retrieves."
)
DEMO = (
    "A demonstration model: it shows how training goes and is not made for real use; figures about it say "
    "nothing about other models."
)

CLASSES = ("single", "cross", "fused")
_TOLD_ELSEWHERE = {"model", "data", "data_sha256", "recipe", "demo"}
_TITLES = {
    "base_fingerprint": "fingerprint of the base",
    "trainable_parameters": "trained parameters",
    "parameters": "parameters",
    "git": "git revision of the working folder",
    "dtype": "number type",
    "seconds": "time",
    "resumed": "resumed at steps",
    "skipped_steps": "steps skipped",
    "lora": "LoRA",
    "license": "licence",
}


def plain(value: object) -> str:
    """A JSON value as a person writes it: texts without quotation marks, lists by commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every setting of nested dictionaries by its dotted name, as text; nothing is left out."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(each, Mapping | list | tuple) for each in value):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}.{place}" if name else str(place))
    else:
        yield name, plain(value)


def circumstances(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of everything but recipe and data, those that this module does not know as well."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if key in _TOLD_ELSEWHERE:
            continue
        title = _TITLES.get(key, key.replace("_", " "))
        if key == "seconds" and value is not None:
            rows.append((title, duration(value)))
        elif key == "versions" and isinstance(value, Mapping):
            rows += [(str(name), plain(version or "not known")) for name, version in value.items()]
        elif key == "lora" and value is None:
            rows.append((title, "none: the weights themselves were trained"))
        elif value is None:
            rows.append((title, "not known"))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((title, f"{value:,}"))
        else:
            rows += [(name.replace("_", " "), text) for name, text in flat(value, title)]
    return rows


def data_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dictionary per data source; with several, one more for their sums, without hash."""
    sources = [dict(source) for source in facts.get("data") or []]
    if len(sources) < 2:
        return sources
    total = {name: sum(source.get(name) or 0 for source in sources) for name in ("rows", "pictures")}
    classes = {
        name: sum((source.get("classes") or {}).get(name, 0) for source in sources) for name in CLASSES
    }
    return [*sources, {"name": f"{len(sources)} sources", **total, "classes": classes}]


def loss_ends(history: Sequence[Mapping[str, Any]]) -> str:
    """First and last value of the smoothed loss, `2.31 → 0.42`; a word on why there is none."""
    loss = series(kept(history), "loss")
    if not loss.points:
        return "not finite" if loss.lost else "not logged"
    line = smooth(loss.points)
    return " → ".join(number(value) for _, value in ([line[0], line[-1]] if len(line) > 1 else line))


def middle(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The median of a logged number."""
    values = sorted(value for _, value in series(kept(history), name).points)
    return values[len(values) // 2] if values else None


def duration(seconds: float) -> str:
    """A time in its two greatest units."""
    if seconds < 60:
        return f"{number(float(seconds))} s"
    whole = round(seconds)
    units = [("d", whole // 86_400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60)]
    first = next(place for place, (_, count) in enumerate(units) if count)
    return " ".join(f"{count} {unit}" for unit, count in units[first : first + 2] if count)


def openings(folder: str) -> list[tuple[str, str]]:
    """How to open what the run wrote, a whole checkpoint: a title and Python code each.

    Args:
        folder: where the model lies, as its reader should write it.
    """
    model = _quoted(folder)
    return [
        (
            "umr-plugins",
            "from umr_plugins import Embedder, Item\n\n"
            f"embedder = Embedder({model})\n"
            'documents = embedder.encode_documents([Item(image="photo.jpg"), "a text"])\n'
            'queries = embedder.encode_queries(["what is asked"])\n'
            "scores = queries @ documents.T\n",
        ),
        (
            "sentence-transformers",
            "from umr_plugins.sentence_transformers import load\n\n"
            f"model = load({model})\n"
            'vectors = model.encode(["a text"])\n',
        ),
        (
            "transformers",
            "from transformers import AutoModel\n\n"
            f"model = AutoModel.from_pretrained({model})\n"
            "# The weights alone: prompt, picture sizes, pooling and unit length are then up to you.\n",
        ),
    ]


def _quoted(text: object) -> str:
    """A text as Python writes it, on one line."""
    return json.dumps(_line(text), ensure_ascii=False)


def _line(text: object) -> str:
    """A text on one line, without control characters."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
