"""What is given to an embedding function, read as items."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.media.arrays import from_array
from umr_plugins.types import Item, as_item

REMEDY: Final = "Mend or leave out those; nothing was stored."
"""Last line of errors about single positions."""


def read_items(values: object) -> list[Item]:
    """Texts, arrays and whatever else can be an item, as items; pictures are not opened.

    Raises:
        InputError: one thing and no list of them.
        BatchError: lists every position that is no item.
    """
    if isinstance(values, str | bytes | os.PathLike | Mapping | Item | np.ndarray):
        raise InputError(f"give a list of texts or pictures, not one {type(values).__name__}")
    if not isinstance(values, Iterable):
        raise InputError(f"give a list of texts or pictures, got {type(values).__name__}")
    items: list[Item] = []
    errors: list[ItemError] = []
    for index, value in enumerate(values):
        try:
            items.append(_item(value))
        except ItemError as error:
            errors.append(error.at(index))
    if errors:
        raise BatchError(errors, len(items) + len(errors), remedy=REMEDY)
    return items


def _item(value: Any) -> Item:
    if value is None:
        raise ItemError("empty", "there is neither text nor picture here; each row needs one to be embedded")
    if isinstance(value, np.ndarray):
        return Item(image=from_array(value))
    if isinstance(value, Mapping) and isinstance(value.get("image"), np.ndarray):
        value = {**value, "image": from_array(value["image"])}
    return as_item(value)


def not_empty(items: list[Item]) -> list[Item]:
    """The items; raises `InputError` if there are none, as Chroma takes no empty answer."""
    if not items:
        raise InputError("give at least one text or picture, got an empty list")
    return items
