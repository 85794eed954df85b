"""LlamaIndex's metadata filters as the index's `where`."""

from __future__ import annotations

from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from umr_plugins.errors import InputError

_SAME = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.IN: "$in",
    FilterOperator.NIN: "$nin",
    FilterOperator.CONTAINS: "$contains",
}
_NEGATED = {
    "$eq": "$ne",
    "$ne": "$eq",
    "$in": "$nin",
    "$nin": "$in",
    "$contains": "$not_contains",
    "$not_contains": "$contains",
    "$and": "$or",
    "$or": "$and",
}
_OF_NOTHING = {
    FilterOperator.IN: "$and",
    FilterOperator.ANY: "$and",
    FilterOperator.NIN: "$or",
    FilterOperator.ALL: "$or",
}
"""How to join a condition and its opposite so that they say what an empty list means."""
_LISTS = {FilterOperator.ANY: "$or", FilterOperator.ALL: "$and"}


def where_of(filters: MetadataFilters | None) -> dict[str, Any] | None:
    """Translate filters; `None` when there is nothing to filter by.

    As in LlamaIndex's own store, `!=` and `nin` match rows that lack the key, and `NOT` means that none of
    the filters matches. With an empty list, `in` and `any` match nothing, `nin` and `all` everything.

    Raises:
        InputError: for `text_match`, `text_match_insensitive`, `is_empty`, a value of `None`, and `NOT`
            around a comparison of size.
    """
    if filters is None or not filters.filters:
        return None
    parts = [
        part
        for each in filters.filters
        if (part := where_of(each) if isinstance(each, MetadataFilters) else _one(each)) is not None
    ]
    condition = filters.condition or FilterCondition.AND
    if condition is FilterCondition.NOT:
        return join("$and", [_negation(part) for part in parts])
    return join(f"${condition.value}", parts)


def join(operator: str, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """`parts` under one `$and` or `$or`, which needs at least two."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else {operator: parts}


def _one(given: MetadataFilter) -> dict[str, Any] | None:
    if given.value is None or (given.operator not in _SAME and given.operator not in _LISTS):
        allowed = ", ".join(operator.value for operator in (*_SAME, *_LISTS))
        raise InputError(
            f"the filter {given.key!r} {given.operator.value} {given.value!r} is not supported; allowed are "
            f"{allowed}, with a value"
        )
    if given.value == [] and given.operator in _OF_NOTHING:
        joint = _OF_NOTHING[given.operator]
        return {joint: [{given.key: {"$eq": ""}}, {given.key: {"$ne": ""}}]}
    if given.operator in _SAME:
        return {given.key: {_SAME[given.operator]: given.value}}
    values = given.value if isinstance(given.value, list) else [given.value]
    return join(_LISTS[given.operator], [{given.key: {"$contains": value}} for value in values])


def _negation(part: dict[str, Any]) -> dict[str, Any]:
    [(key, value)] = part.items()
    if key in _NEGATED:
        return {_NEGATED[key]: [_negation(each) for each in value]}
    [(operator, operand)] = value.items()
    if operator not in _NEGATED:
        raise InputError(
            f"NOT around {operator} on {key!r} is not supported, since it would have to match rows that lack "
            "the key; write the opposite comparison"
        )
    return {key: {_NEGATED[operator]: operand}}
