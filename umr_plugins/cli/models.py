"""List the models that can be used: the bundled one, known checkpoints, and families of further ones."""

from __future__ import annotations

import argparse
from typing import Any

from umr_plugins.backbones.rerankers import INSTRUCT, KNOWN_RERANKERS
from umr_plugins.backbones.spec import BUNDLED, FAMILIES, KNOWN, ModelSpec
from umr_plugins.cli.console import DEMO_NOTE, DONE, emit, say, table

HELP = "list the models that can be used"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing but --json."""


def run(args: argparse.Namespace) -> int:
    """Print embedders, families and rerankers."""
    known = [row(name, spec) for name, spec in KNOWN.items()]
    families = [
        {"model_type": key, "title": family.title, "reads": family.reads} for key, family in FAMILIES.items()
    ]
    rerankers = [
        {"model": name, "family": spec.family, "license": spec.license, "prompt": spec.prompt}
        for name, spec in KNOWN_RERANKERS.items()
    ]
    if args.json:
        emit({"bundled": list(BUNDLED), "known": known, "rerankers": rerankers, "families": families})
        return DONE
    head = ["model", "family", "parameters", "dim", "memory", "licence", "takes"]
    lines = [
        [
            each["model"],
            FAMILIES[each["family"]].title,
            f"{each['parameters'] / 1e9:.1f} B",
            str(each["dim"]),
            f"{each['memory_bytes'] / 1e9:.1f} GB",
            each["license"],
            each["takes"],
        ]
        for each in known
    ]
    say(table(head, lines, right=(2, 3, 4)))
    say("\nMemory is that of the weights in bfloat16; pictures and long texts need some more.")
    say(f"Bundled, offline: {', '.join(BUNDLED)}. {DEMO_NOTE}\n")
    say("Any other checkpoint, in a folder or on the hub, whose config.json has one of these model types:\n")
    say(
        table(["model_type", "family", "read"], [[f["model_type"], f["title"], f["reads"]] for f in families])
    )
    say("\nFor reranking (`umr search --rerank`, `umr rerank`):\n")
    lines = [[each[key] for key in ("model", "license", "prompt")] for each in rerankers]
    say(table(["model", "licence", "prompt"], lines))
    say(f"\nAny other instruct checkpoint of {', '.join(INSTRUCT)} reranks with the prompt judge.")
    say("`umr info MODEL` tells what loading one would do.")
    return DONE


def row(name: str, spec: ModelSpec) -> dict[str, Any]:
    """One known checkpoint as JSON values."""
    return {
        "model": name,
        "family": spec.family,
        "parameters": spec.parameters,
        "dim": spec.dim,
        "memory_bytes": 2 * spec.parameters,
        "license": spec.license,
        "max_images": spec.max_images,
        "max_length": spec.max_length,
        "shortest_trained_dim": spec.shortest_trained_dim,
        "takes": "text, one picture" if spec.max_images == 1 else f"text, up to {spec.max_images} pictures",
    }
