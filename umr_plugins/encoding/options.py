"""Options of a loaded model: device, dtype and limits, checked with messages that name what is allowed."""

from __future__ import annotations

import torch

from umr_plugins.backbones.spec import ModelSpec
from umr_plugins.errors import InputError


def choose_device(device: str | torch.device | None) -> torch.device:
    """The given device, or the GPU when there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f'device={device!r} is no torch device; use "cpu", "cuda", "cuda:1", …') from error


def choose_dtype(dtype: str | torch.dtype | None, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The given dtype, else the model's own, else bfloat16 where the device computes in it."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None and spec.dtype is not None:
        return names[spec.dtype]
    if dtype is None:
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    if dtype not in names:
        raise InputError(f"dtype must be one of {sorted(names)}, got {dtype!r}")
    return names[dtype]


def _computes_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed, not emulated (on the CPU: AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))


def check_spec(spec: ModelSpec) -> None:
    """Raise `InputError` for limits or positions that can't be."""
    if spec.positions not in ("sequential", "mrope"):
        raise InputError(f'positions must be "sequential" or "mrope", got {spec.positions!r}')
    for name in ("min_image_tokens", "max_image_tokens", "max_length"):
        positive(name, getattr(spec, name))
    if spec.min_image_tokens > spec.max_image_tokens:
        raise InputError(
            f"min_image_tokens={spec.min_image_tokens} is above max_image_tokens={spec.max_image_tokens}"
        )


def positive(name: str, value: int) -> int:
    """`value`, or `InputError` unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def check_dim(dim: int | None, hidden: int) -> int:
    """The length of vectors that was asked for, or the model's own."""
    if dim is None:
        return hidden
    if positive("dim", dim) > hidden:
        raise InputError(f"dim={dim} is longer than the model's vectors ({hidden})")
    return dim
