"""Qwen2.5-VL and Qwen3-VL equal a plain computation that imports only torch, transformers, numpy and PIL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umr_plugins.backbones.features import Features
from umr_plugins.embedder import Embedder
from umr_plugins.errors import BatchError

SYSTEM = {"qwen2_5_vl": "You are a helpful assistant.", "qwen3_vl": "Represent the user's input."}
TEXTS = ["a quick brown fox", "Ünïcödé and 中文,\nlines", "word " * 300]


class Reference:
    """One item at a time through the whole released model: string, plain classes, no batches."""

    def __init__(self, folder: Path, family: str) -> None:
        self.system = SYSTEM[family]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        side = 16 if family == "qwen3_vl" else 14
        least, most = (4, 1800) if family == "qwen3_vl" else (256, 1280)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
        area = (2 * side) ** 2
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=side, min_pixels=least * area, max_pixels=most * area, **half
        )

    @torch.no_grad()
    def encode(self, text: str = "", images: tuple[Image.Image, ...] = (), system: str | None = None) -> Any:
        vision: dict[str, Any] = self.processor(images=list(images), return_tensors="pt") if images else {}
        slots = [int(grid.prod()) // 4 for grid in vision["image_grid_thw"]] if images else []
        body = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in slots) + text
        string = (
            f"<|im_start|>system\n{system or self.system}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>"
        )
        ids = self.tokenizer(string, return_tensors="pt").input_ids
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            **vision,
        ).last_hidden_state
        return F.normalize(hidden[:, -1], dim=-1)[0].numpy()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def pair(request: pytest.FixtureRequest) -> tuple[Embedder, Reference]:
    folder = request.getfixturevalue(f"{request.param}_folder")
    return Embedder(folder, dtype="float32"), Reference(folder, request.param)


@pytest.fixture(scope="module")
def exact(photo: Image.Image) -> Image.Image:
    """On the grids of both families, so that nobody resizes: 24 x 16 tokens of 28 pixels, 21 x 14 of 32."""
    return photo.resize((672, 448))


def test_text_picture_fused_and_mixed(pair: tuple[Embedder, Reference], exact: Image.Image) -> None:
    embedder, reference = pair
    items = [TEXTS[0], {"image": exact}, TEXTS[1], {"text": "a caption", "image": exact}, TEXTS[2]]
    theirs = np.stack(
        [
            reference.encode(TEXTS[0]),
            reference.encode(images=(exact,)),
            reference.encode(TEXTS[1]),
            reference.encode("a caption", (exact,)),
            reference.encode(TEXTS[2]),
        ]
    )
    assert np.abs(embedder.encode_documents(items) - theirs).max() < 1e-5
    assert np.abs(theirs[1] - theirs[3]).max() > 1e-3


def test_a_vector_does_not_depend_on_its_batch(pair: tuple[Embedder, Reference], exact: Image.Image) -> None:
    embedder, _ = pair
    small = exact.crop((0, 0, 320, 224))
    items = [TEXTS[2], {"image": small}, {"text": TEXTS[0], "image": exact}, TEXTS[0]]
    alone = np.concatenate([embedder.encode_documents([item]) for item in items])
    assert np.abs(embedder.encode_documents(items) - alone).max() < 1e-5


def test_resized_pictures_agree_with_the_released_processor(
    pair: tuple[Embedder, Reference], photo: Image.Image
) -> None:
    embedder, reference = pair
    odd = photo.resize((517, 333))
    # The processor resizes with Pillow, we with torch: within 2 levels of one another.
    assert float(embedder.encode_documents([odd])[0] @ reference.encode(images=(odd,))) > 0.9995


def test_several_pictures_where_the_family_was_trained_for_it(
    qwen3_vl_folder: Path, qwen2_5_vl_folder: Path, exact: Image.Image
) -> None:
    second = exact.transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize((320, 448))
    item = {"text": "compare", "images": [exact, second]}
    three = Embedder(qwen3_vl_folder, dtype="float32")
    theirs = Reference(qwen3_vl_folder, "qwen3_vl").encode("compare", (exact, second))
    assert np.abs(three.encode_documents([item])[0] - theirs).max() < 1e-5
    with pytest.raises(BatchError, match="takes one picture per item at most, got 2"):
        Embedder(qwen2_5_vl_folder, dtype="float32").encode_documents([item])


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("Find the page", "Find the page."),
        ("  Find the page?  ", "Find the page?"),
        ("Finde die Seite\N{IDEOGRAPHIC FULL STOP}", "Finde die Seite\N{IDEOGRAPHIC FULL STOP}"),
    ],
)
def test_instructions_of_qwen3_vl_embedding_end_in_punctuation(
    qwen3_vl_folder: Path, given: str, seen: str
) -> None:
    embedder = Embedder(qwen3_vl_folder, dtype="float32")
    assert f"system\n{seen}<|im_end|>" in embedder.render("x", instruction=given)
    reference = Reference(qwen3_vl_folder, "qwen3_vl")
    assert np.abs(embedder.encode_queries(["x"], given)[0] - reference.encode("x", system=seen)).max() < 1e-5


def test_early_vision_features_matter(qwen3_vl_folder: Path, exact: Image.Image) -> None:
    """Qwen3-VL adds features of early vision layers to early language layers; without them vectors move."""
    embedder = Embedder(qwen3_vl_folder, dtype="float32")
    backbone: Any = embedder._engine.backbone
    before = embedder.encode_documents([{"image": exact}])
    whole = backbone._kept
    backbone._kept = lambda pictures: [Features(part.tokens) for part in whole(pictures)]
    try:
        after = embedder.encode_documents([{"image": exact}])
    finally:
        backbone._kept = whole
    assert np.abs(before - after).max() > 1e-3
