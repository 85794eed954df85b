"""Attention over sequences that lie end to end in one row: no padding, and none sees another.

Registered with transformers under the name `PACKED`. A language model that is set to it takes the lengths of
the sequences as the keyword `LENGTHS`; without them it attends as SDPA does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "umr_packed"
LENGTHS = "umr_lengths"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence.

    Args:
        module: the attention layer that asks.
        query: `[1, heads, sum of lengths, width]`.
        key: `[1, key heads, sum of lengths, width]`; fewer heads are shared (grouped-query attention).
        value: as `key`.
        attention_mask: of rows that are not packed.
        scaling: of the products; one over the root of the width by default.
        dropout: of the attention weights.
        others: `LENGTHS`, and what other implementations take.

    Returns:
        `[1, sum of lengths, heads, width]`, and no weights.
    """
    lengths = others.pop(LENGTHS, None)
    if lengths is None:
        rows: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return rows
    shared = query.shape[1] != key.shape[1]
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=shared
        )
        for q, k, v in zip(*(torch.split(each, lengths, dim=2) for each in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PACKED, attend)
