"""Weights from safetensors into a native transformers class; every tensor accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from umr_plugins.errors import CheckpointError


def load_weights(
    model_class: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    ignored: tuple[str, ...] = ("lm_head.",),
    **options: Any,
) -> Any:
    """Load `folder` into `model_class` on the CPU; SDPA attention, safetensors only, no remote code.

    Args:
        model_class: a transformers model class without head.
        folder: config and weights.
        dtype: of the loaded weights.
        ignored: prefixes of tensors that the checkpoint may hold and the class has no use for.
        options: more keywords of `from_pretrained`.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the message names them.
    """
    name = model_class.__name__.removesuffix("Model")
    bars: Any = transformers_logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} can't be loaded as {name}: {error}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    problems = {
        "missing tensors": sorted(report["missing_keys"]),
        "unexpected tensors": sorted(key for key in report["unexpected_keys"] if not key.startswith(ignored)),
        "tensors of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise CheckpointError(f"{folder} does not hold a complete {name}: {found}")
    return model


def names_of(folder: Path) -> dict[Path, list[str]]:
    """Names of the tensors in each safetensors file of a folder; reads headers only.

    Raises:
        CheckpointError: a file that can't be read.
    """
    found: dict[Path, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found[path] = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
