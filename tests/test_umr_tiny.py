"""The bundled demonstration model: its vectors, its label, its size."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umr_plugins import Embedder
from umr_plugins.errors import InputError

BAG, WEIGHT_SPREAD = 192, 0.15  # examples/finetune/umr_tiny/bag.py
FOLDER = Path(str(resources.files("umr_plugins.demo") / "umr-tiny"))


@pytest.fixture(scope="module")
def tiny() -> Embedder:
    return Embedder("umr-tiny")


def plain(text: str, image: Image.Image | None = None) -> np.ndarray:
    """One item with transformers alone."""
    model = AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(FOLDER)(text, add_special_tokens=False).input_ids
    special = AutoTokenizer.from_pretrained(FOLDER).convert_tokens_to_ids
    if image is None:
        ids = [special("<|im_start|>"), *ids, special("<|endoftext|>")]
        features = None
    else:
        vision = Qwen2VLImageProcessorPil(min_pixels=4 * 784, max_pixels=4 * 784)(
            images=[image], return_tensors="pt"
        )
        slots = [special("<|image_pad|>")] * (int(vision["image_grid_thw"].prod()) // 4)
        head = [special("<|im_start|>"), special("<|vision_start|>"), *slots, special("<|vision_end|>")]
        ids = [*head, *ids, special("<|endoftext|>")]
        with torch.no_grad():
            features = model.visual(vision["pixel_values"], grid_thw=vision["image_grid_thw"]).pooler_output
    row = torch.tensor([ids])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(row)
        if features is not None:
            embeds[row == special("<|image_pad|>")] = features
        hidden = model.language_model(
            inputs_embeds=embeds, position_ids=torch.arange(len(ids)).expand(3, 1, -1)
        ).last_hidden_state
    return F.normalize(hidden[0, -1], dim=-1).numpy()


def test_its_vectors_equal_a_plain_computation(tiny: Embedder, photo: Image.Image) -> None:
    image = photo.resize((56, 56))  # on its grid: nothing is resized
    ours = tiny.encode_documents(["a red bicycle", {"image": image}, {"text": "but blue", "image": image}])
    theirs = np.stack([plain("a red bicycle"), plain("", image), plain("but blue", image)])
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize(
    "text", ["fox", "how do i knit a woollen scarf?", "a kettle boils water for tea, coffee and soup. " * 12]
)
def test_part_of_a_text_is_the_weighted_sum_of_its_words(tiny: Embedder, text: str) -> None:
    """By the embedding table alone: a token's first dimension holds its weight, the others its direction."""
    stored = load_file(FOLDER / "model.safetensors")
    table = stored["language_model.embed_tokens.weight"][:, :BAG].float()
    scale = stored["language_model.norm.weight"][1:BAG].float()
    ids = torch.tensor(Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids)
    start, end = 1, 0
    unit = F.normalize(table[torch.tensor([start, *ids, end])], dim=1)
    expected = ((unit[:, :1] / WEIGHT_SPREAD).exp() * unit[:, 1:]).sum(0)
    found = torch.from_numpy(tiny.encode_documents([text])[0, 1:BAG]) / scale
    assert F.cosine_similarity(found, expected, dim=0) > 0.99  # rounded to bf16; a plain mean is below 0.9


def test_it_is_labelled_and_takes_no_instruction(tiny: Embedder) -> None:
    assert tiny.is_demo
    assert tiny.info()["demo"] is True
    assert tiny.info()["dtype"] == "float32"
    assert tiny.pages == "fused"
    with pytest.raises(InputError, match="trained without instructions"):
        tiny.encode_queries(["x"], "Find a picture.")


def test_it_is_small_and_says_what_it_is() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 13_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("demonstration model", "photographs", "Licence", "steps", "noto"):
        assert part in card
