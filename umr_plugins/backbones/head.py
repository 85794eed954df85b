"""The few rows of a language-model head that a judgement needs, read from the file without the others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from umr_plugins.backbones.lora import HEAD, read_adapter
from umr_plugins.backbones.registry import Checkpoint, headers
from umr_plugins.errors import CheckpointError

if TYPE_CHECKING:
    from umr_plugins.backbones.base import Backbone

_NAMES = ("lm_head.weight", "language_model.lm_head.weight")


def head_rows(checkpoint: Checkpoint, backbone: Backbone, ids: list[int]) -> torch.Tensor:
    """Rows of the head for some tokens, with the adapter: `[len(ids), hidden]` float32 on the model's device.

    Raises:
        CheckpointError: the checkpoint has no head, as embedders have none; or its adapter changes the head
            of another model.
    """
    rows, shape = _stored_rows(checkpoint, backbone, ids)
    if checkpoint.adapter is not None:
        adapter = read_adapter(checkpoint.adapter)
        if change := adapter.changes.get(HEAD):
            adapter.check(change, shape)
            rows = dataclasses.replace(change, up=change.up[ids]).added_to(rows)
    # As the whole model would have it: in its own type.
    return rows.to(backbone.model.dtype).float().to(backbone.device)


def _stored_rows(
    checkpoint: Checkpoint, backbone: Backbone, ids: list[int]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Rows of the head without an adapter, in some type and on some device, and the shape of all of it."""
    for path, names in headers(checkpoint.folder).items():
        for name in _NAMES:
            if name in names:
                with safe_open(path, framework="pt") as file:
                    stored = file.get_slice(name)
                    rows = torch.cat([stored[token : token + 1] for token in ids])
                return rows, tuple(stored.get_shape())
    if is_tied(checkpoint.config):
        table: torch.Tensor = backbone.model.get_input_embeddings().weight
        return table[torch.tensor(ids, device=table.device)], tuple(table.shape)
    raise CheckpointError(
        f"{checkpoint.folder} has no language-model head ({' or '.join(_NAMES)}), so it can't judge; rerank "
        "with an instruct checkpoint such as Qwen/Qwen2-VL-2B-Instruct"
    )


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the head is the embedding table, by a checkpoint's `config.json`."""
    texts = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings") or texts.get("tie_word_embeddings"))
