"""From an RGB picture to the patches a Qwen-VL vision tower takes.

The patch grid is what GME's released wrapper arrives at in two steps; the pixels are resized once, straight
to that grid. Patches stay uint8: normalisation is folded into the patch embedding (`FoldedPatchEmbed`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional as F

from umr_plugins.backbones.base import Grid
from umr_plugins.backbones.spec import Resampler

Channels = tuple[float, float, float]

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
HALF: Channels = (0.5, 0.5, 0.5)

# Bounds of the wrapper's first step (its picture fetcher), in merged patches.
_FETCH_MIN, _FETCH_MAX = 4, 16384


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Target size of Qwen2-VL: both sides multiples of `factor`, area within the bounds, aspect nearly kept.

    Rounds to the nearest multiple (at least one); above the bound scales by the root of the area ratio and
    floors, below it scales and ceils.
    """
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def target_size(
    height: int, width: int, factor: int, min_tokens: int, max_tokens: int, *, two_steps: bool = True
) -> tuple[int, int]:
    """Pixels (height, width) a picture is resized to. A token covers `factor` x `factor` pixels.

    With `two_steps` as GME's released wrapper gives it: step one is the wrapper's fetcher (4 to 16,384
    tokens), step two the image processor with the model's own bounds. Else the bounds apply at once.
    """
    area = factor * factor
    if two_steps:
        height, width = smart_resize(height, width, factor, _FETCH_MIN * area, _FETCH_MAX * area)
    return smart_resize(height, width, factor, min_tokens * area, max_tokens * area)


def resize(image: Image.Image, size: tuple[int, int], resampler: Resampler) -> NDArray[np.uint8]:
    """Bicubic with antialias to `size` (height, width); uint8 `[height, width, 3]`.

    `torch` is its native uint8 kernel, the arithmetic of Hugging Face's default image processor; `pillow` is
    within 2 levels of it.
    """
    height, width = size
    if image.size == (width, height):
        return np.asarray(image, dtype=np.uint8)
    if resampler == "pillow":
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None]
    out = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0).contiguous().numpy()


def to_patches(pixels: NDArray[np.uint8], patch: int, merge: int) -> tuple[NDArray[np.uint8], Grid]:
    """Cut `[height, width, 3]` to `[patches, patch * patch * 3]`, columns ordered (y, x, channel).

    Rows run in merge-block order: the `merge` x `merge` patches that become one token are neighbours.
    """
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch * 3)
    patches = blocks.transpose(0, 3, 1, 4, 2, 5).reshape(rows * columns, patch * patch * 3)
    return np.ascontiguousarray(patches), (rows, columns)


def widened(patches: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """A still picture's patches as those of two equal frames, if the others of a batch are frames."""
    return patches if patches.shape[1] == width else np.concatenate([patches, patches], 1)


class FoldedPatchEmbed(nn.Module):
    """A vision tower's patch embedding that takes uint8 patches.

    For a still picture the two temporal slices are the same, and rescaling and normalisation are linear, so
    all of it folds into one matrix: with Conv3d weight W `[E, 3, 2, p, p]` and pixel u,
    y = sum_t W / (255 std) (u - 128) + b. Centring by 128 keeps rounding small in bfloat16, where every
    u - 128 is exact. Two frames of a video keep their own slices, where a checkpoint takes `frames`. The
    original convolution stays registered, so checkpoints keep their names.
    """

    weight: torch.Tensor
    pair: torch.Tensor | None
    bias: torch.Tensor

    def __init__(
        self,
        original: nn.Module,
        mean: Channels = CLIP_MEAN,
        std: Channels = CLIP_STD,
        *,
        frames: bool = True,
    ) -> None:
        super().__init__()
        convolution = original.proj
        assert isinstance(convolution, nn.Conv3d)
        self.proj = convolution
        self._normal, self._frames = (mean, std), frames
        with torch.no_grad():
            weight, pair, bias = self._folded()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("pair", pair, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        convolution = self.proj
        kernel = convolution.weight.double()
        shift, scale = (
            torch.tensor(each, dtype=torch.float64, device=kernel.device)[None, :, None, None]
            for each in self._normal
        )
        slices = [
            (part / (255 * scale)).permute(0, 2, 3, 1).reshape(len(part), -1)  # columns (y, x, channel)
            for part in kernel.unbind(2)
        ]
        kernel = kernel.sum(2)  # [E, 3, p, p]
        bias = -(kernel * shift / scale).sum((1, 2, 3))
        if convolution.bias is not None:
            bias = bias + convolution.bias.double()
        weight = sum(slices[1:], slices[0])
        bias = bias + 128 * weight.sum(1)
        dtype = convolution.weight.dtype
        pair = torch.cat(slices, 1).to(dtype) if self._frames else None
        return weight.to(dtype).contiguous(), pair, bias.to(dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 `[patches, 3 * p * p]`, or `[patches, 2 * 3 * p * p]` of two frames, to `[patches, E]`."""
        weight, pair, bias = self.weight, self.pair, self.bias
        if self.proj.weight.requires_grad:  # it is being trained: what was folded once is out of date
            weight, pair, bias = self._folded()
        chosen = weight if pair is None or patches.shape[1] == weight.shape[1] else pair
        return F.linear(patches.to(chosen.dtype) - 128, chosen, bias)
