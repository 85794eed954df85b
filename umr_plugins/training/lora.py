"""Which weights are trained: LoRA adapters (arXiv 2106.09685) by peft, or all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from umr_plugins.backbones.base import Backbone
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
    base: str = "",
    seed: int = 0,
) -> int:
    """Add low-rank adapters to linear layers, and train them alone.

    Args:
        backbone: loaded; changed in place.
        rank: of the adapters; GME trains with 8.
        alpha: an adapter counts alpha / rank times.
        dropout: before an adapter, in training.
        targets: last names of the layers, such as `q_proj`; all linear layers by default.
        vision: whether those of the vision tower are adapted, too.
        base: name of the checkpoint, for whoever opens the adapter.
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
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, base_model_name_or_path=base
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone.model.add_adapter(config)
    return sum(bool(re.fullmatch(chosen, name)) for name in linear)


def train_everything(backbone: Backbone, *, vision: bool = False) -> int:
    """Train all weights of the language model, and with `vision` those of the vision tower; how many."""
    trained = 0
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(vision or name.startswith("language_model."))
        trained += parameter.numel() * parameter.requires_grad
    return trained


def adapter_state(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The adapters' weights by the names that peft saves."""
    state: dict[str, torch.Tensor] = backbone.model.get_adapter_state_dict()
    return state
