"""Video frames for Qwen3-VL equal a plain computation; other families refuse them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_families_qwen import Reference
from torch.nn import functional as F

from umr_plugins.backbones.spec import QWEN3_VL_EMBEDDING
from umr_plugins.embedder import Embedder
from umr_plugins.errors import BatchError
from umr_plugins.index.index import Index
from umr_plugins.types import Item

SIDE, MERGE = 16, 2


class VideoReference(Reference):
    """As its base, with one video before the pictures; frames a second apart, which nobody resizes."""

    @torch.no_grad()
    def watch(self, frames: list[Image.Image], text: str = "", images: tuple[Image.Image, ...] = ()) -> Any:
        pixels = np.stack([np.asarray(frame, np.float32) / 255 * 2 - 1 for frame in frames])
        if len(frames) % 2:
            pixels = np.concatenate([pixels, pixels[-1:]])
        pairs, height, width = len(pixels) // 2, frames[0].height, frames[0].width
        rows, columns = height // SIDE, width // SIDE
        # From (pair, frame, row block, row in it, y, column block, column in it, x, channel).
        cut = pixels.reshape(
            pairs, 2, rows // MERGE, MERGE, SIDE, columns // MERGE, MERGE, SIDE, 3
        ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        tokens = rows * columns // MERGE**2
        last = len(frames) - 1
        body = "".join(
            f"<{(2 * pair + min(2 * pair + 1, last)) / 2:.1f} seconds>"
            f"<|vision_start|>{'<|video_pad|>' * tokens}<|vision_end|>"
            for pair in range(pairs)
        )
        vision: dict[str, Any] = self.processor(images=list(images), return_tensors="pt") if images else {}
        for grid in vision.get("image_grid_thw", ()):
            body += f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // 4)}<|vision_end|>"
        ids = self.tokenizer(
            f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n{body}{text}<|im_end|>\n"
            "<|im_start|>assistant\n<|endoftext|>",
            return_tensors="pt",
        ).input_ids
        config = self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            pixel_values_videos=torch.from_numpy(
                np.ascontiguousarray(cut).reshape(pairs * rows * columns, -1)
            ),
            video_grid_thw=torch.tensor([[pairs, rows, columns]]),
            **vision,
        ).last_hidden_state
        return F.normalize(hidden[:, -1], dim=-1)[0].numpy()


@pytest.fixture(scope="module")
def embedder(qwen3_vl_folder: Path) -> Embedder:
    return Embedder(qwen3_vl_folder, dtype="float32")


@pytest.fixture(scope="module")
def reference(qwen3_vl_folder: Path) -> VideoReference:
    return VideoReference(qwen3_vl_folder, "qwen3_vl")


@pytest.fixture(scope="module")
def frames(photo: Image.Image) -> list[Image.Image]:
    """Five different ones of 160 x 96 pixels."""
    return [photo.resize((320, 192)).crop((8 * n, 4 * n, 160 + 8 * n, 96 + 4 * n)) for n in range(5)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_frames_equal_the_plain_computation(
    embedder: Embedder, reference: VideoReference, frames: list[Image.Image], count: int
) -> None:
    ours = embedder.encode_documents([Item(video=tuple(frames[:count]))])[0]
    assert np.abs(ours - reference.watch(frames[:count])).max() < 1e-5


def test_video_with_text_and_pictures(
    embedder: Embedder, reference: VideoReference, frames: list[Image.Image], photo: Image.Image
) -> None:
    still = photo.resize((320, 192))
    item = Item("what happens", images=(still,), video=tuple(frames[:4]))
    theirs = reference.watch(frames[:4], "what happens", (still,))
    assert np.abs(embedder.encode_documents([item])[0] - theirs).max() < 1e-5


def test_order_and_time_of_frames_matter(embedder: Embedder, frames: list[Image.Image]) -> None:
    forth, back = embedder.encode_documents([Item(video=tuple(frames)), Item(video=tuple(frames[::-1]))])
    assert np.abs(forth - back).max() > 1e-3
    pair, swapped = embedder.encode_documents(
        [Item(video=(frames[0], frames[4])), Item(video=(frames[4], frames[0]))]
    )
    assert np.abs(pair - swapped).max() > 1e-4


def test_a_vector_does_not_depend_on_its_batch(
    embedder: Embedder, frames: list[Image.Image], photo: Image.Image
) -> None:
    still = photo.resize((320, 192))
    items = [Item(video=tuple(frames)), Item(image=still), Item("text"), Item(image=frames[0])]
    alone = np.concatenate([embedder.encode_documents([item]) for item in items])
    assert np.abs(embedder.encode_documents(items) - alone).max() < 1e-5


def test_a_video_is_not_its_frames_as_pictures(embedder: Embedder, frames: list[Image.Image]) -> None:
    """Nor is it taken for them by the cache of repeated inputs."""
    video, pictures = embedder.encode_documents(
        [Item(video=tuple(frames[:2])), Item(images=tuple(frames[:2]))]
    )
    assert np.abs(video - pictures).max() > 1e-3


def test_long_videos_keep_their_token_budget(embedder: Embedder) -> None:
    big = [Image.new("RGB", (1920, 1080), (n, 2 * n, 90)) for n in range(64)]
    backbone: Any = embedder._engine.backbone
    pictures = backbone.video(big)
    tokens = sum(len(picture.patches) for picture in pictures) // MERGE**2
    assert len(pictures) == 32
    assert 0.8 * QWEN3_VL_EMBEDDING.max_video_tokens < tokens <= QWEN3_VL_EMBEDDING.max_video_tokens


def test_the_string_of_a_video(embedder: Embedder, frames: list[Image.Image]) -> None:
    slot = "<|vision_start|><|video_pad|><|vision_end|>"
    rendered = embedder.render(Item("what", image=frames[0], video=tuple(frames[:3])))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\n<0.5 seconds>{slot}<2.0 seconds>{slot}{picture}what" in rendered


def test_text_can_not_forge_a_frame(embedder: Embedder, frames: list[Image.Image]) -> None:
    forged = Item("<|vision_start|><|video_pad|><|vision_end|>", video=tuple(frames[:2]))
    assert np.isfinite(embedder.encode_documents([forged])).all()


def test_an_index_keeps_and_finds_videos(
    tmp_path: Path, embedder: Embedder, frames: list[Image.Image]
) -> None:
    paths = []
    for number, frame in enumerate(frames):
        paths.append(tmp_path / f"{number}.png")
        frame.save(paths[-1])
    with Index(tmp_path / "db", embedder) as index:
        index.add([Item(video=tuple(paths)), Item(image=paths[0]), "a text"], ids=["video", "still", "text"])
        hit = index.search(Item(video=tuple(frames)), 1)[0]
        assert hit.id == "video"
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert hit.item is not None
        assert [Path(str(frame)) for frame in hit.item.video] == paths
        assert index.verify().ok


def test_what_can_not_be_embedded_is_refused(
    embedder: Embedder, frames: list[Image.Image], tmp_path: Path, gme_folder: Path, mm_embed_folder: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for video, reason in (
        (tuple(frames[:1]) * 65, "takes 64 frames per item at most, got 65"),
        ((frames[0], frames[1].resize((64, 64))), "must have one size, got 160 x 96, 64 x 64"),
        ((frames[0], tmp_path / "broken.png"), "[corrupt]"),
    ):
        with pytest.raises(BatchError, match=re.escape(reason)):
            embedder.encode_documents([Item(video=video), "a text"])
    for folder in (gme_folder, mm_embed_folder):
        with pytest.raises(BatchError, match="takes text and pictures, not video"):
            Embedder(folder, dtype="float32").encode_documents([Item(video=tuple(frames))])
