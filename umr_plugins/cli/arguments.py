"""Arguments that several verbs share, and opening the index they name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umr_plugins.errors import InputError

if TYPE_CHECKING:
    from umr_plugins.index.index import Index

DEFAULT_MODEL = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"


RERANK_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


def add_weight(parser: argparse.ArgumentParser) -> None:
    """`--weight W`."""
    parser.add_argument(
        "--weight",
        type=weight,
        metavar="W",
        help="how much the relevance (0 to 1) counts beside the first stage's score, or pure for the "
        "relevance alone (default: 1.0; 0.5 from text to pictures, 0.3 from a picture to texts)",
    )


def weight(value: str) -> float | str:
    """A number of at least 0, or `pure`."""
    if value == "pure":
        return value
    number = float(value)
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"must be at least 0, or pure; got {value}")
    return number


def add_db(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--db DIR`."""
    parser.add_argument("--db", type=folder, required=required, metavar="DIR", help="the index folder")


def folder(value: str) -> Path:
    """An absolute path; `~` is the home folder."""
    return Path(value).expanduser().absolute()


def positive(value: str) -> int:
    """A whole number of at least 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return number


def json_object(value: str) -> dict[str, Any]:
    """A JSON object, such as `{"year": 2024}`."""
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {value}") from None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"year": 2024}}, got {value}')
    return parsed


def open_existing(db: Path, model: str | None = None) -> Index:
    """Open an index that is there already, with the model it records, or with `model`, the same by name.

    Raises:
        InputError: there is no index in that folder; nothing is created.
    """
    from umr_plugins.index.index import Index

    if not Index.exists(db):
        raise InputError(f"there is no index at {db}. Make one with: umr index FOLDER --db {db}")
    return Index(db, model)
