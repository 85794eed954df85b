"""Check an index: every item of the ledger is in Chroma once, with the right vector, and nothing else is."""

from __future__ import annotations

import argparse

from umr_plugins.cli.arguments import add_db, open_existing
from umr_plugins.cli.console import DONE, FAILED, emit, say

HELP = "check that an index is whole"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--db."""
    add_db(parser)


def run(args: argparse.Namespace) -> int:
    """Print whether the index is whole; exit code 1 if it isn't."""
    with open_existing(args.db) as index:
        report = index.verify()
    if args.json:
        emit({"ok": report.ok, "items": report.items, "problems": [str(row) for row in report.problems]})
    elif report.ok:
        say(f"{report.items} items, all in order.")
    else:
        say(f"{len(report.problems)} problems in {report.items} items:")
        for problem in report.problems:
            say(f"  {problem}")
        say(f"Mend it with: umr rebuild --db {args.db}")
    return DONE if report.ok else FAILED
