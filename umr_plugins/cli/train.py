"""Fine-tune an embedding model by a recipe.

Writes a whole model to --out, with its model card and a page of curves. Ctrl-C or SIGTERM finishes the step
and saves; the same command then goes on from the newest checkpoint. A second Ctrl-C does not wait. On several
GPUs: torchrun --nproc-per-node N --no-python umr train RECIPE --out DIR
"""

from __future__ import annotations

import argparse
import signal

from umr_plugins.cli.arguments import folder
from umr_plugins.cli.console import DONE, INTERRUPTED, TERMINATED, emit, note, say

HELP = "fine-tune an embedding model by a recipe"
RESUME_NOTE = "Run the same command again to go on from the last checkpoint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE --out."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file with model and data; see docs/training.md"
    )
    parser.add_argument(
        "--out",
        type=folder,
        required=True,
        metavar="DIR",
        help="a new folder, or that of a run to go on with",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and print where the model is."""
    from umr_plugins.training.reading import read_recipe

    recipe = read_recipe(args.recipe)
    from umr_plugins.training.run import Stopped, rank_of_environment, train

    try:
        made = train(recipe, args.out, note=note)
    except Stopped as stopped:
        done = (
            f"after step {stopped.step} of {stopped.steps}; it is saved"
            if stopped.step
            else "before the first step"
        )
        message = f"Stopped {done}. {RESUME_NOTE}"
        if rank_of_environment() == 0:
            if args.json:
                emit({"error": {"code": "interrupted", "message": message}})
            note(message)
        return TERMINATED if stopped.number == signal.SIGTERM else INTERRUPTED
    if rank_of_environment():
        return DONE
    if args.json:
        emit(
            {
                "out": str(made.out),
                "steps": made.steps,
                "loss": made.loss,
                "skipped": made.skipped,
                "resumed_from": made.resumed_from,
                "seconds": made.seconds,
                "report": str(made.report),
            }
        )
    else:
        say(f"{made.out}: trained for {made.steps} steps. Open it with Embedder({str(made.out)!r})")
        say(f"Curves: {made.report}")
        say("How well it retrieves was not measured by this run.")
    return DONE
