"""Metadata filters in Chroma's notation, checked and evaluated here.

`matches` decides; Chroma is asked for a superset, since it cuts 2.5 to 2 when it compares with an integer.
The meaning is Chroma's otherwise: a negated operator matches rows that lack the key, whole and decimal
numbers compare by value, and a number, a string and a boolean are never equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from umr_plugins.errors import InputError

Where = Mapping[str, Any]

_COMPARE = ("$gt", "$gte", "$lt", "$lte")
_EQUAL = ("$eq", "$ne")
_LIST = ("$in", "$nin")
_CONTAINS = ("$contains", "$not_contains")
_OPERATORS = (*_EQUAL, *_COMPARE, *_LIST, *_CONTAINS)
_JOIN = ("$and", "$or")
_EVERYTHING = {"umr:absent": {"$ne": ""}}  # no row has that key


def check_where(where: Where | None) -> dict[str, Any] | None:
    """The filter in a form Chroma takes, or None for no filter (`None` and `{}`).

    Several keys side by side are joined by `$and`.

    Raises:
        InputError: not a filter; says what is allowed.
    """
    if where is None:
        return None
    if not isinstance(where, Mapping):
        raise InputError(f'where must be a dict such as {{"lang": "en"}}, got {type(where).__name__}')
    parts = [_checked(key, value) for key, value in where.items()]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else {"$and": parts}


def _checked(key: Any, value: Any) -> dict[str, Any]:
    if not isinstance(key, str) or not key:
        raise InputError(f"where: keys must be non-empty strings, got {key!r}")
    if key in _JOIN:
        if not isinstance(value, list | tuple) or not value:
            raise InputError(f"where: {key} takes a non-empty list of filters, got {value!r}")
        parts = [part for part in (check_where(each) for each in value) if part is not None]
        if len(parts) != len(value):
            raise InputError(f"where: {key} holds an empty filter")
        return parts[0] if len(parts) == 1 else {key: parts}
    if key.startswith("$"):
        raise InputError(f"where: unknown operator {key}; outside a key only $and and $or are allowed")
    if not isinstance(value, Mapping):
        return {key: {"$eq": _scalar(key, "$eq", value)}}
    if not value:
        raise InputError(f"where: {key!r} has an empty condition; allowed are {', '.join(_OPERATORS)}")
    conditions = [{key: {operator: _operand(key, operator, operand)}} for operator, operand in value.items()]
    return conditions[0] if len(conditions) == 1 else {"$and": conditions}


def _operand(key: str, operator: Any, operand: Any) -> Any:
    if operator not in _OPERATORS:
        raise InputError(
            f"where: unknown operator {operator!r} on {key!r}; allowed are {', '.join(_OPERATORS)}"
        )
    if operator in _COMPARE:
        if isinstance(operand, bool) or not isinstance(operand, int | float):
            raise InputError(f"where: {operator} on {key!r} compares numbers, got {operand!r}")
        return _scalar(key, operator, operand)
    if operator in _LIST:
        if not isinstance(operand, list | tuple) or not operand:
            raise InputError(f"where: {operator} on {key!r} takes a non-empty list, got {operand!r}")
        values = [_scalar(key, operator, each) for each in operand]
        if len({type(each) for each in values}) > 1:
            raise InputError(f"where: the list of {operator} on {key!r} mixes types: {operand!r}")
        return values
    return _scalar(key, operator, operand)


def _scalar(key: str, operator: str, value: Any) -> str | int | float | bool:
    if not isinstance(value, str | int | float | bool):
        raise InputError(
            f"where: {operator} on {key!r} takes a string, number or boolean, got {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"where: {operator} on {key!r} takes finite numbers, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"where: {value} on {key!r} is outside 64 bits")
    return value


def matches(metadata: Mapping[str, Any], where: Where | None) -> bool:
    """Whether a row with this projected metadata passes a filter that `check_where` returned."""
    if where is None:
        return True
    [(key, value)] = where.items()
    if key == "$and":
        return all(matches(metadata, part) for part in value)
    if key == "$or":
        return any(matches(metadata, part) for part in value)
    [(operator, operand)] = value.items()
    return _passes(metadata.get(key), operator, operand)


def superset(where: dict[str, Any] | None) -> dict[str, Any] | None:
    """A filter for Chroma that lets through at least what `where` does."""
    if where is None:
        return None
    [(key, value)] = where.items()
    if key in _JOIN:
        return {key: [superset(part) for part in value]}
    [(operator, operand)] = value.items()
    return {key: {operator: operand}} if _is_safe(operand) else _wider(key, operator, operand)


def _is_safe(operand: Any) -> bool:
    if isinstance(operand, list):
        return all(_is_safe(each) for each in operand)
    return not isinstance(operand, float) or operand.is_integer()


def _wider(key: str, operator: str, operand: Any) -> dict[str, Any]:
    if operator in ("$lt", "$lte"):
        return {key: {operator: math.ceil(operand)}}
    if operator in ("$gt", "$gte"):
        return {key: {operator: math.floor(operand)}}
    if operator in ("$ne", "$nin"):
        kept = [each for each in (operand if isinstance(operand, list) else [operand]) if _is_safe(each)]
        return {key: {"$nin": kept}} if kept else _EVERYTHING
    return {key: {operator: operand}}


def _passes(stored: Any, operator: str, operand: Any) -> bool:
    if operator in ("$ne", "$nin", "$not_contains"):
        positive = {"$ne": "$eq", "$nin": "$in", "$not_contains": "$contains"}[operator]
        return not _passes(stored, positive, operand)
    if operator == "$contains":
        return isinstance(stored, list) and any(
            type(each) is type(operand) and each == operand for each in stored
        )
    if operator == "$in":
        return any(_same(stored, each) for each in operand)
    if operator == "$eq":
        return _same(stored, operand)
    if isinstance(stored, bool) or not isinstance(stored, int | float):
        return False
    return bool(
        {
            "$gt": stored > operand,
            "$gte": stored >= operand,
            "$lt": stored < operand,
            "$lte": stored <= operand,
        }[operator]
    )


def _same(left: Any, right: Any) -> bool:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    same_kind = isinstance(left, bool) == isinstance(right, bool) if numbers else type(left) is type(right)
    return same_kind and bool(left == right)
