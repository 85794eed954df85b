"""Visual features of pictures, kept for the next time the same picture is seen.

A picture's merged features depend on nothing but its pixels and the vision weights: not on prompt,
instruction or neighbours. So what an embedder computed serves a reranker in the same process, provided that
their vision weights are equal, which is compared by hash and never assumed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from umr_plugins.backbones.base import Picture


class Features(NamedTuple):
    """What a vision tower makes of one picture.

    Args:
        tokens: `[visual tokens, hidden]`.
        layers: Qwen3-VL's features of earlier vision layers, each `[visual tokens, hidden]`.
    """

    tokens: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(part.nbytes for part in (self.tokens, *self.layers))


class FeatureCache:
    """Features by vision weights and pixels; the least recently used go when `max_bytes` is reached.

    Thread-safe. Holds nothing while `max_bytes` is 0.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self._lock = threading.Lock()
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0

    def reserve(self, max_bytes: int) -> None:
        """Raise the limit to `max_bytes`; among several users the largest wish counts."""
        with self._lock:
            self.max_bytes = max(self.max_bytes, max_bytes)

    def get(self, key: bytes) -> Features | None:
        """The features under a key, if they are still there."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, features: Features) -> None:
        """Keep features; tensors that are parts of larger ones are copied, so as not to hold those."""
        if features.nbytes > self.max_bytes:
            return
        own = Features(features.tokens.clone(), tuple(layer.clone() for layer in features.layers))
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = own
            self.bytes += own.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything and start counting anew; the limit stays."""
        with self._lock:
            self._entries.clear()
            self.bytes = self.hits = self.misses = 0


SHARED = FeatureCache()
"""The cache of this process. Empty until a reranker reserves room in it."""


_AT_ONCE = 4096  # patches; on a CPU more of them leave its caches


def made(
    pictures: list[Picture], make: Callable[[list[Picture]], list[Features]], device: torch.device
) -> list[Features]:
    """Features of pictures, in order; on a CPU a few pictures at a time."""
    if device.type != "cpu":
        return make(pictures)
    features: list[Features] = []
    group: list[Picture] = []
    for picture in pictures:
        if group and sum(len(each.patches) for each in (*group, picture)) > _AT_ONCE:
            features += make(group)
            group = []
        group.append(picture)
    return features + make(group)


def kept_or_made(
    pictures: list[Picture],
    make: Callable[[list[Picture]], list[Features]],
    vision: Callable[[], bytes],
    device: torch.device,
) -> list[Features]:
    """Features of pictures, in order: each different picture made once, and only if it is not kept.

    Args:
        pictures: any, also the same ones again; at least one.
        make: runs the vision tower.
        vision: gives the key of its weights; asked for only while the cache is in use.
        device: where the vision tower runs.
    """
    if not SHARED.max_bytes:
        return made(pictures, make, device)
    keys = [vision() + picture.key for picture in pictures]
    wanted = dict(zip(keys, pictures, strict=True))
    found = {key: kept for key in wanted if (kept := SHARED.get(key)) is not None}
    missing = [key for key in wanted if key not in found]
    if missing:
        for key, new in zip(missing, made([wanted[key] for key in missing], make, device), strict=True):
            SHARED.put(key, new)
            found[key] = new
    return [found[key] for key in keys]


def weights_key(name: str, tensors: Iterable[torch.Tensor]) -> bytes:
    """SHA-256 of vision weights, with their types, shapes and device, and of how pixels are normalised."""
    digest = hashlib.sha256(name.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.device}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.digest()
