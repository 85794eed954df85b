"""Tell about a model, an index, or (with neither) about this installation."""

from __future__ import annotations

import argparse
from typing import Any

from umr_plugins import __version__
from umr_plugins.cli.arguments import add_db, open_existing
from umr_plugins.cli.console import DEMO_NOTE, DONE, emit, note, plain, say

HELP = "tell about a model, an index or this installation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[MODEL] --db."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub id, checkpoint folder or umr-tiny")
    add_db(parser, required=False)


def run(args: argparse.Namespace) -> int:
    """Print the facts, one per line."""
    facts: dict[str, Any] = {"ok": True, "items": None}
    if args.db is not None:
        with open_existing(args.db) as index:
            facts |= {"items": index.count(), "index": index.info()}
    if args.model is not None:
        from umr_plugins.backbones.registry import preview

        facts["model"] = preview(args.model)
    if args.db is None and args.model is None:
        facts |= {"version": __version__, "libraries": libraries()}
    if args.json:
        emit(facts)
        return DONE
    for name in ("index", "model", "libraries"):
        if name in facts:
            say(name)
            say(listing(facts[name]))
    if "version" in facts:
        say(f"umr-plugins {__version__}; bundled model: umr-tiny")
    if any(facts.get(name, {}).get("demo") for name in ("index", "model")):
        note(f"Note: {DEMO_NOTE}")
    return DONE


def listing(facts: dict[str, Any]) -> str:
    """Aligned `name  value` lines."""
    width = max((len(name) for name in facts), default=0)
    return "\n".join(f"  {name.ljust(width)}  {plain(shown(value))}" for name, value in facts.items())


def shown(value: object) -> str:
    """A value as people write it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name}={shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(shown(part) for part in value) or "-"
    return str(value)


def libraries() -> dict[str, str]:
    """Versions of what matters in a report of a problem."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    names = ("torch", "transformers", "chromadb", "pillow", "pypdfium2", "llama-index-umr", "langchain-umr")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
