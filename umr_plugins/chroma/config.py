"""What a collection records about its model, and which of it may be loaded again.

Whoever can write to a database writes the configuration that comes back from it. A model is therefore loaded
from stored configuration only if it is bundled, known by its hub id (at its default revision, without
adapter), or was named in this process by the program itself. Imports neither torch nor chromadb.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from umr_plugins.backbones.spec import BUNDLED, KNOWN
from umr_plugins.errors import InputError

_TEXTS: Final = ("model", "revision", "adapter", "instruction", "encoder", "fingerprint")
_POSITIONS: Final = ("sequential", "mrope")
# A stored number must not be able to make every picture fill the memory.
_MOST: Final = {"dim": 65_536, "min_image_tokens": 16_384, "max_image_tokens": 16_384, "max_length": 131_072}
_LOADED: Final = {"model", "revision", "adapter", "positions", "instruction", *_MOST}
_GIVEN: Final = {"encoder", "fingerprint", "instruction"}
_SOURCE: Final = ("model", "revision", "adapter")

_allowed: set[tuple[str, str | None, str | None]] = set()
_lock = threading.Lock()


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without its unset entries.

    Raises:
        InputError: an unknown key or a value that is not allowed.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"a configuration is a mapping, got {type(config).__name__}")
    keys = _GIVEN if "encoder" in config else _LOADED
    unknown = sorted(str(key) for key in config if key not in keys)
    if unknown:
        raise InputError(
            f"unknown keys {unknown} in the configuration of an embedding function; allowed are "
            f"{sorted(keys)}"
        )
    missing = {"encoder", "fingerprint"} if "encoder" in config else {"model"}
    if not missing <= set(config):
        raise InputError(f"the configuration of an embedding function needs {sorted(missing)}")
    given = {key: value for key, value in config.items() if value is not None or key in missing}
    for key, value in given.items():
        if key in _TEXTS and not (isinstance(value, str) and value.strip()):
            raise InputError(f"{key} must be a text that is not blank, got {value!r}")
        if key in _MOST and (type(value) is not int or not 1 <= value <= _MOST[key]):
            raise InputError(f"{key} must be a whole number from 1 to {_MOST[key]:,}, got {value!r}")
        if key == "positions" and value not in _POSITIONS:
            raise InputError(f"positions must be one of {list(_POSITIONS)}, got {value!r}")
    if given.get("min_image_tokens", 1) > given.get("max_image_tokens", _MOST["max_image_tokens"]):
        raise InputError(
            f"min_image_tokens={given['min_image_tokens']} is above "
            f"max_image_tokens={given['max_image_tokens']}"
        )
    return given


def named(model: str | os.PathLike[str]) -> str:
    """A model or adapter as it is recorded: alias and hub id as they are, a folder by its absolute path.

    Raises:
        InputError: no name at all.
    """
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise InputError(f"a model is an alias, a folder or a hub id, got {model!r}")
    given = os.fspath(model)
    folder = Path(given).expanduser()
    return given if given in BUNDLED or not folder.is_dir() else str(folder.resolve())


def allow(config: Mapping[str, Any]) -> None:
    """Let this process load the model that a configuration names."""
    with _lock:
        _allowed.add(_source(config))


def check_allowed(config: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the model of a stored configuration may be loaded."""
    source = _source(config)
    if source in _allowed or (source[0] in {*BUNDLED, *KNOWN} and source[1:] == (None, None)):
        return
    call = ", ".join(f"{key}={value!r}" for key, value in zip(_SOURCE, source, strict=True) if value)
    raise InputError(
        f"a stored configuration names a model that this program has not: {call}. Loaded without asking are "
        f"only {sorted([*BUNDLED, *KNOWN])}, at their default revision and without adapter. If you trust "
        f"whoever made the collection, allow it with UMREmbeddingFunction.allow({call})"
    )


def check_hub_ids(config: Mapping[str, Any]) -> None:
    """Raise `InputError` if a folder has come to lie where a recorded hub id would be looked for first."""
    for key in ("model", "adapter"):
        name = config.get(key)
        folder = Path(name or "").expanduser()
        if name is not None and name not in BUNDLED and not Path(name).is_absolute() and folder.is_dir():
            raise InputError(
                f"{key} {name!r} is recorded as an id of the Hugging Face hub, but would now be read from "
                f"the folder {str(folder.resolve())!r}. Move the folder or change the working directory; if "
                "you mean the folder, name it by its absolute path"
            )


def _source(config: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    return config["model"], config.get("revision"), config.get("adapter")


def vectors_key(config: Mapping[str, Any]) -> str:
    """The same text for configurations of one encoder: all of it but the instruction of queries."""
    return json.dumps({key: value for key, value in config.items() if key != "instruction"}, sort_keys=True)


def difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """In words, what two configurations differ in; empty if they are equal.

    >>> difference({"model": "a", "dim": 8}, {"model": "b", "dim": 8})
    "model is 'a' there and 'b' here"
    """
    keys = [key for key in sorted({*stored, *given}) if stored.get(key) != given.get(key)]
    return "; ".join(f"{key} is {_short(stored, key)} there and {_short(given, key)} here" for key in keys)


def _short(config: Mapping[str, Any], key: str) -> str:
    shown = repr(config.get(key))
    return shown if len(shown) <= 120 else f"{shown[:120]}…"


__all__ = ["allow", "check_allowed", "check_hub_ids", "checked", "difference", "named", "vectors_key"]
