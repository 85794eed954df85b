"""Weights from safetensors into a native transformers class; every tensor accounted for."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from umr_plugins.backbones.registry import headers
from umr_plugins.errors import CheckpointError

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PIECE = 4_194_304  # elements
_MADV_DONTNEED = 4


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
    stored = _stored_dtype(folder) or dtype
    bars: Any = transformers_logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=stored,
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
    if stored != dtype:
        _convert(model, dtype)
    return model


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters piece by piece, giving back each piece of the mapped file once it is copied.

    Loaded in the type they are stored in, weights are views of the files, and nothing is read yet. Converting
    whole files at once would hold them beside the result: 3.4 times its size for float32 to bfloat16.
    """
    places = Counter(parameter.data_ptr() for parameter in model.parameters())
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        shared = places[parameter.data_ptr()] > 1  # another parameter still has to be read from there
        old = parameter.data.flatten()
        new = torch.empty(parameter.shape, dtype=dtype)
        flat = new.view(-1)
        for start in range(0, len(old), _PIECE):
            piece = old[start : start + _PIECE]
            flat[start : start + _PIECE].copy_(piece)
            if not shared:
                _give_back(piece)
        parameter.data = new


def _give_back(tensor: torch.Tensor) -> None:
    """Tell the kernel that the pages wholly inside a tensor, which is not used again, are not needed."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The type that all tensors of a folder are stored in; None if there are several or another kind."""
    found = {entry["dtype"] for header in headers(folder).values() for entry in header.values()}
    return _FLOATS.get(found.pop()) if len(found) == 1 else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
