"""LoRA adapters (arXiv 2106.09685), merged into the weights when they are loaded: W + s B A.

Reads what peft saves: `adapter_config.json` and `adapter_model.safetensors`. Merged, an adapter costs nothing
when the model runs, and peft is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from umr_plugins.backbones.names import canonical
from umr_plugins.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "lm_head"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What a config may not ask for, since the merged sum would leave it out.
_REFUSED = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


@dataclass(frozen=True)
class Change:
    """What an adapter adds to the weight of one linear layer: s B A.

    Args:
        module: the layer, as the adapter names it.
        down: A, `[rank, in]` float32.
        up: B, `[out, rank]` float32.
        scale: s.
    """

    module: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it can be added to."""
        return self.up.shape[0], self.down.shape[1]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight: summed in float32, in the weight's own type and on its device."""
        change = self.scale * (self.up @ self.down)
        return (weight.float() + change.to(weight.device)).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it was read.

    Args:
        folder: where it is.
        base: the model it was trained on, as its config names it.
        changes: by the layer's name in a model without head (`names.canonical`).
    """

    folder: Path
    base: str | None
    changes: dict[str, Change]

    def check(self, change: Change, shape: Sequence[int] | None) -> None:
        """Raise `CheckpointError` unless the layer is there (`shape` not None) and of the change's shape."""
        base = self.base or "unknown"
        if shape is None:
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: the model has no linear layer {change.module!r}; the adapter was "
                f"trained on {base!r}, a model of another architecture"
            )
        if change.shape != tuple(shape):
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {change.module} changes weights of shape {change.shape}, the "
                f"model's have {tuple(shape)}; the adapter was trained on {base!r}, another base"
            )


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and weights.

    Raises:
        CheckpointError: the folder is no LoRA adapter, holds only pickled weights, or uses what can't be
            merged; the message names the file or tensor.
    """
    config = _read_config(folder)
    changes: dict[str, Change] = {}
    for module, sides in _read_pairs(folder).items():
        down, up = sides["A"], sides["B"]
        name = canonical(module)
        if name in changes:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module!r} and {changes[name].module!r} are the same layer of a model"
            )
        changes[name] = Change(module, down, up, _scale(config, module, down.shape[0]))
    base = config.get("base_model_name_or_path")
    return Adapter(folder, base if isinstance(base, str) and base else None, changes)


def merge_adapter(model: nn.Module, folder: Path) -> int:
    """Add an adapter to the linear layers it was trained on; float32 sums, then the weights' own type.

    Args:
        model: a loaded transformers model without head.
        folder: of the adapter.

    Returns:
        How many layers were changed.

    Raises:
        CheckpointError: as `read_adapter`, or it was trained on another base.
    """
    adapter = read_adapter(folder)
    linears = {canonical(name): part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    targets: list[tuple[nn.Linear, Change]] = []
    for name, change in adapter.changes.items():
        if name == HEAD:
            continue  # of a reranker: `head.head_rows`; embedding models have none
        layer = linears.get(name)
        adapter.check(change, None if layer is None else layer.weight.shape)
        assert layer is not None
        targets.append((layer, change))
    if not targets:
        raise CheckpointError(f"{folder / WEIGHTS} changes no layer of the model")
    with torch.no_grad():  # only now: a refused adapter has changed nothing; one full-size change at a time
        for layer, change in targets:
            layer.weight.copy_(change.added_to(layer.weight))
    return len(targets)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no LoRA adapter: {CONFIG} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path}: peft_type is {kind!r}; only 'LORA' can be merged")
    for name, allowed in _REFUSED.items():
        if config.get(name, allowed) not in (allowed, None, [], False):
            raise CheckpointError(
                f"{path}: {name}={config[name]!r} can't be merged from here; merge the adapter with peft's "
                "merge_and_unload and pass the merged folder"
            )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise CheckpointError(f"{path}: lora_alpha must be a number above 0, got {alpha!r}")
    return config


def _read_pairs(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickled.name}), which can run code when loaded; save "
                "the adapter as safetensors"
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{path}: tensor {name!r} is no lora_A or lora_B weight and can't be merged"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["B"].shape[1] != pair["A"].shape[0]:
            raise CheckpointError(f"{path}: {module} needs lora_A [rank, in] and lora_B [out, rank] that fit")
    return sides


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?(?:{pattern})", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
