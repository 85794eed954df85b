"""Train umr-tiny from scratch on a CPU.

python train.py --cache DIR --out DIR --steps N [--resume] [--preview DIR]
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from batches import CONCEPTS, Sampler, Step
from concepts import load_concepts
from evaluate import validate
from model import FastModel, build_model, save_model, sequence, train_tokenizer
from muon import Muon
from pictures import PictureBank
from sources import TRAIN_SETS
from texts import Texts
from tokenizers import Tokenizer

TEMPERATURE, CLIP, WARMUP, FLOOR = 0.05, 1.0, 60, 0.02
MUON_RATE, MUON_DECAY, ADAM_RATE = 0.04, 0.1, 3e-3
LENGTH_EDGES = (8, 12, 18, 28, 44, 64, 96, 144, 208)


def optimisers(model: torch.nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, patch projection, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if inside else rest).append(parameter)
    return [
        Muon(matrices, lr=muon_rate, weight_decay=MUON_DECAY),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(step: int, steps: int) -> float:
    """Warm-up, then one cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())


def encode(fast: FastModel, ids: list, groups: dict) -> torch.Tensor:
    """Unit vectors of every row of a step, in its order; rows of like length run together."""
    visual: dict[int, torch.Tensor] = {}
    for grid, (places, patches) in groups.items():
        visual.update(zip(places, fast.pictures(patches, grid).unbind(0), strict=True))
    rows = [sequence(text, count) for text, count in ids]
    vectors: dict[int, torch.Tensor] = {}
    low = 0
    for high in (*LENGTH_EDGES, 1 << 30):
        part = [n for n, row in enumerate(rows) if low < len(row) <= high]
        low = high
        if part:
            filled = [visual[n] for n in part if n in visual]
            pooled = fast.pool([rows[n] for n in part], torch.cat(filled) if filled else None)
            vectors.update(zip(part, pooled.unbind(0), strict=True))
    return torch.stack([vectors[n] for n in range(len(rows))])


def loss_of(vectors: torch.Tensor, batch: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE over one pool of everything in the step, whatever its modality; and the share of pairs ranked first.

    A row's negatives leave out itself, every row of the same concept and, except among near neighbours that are
    there to be told apart, every row of the same family.
    """
    concept = torch.tensor([row.concept if row.concept >= 0 else -2 - n for n, row in enumerate(batch.rows)])
    family = torch.tensor([row.family if row.family >= 0 else -2 - n for n, row in enumerate(batch.rows)])
    strict = torch.tensor([row.strict for row in batch.rows])
    same = concept[:, None] == concept[None, :]
    near = (family[:, None] == family[None, :]) & ~(strict[:, None] & strict[None, :])
    excluded = same | near
    partners = torch.zeros_like(excluded)
    source, target, weight = (torch.tensor(column) for column in zip(*batch.pairs, strict=True))
    partners[source, target] = True
    scores = vectors @ vectors.T / TEMPERATURE
    negatives = scores.masked_fill(excluded | partners, float("-inf"))
    mass = negatives.logsumexp(1)
    positive = scores[source, target]
    losses = torch.logaddexp(positive, mass[source]) - positive
    weight = weight.to(losses.dtype)
    hits = (positive > negatives.max(1).values[source]).float()
    return (losses * weight).sum() / weight.sum(), (hits * weight).sum() / weight.sum()


def save(path: Path, value: dict) -> None:
    """Write a checkpoint so that a stop in between leaves the old one whole."""
    temporary = path.with_suffix(".new")
    torch.save(value, temporary)
    temporary.replace(path)


def main() -> None:
    """Train, log, checkpoint, and leave the model folder in ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for downloaded packages and rasters"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, log and the final model"
    )
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--preview", type=Path, help="also write a loadable model here at each checkpoint")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    parser.add_argument("--validate-every", type=int, default=250, help="steps between validation figures")
    parser.add_argument("--muon-rate", type=float, default=MUON_RATE)
    parser.add_argument("--adam-rate", type=float, default=ADAM_RATE)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stop-after", type=int, help="end early, at this step of the full schedule")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = load_concepts(arguments.cache)
    texts = Texts(arguments.cache, table)
    words = arguments.cache / "tokenizer.json"
    if not words.exists():
        train_tokenizer(texts.corpus()).save(str(words))
    tokenizer = Tokenizer.from_file(str(words))
    bank = PictureBank(arguments.cache, TRAIN_SETS, table)
    sampler = Sampler(bank, table, texts, tokenizer, arguments.seed)
    model = build_model(arguments.seed).train()
    fast = FastModel(model, arguments.compile)
    steppers = optimisers(model, arguments.muon_rate, arguments.adam_rate)
    checkpoint, start, spent = arguments.out / "checkpoint.pt", 0, 0.0
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimisers"], strict=True):
            stepper.load_state_dict(saved)
        start, spent = state["step"], state["seconds"]
    log = (arguments.out / "log.jsonl").open("a", encoding="utf-8")
    base_rates = (arguments.muon_rate, arguments.adam_rate)
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(int).result()
    torch.set_num_threads(arguments.threads)  # the setter is per thread for OpenMP, but global for MKL

    def load(step: int) -> tuple:
        batch = sampler.draw(step)
        return batch, *sampler.tensors(batch, step)

    began, saved_at = time.monotonic() - spent, time.monotonic()
    total_loss = total_hits = 0.0
    counted, last = 0, time.monotonic()
    ahead = pool.submit(load, start)
    end = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(start, end):
        batch, ids, groups = ahead.result()
        ahead = pool.submit(load, step + 1)
        vectors = encode(fast, ids, groups)
        loss, hits = loss_of(vectors, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for stepper, base in zip(steppers, base_rates, strict=True):
            for group in stepper.param_groups:
                group["lr"] = base * rate(step, arguments.steps)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        total_loss, total_hits, counted = total_loss + loss.item(), total_hits + hits.item(), counted + 1
        line: dict = {}
        if (step + 1) % 25 == 0 or step + 1 == end:
            now = time.monotonic()
            line = {
                "step": step + 1,
                "loss": round(total_loss / counted, 4),
                "ranked_first": round(total_hits / counted, 4),
                "samples_per_s": round(counted * CONCEPTS / (now - last), 1),
                "seconds": round(now - began, 1),
            }
            total_loss = total_hits = 0.0
            counted, last = 0, now
        if (step + 1) % arguments.validate_every == 0 or step + 1 == end:
            line |= {"step": step + 1} | validate(fast, tokenizer, arguments.cache, table)
            last = time.monotonic()
        if line:
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if time.monotonic() - saved_at > arguments.save_every or step + 1 == end:
            seconds = time.monotonic() - began
            save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimisers": [s.state_dict() for s in steppers],
                    "step": step + 1,
                    "seconds": seconds,
                    "steps": arguments.steps,
                },
            )
            if arguments.preview:
                save_model(model, tokenizer, arguments.preview)
            saved_at = time.monotonic()
    pool.shutdown(cancel_futures=True)
    run = {
        "steps": end,
        "concept_samples": end * CONCEPTS,
        "seconds": round(time.monotonic() - began),
        "threads": arguments.threads,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "muon_rate": arguments.muon_rate,
        "adam_rate": arguments.adam_rate,
        "pictures": bank.counts,
    }
    (arguments.out / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    save_model(model, tokenizer, arguments.out / "umr-tiny")


if __name__ == "__main__":
    main()
