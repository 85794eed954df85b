"""Train umr-tiny from scratch on a CPU.

python train.py --cache DIR --out DIR --steps N [--resume] [--preview DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bag import (
    BAG_WIDTH,
    Bag,
    held_parts,
    hold_sizes,
    learn_bag,
    rarity,
    singular_directions,
    start_as_bag,
    sums,
)
from batches import MIX, Sampler, Share, Step
from concepts import load_concepts
from evaluate import validate, validate_texts
from model import END, FastModel, build_model, save_model, train_tokenizer
from muon import Muon
from objective import WEIGHTS, encode, gather, loss_of, terms
from pictures import PictureBank
from sources import TRAIN_SETS
from texts import Texts
from tokenizers import Tokenizer

CLIP, WARMUP, FLOOR = 1.0, 60, 0.02
RATES = {"visual": {"muon": 0.04, "adam": 3e-3}, "language": {"muon": 0.003, "adam": 1e-3}}
BAG_STEPS = 160
MUON_DECAY = 0.1


def optimisers(model: torch.nn.Module, worker: int, workers: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, patch projection, norms and biases."""
    steppers: list[torch.optim.Optimizer] = []
    for part, rates in RATES.items():
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            if name.startswith(part):
                inside = parameter.ndim == 2 and "embed_tokens" not in name
                (matrices if inside else rest).append(parameter)
        steppers.append(Muon(matrices, rates["muon"], MUON_DECAY, worker, workers))
        steppers.append(torch.optim.AdamW(rest, lr=rates["adam"], betas=(0.9, 0.98), weight_decay=0.01))
    return steppers


