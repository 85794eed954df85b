"""From a resolved checkpoint to the loaded model of its family, adapter merged in."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from umr_plugins.backbones.registry import Checkpoint
from umr_plugins.backbones.spec import FAMILIES

if TYPE_CHECKING:
    import torch

    from umr_plugins.backbones.base import Backbone

_log = logging.getLogger(__name__)


def load_backbone(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Load a checkpoint; says so where its licence forbids commercial use."""
    module, name = FAMILIES[checkpoint.spec.family].runner.split(":")
    family = getattr(importlib.import_module(module), name)
    backbone: Backbone = family(checkpoint, device, dtype)
    if checkpoint.adapter is not None:
        from umr_plugins.backbones.lora import merge_adapter

        merge_adapter(backbone.model, checkpoint.adapter)
    if "nc" in checkpoint.spec.license.split("-"):
        _log.warning(
            "%s is licensed %s: not for commercial use", checkpoint.spec.name, checkpoint.spec.license
        )
    return backbone
