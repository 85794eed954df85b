"""What the command line writes: results to stdout, notes to stderr, texts made safe for a terminal."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umr_plugins.types import Hit

DONE, FAILED, USAGE, SOME_REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
"""Exit codes."""

DEMO_NOTE = (
    "umr-tiny is a demonstration model: it matches drawings and short descriptions, and neither reads text "
    "in pictures nor knows photographs."
)
"""Shown wherever the bundled model answers."""


def emit(value: object) -> None:
    """Write one JSON value as the only thing on stdout."""
    print(json.dumps(value, ensure_ascii=True, default=str, allow_nan=False))


def say(text: str = "") -> None:
    """Write a result for people to stdout."""
    print(text)


def progress(value: object) -> None:
    """Write one line of JSON to stderr, for programs that watch a run."""
    note(json.dumps(value))


def note(text: str) -> None:
    """Write progress or a remark to stderr."""
    print(text, file=sys.stderr, flush=True)


def plain(text: str | None, width: int | None = None) -> str:
    """One line without control characters (a corpus could hold escape sequences), cut to `width`."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text or "").split())
    if width is not None and len(line) > width:
        return line[: max(width - 1, 0)].rstrip() + "…"
    return line


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns; those numbered in `right` are aligned right. The last one is cut to the terminal."""
    cells = [list(head), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    room = max(shutil.get_terminal_size((110, 24)).columns - sum(widths[:-1]) - 2 * (len(head) - 1), 20)
    lines = []
    for row in cells:
        row[-1] = plain(row[-1], room)
        parts = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * min(width, room) for width in widths))
    return "\n".join(lines)


def place(path: Path | None, page: int | None, otherwise: str) -> str:
    """`figures/report.pdf:3`, relative to the working folder where the file lies in it; else `otherwise`."""
    if path is None:
        return otherwise
    try:
        shown = str(path.relative_to(Path.cwd()))
    except ValueError:
        shown = str(path)
    return f"{shown}:{page}" if page is not None else shown


def hit_row(hit: Hit) -> dict[str, Any]:
    """A hit as the JSON of `umr search`."""
    return {
        "id": hit.id,
        "score": hit.score,
        "path": str(hit.path) if hit.path is not None else None,
        "page": hit.page,
        "modality": hit.modality,
        "text": hit.text,
    }
