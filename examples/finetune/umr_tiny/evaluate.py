"""Measure an exported umr-tiny: on the validation style, and at the end on two styles it has never seen.

python evaluate.py --cache DIR --model FOLDER [--run run/run.json]
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from concepts import Concept, difference, families, load_concepts
from model import FastModel, sequence
from pictures import SIDE, SQUARE, fake_pages, load_set, on_white, prepare
from sources import TRAIN_SETS, UNSEEN_SETS, VALIDATION_SET, describe
from texts import UNSEEN_PROSE, excerpt_query, load_prose, prose_passage
from tokenizers import Tokenizer
from transformers import Qwen2VLModel

CUTS = (1, 5, 10)
EVERYDAY_GROUPS = (3, 4, 5, 6, 7)


@torch.no_grad()
def embed(
    fast: FastModel, ids: list[list[int]], patches: torch.Tensor | None, grid: tuple[int, int] = SQUARE
) -> torch.Tensor:
    """Vectors of token lists, each behind a picture if ``patches`` are given."""
    parts = []
    cells = 0 if patches is None else grid[0] * grid[1]
    for start in range(0, len(ids), 128):
        chunk = [sequence(row, cells) for row in ids[start : start + 128]]
        visual = None if patches is None else fast.pictures(patches[start : start + 128], grid).flatten(0, 1)
        parts.append(fast.pool(chunk, visual))
    return torch.cat(parts)


def hits(queries: torch.Tensor, candidates: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Percent of queries whose candidate is among the first 1, 5, 10."""
    scores = queries @ candidates.T
    rank = (scores > scores.gather(1, truth[:, None])).sum(1)
    return {f"hit@{cut}": round(100 * (rank < cut).float().mean().item(), 1) for cut in CUTS}


def few(queries: torch.Tensor, candidates: torch.Tensor, rounds: int = 20) -> dict[str, float]:
    """The same among 200 candidates drawn at random, averaged over rounds; rows of both belong together."""
    rng = random.Random(0)
    size = min(200, len(queries))
    total: dict[str, float] = {}
    for _ in range(rounds):
        part = torch.tensor(rng.sample(range(len(queries)), size))
        for key, value in hits(queries[part], candidates[part], torch.arange(size)).items():
            total[key] = total.get(key, 0.0) + value / rounds
    return {key: round(value, 1) for key, value in total.items()}


@lru_cache(maxsize=8)
def style(cache: Path, short: str) -> tuple[list[int], torch.Tensor]:
    """Concept numbers of a set and their patches, prepared as in inference."""
    concepts, pictures = load_set(cache, short, load_concepts(cache))
    return concepts.tolist(), prepare(on_white(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()))


def tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts."""
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def own_notes() -> list[dict[str, str]]:
    """Forty notes on everyday things, each with its emoji and a question that it answers."""
    return tomllib.loads(Path(__file__).with_name("notes.toml").read_text(encoding="utf-8"))["note"]


@torch.no_grad()
def validate_texts(vectors: Callable[[list[str]], torch.Tensor]) -> dict[str, float]:
    """Question to note among the forty notes, for anything that turns texts into unit vectors."""
    notes = own_notes()
    found = hits(
        vectors([note["question"] for note in notes]),
        vectors([note["text"] for note in notes]),
        torch.arange(len(notes)),
    )
    return {f"val_questions_{key}": value for key, value in found.items()}


@torch.no_grad()
def about_notes(fast: FastModel, tokenizer: Tokenizer, drawn: dict[str, int], drawings: torch.Tensor) -> dict:
    """Question to note and drawing to note, among the notes and 200 drawings.

    ``drawn`` maps an emoji to its row in ``drawings``; notes on an emoji that is not there are left out.
    """
    notes = [note for note in own_notes() if note["emoji"] in drawn]
    rows = [drawn[note["emoji"]] for note in notes]
    others = [row for row in range(len(drawings)) if row not in rows]
    texts = embed(fast, tokens(tokenizer, [note["text"] for note in notes]), None)
    everything = torch.cat([texts, drawings[random.Random(0).sample(others, min(200, len(others)))]])
    questions = embed(fast, tokens(tokenizer, [note["question"] for note in notes]), None)
    truth = torch.arange(len(notes))
    return {
        "question to note, among notes and drawings": hits(questions, everything, truth),
        "drawing to note, among notes and drawings": hits(drawings[rows], everything, truth),
    }


@torch.no_grad()
def validate(fast: FastModel, tokenizer: Tokenizer, cache: Path, table: list[Concept]) -> dict[str, float]:
    """Label to EmojiOne drawing over all of its base concepts; words to notes and pages beside drawings."""
    concepts, patches = style(cache, VALIDATION_SET)
    keep = [n for n, index in enumerate(concepts) if not table[index].tone]
    drawings = embed(fast, [[]] * len(keep), patches[keep])
    labels = embed(fast, tokens(tokenizer, [table[concepts[n]].label for n in keep]), None)
    found = hits(labels, drawings, torch.arange(len(keep)))
    mixed = collection(fast, tokenizer, cache, labels, drawings)
    drawn = {table[concepts[n]].hexcode: row for row, n in enumerate(keep)}
    mixed |= about_notes(fast, tokenizer, drawn, drawings)
    return {
        "val_hit@1": found["hit@1"],
        "val_hit@5": found["hit@5"],
        "val200_hit@1": few(labels, drawings, 5)["hit@1"],
        "val_notes_hit@5": mixed["key words to note, the same"]["hit@5"],
        "val_pages_hit@5": mixed["key words to page, the same"]["hit@5"],
        "val_questions_hit@5": mixed["question to note, among notes and drawings"]["hit@5"],
        "val_drawing_to_note_hit@5": mixed["drawing to note, among notes and drawings"]["hit@5"],
    }


@torch.no_grad()
def report(fast: FastModel, tokenizer: Tokenizer, cache: Path, table: list[Concept], short: str) -> dict:
    """All figures on one style, for the concepts that some training style draws."""
    known = {index for name in TRAIN_SETS for index in load_set(cache, name, table)[0].tolist()}
    concepts, patches = style(cache, short)
    keep = [n for n, index in enumerate(concepts) if index in known]
    concepts, patches = [concepts[n] for n in keep], patches[keep]
    every = embed(fast, [[]] * len(concepts), patches)
    base = [n for n, index in enumerate(concepts) if not table[index].tone]
    drawings, truth = every[base], torch.arange(len(base))
    labels = embed(fast, tokens(tokenizer, [table[concepts[n]].label for n in base]), None)
    keys = embed(fast, tokens(tokenizer, [" ".join(table[concepts[n]].tags) for n in base]), None)
    everyday = torch.tensor([k for k, n in enumerate(base) if table[concepts[n]].group in EVERYDAY_GROUPS])
    noto, noto_patches = style(cache, "noto")
    row_of = {index: n for n, index in enumerate(noto)}
    shared = [k for k, n in enumerate(base) if concepts[n] in row_of]
    other = embed(fast, [[]] * len(shared), noto_patches[[row_of[concepts[base[k]]] for k in shared]])
    result = {
        "candidates": len(base),
        "text to picture, label": hits(labels, drawings, truth),
        "text to picture, keywords": hits(keys, drawings, truth),
        "picture to text": hits(drawings, labels, truth),
        "picture to picture, from Noto": hits(other, drawings, torch.tensor(shared)),
        "text to picture, label, 200 candidates": few(labels, drawings),
        "text to picture, everyday things, 200 candidates": few(labels[everyday], drawings[everyday]),
        "picture to text, 200 candidates": few(drawings, labels),
        "picture to picture, 200 candidates": few(other, drawings[shared]),
    }
    result |= collection(fast, tokenizer, cache, labels, drawings)
    drawn = {table[concepts[n]].hexcode: row for row, n in enumerate(base)}
    result |= about_notes(fast, tokenizer, drawn, drawings)
    return result | compositions(fast, tokenizer, table, concepts, every, row_of, noto_patches)


def collection(
    fast: FastModel, tokenizer: Tokenizer, cache: Path, labels: torch.Tensor, drawings: torch.Tensor
) -> dict:
    """One unfiltered collection of 200 drawings, 200 notes and 200 pages; the prose is not trained on."""
    rng = random.Random(0)
    documents = load_prose(cache, UNSEEN_PROSE)
    part = torch.tensor(rng.sample(range(len(labels)), min(200, len(labels))))
    notes = [prose_passage(documents, rng, rng.randint(20, 60)) for _ in range(200)]
    pages = [prose_passage(documents, rng, rng.randint(90, 170)) for _ in range(200)]
    scans = prepare(fake_pages(200, torch.full((1, 3, SIDE, SIDE), 128, dtype=torch.uint8), 99), (2, 1))
    everything = torch.cat(
        [
            drawings[part],
            embed(fast, tokens(tokenizer, notes), None),
            embed(fast, tokens(tokenizer, pages), scans, (2, 1)),
        ]
    )
    questions = embed(fast, tokens(tokenizer, [excerpt_query(text, rng) for text in notes + pages]), None)
    size = len(part)
    return {
        "label to drawing, among drawings, notes and pages": hits(
            labels[part], everything, torch.arange(size)
        ),
        "key words to note, the same": hits(questions[:200], everything, torch.arange(size, size + 200)),
        "key words to page, the same": hits(
            questions[200:], everything, torch.arange(size + 200, size + 400)
        ),
    }


def compositions(
    fast: FastModel,
    tokenizer: Tokenizer,
    table: list[Concept],
    concepts: list[int],
    every: torch.Tensor,
    row_of: dict[int, int],
    noto_patches: torch.Tensor,
) -> dict:
    """Noto drawing of one thing and the words that change it, to the changed thing's drawing among all."""
    place = {index: n for n, index in enumerate(concepts)}
    rng = random.Random(0)
    result = {}
    for name, tone in (("skin tone", True), ("other change", False)):
        cases: list[tuple[int, int, str]] = []
        for group in families(table):
            if any(table[index].tone for index in group) != tone:
                continue
            for want in group:
                have = (
                    table[group[0]].family
                    if tone
                    else rng.choice([other for other in group if other != want])
                )
                gained = difference(table[have], table[want])[0]
                if gained and have != want and have in row_of and want in place and have in place:
                    cases.append((have, want, gained))
        if len(cases) < 30:
            continue
        cases = rng.sample(cases, min(1500, len(cases)))
        patches = noto_patches[[row_of[have] for have, _, _ in cases]]
        truth = torch.tensor([place[want] for _, want, _ in cases])
        fused = embed(fast, tokens(tokenizer, [words for _, _, words in cases]), patches)
        result[f"picture + {name}"] = {"candidates": len(concepts)} | hits(fused, every, truth)
        result[f"picture + {name}, picture alone"] = hits(
            embed(fast, [[]] * len(cases), patches), every, truth
        )
        words = embed(fast, tokens(tokenizer, [words for _, _, words in cases]), None)
        result[f"picture + {name}, words alone"] = hits(words, every, truth)
    return result


def main() -> None:
    """Write ``results.json`` beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="run.json of the training run, kept with the results")
    arguments = parser.parse_args()
    table = load_concepts(arguments.cache)
    model = Qwen2VLModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    fast = FastModel(model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    results = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {VALIDATION_SET: report(fast, tokenizer, arguments.cache, table, VALIDATION_SET)},
        "unseen": {name: report(fast, tokenizer, arguments.cache, table, name) for name in UNSEEN_SETS},
        "training": json.loads(arguments.run.read_text(encoding="utf-8")) if arguments.run else None,
        "sources": describe(),
    }
    (arguments.model / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: results[key] for key in ("parameters", "validation", "unseen")}, indent=2))


if __name__ == "__main__":
    main()
