"""A prompt's beginning computed once, for all the prompts that share it.

Under causal attention the states of a prefix do not depend on what follows, so its keys and values are
computed once and reused: what is left to do for each prompt is its own ending. Equal to whole forward passes
up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from umr_plugins.backbones.base import Backbone, Prepared


class Prefix(NamedTuple):
    """Keys and values of each layer, `[1, key-value heads, length, head size]`, and the prompt's start."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    prompt: Prepared


class _Shared(DynamicLayer):  # type: ignore[no-untyped-call]  # of transformers' __init_subclass__
    """One layer's prefix, put before the keys and values of any number of rows; keeps nothing of theirs."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = self._shared = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(key_states)
        keys, values = (part.expand(rows, -1, -1, -1) for part in self._shared)
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


def common(first: Prepared, second: Prepared) -> int:
    """Tokens at the beginning of both prompts that are the same, whole pictures only."""
    length = min(first.length, second.length)
    same = first.ids[:length] == second.ids[:length]
    end = length if same.all() else int(same.argmin())
    pairs = zip(first.pictures, second.pictures, first.spans, second.spans, strict=False)
    for one, other, (start, stop), span in pairs:
        if start >= end:
            break
        if span != (start, stop) or stop > end or one.key != other.key:
            return start
    return end


def part(prompt: Prepared, start: int, stop: int | None = None) -> Prepared:
    """A prompt's tokens from `start` to `stop`, with the pictures that lie there; it cuts none."""
    end = prompt.length if stop is None else stop
    inside = [number for number, (first, _) in enumerate(prompt.spans) if start <= first < end]
    return dataclasses.replace(
        prompt,
        ids=prompt.ids[start:end],
        positions=prompt.positions[:, start:end],
        pictures=tuple(prompt.pictures[number] for number in inside),
        spans=tuple((prompt.spans[n][0] - start, prompt.spans[n][1] - start) for n in inside),
    )


@torch.inference_mode()
def prefill(backbone: Backbone, prompt: Prepared) -> Prefix:
    """Run a prompt's beginning and keep its keys and values."""
    language = backbone.model.language_model
    cache = DynamicCache()
    language(**backbone.inputs([prompt]), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return Prefix([(layer.keys, layer.values) for layer in layers], prompt)


@torch.inference_mode()
def last_states(
    backbone: Backbone, prefix: Prefix | None, prompts: list[Prepared], shared: int
) -> torch.Tensor:
    """Final hidden states `[n, hidden]` of the prompts' last tokens, float32.

    Args:
        backbone: of a causal model.
        prefix: what the prompts begin with; None runs them whole.
        prompts: whole prompts.
        shared: how many of the prefix's tokens all of them begin with; less than their lengths.
    """
    language = backbone.model.language_model
    start = shared if prefix is not None else 0
    ends = [part(prompt, start) for prompt in prompts]
    options: dict[str, Any] = {"use_cache": False}
    if prefix is not None and start:
        layers = [_Shared(keys[:, :, :start], values[:, :, :start]) for keys, values in prefix.layers]
        longest = max(end.length for end in ends)
        # Padding stands at the right: under this mask no real token sees it.
        mask = torch.ones(longest, start + longest, dtype=torch.bool, device=backbone.device).tril(start)
        options |= {"past_key_values": Cache(layers=list(layers)), "attention_mask": mask[None, None]}
    hidden: torch.Tensor = language(**backbone.inputs(ends), **options).last_hidden_state
    rows = torch.arange(len(ends), device=hidden.device)
    last = torch.tensor([end.length - 1 for end in ends], device=hidden.device)
    return hidden[rows, last].float()
