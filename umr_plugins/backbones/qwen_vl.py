"""Qwen2-VL as an embedder, in the GME layout (arXiv 2412.16855, section 3).

Native transformers classes without the language-model head; picture preparation and tokenisation are
composed here, so no processor class (and no torchvision) is needed. Pools the last token of the template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2VLModel
from transformers.utils import logging as transformers_logging

from umr_plugins.backbones.base import Picture, Prepared
from umr_plugins.backbones.pixels import FoldedPatchEmbed, resize, target_size, to_patches
from umr_plugins.backbones.registry import Checkpoint
from umr_plugins.backbones.tokens import TextTokenizer
from umr_plugins.errors import CheckpointError, InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.types import Item, Modality


class QwenVL:
    """A loaded Qwen2-VL checkpoint.

    Args:
        checkpoint: files and spec.
        device: where it runs.
        dtype: of the weights.
    """

    modalities: frozenset[Modality] = frozenset({"text", "image", "fused"})

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = checkpoint.spec
        self.tokenizer = TextTokenizer(checkpoint.folder)
        self.model = (
            _load_weights(checkpoint.folder, dtype).to(device).eval().requires_grad_(requires_grad=False)
        )
        self.device = device
        vision = self.model.config.vision_config
        self._patch, self._merge = int(vision.patch_size), int(vision.spatial_merge_size)
        self.hidden_size = int(self.model.config.text_config.hidden_size)
        self.model.visual.patch_embed = FoldedPatchEmbed(self.model.visual.patch_embed)
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
        at = slot.index(self._image_id)
        self._before_image, self._after_image = slot[:at], slot[at + 1 :]
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

    def check(self, item: Item) -> None:
        """Refuse what the family was not trained on: several pictures, video."""
        if item.video:
            raise ItemError("unsupported", f"{self.spec.name} takes text and pictures, not video")
        if len(item.pictures) > 1:
            raise ItemError(
                "unsupported",
                f"{self.spec.name} takes one picture per item, got {len(item.pictures)}; embed them as "
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
        )
        patches, grid = to_patches(resize(image, size, self.spec.resampler), self._patch, self._merge)
        return Picture(patches, grid)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of user texts, uncut, without any added token."""
        return self.tokenizer.text(texts)

    def compose(self, text: list[int], pictures: tuple[Picture, ...], instruction: list[int]) -> Prepared:
        """Template, instruction, picture first, text after it; text is cut to `max_length`, never the tail.

        Raises:
            ItemError: `too_large` when the instruction alone leaves no room.
        """
        merged = self._merge * self._merge
        head = [*self._lead, *instruction, *self._middle]
        runs: list[int | tuple[int, int]] = [len(head)]  # for M-RoPE: text run or merged grid
        ids = head
        for picture in pictures:
            tokens = len(picture.patches) // merged
            ids = [*ids, *self._before_image, *[self._image_id] * tokens, *self._after_image]
            grid = (picture.grid[0] // self._merge, picture.grid[1] // self._merge)
            runs += [len(self._before_image), grid, len(self._after_image)]
        room = self.spec.max_length - len(ids) - len(self._tail)
        if room < (1 if text else 0):
            raise ItemError(
                "too_large",
                f"the instruction ({len(instruction)} tokens) and picture leave no room within max_length="
                f"{self.spec.max_length} tokens; shorten the instruction or raise max_length",
            )
        kept = text[:room]
        ids = [*ids, *kept, *self._tail]
        runs.append(len(kept) + len(self._tail))
        positions = (
            mrope_positions(runs) if self.spec.positions == "mrope" else np.tile(np.arange(len(ids)), (3, 1))
        )
        return Prepared(np.array(ids, np.int64), positions, pictures, truncated=len(kept) < len(text))

    @torch.inference_mode()
    def forward(self, items: list[Prepared]) -> torch.Tensor:
        """Pooled hidden states `[n, hidden]`, float32.

        Right padding under causal attention: no real token ever sees a padded one, so a vector does not
        depend on its neighbours and no mask is needed. The pooled position comes from the true lengths.
        """
        longest = max(item.length for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        positions = torch.zeros(3, len(items), longest, dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : item.length] = torch.from_numpy(item.ids)
            positions[:, row, : item.length] = torch.from_numpy(item.positions)
        ids = ids.to(self.device)
        # Padding is id 0 and never the image token, so the mask finds real picture slots only.
        slots = ids == self._image_id
        embeds = self.model.get_input_embeddings()(ids)
        pictures = [picture for item in items for picture in item.pictures]
        if pictures:
            features = self._features(pictures)
            if int(slots.sum()) != len(features):
                raise RuntimeError(f"{int(slots.sum())} picture slots but {len(features)} picture features")
            embeds = embeds.masked_scatter(slots[..., None], features.to(embeds.dtype))
        hidden: torch.Tensor = self.model.language_model(
            inputs_embeds=embeds, position_ids=positions.to(self.device), use_cache=False
        ).last_hidden_state
        last = torch.tensor([item.length - 1 for item in items], device=self.device)
        return hidden[torch.arange(len(items), device=self.device), last].float()

    def _features(self, pictures: list[Picture]) -> torch.Tensor:
        """Merged vision features `[visual tokens, hidden]` of all pictures, in order."""
        patches = torch.from_numpy(np.concatenate([picture.patches for picture in pictures]))
        grid = torch.tensor([[1, *picture.grid] for picture in pictures])
        output = self.model.visual(patches.to(self.device), grid_thw=grid.to(self.device))
        features: torch.Tensor = output.pooler_output
        return features


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


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    bars: Any = transformers_logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        loaded: Any = Qwen2VLModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} can't be loaded as Qwen2-VL: {error}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    model, report = loaded
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.startswith("lm_head."))
    problems = {
        "missing tensors": sorted(report["missing_keys"]),
        "unexpected tensors": unexpected,
        "tensors of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise CheckpointError(f"{folder} does not hold a complete Qwen2-VL: {found}")
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
