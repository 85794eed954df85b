"""Write the model card beside the weights, from the figures in ``results.json``.

python card.py --model FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bag import BAG_WIDTH, PAIRS
from batches import FAMILY_SIZE, MIX, NAME, NOTE, PROSE, QUESTION
from evaluate import CUTS
from objective import TEMPERATURE
from sources import UNSEEN_SETS, VALIDATION_SET
from train import BAG_STEPS

NAMES = {
    "emojione": "EmojiOne (validation style)",
    "twemoji": "Twemoji (unseen)",
    "fxemoji": "FxEmoji (unseen)",
}
FIRST_BAG_WIDTH = 128
SHARES = {"names": NAME, "notes": NOTE, "prose": PROSE, "questions": QUESTION}
TEMPLATE = Path(__file__).with_name("card.md")


def tables(results: dict) -> str:
    """One table for each style."""
    lines: list[str] = []
    for short in (VALIDATION_SET, *UNSEEN_SETS):
        figures = {**results["validation"], **results["unseen"]}[short]
        heads = [f"{NAMES[short]}, {figures['candidates']} concepts", *(f"@{cut}" for cut in CUTS)]
        lines += ["", "| " + " | ".join(heads) + " |"]
        lines.append("|---|" + "---|" * len(CUTS))
        for name, value in figures.items():
            if isinstance(value, dict):
                among = f", {value['candidates']} candidates" if "candidates" in value else ""
                cells = " | ".join(f"{value[f'hit@{cut}']:.1f}" for cut in CUTS)
                lines.append(f"| {name.replace('picture', 'drawing')}{among} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Write ``README.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    folder = parser.parse_args().model
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = results["training"]
    training = (
        f"{run['steps']:,} steps, {run['concept_samples']:,} concept samples, "
        f"{sum(run['pictures'].values()):,} drawings in {len(run['pictures'])} styles, "
        f"{run['seconds'] / 60:.0f} minutes on {run['workers'] * run['threads']} CPU cores with AVX-512, "
        f"torch {run['torch']}."
    )
    columns = ("name", "version", "licence", "role")
    rows = ["| " + " | ".join(source[key] for key in columns) + " |" for source in results["sources"]]
    card = TEMPLATE.read_text(encoding="utf-8").format(
        parameters=results["parameters"] / 1e6,
        dimensions=config["text_config"]["hidden_size"],
        seen_note="Chance is 100 divided by the number of candidates.",
        tables=tables(results),
        training=training,
        sources="\n".join(rows),
        mix=f"| {MIX.concepts} | {MIX.families} x {FAMILY_SIZE} | {MIX.notes} | {MIX.cards} | {MIX.passages} "
        f"| {MIX.pages} |",
        temperature=TEMPERATURE,
        bag_steps=BAG_STEPS,
        bag_pairs=PAIRS,
        bag_width=BAG_WIDTH,
        bag_added=BAG_WIDTH - FIRST_BAG_WIDTH,
        shares=", ".join(f"{share:.0%} for {kind}" for kind, share in SHARES.items()),
        rate=run["rate"],
        seed=run["seed"],
        rates="; ".join(
            f"{part} {rates['muon']} and {rates['adam']}" for part, rates in run["rates"].items()
        ),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
