"""Choose how much the bag of words counts beside what training added, on the validation style and prose.

python balance.py --cache DIR --model FOLDER

Tries factors on the bag's weights of the last norm and keeps the one with the best average over the kinds of
search. The weights of the other dimensions stay as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bag import BAG_WIDTH
from concepts import Concept, load_concepts
from evaluate import about_notes, collection, embed, hits, style, tokens
from model import FastModel, save_model
from sources import VALIDATION_SET
from tokenizers import Tokenizer
from transformers import Qwen2VLModel

FACTORS = (0.7, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2)


@torch.no_grad()
def figures(model: Qwen2VLModel, tokenizer: Tokenizer, cache: Path, table: list[Concept]) -> dict[str, float]:
    """hit@5 for five kinds of search: each a figure of evaluate.py, or the mean of two."""
    fast = FastModel(model)
    concepts, patches = style(cache, VALIDATION_SET)
    keep = [n for n, index in enumerate(concepts) if not table[index].tone]
    drawings = embed(fast, [[]] * len(keep), patches[keep])
    labels = embed(fast, tokens(tokenizer, [table[concepts[n]].label for n in keep]), None)
    drawn = {table[concepts[n]].hexcode: row for row, n in enumerate(keep)}
    noto, noto_patches = style(cache, "noto")
    row_of = {index: n for n, index in enumerate(noto)}
    shared = [row for row, n in enumerate(keep) if concepts[n] in row_of]
    other = embed(fast, [[]] * len(shared), noto_patches[[row_of[concepts[keep[row]]] for row in shared]])
    mixed = collection(fast, tokenizer, cache, labels, drawings)
    mixed |= about_notes(fast, tokenizer, drawn, drawings)
    found = {name: value["hit@5"] for name, value in mixed.items()}
    notes = found["key words to note, the same"] + found["question to note, among notes and drawings"]
    return {
        "text to drawing": found["label to drawing, among drawings, notes and pages"],
        "text to note": notes / 2,
        "text to page": found["key words to page, the same"],
        "drawing to note": found["drawing to note, among notes and drawings"],
        "drawing to drawing": hits(other, drawings, torch.tensor(shared))["hit@5"],
    }


def main() -> None:
    """Print the figures for each factor and write the model with the best one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    table = load_concepts(arguments.cache)
    model = Qwen2VLModel.from_pretrained(arguments.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    weights = model.language_model.norm.weight[:BAG_WIDTH]
    start, best = weights.clone(), (0.0, 1.0)
    for factor in FACTORS:
        weights.copy_(factor * start)
        found = figures(model, tokenizer, arguments.cache, table)
        average = sum(found.values()) / len(found)
        print(json.dumps({"factor": factor, "average": round(average, 2)} | found), flush=True)
        best = max(best, (average, factor))
    weights.copy_(best[1] * start)
    save_model(model, tokenizer, arguments.model)
    print(json.dumps({"kept": best[1]}))


if __name__ == "__main__":
    main()
