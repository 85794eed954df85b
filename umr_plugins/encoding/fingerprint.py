"""One string that changes whenever a document's vector could."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from umr_plugins.backbones.base import Backbone
from umr_plugins.backbones.registry import Checkpoint


def fingerprint(checkpoint: Checkpoint, backbone: Backbone, dim: int) -> str:
    """SHA-256 of everything that moves a document's vector; dtype and device are not part of it."""
    spec = backbone.spec
    said = spec.default_instruction
    parts = {
        "weights": weights_sha256(checkpoint),
        "adapter": {
            path.name: _file_sha256(path)
            for path in sorted(checkpoint.adapter.glob("adapter_*") if checkpoint.adapter else ())
        },
        "tokenizer": backbone.vocabulary_hash,
        "template": [spec.form("document", said), spec.image_slot, said],
        "pixels": [spec.min_image_tokens, spec.max_image_tokens, spec.two_steps, spec.resampler],
        "video": [spec.video_slot, spec.max_video_tokens],
        "positions": spec.positions,
        "pooling": spec.pooling,
        "max_length": spec.max_length,
        "dim": dim,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_sha256(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each file of weights, by name."""
    return {path.name: _file_sha256(path) for path in sorted(checkpoint.folder.glob("*.safetensors"))}


def _file_sha256(path: Path) -> str:
    # The hub's cache names large files by their sha256: no need to read 9 GB again.
    real = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    with real.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
