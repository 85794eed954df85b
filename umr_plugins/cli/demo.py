"""Index the sample corpus with the bundled demonstration model, run its queries, write an HTML report."""

from __future__ import annotations

import argparse
from pathlib import Path

from umr_plugins.cli.arguments import folder
from umr_plugins.cli.console import DONE, emit, note, say

HELP = "a small offline demonstration with measured results"
RESUME_NOTE = "Run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out."""
    default = Path("demo-output").absolute()
    parser.add_argument("--out", type=folder, default=default, metavar="DIR", help="default: ./demo-output")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration."""
    from umr_plugins.demo.report import as_text, write_report
    from umr_plugins.demo.run import run_demo

    result = run_demo(args.out, tell=note)
    report = write_report(args.out / "report.html", result)
    if args.json:
        emit({**result.as_json(), "report": str(report), "db": str(result.db)})
    else:
        say(as_text(result, report))
    return DONE
