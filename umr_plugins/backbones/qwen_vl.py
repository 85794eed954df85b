"""The Qwen-VL families (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) as embedders: GME (arXiv 2412.16855) and successors.

Native transformers classes without the language-model head; picture preparation and tokenisation are
composed here, so no processor class (and no torchvision) is needed. Pools the last token of the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from umr_plugins.backbones.base import Input, Picture, Piece, Prepared
from umr_plugins.backbones.features import Features, kept_or_made, made, weights_key
from umr_plugins.backbones.packing import LENGTHS, PACKED
from umr_plugins.backbones.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Channels,
    FoldedPatchEmbed,
    resize,
    target_size,
    to_patches,
    widened,
)
from umr_plugins.backbones.registry import Checkpoint
from umr_plugins.backbones.tokens import TextTokenizer
from umr_plugins.backbones.weights import load_weights
from umr_plugins.errors import CheckpointError, InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.types import Item, Modality


@dataclass(frozen=True)
class _Architecture:
    """What tells the families apart: transformers' class without head, and the pixel normalisation."""

    model: str
    mean: Channels
    std: Channels


_ARCHITECTURES = {
    "qwen2_vl": _Architecture("Qwen2VLModel", CLIP_MEAN, CLIP_STD),
    "qwen2_5_vl": _Architecture("Qwen2_5_VLModel", CLIP_MEAN, CLIP_STD),
    "qwen3_vl": _Architecture("Qwen3VLModel", HALF, HALF),
}


