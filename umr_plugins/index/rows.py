"""One item as the ledger holds it: ids, content hashes, stored pictures, checked metadata."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from umr_plugins.errors import InputError
from umr_plugins.media.images import content_key, load_image, read_source
from umr_plugins.types import FloatArray, Item, Modality, PageImage, TarImage, clean_text

MAX_ID = 4096
_ROWS = 1024
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}


@dataclass(frozen=True)
class Row:
    """An item ready to be committed.

    Args:
        content: 32 bytes that identify what was embedded; equal content has an equal vector.
        vector: float32 little-endian bytes, unit length.
        pictures: JSON of `stored_pictures`.
        own: the caller brought the vector, so it says nothing about other items of equal content.
        page: 1-based page of a PDF.
        blobs: pictures that live in the ledger itself, by SHA-256.
    """

    id: str
    modality: Modality
    text: str | None
    pictures: str | None
    content: bytes
    vector: bytes
    metadata: str = "{}"
    payload: str | None = None
    own: bool = False
    part: int = 0
    page: int | None = None
    blobs: dict[bytes, bytes] = field(default_factory=dict)

    def with_vector(self, vector: bytes) -> Row:
        """The same row with its vector."""
        return replace(self, vector=vector)


def content_hash(item: Item) -> bytes:
    """32 bytes over everything a document's vector depends on, pictures by their bytes.

    Raises:
        ItemError: a picture can't be read.
    """
    digest = hashlib.sha256()
    for name, value in (("text", item.text), ("instruction", item.instruction)):
        if value is not None:
            _feed(digest, name.encode(), value.encode())
    for kind, pictures in (("image", item.pictures), ("video", item.video)):
        for picture in pictures:
            key = picture.encode() if _is_url(picture) else content_key(picture)
            _feed(digest, kind.encode(), key)
    return digest.digest()


def _feed(digest: Any, name: bytes, value: bytes) -> None:
    # Lengths first, so that no two different items can write the same bytes.
    digest.update(b"%s:%d:" % (name, len(value)))
    digest.update(value)


def file_item_id(path: bytes, part: int, page: int | None, content: bytes, text: str | None) -> str:
    """The id of one part of a file: the same file with the same content always gets the same id.

    The stored text counts too, since it can differ from what was embedded (a PDF page's text layer).
    """
    head = json.dumps([part, page, text]).encode()
    return hashlib.blake2b(b"\0".join([path, head, content]), digest_size=16).hexdigest()


def stored_pictures(item: Item) -> tuple[str | None, dict[bytes, bytes]]:
    """The item's pictures as JSON references, and the bytes that go into the ledger.

    Paths stay references (absolute); pictures in memory (`PIL.Image`, bytes, data URI) and members
    of a tar are kept as bytes.

    Raises:
        ItemError: a picture in memory can't be kept.
    """
    blobs: dict[bytes, bytes] = {}
    stored: dict[str, Any] = {}
    if item.image is not None:
        stored["image"] = _reference(item.image, blobs)
    if item.images:
        stored["images"] = [_reference(picture, blobs) for picture in item.images]
    if item.video:
        stored["video"] = [_reference(picture, blobs) for picture in item.video]
    if item.instruction is not None:
        stored["instruction"] = item.instruction
    return (json.dumps(stored) if stored else None), blobs


def file_pictures(page: int | None) -> str:
    """The reference of an item whose picture is its own source file (or one page of it)."""
    return json.dumps({"image": {"source": page}})


def _reference(picture: Any, blobs: dict[bytes, bytes]) -> dict[str, Any]:
    if isinstance(picture, PageImage):
        return {"page": [_absolute(picture.path), picture.page]}
    if isinstance(picture, Path):
        return {"path": _absolute(picture)}
    if isinstance(picture, str):
        if _is_url(picture):
            return {"url": picture}
        if picture[:5].lower() not in ("data:", "file:"):
            return {"path": _absolute(Path(picture))}
        data = read_source(picture)
    elif isinstance(picture, TarImage):
        data = read_source(picture)
    elif isinstance(picture, bytes):
        data = picture
    else:
        data = _png(picture)
    key = hashlib.sha256(data).digest()
    blobs[key] = data
    return {"blob": key.hex()}


def _is_url(picture: object) -> TypeGuard[str]:
    return isinstance(picture, str) and picture[:8].lower().startswith(("http://", "https://"))


def _absolute(path: Path) -> str:
    return os.fsencode(path.expanduser().absolute()).decode("utf-8", "surrogateescape")


def _png(picture: Any) -> bytes:
    out = io.BytesIO()
    exact = picture if picture.mode in _PNG_MODES else load_image(picture)
    exact.save(out, "PNG", compress_level=1)
    return out.getvalue()


def item_of(
    text: str | None, pictures: str | None, source: Path | None, blob: Callable[[bytes], bytes | None]
) -> Item:
    """The item again, with pictures as references that are opened only when asked."""
    if pictures is None:
        return Item(text=text)
    stored = json.loads(pictures)

    def opened(reference: Mapping[str, Any]) -> Any:
        if "source" in reference:
            assert source is not None  # only rows of files refer to their source
            page = reference["source"]
            return source if page is None else PageImage(source, page)
        if "page" in reference:
            return PageImage(Path(reference["page"][0]), reference["page"][1])
        if "path" in reference:
            return Path(reference["path"])
        if "url" in reference:
            return reference["url"]
        return blob(bytes.fromhex(reference["blob"]))

    return Item(
        text=text,
        image=opened(stored["image"]) if "image" in stored else None,
        images=tuple(opened(each) for each in stored.get("images", ())),
        video=tuple(opened(each) for each in stored.get("video", ())),
        instruction=stored.get("instruction"),
    )


def check_id(value: object) -> str:
    """A usable id, or `InputError`."""
    if not isinstance(value, str) or not value or len(value) > MAX_ID:
        raise InputError(f"ids are non-empty strings of at most {MAX_ID} characters, got {value!r:.80}")
    if clean_text(value) != value:
        raise InputError(f"the id {value!r:.80} holds a lone surrogate; ids must be valid Unicode")
    return value


def check_metadata(value: object, index: int) -> str:
    """Metadata as JSON, or `InputError` that names what can't be kept."""
    if value is None:
        return "{}"
    if not isinstance(value, Mapping):
        raise InputError(f"metadata {index} must be a dict, got {type(value).__name__}")
    try:
        _check_json(value, f"metadata {index}", 0)
        return json.dumps(value, ensure_ascii=True, allow_nan=False)
    except RecursionError as error:
        raise InputError(f"metadata {index} refers to itself") from error


def _check_json(value: object, where: str, depth: int) -> None:
    if depth > 50:
        raise InputError(f"{where} is nested more than 50 deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value!r}; only finite numbers can be kept")
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise InputError(f"{where}: keys must be strings, got {key!r}")
            _check_json(part, f"{where}, key {key!r}", depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_json(part, where, depth + 1)
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise InputError(
            f"{where} is a {type(value).__name__}; allowed are strings, numbers, booleans, None, lists and "
            "dicts (turn dates into strings, numpy numbers into int or float)"
        )


def projected_metadata(
    metadata: Mapping[str, Any], modality: str, path: str | None, page: int | None
) -> dict[str, Any]:
    """What `where` can filter on: flat values of the user's metadata, and `modality`, `path`, `page`.

    A key of the user's own wins over ours. Lists of one scalar type can be asked with `$contains`; other
    nested values stay in the ledger only.
    """
    ours: dict[str, Any] = {"modality": modality}
    if path is not None:
        ours["path"] = clean_text(path)
    if page is not None:
        ours["page"] = page
    flat = {
        clean_text(key): clean_text(value) if isinstance(value, str) else value
        for key, value in metadata.items()
        if key and not key.startswith(("chroma:", "$")) and _is_flat(value)
    }
    return ours | {str(key): value for key, value in flat.items()}


def _is_flat(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and len({type(each) for each in value}) == 1 and all(map(_is_scalar, value))
    return _is_scalar(value)


def _is_scalar(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    return isinstance(value, str | bool | float)


def unit_rows(vectors: FloatArray) -> FloatArray:
    """Rows as finite float32 of length 1; rows that can't be are NaN throughout."""
    matrix = np.asarray(vectors, dtype=np.float32)
    unit = np.empty_like(matrix)
    for start in range(0, len(matrix), _ROWS):  # in float64 a large call would need several times its memory
        part = matrix[start : start + _ROWS]
        with np.errstate(all="ignore"):
            norms = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
            good = np.isfinite(norms) & (norms > 1e-12)
            scaled = np.where(np.abs(norms - 1) <= 1e-5, part, part / norms).astype(np.float32)
        unit[start : start + _ROWS] = np.where(good, scaled, np.float32("nan"))
    return unit
