"""Make the Chroma side of an index anew from its ledger, without running the model."""

from __future__ import annotations

import argparse

from umr_plugins.cli.arguments import add_db, open_existing
from umr_plugins.cli.console import DONE, FAILED, emit, say

HELP = "make the searchable side of an index anew from its ledger"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--db."""
    add_db(parser)


def run(args: argparse.Namespace) -> int:
    """Rebuild, check, and print the result."""
    with open_existing(args.db) as index:
        index.rebuild()
        report = index.verify()
    if args.json:
        emit({"ok": report.ok, "items": report.items, "problems": [str(row) for row in report.problems]})
    else:
        say(f"{report.items} items rebuilt, {'all in order' if report.ok else report.problems}.")
    return DONE if report.ok else FAILED
