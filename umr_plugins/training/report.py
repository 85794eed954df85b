"""What a run leaves for people to look at: one HTML page with its curves, data and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umr_plugins import html
from umr_plugins.training.curves import curve, kept, number, series
from umr_plugins.training.facts import (
    CLASSES,
    DEMO,
    NOT_EVALUATED,
    circumstances,
    data_rows,
    duration,
    flat,
    loss_ends,
    middle,
    openings,
    plain,
)

_CURVES = (
    ("loss", "Loss", True),
    ("learning_rate", "Learning rate", False),
    ("grad_norm", "Gradient norm", False),
    ("samples_per_second", "Samples a second", True),
)
"""Name in the history, title, and whether a running mean is drawn (it would spread a spike of the norm)."""

_HASH_SHOWN = 12
_ABSENT = html.paragraph("Not recorded.", "missing")
_LEGEND = (
    "single: query and answers of one modality, cross: of two, fused: picture and text together on a side. "
    "The beginning of each hash is shown; point at it for all of it."
)


def write_report(path: Path, history: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write the page of a run, which needs nothing besides itself: no scripts, nothing loaded.

    Args:
        path: of the page; folders above it are created, a page that is there is replaced.
        history: one dictionary per logged step: `step` and any of `loss`, `learning_rate`, `grad_norm`,
            `samples_per_second`, `tokens_per_second`, `skipped` (steps so far), `masked` (documents that were
            no negatives because they are known answers). Where a resumed run did steps again, the later ones
            are shown.
        facts: what ran, as JSON values: `model`, `data`, `recipe`, `steps`, `seconds`, `versions` and the
            rest; what is missing is left out, what is not known to this page is listed as it is. `folder` is
            where the model lies, the folder of the page unless given.

    Returns:
        `path`.

    Raises:
        OSError: it can't be written.
    """
    lines = kept(history)
    folder = str(facts.get("folder") or path.resolve().parent.name)
    marks = [(float(step), f"resumed at step {step}") for step in facts.get("resumed") or []]
    parts = [
        f"<h1>Training of {html.escape(facts.get('model') or 'a model')}</h1>",
        html.paragraph(_lead(facts), "lead"),
        *(html.paragraph(text, "caveat") for text in _caveats(facts)),
        _tiles(lines, facts),
        "<h2>Curves</h2>",
        '<div class="curves">',
        *(
            curve(title, series(lines, name), marks=marks, running=running)
            for name, title, running in _CURVES
        ),
        "</div>",
        *(html.paragraph(text, "quiet") for text in _remarks(history, lines, marks)),
        "<h2>Data</h2>",
        *_data(facts),
        "<h2>Recipe</h2>",
        _terms(flat(facts["recipe"]) if facts.get("recipe") else ()),
        "<h2>What ran</h2>",
        _terms(circumstances(facts)),
        "<h2>Open the model</h2>",
        *(f"<h3>{title}</h3><pre>{html.escape(code)}</pre>" for title, code in openings(folder)),
    ]
    return html.write(path, f"Training of {facts.get('model') or 'a model'}", "".join(parts))


def _lead(facts: Mapping[str, Any]) -> str:
    sources = facts.get("data") or []
    rows = sum(source.get("rows") or 0 for source in sources)
    parts = [
        f"{rows:,} rows of {len(sources)} source{'s' if len(sources) != 1 else ''}" if sources else "",
        _trained(facts),
        " in ".join(str(facts[name]) for name in ("device", "dtype") if facts.get(name)),
    ]
    return " · ".join(part for part in parts if part)


def _trained(facts: Mapping[str, Any]) -> str:
    trained, total = facts.get("trainable_parameters"), facts.get("parameters")
    if not trained:
        return ""
    share = f" of {number(total / 1e6)} M ({trained / total:.2%})" if total else ""
    return f"{number(trained / 1e6)} M{share} parameters trained"


def _caveats(facts: Mapping[str, Any]) -> list[str]:
    skipped = facts.get("skipped_steps") or 0
    return [
        *([DEMO] if facts.get("demo") else []),
        NOT_EVALUATED,
        *([f"Steps that were skipped and changed no weights: {skipped:,}."] if skipped else []),
    ]


def _tiles(lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    seconds, samples, tokens = (
        facts.get("seconds"),
        middle(lines, "samples_per_second"),
        middle(lines, "tokens_per_second"),
    )
    tiles = [
        (loss_ends(lines), "loss, first → last (smoothed)"),
        (f"{facts['steps']:,}" if facts.get("steps") is not None else "–", "steps"),
        (number(samples) if samples is not None else "–", "samples a second (median)"),
        (number(tokens) if tokens is not None else "–", "tokens a second (median)"),
        (duration(seconds) if seconds is not None else "–", "time"),
    ]
    cells = (f"<div><b>{html.escape(value)}</b><span>{name}</span></div>" for value, name in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _remarks(
    history: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    marks: Sequence[tuple[float, str]],
) -> list[str]:
    again, masked = len(history) - len(lines), series(lines, "masked").points
    remarks = []
    if marks:
        remarks.append(f"Dashed: {', '.join(said for _, said in marks)}.")
    if again:
        remarks.append(f"{again:,} logged steps were done again after a resume; the later ones are shown.")
    if any(count for _, count in masked):
        mean = sum(count for _, count in masked) / len(masked)
        remarks.append(
            f"Per logged step, {number(mean)} documents on average were no negatives because they are known "
            "answers of the query."
        )
    return remarks


def _data(facts: Mapping[str, Any]) -> list[str]:
    sources = facts.get("data") or []
    if not sources:
        return [_ABSENT]
    rows = []
    for place, source in enumerate(data_rows(facts)):
        name = html.escape(source.get("name", ""))
        known = source.get("classes") or {}
        rows.append(
            [
                name if place < len(sources) else f'<span class="sum">{name}</span>',
                html.escape(source.get("path", "")),
                html.escape(source.get("format", "")),
                *(_count(value) for value in (source.get("rows"), *(known.get(each) for each in CLASSES))),
                _count(source.get("pictures")),
                _hash(source.get("sha256")),
            ]
        )
    head = ("source", "file", "format", "rows", *CLASSES, "with pictures", "sha256")
    whole = plain(facts["data_sha256"]) if facts.get("data_sha256") else ""
    return [
        html.table(head, rows, words=(0, 1, 2, 8)),
        html.paragraph(_LEGEND, "quiet"),
        *([f'<p class="quiet">All data together: <code>{html.escape(whole)}</code></p>'] if whole else []),
    ]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _hash(value: object) -> str:
    if not value:
        return ""
    text = str(value)
    short = text if len(text) <= _HASH_SHOWN else f"{text[:_HASH_SHOWN]}…"
    return f'<code title="{html.escape(text)}">{html.escape(short)}</code>'


def _terms(rows: Iterable[tuple[str, str]]) -> str:
    """Names with their values, in columns."""
    cells = [f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in rows]
    return f'<dl class="terms">{"".join(cells)}</dl>' if cells else _ABSENT
