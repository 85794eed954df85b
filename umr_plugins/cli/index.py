"""Embed files and keep them in an index folder: pictures, PDF pages, texts.

A second run embeds only what changed and removes what is gone. A file that can't be used is reported and
costs only itself. The run may be interrupted at any moment: what was committed is kept, and running the
same command again goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umr_plugins.cli.arguments import DEFAULT_MODEL, add_db, folder
from umr_plugins.cli.console import DEMO_NOTE, DONE, SOME_REFUSED, emit, note, place, progress, say, table
from umr_plugins.errors import InputError

if TYPE_CHECKING:
    from umr_plugins.index.codes import CodesOption
    from umr_plugins.index.folder_sync import FolderReport
    from umr_plugins.index.index import Index

HELP = "embed files and folders into an index"
RESUME_NOTE = "What was committed is kept: run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE… --db --model --pages --codes."""
    parser.add_argument("sources", nargs="+", type=folder, metavar="SOURCE", help="a file or a folder")
    add_db(parser)
    parser.add_argument(
        "--model",
        help=f"hub id, checkpoint folder or umr-tiny (a small demonstration model that ships with this "
        f"package); an existing index knows its own. Default: {DEFAULT_MODEL}",
    )
    parser.add_argument(
        "--pages",
        choices=("image", "fused", "text"),
        help="embed a PDF page as its picture, as picture with text, or as text (default: the model's own)",
    )
    parser.add_argument(
        "--codes",
        choices=("off", "int8", "binary"),
        help="search by scanning short codes of the vectors in memory instead of asking Chroma; recorded in "
        "the index (default: as recorded, off in a new one)",
    )


def run(args: argparse.Namespace) -> int:
    """Index every source and print what happened."""
    sources: list[Path] = args.sources
    missing = [str(source) for source in sources if not source.exists() and not source.is_symlink()]
    if missing:
        raise InputError(f"no such file or folder: {', '.join(missing)}")
    with open_or_create(args.db, args.model, args.codes) as index:
        if index.info().get("demo") and not args.json:
            note(f"Note: {DEMO_NOTE}")
        reports = index_sources(index, sources, pages=args.pages, as_json=args.json)
        stored = index.count()
    if args.json:
        emit(as_json(reports))
    else:
        say(summary(reports, args.db, stored))
    return SOME_REFUSED if any(report.refused for report in reports) else DONE


def open_or_create(db: Path, model: str | None, codes: CodesOption | None = None) -> Index:
    """The index in `db`; a new one gets `model`, or the default model."""
    from umr_plugins.index.index import Index

    return Index(db, model if model is not None or Index.exists(db) else DEFAULT_MODEL, codes=codes)


def index_sources(
    index: Index, sources: Sequence[Path], *, pages: str | None, as_json: bool
) -> list[FolderReport]:
    """One report per folder, and one for all single files together."""
    on_commit = commit_counter() if as_json else None
    options: dict[str, Any] = {"pages": pages, "show_progress": not as_json and sys.stderr.isatty()}
    reports = []
    files = [source for source in sources if not source.is_dir() or source.is_symlink()]
    for source in sources:
        if source not in files:
            reports.append(index.add_folder(source, on_commit=on_commit and on_commit(), **options))
    if files:
        reports.append(index.add_files(files, on_commit=on_commit and on_commit(), **options))
    return reports


def commit_counter() -> Callable[[], Callable[[int], None]]:
    """Makes callbacks that write `{"committed": n}` to stderr, n counted over the whole run."""
    total = 0

    def for_one_source() -> Callable[[int], None]:
        before = total

        def committed(count: int) -> None:
            nonlocal total
            total = before + count
            progress({"committed": total})

        return committed

    return for_one_source


def as_json(reports: Sequence[FolderReport]) -> dict[str, Any]:
    """The reports as one JSON object."""
    return {
        "indexed": sum(report.indexed for report in reports),
        "unchanged": sum(report.unchanged for report in reports),
        "removed": sum(report.removed for report in reports),
        "items": sum(report.items for report in reports),
        "refused": [
            {
                "path": str(row.path),
                "page": row.page,
                "stage": row.stage,
                "code": row.code,
                "reason": row.reason,
            }
            for report in reports
            for row in report.refused
        ],
    }


def summary(reports: Sequence[FolderReport], db: Path, stored: int) -> str:
    """What happened, with a table of the refused files at the end, where it is seen."""
    sums = as_json(reports)
    lines = [
        f"{sums['indexed']} files indexed, {sums['unchanged']} unchanged, {sums['removed']} removed; "
        f"the index at {place(db, None, '')} holds {stored} items."
    ]
    refused = [row for report in reports for row in report.refused]
    if refused:
        rows = [(row.code, place(Path(row.path), row.page, ""), row.reason) for row in refused]
        lines += ["", f"{len(refused)} refused:", table(("code", "file", "reason"), rows)]
    return "\n".join(lines)
