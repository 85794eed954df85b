"""Which weights are trained: LoRA adapters (arXiv 2106.09685) by peft, or all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from umr_plugins.backbones.base import Backbone
from umr_plugins.backbones.lora import CONFIG
from umr_plugins.backbones.registry import Checkpoint
from umr_plugins.errors import InputError, MissingExtraError

_LANGUAGE = r"language_model\.layers\."
_VISION = r"(?:visual\.blocks|vision_tower\.(?:vision_model\.)?encoder\.layers)\."


def add_lora(
    backbone: Backbone,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
    vision: bool = False,
    seed: int = 0,
) -> int:
    """Add low-rank adapters to linear layers, in float32 whatever the base is in, and train them alone.

    Args:
        backbone: loaded; changed in place.
        rank: of the adapters; GME trains with 8.
        alpha: an adapter counts alpha / rank times.
        dropout: before an adapter, in training.
        targets: last names of the layers, such as `q_proj`; all linear layers by default.
        vision: whether those of the vision tower are adapted, too.
        seed: of the adapters' first values.

    Returns:
        How many layers are adapted.

    Raises:
        InputError: a target that no layer has, or an empty list of them.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("training needs peft: pip install 'umr-plugins[train]'") from error
    place = f"(?:{_LANGUAGE}|{_VISION})" if vision else _LANGUAGE
    linear = [
        name
        for name, part in backbone.model.named_modules()
        if isinstance(part, nn.Linear) and re.match(place, name)
    ]
    known = sorted({name.rpartition(".")[2] for name in linear})
    wanted = known if targets is None else list(targets)
    if not wanted:
        raise InputError(
            f"lora.targets is an empty list; name some of {', '.join(known)}, or leave it out for all of them"
        )
    if unknown := [name for name in wanted if name not in known]:
        where = "language and vision" if vision else "language"
        raise InputError(
            f"lora.targets: no linear layer of the {where} layers is called {', '.join(unknown)}; there are "
            f"{', '.join(known)}"
        )
    chosen = rf"{place}.*\b(?:{'|'.join(map(re.escape, wanted))})"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone.model.add_adapter(config)
    for parameter in backbone.model.parameters():
        if parameter.requires_grad:  # bfloat16 would round most of the optimizer's steps away
            parameter.data = parameter.data.float()
    return sum(bool(re.fullmatch(chosen, name)) for name in linear)


def train_everything(backbone: Backbone, *, vision: bool = False) -> int:
    """Train all weights of the language model, and with `vision` those of the vision tower; how many."""
    trained = 0
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(vision or name.startswith("language_model."))
        trained += parameter.numel() * parameter.requires_grad
    return trained


def keep_no_activations(backbone: Backbone) -> None:
    """Have the language layers compute their activations again for the gradient (checkpointing)."""
    language = backbone.model.language_model
    # Newer versions of transformers have another name for it.
    older = getattr(language, "gradient_checkpointing_enable", None)
    enable: Any = getattr(language, "activation_checkpointing_enable", older)
    enable({"use_reentrant": False})


def save_adapter(model: nn.Module, folder: Path, checkpoint: Checkpoint) -> None:
    """Write the adapter as peft does, naming its base as it was asked for.

    Args:
        model: with an adapter.
        folder: new.
        checkpoint: the base.
    """
    model.save_pretrained(folder)  # type: ignore[operator]
    # While it trains the base is a folder of this machine: peft would ask the hub about any other name.
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = (
        str(checkpoint.folder) if checkpoint.origin == "folder" else checkpoint.given
    )
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
