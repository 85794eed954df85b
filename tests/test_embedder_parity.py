"""Vectors equal a plain computation that imports only torch, transformers, numpy and PIL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umr_plugins.backbones.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    FoldedPatchEmbed,
    resize,
    target_size,
    to_patches,
)
from umr_plugins.embedder import Embedder

TEXTS = [
    "a quick brown fox",
    "Ünïcödé and 中文, emoji \N{GRINNING FACE}\N{ZERO WIDTH JOINER}, tabs\tand\nlines",
    "word " * 300,
    "x",
]
INSTRUCTION = "Find an image that matches the given text."


class Reference:
    """One item at a time, as the released wrapper computes it: whole string, plain classes, no batches."""

    def __init__(self, folder: Path, positions: str) -> None:
        self.positions = positions
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = Qwen2VLImageProcessorPil(min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28)

    @torch.no_grad()
    def encode(
        self, text: str = "", image: Image.Image | None = None, system: str = "You are a helpful assistant."
    ) -> np.ndarray:
        vision: dict[str, Any] = self.processor(images=[image], return_tensors="pt") if image else {}
        slots = int(vision["image_grid_thw"].prod()) // 4 if image else 0
        body = f"<|vision_start|>{'<|image_pad|>' * slots}<|vision_end|>{text}" if image else text
        string = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>"
        )
        ids = self.tokenizer(string, return_tensors="pt").input_ids
        if self.positions == "mrope":
            kinds = (ids == self.model.config.image_token_id).int()
            hidden = self.model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **vision
            ).last_hidden_state
        else:
            embeds = self.model.get_input_embeddings()(ids)
            if image:
                features = self.model.model.visual(
                    vision["pixel_values"], grid_thw=vision["image_grid_thw"]
                ).pooler_output
                embeds[ids == self.model.config.image_token_id] = features
            hidden = self.model.model.language_model(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            ).last_hidden_state
        return F.normalize(hidden[:, -1], dim=-1)[0].numpy()


@pytest.fixture(scope="module", params=["sequential", "mrope"])
def pair(request: pytest.FixtureRequest, qwen2_vl_folder: Path) -> tuple[Embedder, Reference]:
    embedder = Embedder(qwen2_vl_folder, dtype="float32", positions=request.param)
    return embedder, Reference(qwen2_vl_folder, request.param)


@pytest.fixture(scope="module")
def exact(photo: Image.Image) -> Image.Image:
    """Already on the patch grid: 21 x 16 tokens, so nobody resizes."""
    return photo.resize((588, 448))


def test_text_equals_the_plain_computation(pair: tuple[Embedder, Reference]) -> None:
    embedder, reference = pair
    ours = embedder.encode_queries(TEXTS)
    theirs = np.stack([reference.encode(text) for text in TEXTS])
    assert np.abs(ours - theirs).max() < 1e-5


def test_an_instruction_replaces_the_system_turn_of_queries_only(pair: tuple[Embedder, Reference]) -> None:
    embedder, reference = pair
    told = reference.encode("fox", system=INSTRUCTION)
    untold = reference.encode("fox")
    assert np.abs(embedder.encode_queries(["fox"], INSTRUCTION)[0] - told).max() < 1e-5
    assert (
        np.abs(embedder.encode_queries([{"text": "fox", "instruction": INSTRUCTION}])[0] - told).max() < 1e-5
    )
    assert np.abs(embedder.encode_documents(["fox"])[0] - untold).max() < 1e-5
    assert np.abs(told - untold).max() > 1e-3


def test_pictures_that_need_no_resizing_are_exact(
    pair: tuple[Embedder, Reference], exact: Image.Image
) -> None:
    embedder, reference = pair
    items = [{"image": exact}, {"text": "a caption", "image": exact}]
    ours = embedder.encode_documents(items)
    theirs = np.stack([reference.encode(image=exact), reference.encode("a caption", exact)])
    assert np.abs(ours - theirs).max() < 1e-5


def test_resized_pictures_agree_with_the_pillow_resampler(
    pair: tuple[Embedder, Reference], photo: Image.Image
) -> None:
    embedder, reference = pair
    height, width = _two_steps(photo.height, photo.width)
    resized = photo.resize((width, height), Image.Resampling.BICUBIC)
    ours = embedder.encode_documents([photo, {"text": "waves", "image": photo}])
    theirs = np.stack([reference.encode(image=resized), reference.encode("waves", resized)])
    assert (ours * theirs).sum(1).min() > 0.9995


def test_a_mixed_list_comes_back_in_order(pair: tuple[Embedder, Reference], exact: Image.Image) -> None:
    embedder, reference = pair
    items = [TEXTS[0], {"image": exact}, TEXTS[2], {"text": "both", "image": exact}, TEXTS[3], TEXTS[0]]
    ours = embedder.encode_documents(items)
    theirs = np.stack(
        [
            reference.encode(TEXTS[0]),
            reference.encode(image=exact),
            reference.encode(TEXTS[2]),
            reference.encode("both", exact),
            reference.encode(TEXTS[3]),
            reference.encode(TEXTS[0]),
        ]
    )
    assert np.abs(ours - theirs).max() < 1e-5


def test_positions_matter_for_pictures_and_not_for_text(qwen2_vl_folder: Path, exact: Image.Image) -> None:
    sequential = Embedder(qwen2_vl_folder, dtype="float32", positions="sequential")
    mrope = Embedder(qwen2_vl_folder, dtype="float32", positions="mrope")
    items = ["just text", {"image": exact}]
    difference = np.abs(sequential.encode_documents(items) - mrope.encode_documents(items)).max(1)
    assert difference[0] < 1e-6
    assert difference[1] > 1e-4


def _hugging_face_pixels(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """What Hugging Face's default (torchvision) backend computes, written with torch alone."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    mean = torch.tensor(CLIP_MEAN)[:, None, None] * 255
    std = torch.tensor(CLIP_STD)[:, None, None] * 255
    return (resized.float() - mean) / std


