"""Short codes of unit vectors: int8, a quarter of float32's size, and binary, a 32nd of it.

A code ranks candidates, whose scores are then computed from the float32 vectors; so it may lose an answer but
never gives a wrong score. int8 has one scale per vector (its largest component is 127), hence a code depends
on nothing but its vector. Binary keeps the signs; the query stays float32, since comparing its signs only
would lose more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from umr_plugins.types import FloatArray

CodeKind = Literal["int8", "binary"]
CodeArray: TypeAlias = npt.NDArray[np.uint8]

OVER_FETCH: dict[CodeKind, int] = {"int8": 4, "binary": 16}
"""Candidates per wanted answer that are scored from float32; benchmarks/codes measures what is lost."""

_SCALE_BYTES = 4
_BLOCK = 16_384
"""Rows scored at a time, which bounds the memory of a scan."""


def width(kind: CodeKind, dim: int) -> int:
    """Bytes of one code."""
    return _SCALE_BYTES + dim if kind == "int8" else math.ceil(dim / 8)


def quantize(kind: CodeKind, vectors: FloatArray) -> CodeArray:
    """Codes ``[n, width]`` of vectors ``[n, dim]``.

    int8: the scale as a little-endian float32, then ``round(vector / scale)``. binary: one bit per component,
    1 where it is above 0, filled up with zeros to whole bytes.
    """
    vectors = np.atleast_2d(np.asarray(vectors, np.float32))
    if kind == "binary":
        return np.packbits(vectors > 0, axis=1)
    scale = np.abs(vectors).max(1, keepdims=True).clip(1e-30) / 127
    codes = np.empty((len(vectors), width(kind, vectors.shape[1])), np.uint8)
    codes[:, :_SCALE_BYTES] = scale.astype("<f4").view(np.uint8)
    codes[:, _SCALE_BYTES:] = np.rint(vectors / scale).astype(np.int8).view(np.uint8)
    return codes


def scores(kind: CodeKind, query: FloatArray, codes: CodeArray) -> FloatArray:
    """What the codes ``[n, width]`` say about the cosine with a query ``[dim]``: ``[n]``, higher is nearer.

    int8: the cosine itself, up to rounding. binary: the cosine of the query and the vector of signs.
    """
    score = _int8_scores if kind == "int8" else _binary_scores(query, codes.shape[1])
    blocks = [score(query, codes[start : start + _BLOCK]) for start in range(0, len(codes), _BLOCK)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _int8_scores(query: FloatArray, codes: CodeArray) -> FloatArray:
    scale = np.ascontiguousarray(codes[:, :_SCALE_BYTES]).view("<f4")[:, 0]
    products: FloatArray = codes[:, _SCALE_BYTES:].view(np.int8).astype(np.float32) @ query
    products *= scale
    return products


def _binary_scores(query: FloatArray, size: int) -> Callable[[FloatArray, CodeArray], FloatArray]:
    """Sums up, byte by byte, what each of its 256 values contributes."""
    padded = np.zeros(8 * size, np.float32)
    padded[: len(query)] = query / math.sqrt(len(query))
    signs = 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) - 1
    table = (padded.reshape(size, 8) @ signs.T.astype(np.float32)).astype(np.float32)

    def score(query: FloatArray, codes: CodeArray) -> FloatArray:
        total = np.zeros(len(codes), np.float32)
        for contributions, column in zip(table, np.ascontiguousarray(codes.T), strict=True):
            total += contributions[column]
        return total

    return score
