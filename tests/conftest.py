"""Fixtures shared by all tests: small checkpoints of the true architecture, pictures, and no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
from PIL import Image


@pytest.fixture(scope="session")
def qwen2_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL in the released layout, read in the GME layout with M-RoPE."""
    return tiny_checkpoints.write_qwen_vl(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture(scope="session")
def gme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a GME checkpoint: its config names the remote code, so positions are sequential."""
    return tiny_checkpoints.write_qwen_vl(tmp_path_factory.mktemp("gme"), gme=True)


@pytest.fixture(scope="session")
def qwen2_5_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL in the released layout."""
    return tiny_checkpoints.write_qwen_vl(tmp_path_factory.mktemp("qwen2.5-vl"), "qwen2_5_vl")


@pytest.fixture(scope="session")
def qwen3_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL in the released layout, read as Qwen3-VL-Embedding is."""
    return tiny_checkpoints.write_qwen_vl(tmp_path_factory.mktemp("qwen3-vl"), "qwen3_vl")


@pytest.fixture(scope="session")
def qwen3_vl_reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL-Reranker: an instruct model whose chat template says what it is."""
    folder = tiny_checkpoints.write_qwen_vl(tmp_path_factory.mktemp("qwen3-vl-reranker"), "qwen3_vl", seed=1)
    said = "{{- 'Judge whether the Document meets the requirements' }}"
    (folder / "chat_template.jinja").write_text(said)
    return folder


@pytest.fixture(scope="session")
def mm_embed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MM-Embed in the released layout."""
    return tiny_checkpoints.write_llava_next(tmp_path_factory.mktemp("mm-embed"))


@pytest.fixture(scope="session")
def llava_next_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random off-the-shelf LLaVA-NeXT."""
    return tiny_checkpoints.write_llava_next(tmp_path_factory.mktemp("llava-next"), mm_embed=False)


@pytest.fixture(scope="session")
def llava_next_34b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-NeXT with the 34B's language model and chat form."""
    return tiny_checkpoints.write_llava_next(
        tmp_path_factory.mktemp("llava-next-34b"), mm_embed=False, chatml=True
    )


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A smooth colourful picture of 300 x 200 pixels."""
    rows, columns = np.mgrid[0:200, 0:300].astype(np.float64)
    channels = [np.sin(rows / 17 + columns / 23), np.cos(columns / 11), np.sin(rows / 7 - columns / 31)]
    return Image.fromarray(np.stack([(c + 1) * 127 for c in channels], axis=-1).astype(np.uint8))
