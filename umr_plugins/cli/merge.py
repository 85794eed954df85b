"""Write a LoRA adapter and its base as one whole checkpoint.

The adapter is a folder or hub id as peft saves it. Without --model its config says which base it was trained
on. Only the changed weights differ from the base's, and they keep their names and types.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from umr_plugins.cli.arguments import folder
from umr_plugins.cli.console import DEMO_NOTE, DONE, emit, note, say
from umr_plugins.errors import CheckpointError, InputError, ModelNotFoundError

if TYPE_CHECKING:
    from umr_plugins.backbones.registry import Checkpoint
    from umr_plugins.backbones.spec import ModelRole

HELP = "write a LoRA adapter and its base as one whole checkpoint"
RESUME_NOTE = "Nothing was written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER --out --model --role."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub id of the adapter")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--model", metavar="BASE", help="hub id or folder of the base (default: the one that ADAPTER names)"
    )
    parser.add_argument(
        "--role",
        choices=("embedder", "reranker"),
        help="what the result is for (default: as the base; an instruct checkpoint counts as embedder)",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, write, and print where."""
    from umr_plugins.backbones.lora import CONFIG, read_adapter
    from umr_plugins.backbones.merge import write_checkpoint
    from umr_plugins.backbones.registry import resolve_adapter

    adapter = read_adapter(resolve_adapter(args.adapter))
    name = args.model or adapter.base
    if name is None:
        raise InputError(f"{adapter.folder / CONFIG} does not name the adapter's base; give it with --model")
    try:
        base = resolve_as(name, args.role)
    except ModelNotFoundError as error:
        if args.model:
            raise
        raise ModelNotFoundError(
            f"the base that {adapter.folder / CONFIG} names was not found; give it with --model. {error}"
        ) from error
    out = write_checkpoint(base, args.out, adapter=adapter.folder)
    model, changed = str(base.folder) if base.origin == "folder" else base.given, len(adapter.changes)
    if args.json:
        emit({"out": str(out), "model": model, "adapter": str(adapter.folder), "changed": changed})
    else:
        say(f"{changed} weights of {model} changed; the whole checkpoint is in {out}.")
    if base.spec.demo:
        note(f"Note: {DEMO_NOTE}")
    return DONE


def resolve_as(model: str, role: ModelRole | None) -> Checkpoint:
    """The checkpoint in a role; without one as an embedder, or as a reranker where it is only that."""
    from umr_plugins.backbones.registry import resolve

    if role is not None:
        return resolve(model, role=role)
    try:
        return resolve(model)
    except CheckpointError as error:
        try:
            return resolve(model, role="reranker")
        except CheckpointError:
            raise error from None
