"""LoRA adapters (arXiv 2106.09685), merged into the weights when they are loaded: W + s B A.

Reads what peft saves: `adapter_config.json` and `adapter_model.safetensors`. Merged, an adapter costs nothing
when the model runs, and peft is not needed.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from umr_plugins.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What a config may not ask for, since the merged sum would leave it out.
_REFUSED = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


@dataclass(frozen=True)
class _Pair:
    down: torch.Tensor  # A, [rank, in]
    up: torch.Tensor  # B, [out, rank]


def merge_adapter(model: nn.Module, folder: Path) -> int:
    """Add an adapter to the linear layers it was trained on; float32 sums, then the weights' own type.

    Args:
        model: a loaded transformers model without head.
        folder: of the adapter.

    Returns:
        How many layers were changed.

    Raises:
        CheckpointError: the folder is no LoRA adapter, holds only pickled weights, uses what can't be merged,
            or was trained on another base; the message names the file or tensor.
    """
    config = _read_config(folder)
    base = config.get("base_model_name_or_path") or "unknown"
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    targets: list[tuple[nn.Linear, _Pair, float]] = []
    for module, pair in _read_pairs(folder).items():
        if module.rpartition(".")[2] == "lm_head":
            continue  # embedding models have no head
        found = next((name for name in _spellings(module) if name in linears), None)
        if found is None:
            raise CheckpointError(
                f"{folder / WEIGHTS}: the model has no linear layer {module!r}; the adapter was trained on "
                f"{base!r}, a model of another architecture"
            )
        layer = linears[found]
        if (pair.up.shape[0], pair.down.shape[1]) != tuple(layer.weight.shape):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} changes weights of shape "
                f"({pair.up.shape[0]}, {pair.down.shape[1]}), the model's have {tuple(layer.weight.shape)}; "
                f"the adapter was trained on {base!r}, another base"
            )
        targets.append((layer, pair, _scale(config, module, pair.down.shape[0])))
    if not targets:
        raise CheckpointError(f"{folder / WEIGHTS} changes no layer of the model")
    with torch.no_grad():  # only now: a refused adapter has changed nothing; one full-size change at a time
        for layer, pair, scale in targets:
            weight, change = layer.weight, scale * (pair.up @ pair.down)
            weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
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


def _read_pairs(folder: Path) -> dict[str, _Pair]:
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
    return {module: _Pair(pair["A"], pair["B"]) for module, pair in sides.items()}


def _spellings(module: str) -> list[str]:
    """Where the layer may be in a headless model; adapters keep the layout they were trained in."""
    plain = module.removeprefix("model.")
    return [
        module,
        plain,
        f"language_model.{plain}",
        plain.replace("language_model.model.", "language_model."),
    ]


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?(?:{pattern})", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
