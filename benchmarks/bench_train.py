"""Training beside sentence-transformers' trainer: same checkpoint, rows, trainable weights, batch and chunk.

python bench_train.py --vocabulary qwen.tiktoken [--steps N] [--batch N] [--chunk N ...] [--out FILE]
python bench_train.py --vocabulary qwen.tiktoken --memory 64 1024 [--out FILE]

The random Qwen2-VL of bench_rerank.py learns, by LoRA on its language model and with its vision tower frozen,
from rows of text and pictures cut out of the sample corpus. Rows stand in one order for all, the adapter
starts from the same numbers, and the losses must agree for a time to count. Every run has a process of its
own. The peer needs `datasets`, and torchvision as torchvision_for_cpu.py says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision_for_cpu  # noqa: F401  # before transformers
from bench_rerank import CORPUS, SLOT, SYSTEM, write_checkpoint
from PIL import Image
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
CHAT = (
    "{%- for message in messages -%}{{ " + json.dumps(SYSTEM) + " }}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{{ " + json.dumps(SLOT) + " }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{ part.text }}"
    "{%- endif -%}{%- endfor -%}{{ " + json.dumps(TAIL) + " }}{%- endfor -%}"
)
"""GME's prompt as a chat template: the picture, then the text, and the end-of-text token that is pooled."""
KINDS = (
    ("text", "text"),
    ("text", "picture"),
    ("picture", "text"),
    ("picture", "picture"),
    ("fused", "picture"),
)
"""What asks and what answers; rows take turns through these."""
SIDES = (280, 400)
"""Pixels a side: 10 to 14 of the 28 pixels that are one token, so 100 to 196 tokens."""
WORDS, SPREAD = 76, 0.35
"""Median and sigma of the log-normal number of words."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHUNK_TOKENS, FEATURE_BYTES = 2048, 2**26
"""Of the runs whose memory is measured."""
RANK, ALPHA, LEARNING_RATE, TEMPERATURE, CLIP, SEED = 8, 16, 1e-4, 0.03, 1.0, 0


@dataclass(frozen=True)
class Example:
    """One row; `query` and `positive` hold `text`, `image` (a path below the rows' folder), or both."""

    id: str
    query: dict[str, str]
    positive: dict[str, str]

    def json(self) -> str:
        """In the library's row format, all rows of one source: they are read in the order of the file."""
        row = {"id": self.id, "query": self.query, "positives": [self.positive], "source": "bench"}
        return json.dumps(row, ensure_ascii=False)


@dataclass
class Run:
    """What one trainer did; `seconds` are those of the steps after the first, loading the rows included."""

    batch: int
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trainable: int = 0
    peak_bytes: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of every query and document, padding left out."""
    widths: list[int] = field(default_factory=list)
    """Tokens that the language model computes for each: where chunks are padded, the longest of its chunk."""
    patches: list[int] = field(default_factory=list)
    """Patches of every picture, four to a token."""

    def summary(self) -> dict[str, Any]:
        """Figures for the report."""
        steps = sorted(self.seconds)
        mean = sum(steps) / len(steps) if steps else math.nan
        return {
            "first_step_seconds": round(self.first_seconds, 3),
            "seconds_per_step": {"mean": round(mean, 3), "least": round(min(steps, default=math.nan), 3)},
            "rows_per_second": round(self.batch / mean, 3),
            "losses": [round(loss, 6) for loss in self.losses],
            "trainable_parameters": self.trainable,
            "peak_bytes": self.peak_bytes,
            "padding_share": round(1 - sum(self.lengths) / sum(self.widths), 4),
        }


class _Source:
    """Passages and cut-outs of the sample corpus, none twice."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        notes = [path.read_text(encoding="utf-8").split() for path in sorted(CORPUS.rglob("*.md"))]
        # Without words that spell special tokens: the peer would take them for such.
        self.words = [word for note in notes for word in note if "<|" not in word]
        self.pictures = sorted(path for path in CORPUS.rglob("*") if path.suffix in (".jpg", ".png"))
        self.seen: set[str] = set()
        self.written = 0

    def text(self) -> str:
        while True:
            count = max(8, min(400, round(WORDS * math.exp(self.chance.gauss(0, SPREAD)))))
            at = self.chance.randrange(len(self.words) - count)
            text = " ".join(self.words[at : at + count])
            if text not in self.seen:
                self.seen.add(text)
                return text

    def picture(self, path: Path) -> str:
        """Write a random cut-out at a random size; its path below the folder."""
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        box = [round(side * self.chance.uniform(0.6, 0.95)) for side in whole.size]
        left, top = (self.chance.randrange(side - cut) for side, cut in zip(whole.size, box, strict=True))
        size = (self.chance.randint(*SIDES), self.chance.randint(*SIDES))
        cut = whole.crop((left, top, left + box[0], top + box[1])).resize(size, Image.Resampling.BICUBIC)
        name = f"pictures/{self.written:04d}{path.suffix}"
        self.written += 1
        cut.save(self.folder / name, quality=92)
        return name

    def row(self, number: int) -> Example:
        asks, answers = KINDS[number % len(KINDS)]
        shown = self.chance.choice(self.pictures)  # both pictures of a row show the same thing
        sides = []
        for kind in (asks, answers):
            side = {} if kind == "picture" else {"text": self.text()}
            sides.append(side if kind == "text" else side | {"image": self.picture(shown)})
        return Example(f"{asks}-{answers}-{number:04d}", *sides)


def write_rows(folder: Path, count: int, seed: int = SEED) -> list[Example]:
    """Make `folder/rows.jsonl` and `folder/pictures`; the same files for the same seed."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    source = _Source(folder, seed)
    rows = [source.row(number) for number in range(count)]
    (folder / "rows.jsonl").write_text("".join(row.json() + "\n" for row in rows), encoding="utf-8")
    return rows


def start_adapter(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give an adapter the same beginning in any trainer: A uniform as peft draws it, B zero."""
    drawn = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_A" in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=drawn))
            elif "lora_B" in name:
                parameter.zero_()


def peer(
    folder: Path,
    data: Path,
    rows: list[Example],
    batch: int,
    chunk: int,
    steps: int,
    tokens: int | None = None,
    workers: int = 0,
) -> Run:
    """Train with sentence-transformers' trainer and its cached loss; no shuffling, no checkpointing, float32.

    Args:
        folder: of the checkpoint.
        data: the folder that the rows' pictures stand below.
        rows: at least `batch * steps`.
        batch: rows for one optimiser step.
        chunk: its `mini_batch_size`.
        steps: optimiser steps.
        tokens: its `mini_batch_num_tokens`: chunks by tokens, in place of rows.
        workers: its data loader's processes.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.losses.gradcache import _minibatch_ranges
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    torch.set_flush_denormal(True)  # ours does so itself; the random model leaves many such numbers
    reads = Transformer(
        str(folder), model_kwargs={"dtype": torch.float32}, processor_kwargs={"chat_template": CHAT}
    )
    pools = Pooling(reads.get_embedding_dimension(), "lasttoken")
    model = SentenceTransformer(modules=[reads, pools, Normalize()], device="cpu")
    # The vision tower has no layer of these names.
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS)))
    start_adapter(model.named_parameters())
    learns = {name: part.numel() for name, part in model.named_parameters() if part.requires_grad}
    if not all("language_model" in name and "lora_" in name for name in learns):
        raise SystemExit(f"the peer would train more than the adapter: {sorted(learns)}")
    run = Run(batch, trainable=sum(learns.values()))

    used = rows[: batch * steps]
    columns = {
        "anchor": [json.dumps(row.query) for row in used],
        "positive": [json.dumps(row.positive) for row in used],
    }
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=chunk, mini_batch_num_tokens=tokens
    )

    def note(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        run.losses.append(float(output.detach()))
        for column in inputs[0]:
            lengths = column["attention_mask"].sum(1).tolist()
            run.lengths += lengths
            cuts = _minibatch_ranges(column, chunk, tokens)
            for begin, end in cuts:
                run.widths += [max(lengths[begin:end])] * (end - begin)
            if "image_grid_thw" in column:
                run.patches += column["image_grid_thw"].prod(1).tolist()

    loss.register_forward_hook(note)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    with tempfile.TemporaryDirectory() as unused:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=unused,
                per_device_train_batch_size=batch,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=CLIP,
                batch_sampler=in_order,
                dataloader_num_workers=workers,
                use_cpu=True,
                seed=SEED,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(columns),
            data_collator=SentenceTransformerDataCollator(_Opening(model.preprocess, data)),
            loss=loss,
            callbacks=[Clock()],
        )
        began = time.perf_counter()
        trainer.train()
    run.first_seconds = ends[0] - began
    run.seconds = [after - before for before, after in itertools.pairwise(ends)]
    run.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return run


def ours(
    folder: Path,
    data: Path,
    rows: list[Example],
    batch: int,
    chunk: int | None,
    steps: int,
    tokens: int = 10**9,
    feature_bytes: int = 2**30,
) -> Run:
    """Train with `UMRTrainer`; arguments as `peer`, `tokens` and `feature_bytes` as `Memory` of a recipe."""
    from transformers import PrinterCallback, SchedulerType, TrainerCallback

    from umr_plugins.backbones.load import load_backbone
    from umr_plugins.backbones.registry import resolve
    from umr_plugins.data.readers import read
    from umr_plugins.encoding.trainable import TrainableEncoder
    from umr_plugins.training.arguments import arguments
    from umr_plugins.training.collate import Batches
    from umr_plugins.training.lora import add_lora
    from umr_plugins.training.reading import make_recipe
    from umr_plugins.training.trainer import UMRTrainer

    recipe = make_recipe(
        {
            "model": str(folder),
            "data": [{"path": str(data / "rows.jsonl")}],
            "batch": {"pictures": batch, "text": batch},
            "lora": {"rank": RANK, "alpha": ALPHA, "dropout": 0},
            "optimizer": {"learning_rate": LEARNING_RATE, "betas": [0.9, 0.999], "max_grad_norm": CLIP},
            "memory": {"chunk_tokens": tokens, "chunk_entries": chunk, "feature_bytes": feature_bytes},
            "precision": "float32",
            "device": "cpu",
            "log_every": 1,
        },
        data,
    )
    checkpoint = resolve(folder)
    spec = replace(checkpoint.spec, min_image_tokens=4)
    backbone = load_backbone(replace(checkpoint, spec=spec), torch.device("cpu"), torch.float32)
    add_lora(backbone, rank=RANK, alpha=ALPHA, dropout=0)
    start_adapter(backbone.model.named_parameters())
    encoder = TrainableEncoder(backbone)
    run = Run(batch, trainable=sum(part.numel() for part in encoder.parameters() if part.requires_grad))
    take = encoder.prepared

    def noted(entries: Any) -> Iterator[Any]:
        for item in take(entries):
            run.lengths.append(item.length)
            run.patches += [len(picture.patches) for picture in item.pictures]
            yield item

    encoder.prepared = noted  # type: ignore[method-assign]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as unused:
        args = arguments(recipe, spec, steps, Path(unused))
        args.lr_scheduler_type, args.warmup_steps = SchedulerType.CONSTANT, 0
        args.save_steps = 10**9
        ordered = _InOrder(read("rows", data / "rows.jsonl"), batch, steps)
        trainer = UMRTrainer(encoder, Batches(ordered), recipe, args, {}, [Clock()])  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]  # the peer saves nothing
        began = time.perf_counter()
        trainer.train()
    run.losses = [line["loss"] for line in trainer.state.log_history if "samples_per_second" in line]
    run.widths = run.lengths
    run.first_seconds = ends[0] - began
    run.seconds = [after - before for before, after in itertools.pairwise(ends)]
    run.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return run


@dataclass(frozen=True)
class _InOrder:
    """Batches of rows in the order of the file."""

    sources: list[Any]
    batch: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[tuple[int, int]]:
        return [(0, number) for number in range(step * self.batch, (step + 1) * self.batch)]


@dataclass(frozen=True)
class _Opening:
    """Rows stand in the data set as JSON, because a column of one has one type; pictures open here."""

    preprocess: Callable[..., dict[str, Any]]
    folder: Path

    def __call__(self, column: list[str], **options: Any) -> dict[str, Any]:
        return self.preprocess([self._input(json.loads(each)) for each in column], **options)

    def _input(self, item: dict[str, str]) -> Any:
        """What sentence-transformers takes: a string, a picture, or a dictionary of both."""
        if "image" not in item:
            return item["text"]
        with Image.open(self.folder / item["image"]) as opened:
            picture = opened.convert("RGB")
        return {"image": picture, "text": item["text"]} if "text" in item else picture


def flops(folder: Path, lengths: list[int], patches: list[int]) -> dict[str, float]:
    """Floating-point operations of one forward pass over tokens actually seen, by arithmetic.

    A multiply-add counts two. Only matrix products count: norms, activations, rotations and the loss are
    small beside them. Vision attention is full inside a picture, the language model's is causal; padding and
    the adapter (3 % of a layer's products) are left out.

    Args:
        folder: of the checkpoint.
        lengths: tokens of every text or picture sequence.
        patches: of every picture.

    Returns:
        `vision` (V) and `language` (L) of one pass, and `limit`: what holding a picture's features from the
        first pass of GradCache (arXiv 2101.06983) for the second can save at most, (2V + 3L) / (V + 3L).
        Two passes forward are 2L; the third L is the gradient of the activations, for the weights are frozen.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    eyes, text = config["vision_config"], config["text_config"]
    wide, merged = eyes["embed_dim"], eyes["embed_dim"] * eyes["spatial_merge_size"] ** 2
    pixels = eyes["in_channels"] * eyes["temporal_patch_size"] * eyes["patch_size"] ** 2
    block = 4 * wide * wide + 2 * wide * int(eyes["mlp_ratio"] * wide)
    per_patch = pixels * wide + eyes["depth"] * block
    per_token = merged * merged + merged * eyes["hidden_size"]
    vision = 0.0
    for count in patches:
        attention = eyes["depth"] * 2 * count * wide
        vision += 2 * (count * (per_patch + attention) + count / eyes["spatial_merge_size"] ** 2 * per_token)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    size = text.get("head_dim") or hidden // heads
    keys = text["num_key_value_heads"] * size
    layer = hidden * (2 * heads * size + 2 * keys) + 3 * hidden * text["intermediate_size"]
    language = 0.0
    for count in lengths:
        attention = 2 * heads * size * (count + 1) / 2
        language += 2 * count * text["num_hidden_layers"] * (layer + attention)
    limit = (2 * vision + 3 * language) / (vision + 3 * language)
    return {"vision": vision, "language": language, "limit": limit}


def _apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def report_memory(folder: Path, data: Path, rows: list[Example], arguments: argparse.Namespace) -> None:
    """Peak memory of one step of our trainer at several batch sizes, chunks being equal.

    The model has two layers in each tower, so that the pictures of a batch weigh more beside it.
    """
    small = Path(tempfile.mkdtemp())
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = config.vision_config.depth = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    Qwen2VLForConditionalGeneration(config).save_pretrained(small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, small / name)
    peaks = {}
    for batch in arguments.memory:
        run = _apart(ours, small, data, rows, batch, None, 1, CHUNK_TOKENS, FEATURE_BYTES)
        peaks[batch] = run.peak_bytes
        print(batch, f"{run.peak_bytes / 2**20:.0f} MiB", flush=True)
    least, *_, most = peaks.values()
    report = {
        "chunk_tokens": CHUNK_TOKENS,
        "feature_bytes": FEATURE_BYTES,
        "pictures": sum(("image" in row.query) + ("image" in row.positive) for row in rows[: max(peaks)]),
        "peak_bytes": peaks,
        "ratio": round(most / least, 3),
    }
    _write(report, arguments.out)


def _write(report: dict[str, Any], out: Path | None) -> None:
    report |= {
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "sentence-transformers", "peft", "datasets")
        }
        | {"python": platform.python_version()},
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def main() -> None:
    """Write checkpoint and rows, train with each, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=Path, required=True, help="qwen.tiktoken of the wheel dashscope")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--chunk",
        type=int,
        nargs="+",
        default=[8, 1],
        help="rows at once; the peer also runs with each further",
    )
    parser.add_argument("--rounds", type=int, default=2, help="how often each takes its turn")
    parser.add_argument("--memory", type=int, nargs="+", metavar="BATCH", help="peak memory at these sizes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--checkpoint", type=Path, help="folder to write the checkpoint to, or with one in it"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")
    folder = arguments.checkpoint or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        write_checkpoint(folder, arguments.vocabulary)
    data = Path(tempfile.mkdtemp())
    needed = max(arguments.memory) if arguments.memory else arguments.batch * arguments.steps
    rows = write_rows(data, needed)
    if arguments.memory:
        report_memory(folder, data, rows, arguments)
        return
    first = arguments.chunk[0]
    names = {f"sentence-transformers, mini_batch_size={chunk}": (peer, chunk) for chunk in arguments.chunk}
    names = {f"umr-plugins, chunk_entries={first}": (ours, first), **names}
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(arguments.rounds):  # in turns, so that a busy minute hits everyone
        for name, (trainer, chunk) in names.items():
            settings = (arguments.batch, chunk, arguments.steps)
            runs[name].append(_apart(trainer, folder, data, rows, *settings))
    best = {name: min(each, key=lambda run: min(run.seconds)) for name, each in runs.items()}
    mine, *others = best.values()
    for other in others:
        if mine.trainable != other.trainable:
            raise SystemExit(f"other weights are trained: {mine.trainable} and {other.trainable}")
        apart = max(abs(a - b) / abs(b) for a, b in zip(mine.losses, other.losses, strict=True))
        if apart > 1e-3:
            raise SystemExit(f"losses differ by {apart:.1e}: {mine.losses} and {other.losses}")
    seen, count = others[0], len(rows)
    work = flops(folder, seen.lengths, seen.patches)
    vision, language = work["vision"], work["language"]
    padded = flops(folder, seen.widths, seen.patches)["language"]
    report = {
        "batch": arguments.batch,
        "steps": arguments.steps,
        "adapter": {"rank": RANK, "alpha": ALPHA, "layers": LINEARS},
        "tokens": {
            "items": len(seen.lengths),
            "mean": round(sum(seen.lengths) / len(seen.lengths), 1),
            "pictures": len(seen.patches),
            "mean_of_a_picture": round(sum(seen.patches) / len(seen.patches) / 4, 1),
        },
        "gflops_per_row": {
            "vision": round(vision / count / 1e9, 2),
            "language": round(language / count / 1e9, 2),
        },
        "limit_by_arithmetic": {
            "vision_once": round(work["limit"], 3),
            "vision_once_and_no_padding": round((2 * vision + 3 * padded) / (vision + 3 * language), 3),
        },
        "speedup": {
            name: round(min(run.seconds) / min(mine.seconds), 2)
            for name, run in zip(list(best)[1:], others, strict=True)
        },
        "losses_agree_to": max(
            abs(a - b) / abs(b) for other in others for a, b in zip(mine.losses, other.losses, strict=True)
        ),
        "runs": {name: run.summary() for name, run in best.items()},
    }
    _write(report, arguments.out)


if __name__ == "__main__":
    main()
