"""Which items share a forward pass: sorted by true length, filled to a token budget."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group item positions so that a padded batch holds at most `max_tokens` tokens.

    Longest first, so that memory trouble shows at once; neighbours have nearly the same length, so padding
    costs about one percent. An item longer than the budget gets a batch of its own.

    Args:
        lengths: true token counts (text, template and visual tokens).
        max_tokens: budget of a batch, padding included.

    >>> plan_batches([3, 9, 4, 2], 9)
    [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches: list[list[int]] = []
    width = 0
    for position in order:
        if batches and (len(batches[-1]) + 1) * width <= max_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
            width = max(1, lengths[position])
    return batches