class QwenVL:
    """A loaded Qwen-VL checkpoint.

    Args:
        checkpoint: files and spec.
        device: where it runs.
        dtype: of the weights.
    """

    modalities: frozenset[Modality] = frozenset({"text", "image", "fused"})

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = checkpoint.spec
        architecture = _ARCHITECTURES[self.spec.family]
        self.tokenizer = TextTokenizer(checkpoint.folder)
        loaded = load_weights(getattr(transformers, architecture.model), checkpoint.folder, dtype)
        self.model = loaded.to(device).eval().requires_grad_(requires_grad=False)
        self.device = device
        vision = self.model.config.vision_config
        self._patch, self._merge = int(vision.patch_size), int(vision.spatial_merge_size)
        self.hidden_size = int(self.model.config.text_config.hidden_size)
        self.model.visual.patch_embed = FoldedPatchEmbed(
            self.model.visual.patch_embed,
            architecture.mean,
            architecture.std,
            frames=self.spec.video_slot is not None,
        )
        self._image_id = int(self.model.config.image_token_id)
        self._fix_template()

    def _fix_template(self) -> None:
        before, after = self.spec.template.split("{body}")
        self._lead, *rest = (self.tokenizer.template(part) for part in before.split("{instruction}"))
        self._middle: list[int] = rest[0] if rest else []
        self._tail = self.tokenizer.template(after)
        slot = self.tokenizer.template(self.spec.image_slot)
        if slot.count(self._image_id) != 1 or self._image_id in [*self._lead, *self._middle, *self._tail]:
            raise CheckpointError(
                f"the picture slot {self.spec.image_slot!r} must hold the image token (id {self._image_id}) "
                "once, and the template around it not at all"
            )
        self._image_slot = slot
        self._video_id = int(self.model.config.video_token_id)
        slots = self.spec.video_slots(1) if self.spec.video_slot is not None else []
        if any(self.tokenizer.template(each).count(self._video_id) != 1 for each in slots):
            raise CheckpointError(
                f"the video slot {self.spec.video_slot!r} must hold the video token (id {self._video_id}) "
                "once"
            )
        fixed = len(self._lead) + len(self._middle) + len(self._tail)
        needed = fixed + len(slot) - 1 + self.spec.max_image_tokens
        if needed > self.spec.max_length:
            raise InputError(
                f"max_length={self.spec.max_length} can't hold the template and a picture of "
                f"max_image_tokens={self.spec.max_image_tokens}: at least {needed} tokens are needed. "
                "Raise max_length or lower max_image_tokens"
            )

    @property
    def vocabulary_hash(self) -> str:
        """SHA-256 of the tokenizer."""
        return self.tokenizer.sha256

    @property
    def added_tokens(self) -> frozenset[str]:
        """Names of the tokenizer's added tokens."""
        return frozenset(self.tokenizer.added)

    def check(self, item: Item) -> None:
        """Refuse what the checkpoint was not trained on: too many pictures or frames, video."""
        if item.video and self.spec.video_slot is None:
            raise ItemError("unsupported", f"{self.spec.name} takes text and pictures, not video")
        if len(item.video) > self.spec.max_frames:
            raise ItemError(
                "unsupported",
                f"{self.spec.name} takes {self.spec.max_frames} frames per item at most, got "
                f"{len(item.video)}; sample them evenly, or embed parts of the video as separate items",
            )
        if len(item.pictures) > self.spec.max_images:
            allowed = "one picture" if self.spec.max_images == 1 else f"{self.spec.max_images} pictures"
            raise ItemError(
                "unsupported",
                f"{self.spec.name} takes {allowed} per item at most, got {len(item.pictures)}; embed them as "
                "separate items",
            )

    def picture(self, source: Any) -> Picture:
        """Decode, resize and cut one picture."""
        image = load_image(source)
        size = target_size(
            image.height,
            image.width,
            self._patch * self._merge,
            self.spec.min_image_tokens,
            self.spec.max_image_tokens,
            two_steps=self.spec.two_steps,
        )
        patches, grid = to_patches(resize(image, size, self.spec.resampler), self._patch, self._merge)
        return Picture(patches, grid)

    def video(self, frames: Sequence[Any]) -> tuple[Picture, ...]:
        """Decode, resize and cut frames, in pairs; an odd last one is its own partner.

        Raises:
            ItemError: a frame can't be read, or is not of the first one's size.
        """
        images = [load_image(frame) for frame in frames]
        if any(image.size != images[0].size for image in images):
            sizes = sorted({f"{image.width} x {image.height}" for image in images})
            raise ItemError(
                "unsupported", f"the frames of a video must have one size, got {', '.join(sizes)}"
            )
        most = min(self.spec.max_image_tokens, self.spec.max_video_tokens // ((len(images) + 1) // 2))
        size = target_size(
            images[0].height,
            images[0].width,
            self._patch * self._merge,
            min(self.spec.min_image_tokens, most),
            most,
            two_steps=self.spec.two_steps,
        )
        cut = [
            to_patches(resize(image, size, self.spec.resampler), self._patch, self._merge) for image in images
        ]
        cut += cut[len(cut) - len(cut) % 2 :]
        return tuple(
            Picture(np.concatenate([first, second], 1), grid)
            for (first, grid), (second, _) in zip(cut[::2], cut[1::2], strict=True)
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without template."""
        return len(self.tokenizer.text([text])[0])

    def prepare(self, inputs: list[Input]) -> list[Prepared | ItemError]:
        """Template, instruction, video, pictures, text; text alone is cut to `max_length`, never the tail.

        An instruction, frames or pictures that alone leave no room are an `ItemError` with code `too_large`.
        """
        said = list(dict.fromkeys(each.instruction or "" for each in inputs))
        ids = self.tokenizer.text([*said, *(each.text for each in inputs)], self.spec.max_length)
        instruction = dict(zip(said, ids, strict=False))
        return [
            self._compose(text, each, instruction[each.instruction or ""])
            for text, each in zip(ids[len(said) :], inputs, strict=True)
        ]

    def _compose(self, text: list[int], each: Input, instruction: list[int]) -> Prepared | ItemError:
        merged = self._merge * self._merge
        head = [*self._lead, *(instruction if self.spec.takes_instruction else []), *self._middle]
        runs: list[int | tuple[int, int]] = [len(head)]  # for M-RoPE: text run or merged grid
        ids = head
        pictures = (*each.video, *each.pictures)
        slots = [
            (self.tokenizer.template(slot), self._video_id) for slot in self.spec.video_slots(each.frames)
        ]
        slots += [(self._image_slot, self._image_id)] * len(each.pictures)
        for picture, (slot, pad) in zip(pictures, slots, strict=True):
            at = slot.index(pad)
            ids = [*ids, *slot[:at], *[pad] * (len(picture.patches) // merged), *slot[at + 1 :]]
            grid = (picture.grid[0] // self._merge, picture.grid[1] // self._merge)
            runs += [at, grid, len(slot) - at - 1]
        limit = min(self.spec.max_length, each.max_length or self.spec.max_length)
        room = limit - len(ids) - len(self._tail)
        if room < (1 if text else 0):
            return ItemError(
                "too_large",
                f"the instruction ({len(instruction)} tokens) and {len(pictures)} pictures or pairs of "
                f"frames ({len(ids) - len(head)} tokens) leave no room within "
                f"max_length={limit}; shorten the instruction, lower max_image_tokens or "
                "raise max_length",
            )
        kept = text[:room]
        ids = [*ids, *kept, *self._tail]
        runs.append(len(kept) + len(self._tail))
        positions = (
            mrope_positions(runs) if self.spec.positions == "mrope" else np.tile(np.arange(len(ids)), (3, 1))
        )
        return Prepared(np.array(ids, np.int64), positions, pictures, truncated=len(kept) < len(text))

    def prompt(self, pieces: Sequence[Piece]) -> Prepared:
        """Put a prompt together, of any length; words between added tokens are tokenised as one string."""
        ids: list[int] = []
        runs: list[int | tuple[int, int]] = []
        spans: list[tuple[int, int]] = []
        pictures: list[Picture] = []
        words: list[tuple[str, bool]] = []
        before, after = self.spec.image_slot.split("<|image_pad|>")
        for piece in pieces:
            if piece.picture is None:
                words.append((piece.text, piece.fixed))
                continue
            text = self.tokenizer.prompt([*words, (before, True)])
            rows, columns = (side // self._merge for side in piece.picture.grid)
            ids += text
            spans.append((len(ids), len(ids) + rows * columns))
            ids += [self._image_id] * (rows * columns)
            runs += [len(text), (rows, columns)]
            pictures.append(piece.picture)
            words = [(after, True)]
        text = self.tokenizer.prompt(words)
        positions = (
            mrope_positions([*runs, len(text)])
            if self.spec.positions == "mrope"
            else np.tile(np.arange(len(ids) + len(text)), (3, 1))
        )
        return Prepared(np.array([*ids, *text], np.int64), positions, tuple(pictures), spans=tuple(spans))

    def single_tokens(self, word: str, *, blank: bool) -> set[int]:
        """Ids of the tokens that are a word alone; with `blank` also with a blank before it."""
        return self.tokenizer.single(word, blank=blank)

    def cut(self, text: str, count: int) -> str:
        """The text without its last `count` tokens, shorter by a character at least."""
        return self.tokenizer.without_last(text, count)

    def inputs(
        self, items: list[Prepared], features: Sequence[Features] | None = None, *, packed: bool = False
    ) -> dict[str, Any]:
        """Keywords for the language model: embeddings `[n, longest, hidden]`, positions `[3, n, longest]`.

        Padded at the right, or `packed` into one row, `n` 1 and `longest` the sum of lengths; with Qwen3-VL
        also the features that its first layers add.
        """
        rows = [range(len(items))] if packed else [[number] for number in range(len(items))]
        longest = max(sum(items[number].length for number in row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(3, len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            start = 0
            for item in (items[number] for number in row):
                ids[place, start : start + item.length] = torch.from_numpy(item.ids)
                positions[:, place, start : start + item.length] = torch.from_numpy(item.positions)
                start += item.length
        ids = ids.to(self.device)
        # Padding is id 0 and neither token, so the mask finds real slots only.
        slots = (ids == self._image_id) | (ids == self._video_id)
        embeds = self.model.get_input_embeddings()(ids)
        parts = features if features is not None else self._kept([p for item in items for p in item.pictures])
        deep: dict[str, Any] = {}
        if parts:
            tokens = torch.cat([part.tokens for part in parts])
            layers = [torch.cat(each) for each in zip(*(part.layers for part in parts), strict=True)]
            if int(slots.sum()) != len(tokens):
                raise RuntimeError(f"{int(slots.sum())} picture slots but {len(tokens)} picture features")
            embeds = embeds.masked_scatter(slots[..., None], tokens.to(embeds.dtype))
            if layers:
                deep = {"visual_pos_masks": slots, "deepstack_visual_embeds": layers}
        return {"inputs_embeds": embeds, "position_ids": positions.to(self.device), **deep}

    @torch.inference_mode()
    def forward(self, items: list[Prepared]) -> torch.Tensor:
        """Pooled hidden states `[n, hidden]`, float32."""
        return self.pooled(items)

    def pooled(
        self, items: list[Prepared], features: Sequence[Features] | None = None, *, packed: bool = False
    ) -> torch.Tensor:
        """Pooled hidden states `[n, hidden]`, float32, with gradient where the caller wants one.

        Right padding under causal attention: no real token ever sees a padded one, so a vector does not
        depend on its neighbours and no mask is needed. The pooled position comes from the true lengths.
        """
        lengths = [item.length for item in items]
        hidden: torch.Tensor = self.model.language_model(
            **self.inputs(items, features, packed=packed),
            use_cache=False,
            **({LENGTHS: lengths} if packed else {}),
        ).last_hidden_state
        last = torch.tensor(lengths, device=self.device)
        if packed:
            return hidden[0, last.cumsum(0) - 1].float()
        return hidden[torch.arange(len(items), device=self.device), last - 1].float()

    def use_packing(self) -> bool:
        """Have the language layers attend within lengths, for `packed` rows; False if they can't."""
        config = self.model.language_model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return False
        config._attn_implementation = PACKED
        return True

    def _kept(self, pictures: list[Picture]) -> list[Features]:
        return kept_or_made(pictures, self._vision, lambda: self.vision_key, self.device) if pictures else []

    def features(self, pictures: list[Picture]) -> list[Features]:
        """Merged vision features of pictures, in order, computed anew, with gradient where one is wanted.

        Qwen3-VL also has features of earlier vision layers, one tensor for each of the first language layers
        (DeepStack, arXiv 2406.04334).
        """
        return made(pictures, self._vision, self.device)

    @cached_property
    def vision_key(self) -> bytes:
        """Equal where pictures have equal features: of the vision weights, their type and device."""
        visual = self.model.visual
        # Normalisation is folded into weights: equal ones stand for equal means and deviations.
        folded = (visual.patch_embed.weight, visual.patch_embed.bias)
        return weights_key(self.spec.family, [*visual.parameters(), *folded])

    def _vision(self, pictures: list[Picture]) -> list[Features]:
        width = max(picture.patches.shape[1] for picture in pictures)
        patches = torch.from_numpy(np.concatenate([widened(each.patches, width) for each in pictures]))
        grid = torch.tensor([[1, *picture.grid] for picture in pictures])
        output = self.model.visual(patches.to(self.device), grid_thw=grid.to(self.device))
        sizes = [picture.grid[0] * picture.grid[1] // self._merge**2 for picture in pictures]
        layers = [each.split(sizes) for each in getattr(output, "deepstack_features", None) or []]
        return [
            Features(tokens, tuple(layer[number] for layer in layers))
            for number, tokens in enumerate(output.pooler_output.split(sizes))
        ]


def mrope_positions(runs: list[int | tuple[int, int]]) -> NDArray[np.int64]:
    """Qwen2-VL's M-RoPE positions `[3, length]` (time, row, column) of text runs and merged picture grids.

    A text run counts on all axes; a picture of h x w tokens starting at p has time p, row p + r, column
    p + c, and the next token starts at p + max(h, w) (arXiv 2409.12191, section 2.1).

    >>> mrope_positions([2, (1, 2), 1]).tolist()
    [[0, 1, 2, 2, 4], [0, 1, 2, 2, 4], [0, 1, 2, 3, 4]]
    """
    parts, start = [], 0
    for run in runs:
        if isinstance(run, int):
            parts.append(np.tile(np.arange(start, start + run), (3, 1)))
            start += run
        else:
            rows, columns = run
            row, column = np.divmod(np.arange(rows * columns), columns)
            parts.append(np.stack([np.full(rows * columns, start), start + row, start + column]))
            start += max(rows, columns)
    return np.concatenate(parts, axis=1).astype(np.int64)