@pytest.mark.parametrize("size", [(300, 200), (1000, 40), (33, 2000), (2500, 1800), (5, 5)])
def test_resized_pixels_equal_the_default_backend(photo: Image.Image, size: tuple[int, int]) -> None:
    image = photo.resize(size)
    height, width = target_size(image.height, image.width, 28, 256, 1280)
    theirs = _hugging_face_pixels(image, (height, width))
    patches, grid = to_patches(resize(image, (height, width), "torch"), 14, 2)
    assert grid == (height // 14, width // 14)
    # Undo the merge-block order to compare pictures.
    blocks = patches.reshape(grid[0] // 2, grid[1] // 2, 2, 2, 14, 14, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    ours = torch.from_numpy(blocks.reshape(height, width, 3).copy()).permute(2, 0, 1).float()[None]
    normalised = (ours / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert torch.abs(normalised - theirs).max() < 1e-6


@pytest.mark.parametrize("size", [(300, 200), (640, 480), (97, 1511)])
def test_the_two_resamplers_differ_by_at_most_two_levels(photo: Image.Image, size: tuple[int, int]) -> None:
    image = photo.resize(size)
    target = target_size(image.height, image.width, 28, 256, 1280)
    a, b = resize(image, target, "torch").astype(int), resize(image, target, "pillow").astype(int)
    assert np.abs(a - b).max() <= 2


def test_patches_come_in_hugging_face_order(exact: Image.Image) -> None:
    processor = Qwen2VLImageProcessorPil(min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28)
    theirs = processor(images=[exact], return_tensors="np")["pixel_values"]  # [P, 3 * 2 * 14 * 14]
    theirs = theirs.reshape(-1, 3, 2, 14, 14)
    patches, _ = to_patches(np.asarray(exact), 14, 2)
    ours = patches.reshape(-1, 14, 14, 3).transpose(0, 3, 1, 2) / 255
    ours = (ours - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None]
    assert np.abs(ours - theirs[:, :, 0]).max() < 1e-5
    assert np.array_equal(theirs[:, :, 0], theirs[:, :, 1])


def test_the_folded_patch_embedding_equals_the_convolution(exact: Image.Image) -> None:
    torch.manual_seed(1)
    original = torch.nn.Module()
    original.proj = torch.nn.Conv3d(3, 32, (2, 14, 14), (2, 14, 14), bias=True)
    patches, _ = to_patches(np.asarray(exact), 14, 2)
    pixels = torch.from_numpy(patches).reshape(-1, 14, 14, 3).permute(0, 3, 1, 2).double() / 255
    mean, std = torch.tensor(CLIP_MEAN).double(), torch.tensor(CLIP_STD).double()
    normalised = ((pixels - mean[:, None, None]) / std[:, None, None])[:, :, None].expand(-1, -1, 2, -1, -1)
    with torch.no_grad():
        theirs = original.double().proj(normalised).flatten(1)
        ours = FoldedPatchEmbed(original.float())(torch.from_numpy(patches))
    assert torch.abs(ours - theirs).max() < 2e-5


def _two_steps(height: int, width: int) -> tuple[int, int]:
    """The released wrapper's two resizes, transcribed with their published constants."""

    def fetch(h: int, w: int) -> tuple[int, int]:
        hb, wb = max(28, round(h / 28) * 28), max(28, round(w / 28) * 28)
        if hb * wb > 16384 * 784:
            beta = math.sqrt(h * w / (16384 * 784))
            return math.floor(h / beta / 28) * 28, math.floor(w / beta / 28) * 28
        if hb * wb < 4 * 784:
            beta = math.sqrt(4 * 784 / (h * w))
            return math.ceil(h * beta / 28) * 28, math.ceil(w * beta / 28) * 28
        return hb, wb

    h, w = fetch(height, width)
    hb, wb = round(h / 28) * 28, round(w / 28) * 28
    if hb * wb > 1_003_520:
        beta = math.sqrt(h * w / 1_003_520)
        return max(28, math.floor(h / beta / 28) * 28), max(28, math.floor(w / beta / 28) * 28)
    if hb * wb < 200_704:
        beta = math.sqrt(200_704 / (h * w))
        return math.ceil(h * beta / 28) * 28, math.ceil(w * beta / 28) * 28
    return hb, wb


def test_the_patch_grid_is_that_of_the_two_released_steps() -> None:
    sizes = np.random.default_rng(0).integers(1, 4000, (500, 2)).tolist()
    sizes = [size for size in sizes if max(size) / min(size) <= 200]
    assert [target_size(h, w, 28, 256, 1280) for h, w in sizes] == [_two_steps(h, w) for h, w in sizes]
