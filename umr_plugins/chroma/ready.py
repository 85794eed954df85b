"""What this process knows about encoders that stored configuration names: options, or the encoder itself.

Chroma builds functions from what a collection records. They run where, and with the encoder that, the program
chose for the same configuration, and so share its weights.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from umr_plugins.chroma.config import vectors_key
from umr_plugins.types import Encoder

_latest: dict[str, tuple[dict[str, Any], Callable[[], Encoder | None]]] = {}


def remember(config: Mapping[str, Any], machine: dict[str, Any], encoder: Encoder | None) -> None:
    """Note what a function of the program's own runs with. The encoder is not kept alive by it."""
    _latest[vectors_key(config)] = (machine, _reference(encoder))


def recall(config: Mapping[str, Any]) -> tuple[dict[str, Any], Encoder | None]:
    """Options of the machine, and the encoder if one was given ready and still lives."""
    machine, encoder = _latest.get(vectors_key(config), ({}, _nothing))
    return machine, encoder()


def identity(encoder: Encoder) -> dict[str, Any]:
    """What is recorded of a ready encoder: the options of an `Embedder`, else name and fingerprint."""
    ours = sys.modules.get("umr_plugins.embedder")  # not imported: without it there is no Embedder
    config = getattr(encoder, "config", None)
    if isinstance(config, Mapping) and ours is not None and isinstance(encoder, ours.Embedder):
        return dict(config)
    called = config.get("model") if isinstance(config, Mapping) else None
    return {"encoder": str(called or type(encoder).__name__), "fingerprint": encoder.fingerprint}


def _nothing() -> Encoder | None:
    return None


def _reference(encoder: Encoder | None) -> Callable[[], Encoder | None]:
    if encoder is None:
        return _nothing
    try:
        return weakref.ref(encoder)
    except TypeError:
        return lambda: encoder
