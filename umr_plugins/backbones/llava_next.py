"""LLaVA-NeXT as an embedder: MM-Embed (arXiv 2411.02571) and the off-the-shelf backbones of its ablations.

MM-Embed is a LLaVA-NeXT whose language model is NV-Embed's bidirectional Mistral with a latent-attention
pooler on top. Its released code needs an old transformers, remote code and a second, gated repository; here
the native classes run it with SDPA. Masks come from true positions, so a vector never depends on its batch.
A picture is the global tile only: 576 patches and one newline vector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlavaNextModel

from umr_plugins.backbones.base import Input, Picture, Piece, Prepared
from umr_plugins.backbones.features import Features, kept_or_made, made, weights_key
from umr_plugins.backbones.latent_attention import LatentAttention, tensor_names
from umr_plugins.backbones.pixels import CLIP_MEAN, CLIP_STD, resize
from umr_plugins.backbones.registry import Checkpoint, headers
from umr_plugins.backbones.tokens import SlotTokenizer, bounded
from umr_plugins.backbones.weights import load_weights
from umr_plugins.errors import CheckpointError, InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.types import Item, Modality

_POOLER = "latent_attention_model."


class LlavaNext:
    """A loaded LLaVA-NeXT checkpoint.

    Args:
        checkpoint: files and spec.
        device: where it runs.
        dtype: of the weights.
    """

    modalities: frozenset[Modality] = frozenset({"text", "image", "fused"})

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = checkpoint.spec
        self.device = device
        bidirectional = self.spec.pooling == "latent_attention"
        config = _config(checkpoint.folder, bidirectional=bidirectional)
        loaded = load_weights(
            LlavaNextModel,
            checkpoint.folder,
            dtype,
            ignored=("lm_head.", "language_model.lm_head.", *([_POOLER] if bidirectional else [])),
            config=config,
        )
        self.model = loaded.to(device).eval().requires_grad_(requires_grad=False)
        for layer in self.model.language_model.layers if bidirectional else ():
            # The configuration switch frees the mask; where there is no padding there is no mask, and SDPA
            # asks the layer.
            layer.self_attn.is_causal = False
        self._pooler = (
            LatentAttention(_pooler_tensors(checkpoint.folder), dtype).to(device).eval().requires_grad_(False)
            if bidirectional
            else None
        )
        self.hidden_size = int(config.text_config.hidden_size)
        self._side = int(config.vision_config.image_size)
        across = self._side // int(config.vision_config.patch_size)
        self._grid = (across, across)
        self._visual = across * across + 1
        limits = (self.spec.min_image_tokens, self.spec.max_image_tokens)
        if limits != (self._visual, self._visual):
            raise InputError(
                f"{self.spec.name} sees every picture as {self._visual} tokens; min_image_tokens and "
                f"max_image_tokens can't be {limits[0]} and {limits[1]}"
            )
        self._image_id = int(config.image_token_index)
        forms = (self.spec.template, self.spec.bare_template or "", self.spec.document_template or "")
        names = dict.fromkeys(re.findall(r"<\|?\w+\|?>|</s>", "".join(forms)))
        self.tokenizer = SlotTokenizer(checkpoint.folder, "<image>", tuple(names))

    @property
    def vocabulary_hash(self) -> str:
        """SHA-256 of the tokenizer."""
        return self.tokenizer.sha256

    @property
    def added_tokens(self) -> frozenset[str]:
        """Names of the tokenizer's added tokens."""
        return frozenset(self.tokenizer.added)

    def check(self, item: Item) -> None:
        """Refuse what the family was not trained on: several pictures, video."""
        if item.video:
            raise ItemError("unsupported", f"{self.spec.name} takes text and pictures, not video")
        if len(item.pictures) > 1:
            raise ItemError(
                "unsupported",
                f"{self.spec.name} takes one picture per item at most, got {len(item.pictures)}; embed them "
                "as separate items",
            )

    def picture(self, source: Any) -> Picture:
        """Decode one picture and resize it to the global tile, a square; its aspect ratio is not kept."""
        pixels = resize(load_image(source), (self._side, self._side), self.spec.resampler)
        return Picture(pixels, self._grid)

    def video(self, frames: Sequence[Any]) -> tuple[Picture, ...]:
        """The family takes none; `check` says so first."""
        raise ItemError("unsupported", f"{self.spec.name} takes text and pictures, not video")

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without template."""
        return len(self.tokenizer.text([text])[0])

    def prepare(self, inputs: list[Input]) -> list[Prepared | ItemError]:
        """Write each input in its form, tokenise it whole, and cut its text to `max_length`.

        Llama's tokenizers join text with what stands before it, so the parts can't be tokenised apart. The
        picture's slot is a token that no text can spell.
        """
        forms = [self.spec.form(each.role, each.instruction) for each in inputs]
        limit = self.spec.max_length
        strings = [
            self._write(form, each, bounded(each.text, limit))
            for form, each in zip(forms, inputs, strict=True)
        ]
        rows = self.tokenizer.slotted(strings)
        return [self._finish(form, each, ids) for form, each, ids in zip(forms, inputs, rows, strict=True)]

    def _write(self, form: str, each: Input, text: str) -> str:
        slot = self.spec.image_slot.replace("<image>", self.tokenizer.slot)
        before, after = self.tokenizer.bare(form).split("{body}")
        lead = before.replace("{instruction}", each.instruction or "")
        return lead + slot * len(each.pictures) + text + after

    def _finish(self, form: str, each: Input, ids: list[int]) -> Prepared | ItemError:
        head, tail = self.tokenizer.ends(form)
        visual = len(each.pictures) * (self._visual - 1)
        limit = min(self.spec.max_length, each.max_length or self.spec.max_length)
        room = limit - visual - len(head) - len(tail)
        text = bounded(each.text, self.spec.max_length)
        if text != each.text and len(ids) <= room:  # a long run of blanks: the prefix decides nothing
            text = each.text
            (ids,) = self.tokenizer.slotted([self._write(form, each, text)])
        truncated = len(ids) > room
        while len(ids) > room and text:  # cut by tokens of the text alone; joints can cost one or two more
            text = self.tokenizer.without_last(text, len(ids) - room)
            (ids,) = self.tokenizer.slotted([self._write(form, each, text)])
        if len(ids) > room or (each.text and not text):
            return ItemError(
                "too_large",
                f"the instruction and picture leave no room within max_length={limit} tokens; "
                "shorten the instruction or raise max_length",
            )
        expanded: list[int] = [*head]
        for token in ids:
            expanded += [self._image_id] * self._visual if token == self.tokenizer.slot_id else [token]
        expanded += tail
        positions = np.tile(np.arange(len(expanded)), (3, 1))
        return Prepared(
            np.array(expanded, np.int64), positions, each.pictures, truncated, self._pooled_from(form, each)
        )

    def _pooled_from(self, form: str, each: Input) -> int:
        """First pooled position: the instruction is masked from pooling, as released, off by one and all.

        The released code counts the tokens of the instruction with beginning *and end* tokens, so the token
        after the instruction (its newline) is left out too.
        """
        if self.spec.pooling != "latent_attention" or "{instruction}" not in form:
            return 0
        lead = self.tokenizer.bare(form).split("\nQuery: ")[0]
        (ids,) = self.tokenizer.text([lead.replace("{instruction}", each.instruction or "")])
        head, tail = self.tokenizer.ends(form)
        return len(head) + len(ids) + len(tail)

    def prompt(self, pieces: Sequence[Piece]) -> Prepared:
        """Put a prompt together, of any length; words and pictures between added tokens are one string."""
        slot = self.spec.image_slot.replace("<image>", self.tokenizer.slot)
        string, pictures = "", []
        for piece in pieces:
            if piece.picture is not None:
                string += slot
                pictures.append(piece.picture)
            else:
                string += self.tokenizer.fixed(piece.text) if piece.fixed else piece.text
        (ids,) = self.tokenizer.slotted([string])
        expanded: list[int] = []
        spans: list[tuple[int, int]] = []
        for token in ids:
            if token == self.tokenizer.slot_id:
                spans.append((len(expanded), len(expanded) + self._visual))
                expanded += [self._image_id] * self._visual
            else:
                expanded.append(token)
        positions = np.tile(np.arange(len(expanded)), (3, 1))
        return Prepared(np.array(expanded, np.int64), positions, tuple(pictures), spans=tuple(spans))

    def single_tokens(self, word: str, *, blank: bool) -> set[int]:
        """Ids of the tokens that are a word alone; with `blank` also with a blank before it."""
        return self.tokenizer.single(word, blank=blank)

    def cut(self, text: str, count: int) -> str:
        """The text without its last `count` tokens, shorter by a character at least."""
        return self.tokenizer.without_last(text, count)

    def inputs(
        self, items: list[Prepared], features: Sequence[Features] | None = None, *, packed: bool = False
    ) -> dict[str, Any]:
        """Keywords for the language model: embeddings `[n, longest, hidden]`, positions `[n, longest]`."""
        longest = max(item.length for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        places = torch.zeros(len(items), longest, dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : item.length] = torch.from_numpy(item.ids)
            places[row] = int(item.positions[0, 0]) + torch.arange(longest)
        slots = ids == self._image_id
        # Picture and padding tokens lie beyond the embedding table of NV-Embed's language model.
        embeds = self.model.get_input_embeddings()(ids.masked_fill(slots, 0).to(self.device))
        parts = features if features is not None else self._kept([p for item in items for p in item.pictures])
        if parts:
            tokens = torch.cat([part.tokens for part in parts])
            embeds = embeds.masked_scatter(slots[..., None].to(self.device), tokens.to(embeds.dtype))
        return {"inputs_embeds": embeds, "position_ids": places.to(self.device)}

    @torch.inference_mode()
    def forward(self, items: list[Prepared]) -> torch.Tensor:
        """Pooled states `[n, hidden]`, float32."""
        return self.pooled(items)

    def pooled(
        self, items: list[Prepared], features: Sequence[Features] | None = None, *, packed: bool = False
    ) -> torch.Tensor:
        """Pooled states `[n, hidden]`, float32, with gradient where the caller wants one; never packed."""
        inputs = self.inputs(items, features)
        mask = torch.zeros(inputs["inputs_embeds"].shape[:2], dtype=torch.bool)
        pooled = torch.zeros_like(mask)
        for row, item in enumerate(items):
            mask[row, : item.length] = True
            pooled[row, item.pooled_from : item.length] = True
        hidden: torch.Tensor = self.model.language_model(
            **inputs, attention_mask=mask.to(self.device), use_cache=False
        ).last_hidden_state
        if self._pooler is not None:
            vectors: torch.Tensor = self._pooler(hidden, pooled.to(self.device))
            return vectors
        last = torch.tensor([item.length - 1 for item in items], device=self.device)
        return hidden[torch.arange(len(items), device=self.device), last].float()

    def use_packing(self) -> bool:
        """Not with a pooler over positions, nor with bidirectional attention: rows are padded."""
        return False

    def _kept(self, pictures: list[Picture]) -> list[Features]:
        return kept_or_made(pictures, self._vision, lambda: self.vision_key, self.device) if pictures else []

    def features(self, pictures: list[Picture]) -> list[Features]:
        """Features of pictures, in order, computed anew, with gradient where one is wanted."""
        return made(pictures, self._vision, self.device)

    @cached_property
    def vision_key(self) -> bytes:
        """Equal where pictures have equal features: of the weights that make them, their type and device."""
        model = self.model
        tensors = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()]
        name = f"llava_next {model.config.vision_feature_layer}"
        return weights_key(name, [*tensors, model.image_newline])

    def _vision(self, pictures: list[Picture]) -> list[Features]:
        """Of each picture its projected patches and the newline vector: `[577, hidden]`."""
        config, tower = self.model.config, self.model.vision_tower
        pixels = torch.from_numpy(np.stack([picture.patches for picture in pictures])).to(self.device)
        mean, std = (torch.tensor(part, device=self.device) for part in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(tower.dtype)
        states = tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        patches = self.model.multi_modal_projector(states[:, 1:])
        newline = self.model.image_newline.expand(len(pictures), 1, -1).to(patches.dtype)
        return [Features(tokens) for tokens in torch.cat([patches, newline], 1)]


def _config(folder: Path, *, bidirectional: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no readable LLaVA-NeXT configuration: {error}") from error
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise CheckpointError(
            f"{folder}: vision_feature_select_strategy={config.vision_feature_select_strategy!r} with layer "
            f"{config.vision_feature_layer!r} is not supported; one layer without its class token is"
        )
    if bidirectional:
        # The released text_config is LLaVA's own; the weights are NV-Embed's, with fewer rows.
        config.text_config.vocab_size = _rows(folder, "language_model.embed_tokens.weight")
        config.text_config.is_causal = False
    return config


def _rows(folder: Path, name: str) -> int:
    for header in headers(folder).values():
        if name in header:
            return int(header[name]["shape"][0])
    raise CheckpointError(f"{folder} does not hold the tensor {name}")


def _pooler_tensors(folder: Path) -> dict[str, torch.Tensor]:
    wanted = set(tensor_names())
    tensors: dict[str, torch.Tensor] = {}
    unexpected: list[str] = []
    for path, names in headers(folder).items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                short = name.removeprefix(_POOLER)
                if name.startswith(_POOLER) and short in wanted:
                    tensors[short] = file.get_tensor(name)
                elif name.startswith(_POOLER):
                    unexpected.append(name)
    missing = sorted(_POOLER + name for name in wanted - set(tensors))
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not hold a complete latent-attention pooler: missing tensors {missing}, "
            f"unexpected tensors {sorted(unexpected)}"
        )
    return tensors
