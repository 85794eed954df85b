"""A training recipe: what is trained, on what, how. Read from YAML; unknown keys are refused.

Defaults are GME's (arXiv 2412.16855) where it gives them: LoRA of rank 8, learning rate 1e-4 falling linearly
after a warm-up over 0.06 of the steps, temperature 0.03, 128 queries a batch with pictures and 512 of text
only, at most 1,024 visual tokens a picture, 1,800 tokens with pictures and 512 of text only. Where the paper
is silent (LoRA's alpha, dropout and layers) or prints what looks like a slip (Adam's epsilon), they are ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: file or folder; relative ones start from the recipe's folder.
        format: a layout of `umr_plugins.data.readers.FORMATS`.
        options: further arguments of its reader, such as `name` and `split`.
    """

    path: str
    format: str = "rows"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Shares of rows; what is left out has 0, and without any entry rows count alike.

    Args:
        classes: by modality class: `single`, `cross`, `fused`.
        sources: by name of the source, within its class.
    """

    classes: dict[str, float] = field(default_factory=dict)
    sources: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchSizes:
    """Queries of a batch, over all processes.

    Args:
        pictures: of rows with pictures.
        text: of rows of text only.
        same_source: whether a batch's rows all come from one source.
    """

    pictures: int = 128
    text: int = 512
    same_source: bool = True


@dataclass(frozen=True)
class Loss:
    """See `umr_plugins.training.losses`.

    Args:
        temperature: of the softmax; the starting value if it is learned.
        learn_temperature: whether it is.
        in_batch: whether documents of other queries are negatives too.
        same_source_only: only those of queries of the same source.
        query_query: adds other queries as negatives.
        document_document: adds other documents as negatives of the positive.
        false_negative_margin: documents more similar than the positive by this are no negatives.
        matryoshka: weights by number of leading dimensions (arXiv 2205.13147).
        distillation: weight of a loss that follows the scores of documents.
        teacher_temperature: of those scores.
    """

    temperature: float = 0.03
    learn_temperature: bool = False
    in_batch: bool = True
    same_source_only: bool = False
    query_query: bool = False
    document_document: bool = False
    false_negative_margin: float | None = None
    matryoshka: dict[int, float] = field(default_factory=dict)
    distillation: float = 0.0
    teacher_temperature: float = 1.0


@dataclass(frozen=True)
class Lora:
    """Adapters (arXiv 2106.09685); see `umr_plugins.training.lora.add_lora`."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] | None = None
    vision: bool = False


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and decay.

    Args:
        learning_rate: the highest.
        warmup: part of the steps until it is reached.
        weight_decay: of AdamW.
        betas: of AdamW.
        epsilon: of AdamW.
        max_grad_norm: longer gradients are shortened to this.
    """

    learning_rate: float = 1e-4
    warmup: float = 0.06
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Memory:
    """What a step may hold at once; changes speed, and the result by rounding only.

    Args:
        chunk_tokens: encoded together, visual tokens included.
        chunk_entries: most inputs encoded together.
        feature_bytes: visual features kept from a step's first pass to its second.
        checkpointing: whether activations of the language layers are computed again instead of kept.
        loss_rows: queries whose similarities are in memory at once.
    """

    chunk_tokens: int = 8192
    chunk_entries: int | None = None
    feature_bytes: int = 2**30
    checkpointing: bool = False
    loss_rows: int = 1024


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    Args:
        model: bundled alias, folder or hub id.
        data: where rows come from.
        revision: of a hub id.
        steps: how many; or
        epochs: how often all rows are seen. One epoch if neither is given.
        weights: of classes and sources.
        batch: sizes.
        negatives: hard negatives of each query; by default those a row has, 8 at most.
        loss: what is minimised.
        tuning: `lora`, or `full`: all weights of the language model.
        lora: the adapters.
        full_vision: with `full`, whether the vision tower is trained too.
        optimizer: how weights are moved.
        memory: budgets.
        max_image_tokens: visual tokens of a picture, at most.
        min_image_tokens: at least; None for the model's own.
        max_length: tokens of an input with a picture.
        max_text_length: tokens of an input without one.
        precision: `bfloat16`, `float32`, or None for what the machine computes in.
        device: torch device.
        seed: of everything that is drawn.
        save_every: steps between checkpoints.
        keep: how many of them.
        log_every: steps between lines of the log.
        max_skipped: steps in a row that may be skipped because loss or gradient is not finite.
        tensorboard: whether curves are also written for TensorBoard.
        trainer: further arguments of transformers' TrainingArguments, such as `fsdp` and `deepspeed`.
    """

    model: str
    data: list[Source]
    revision: str | None = None
    steps: int | None = None
    epochs: float | None = None
    weights: Weights = field(default_factory=Weights)
    batch: BatchSizes = field(default_factory=BatchSizes)
    negatives: int | None = None
    loss: Loss = field(default_factory=Loss)
    tuning: Literal["lora", "full"] = "lora"
    lora: Lora = field(default_factory=Lora)
    full_vision: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    memory: Memory = field(default_factory=Memory)
    max_image_tokens: int = 1024
    min_image_tokens: int | None = None
    max_length: int = 1800
    max_text_length: int = 512
    precision: Literal["bfloat16", "float32"] | None = None
    device: str | None = None
    seed: int = 0
    save_every: int = 200
    keep: int = 3
    log_every: int = 10
    max_skipped: int = 5
    tensorboard: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, as `make_recipe` takes them; keys that are numbers become texts."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def sha256(self) -> str:
        """Of everything that changes the result; not of how often is logged and saved."""
        said = {key: value for key, value in self.as_dict().items() if key not in FREE}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


FREE = frozenset({"save_every", "keep", "log_every", "tensorboard", "max_skipped", "memory", "device"})
"""What may change between stopping and going on; `memory` and `device` by rounding and by what dropout draws,
no more."""