def rate(step: int, steps: int) -> float:
    """The share of the full rate: warm-up, then one cosine down to ``FLOOR``."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / (steps - WARMUP)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(done * math.pi))


def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the workers' gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def bag_of_words(texts: Texts, tokenizer: Tokenizer, seed: int) -> Bag:
    """What the language model starts as."""
    torch.manual_seed(seed)
    entries, paragraphs = texts.entries(), texts.paragraphs()
    idf = rarity(tokenizer, entries, paragraphs)
    directions = singular_directions(tokenizer, entries + paragraphs, idf, BAG_WIDTH - 1)

    def report(step: int, loss: float, bag: Bag) -> None:
        if step % 40 == 0:
            found = validate_texts(partial(sums, tokenizer, bag=bag))
            print(json.dumps({"bag_step": step, "loss": round(loss, 4)} | found), flush=True)

    return learn_bag(tokenizer, Bag(directions, idf), texts.pairs, BAG_STEPS, report)


def save(path: Path, value: dict) -> None:
    """Write a checkpoint so that a stop in between leaves the old one whole."""
    temporary = path.with_suffix(".new")
    torch.save(value, temporary)
    temporary.replace(path)


def work(worker: int, arguments: argparse.Namespace, meeting: str) -> None:
    """Train in one of ``--workers`` processes of one thread each; the first one logs, validates and saves."""
    workers, first = arguments.workers, worker == 0
    torch.set_num_threads(arguments.threads)
    if workers > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=worker, world_size=workers)
    table = load_concepts(arguments.cache)
    texts = Texts(arguments.cache, table)
    tokenizer = Tokenizer.from_file(str(arguments.cache / "tokenizer.json"))
    bank = PictureBank(arguments.cache, TRAIN_SETS, table)
    sampler = Sampler(bank, table, texts, tokenizer, arguments.seed)
    model = build_model(arguments.seed).train()
    if arguments.start:
        model.load_state_dict(torch.load(arguments.start, weights_only=True))
    else:
        start_as_bag(model, Bag(**torch.load(arguments.out / "bag.pt", weights_only=True)), END)
    held = held_parts(model)
    fast = FastModel(model, arguments.compile)
    steppers = optimisers(model, worker, workers)
    full = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    checkpoint, start, spent = arguments.out / "checkpoint.pt", 0, 0.0
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimisers"], strict=True):
            stepper.load_state_dict(saved)
        start, spent = state["step"], state["seconds"]
    pool = ThreadPoolExecutor(1)

    def load(step: int) -> tuple[Step, Share]:
        batch = sampler.draw(step)
        return batch, sampler.tensors(batch, step, worker, workers)

    began, saved_at = time.monotonic() - spent, time.monotonic()
    total, counted, last = torch.zeros(2 + len(WEIGHTS)), 0, time.monotonic()
    ahead = pool.submit(load, start)
    end = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(start, end):
        batch, share = ahead.result()
        ahead = pool.submit(load, step + 1)
        vectors = gather(encode(fast, share), share.shares, worker)
        loss, hits = loss_of(vectors, batch)
        added = terms(vectors, batch)
        (loss + sum(WEIGHTS[name] * value for name, value in added.items())).backward()
        if workers > 1:
            sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for parameter, place, _ in held:
            parameter.grad[place] = 0
        for stepper, rates in zip(steppers, full, strict=True):
            for group, base in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = base * arguments.rate * rate(step, arguments.steps)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, place, value in held:
                parameter[place] = value
        hold_sizes(model, END)
        if not first:
            continue
        total, counted = total + torch.stack([loss, hits, *added.values()]).detach(), counted + 1
        line: dict = {}
        if (step + 1) % 25 == 0 or step + 1 == end:
            now = time.monotonic()
            means = [round(value, 4) for value in (total / counted).tolist()]
            names = ("loss", "ranked_first", *added)
            line = {"step": step + 1} | dict(zip(names, means, strict=True))
            line["samples_per_s"] = round(counted * MIX.concepts / (now - last), 1)
            line["seconds"] = round(now - began, 1)
            total, counted, last = torch.zeros_like(total), 0, now
        if (step + 1) % arguments.validate_every == 0 or step + 1 == end:
            line |= {"step": step + 1} | validate(fast, tokenizer, arguments.cache, table)
            last = time.monotonic()
        if line:
            print(json.dumps(line), flush=True)
            with (arguments.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if time.monotonic() - saved_at > arguments.save_every or step + 1 == end:
            state = {"model": model.state_dict(), "optimisers": [s.state_dict() for s in steppers]}
            seconds = time.monotonic() - began
            save(checkpoint, state | {"step": step + 1, "seconds": seconds, "steps": arguments.steps})
            if arguments.preview:
                save_model(model, tokenizer, arguments.preview)
            saved_at = time.monotonic()
    pool.shutdown(cancel_futures=True)
    if first:
        run = {
            "steps": end,
            "concept_samples": MIX.concepts * end,
            "seconds": round(time.monotonic() - began),
        }
        run |= {key: getattr(arguments, key) for key in ("workers", "threads", "seed", "rate")}
        run |= {"rates": RATES, "torch": torch.__version__, "pictures": bank.counts}
        (arguments.out / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        save_model(model, tokenizer, arguments.out / "umr-tiny")
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Train, log, checkpoint, and leave the model folder in ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for downloaded packages and rasters"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, log and the final model"
    )
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--start", type=Path, help="begin with these weights, from grow.py")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the full learning rates")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step's rows")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--preview", type=Path, help="also write a loadable model here at each checkpoint")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    parser.add_argument("--validate-every", type=int, default=250, help="steps between validation figures")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stop-after", type=int, help="end early, at this step of the full schedule")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    words = arguments.cache / "tokenizer.json"
    if not words.exists():
        train_tokenizer(Texts(arguments.cache, load_concepts(arguments.cache)).corpus()).save(str(words))
    if not arguments.start and not (arguments.out / "bag.pt").exists():
        texts = Texts(arguments.cache, load_concepts(arguments.cache))
        bag = bag_of_words(texts, Tokenizer.from_file(str(words)), arguments.seed)
        save(arguments.out / "bag.pt", bag._asdict())
    PictureBank(arguments.cache, TRAIN_SETS, load_concepts(arguments.cache))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        if arguments.workers == 1:
            work(0, arguments, meeting)
        else:
            mp.spawn(work, (arguments, meeting), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
