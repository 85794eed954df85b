"""The `umr` command: parses, calls one verb, turns errors into messages and exit codes.

Heavy libraries are imported by the verbs when they run, so that `umr --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from umr_plugins import __version__
from umr_plugins.cli import demo, index, info, merge, models, rebuild, rerank, search, train, verify
from umr_plugins.cli.console import FAILED, INTERRUPTED, emit, note
from umr_plugins.errors import UMRError

VERBS = (index, search, rerank, train, merge, info, models, verify, rebuild, demo)

DESCRIPTION = """Search pictures, document pages and texts by text, picture, or both.

  umr index ~/papers --db papers.db      PDFs, pictures and texts; a second run embeds only what changed
  umr search "a red kite" --db papers.db
  umr demo                               a small offline demonstration, in about a minute"""

EPILOG = "Exit codes: 0 done, 3 done with files refused, 1 failed, 2 wrong usage. See `umr VERB --help`."


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs."""
    parser = argparse.ArgumentParser(prog="umr", description=DESCRIPTION, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"umr-plugins {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for module in VERBS:
        name = module.__name__.rpartition(".")[2]
        verb = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print one JSON value instead of text")
        verb.set_defaults(run=module.run, fail=verb.error, resume_note=getattr(module, "RESUME_NOTE", ""))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; those of the process by default.
    """
    # File names need not be valid UTF-8: show them escaped instead of failing on them.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except UMRError as error:
        return _failed(args.json, error.code, str(error))
    except KeyboardInterrupt:
        _failed(args.json, "interrupted", f"Interrupted. {args.resume_note}".rstrip())
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, a pager) has what it wants; closing stdout now must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _failed(args.json, "storage", str(error))


def _failed(as_json: bool, code: str, message: str) -> int:
    if as_json:
        emit({"error": {"code": code, "message": message}})
    note(message if code == "interrupted" else f"umr: {message}")
    return FAILED
