"""The model card of a run: `README.md` with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from umr_plugins.training.curves import absent, kept, number, series, smooth, window
from umr_plugins.training.facts import (
    CLASSES,
    DEMO,
    NOT_EVALUATED,
    circumstances,
    data_rows,
    loss_ends,
    openings,
    plain,
)

MOST_STEPS = 12
"""Most rows of the table of the loss."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MARKUP = re.compile(r"([\\`*_\[\]|~$#])")
_CLASS_TITLES = dict(zip(CLASSES, ("one modality", "across modalities", "picture with text"), strict=True))


def write_card(folder: Path, history: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write the card of the model that lies in a folder; one that is there is replaced.

    It is made from what ran and nothing else: an unknown licence stays unknown, and that the model was not
    evaluated is said.

    Args:
        folder: of the checkpoint; created if missing.
        history: as for `umr_plugins.training.report.write_report`.
        facts: likewise.

    Returns:
        The path of the card.

    Raises:
        OSError: it can't be written.
    """
    lines = kept(history)
    name = str(facts.get("folder") or folder.resolve().name)
    base = _cell(facts.get("model") or "an unnamed model")
    adapter = facts.get("lora") is not None
    by = " LoRA is merged into its weights; the adapter alone is in the folder adapter." if adapter else ""
    parts = [
        f"---\n{_yaml(front_matter(folder, facts))}---",
        f"# {_cell(name)}",
        f"A model trained from {base}: embeds texts, pictures, and pictures with text into one vector "
        f"space.{by}",
        *([f"**{DEMO}**"] if facts.get("demo") else []),
        "## Use",
        *(f"With {title}:\n\n{_fenced(code, 'python')}" for title, code in openings(name)),
        "## Training data",
        _data(facts),
        "## Training",
        _table(("what ran", ""), circumstances(facts), numbers=()),
        f"Recipe:\n\n{_fenced(_yaml(facts['recipe']), 'yaml')}"
        if facts.get("recipe")
        else "Recipe: not recorded.",
        "## Results",
        NOT_EVALUATED,
        _losses(lines),
        "## Limits",
        *_limits(facts),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    path.write_bytes(("\n\n".join(parts) + "\n").encode("utf-8", "replace"))
    return path


def front_matter(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads of a card, as plain values; a base that can't be a hub id is left to the text."""
    lora, base = facts.get("lora") is not None, str(facts.get("model") or "")
    library = "sentence-transformers" if (folder / "modules.json").is_file() else "transformers"
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "feature-extraction",
        "license": str(facts.get("license") or "unknown").lower(),
        "tags": [
            "umr-plugins",
            "multimodal",
            "embeddings",
            "retrieval",
            *(["lora"] if lora else []),
            *(["demonstration"] if facts.get("demo") else []),
        ],
    }
    if _HUB_ID.fullmatch(base):
        front |= {"base_model": base, "base_model_relation": "finetune"}
    if facts.get("languages"):
        front["language"] = facts["languages"]
    return front


def _data(facts: Mapping[str, Any]) -> str:
    rows = []
    for source in data_rows(facts):
        classes = source.get("classes") or {}
        counts = (source.get("rows"), *(classes.get(name) for name in CLASSES), source.get("pictures"))
        words = (plain(source.get(key) or "") for key in ("name", "path", "format"))
        numbers = ("" if count is None else f"{count:,}" for count in counts)
        rows.append([*words, *numbers, plain(source.get("sha256") or "")])
    head = ("source", "file", "format", "rows", *_CLASS_TITLES.values(), "with pictures", "SHA-256")
    whole = facts.get("data_sha256")
    table = _table(head, rows, numbers=range(3, 8))
    return table + (f"\n\nSHA-256 of all data together: {_cell(plain(whole))}" if whole else "")


def _losses(lines: Sequence[Mapping[str, Any]]) -> str:
    loss = series(lines, "loss")
    if not loss.points:
        return f"Training loss: {absent(loss)}."
    count = len(loss.points)
    shown = min(count, MOST_STEPS)
    smoothed = smooth(loss.points)
    by_step = {line["step"]: line for line in lines}
    rows = []
    for place in (round(at * (count - 1) / max(shown - 1, 1)) for at in range(shown)):
        step, value = loss.points[place]
        others = (_logged(by_step[step], name) for name in ("learning_rate", "grad_norm"))
        rows.append([f"{step:,.0f}", number(smoothed[place][1]), number(value), *others])
    mean = f" (smoothed: mean of {window(count):,} logged steps)" if window(count) > 1 else ""
    told = f"Training loss, first to last: {loss_ends(lines)}{mean}."
    lost = f" {loss.lost:,} logged losses were not finite." if loss.lost else ""
    head = ("step", "loss, smoothed", "loss", "learning rate", "gradient norm")
    return f"{told}{lost}\n\n{_table(head, rows, numbers=range(5))}"


def _logged(line: Mapping[str, Any], name: str) -> str:
    points = series([line], name).points
    return number(points[0][1]) if points else ""


def _limits(facts: Mapping[str, Any]) -> list[str]:
    skipped = facts.get("skipped_steps") or 0
    limits = [
        "Measure it on your own queries before relying on it: it may retrieve worse than the base model.",
        "What the base model can't do and may not be used for holds for this one too.",
        "The training data may have terms of their own, which are not recorded here.",
        *([f"Steps that were skipped and changed no weights: {skipped:,}."] if skipped else []),
    ]
    return ["\n".join(f"- {limit}" for limit in limits)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int]) -> str:
    """A Markdown table; columns numbered in `numbers` are aligned right. Without rows, a word on it."""
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    cells = [[_cell(text) for text in row] for row in rows]
    if not cells:
        return "Not recorded."
    lines = [list(head), rule, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: object) -> str:
    """A text as one line of Markdown that shows it as it is, in a table too."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return _MARKUP.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _fenced(text: str, language: str) -> str:
    """Code between fences longer than any run of backticks in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _yaml(value: object) -> str:
    as_json = json.loads(json.dumps(value, default=str))  # tuples and paths are no plain YAML
    text: str = yaml.safe_dump(as_json, sort_keys=False, allow_unicode=True)
    return text
