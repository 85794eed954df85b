"""GradCache against one step over the whole batch: the gradients are equal, whatever the chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import write_llava_next, write_qwen_vl
from torch.nn import functional as F

from umr_plugins.backbones.base import Backbone
from umr_plugins.backbones.load import load_backbone
from umr_plugins.backbones.registry import resolve
from umr_plugins.encoding.trainable import Entry, TrainableEncoder
from umr_plugins.errors import ItemError
from umr_plugins.training.gradcache import GradCache
from umr_plugins.training.heap import Heap
from umr_plugins.training.lora import add_lora, keep_no_activations, train_everything
from umr_plugins.types import Item

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next")


def limits(folder: Path) -> dict[str, int]:
    """Small pictures, where a family leaves the choice."""
    return {} if "llava" in folder.name else {"min_image_tokens": 4, "max_image_tokens": 32}


def backbone_of(folder: Path) -> Backbone:
    checkpoint = resolve(folder)
    checkpoint = dataclasses.replace(checkpoint, spec=dataclasses.replace(checkpoint.spec, **limits(folder)))
    return load_backbone(checkpoint, torch.device("cpu"), torch.float32)


def encoder_of(
    folder: Path, *, dropout: float = 0.0, pack: bool = True, full: bool = False, vision: bool = False
) -> TrainableEncoder:
    backbone = backbone_of(folder)
    if full:
        train_everything(backbone, vision=True)
    else:
        add_lora(backbone, rank=4, alpha=8, dropout=dropout, vision=vision, seed=0)
        with torch.no_grad():  # an adapter starts at zero, which would leave half of its gradients zero
            for name, parameter in backbone.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return TrainableEncoder(backbone, pack=pack).train()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    if request.param == "llava_next":
        return write_llava_next(made)
    return write_qwen_vl(made, request.param, gme=request.param == "qwen2_vl")


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Random models leave many denormal numbers, which take a CPU a hundred times longer."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def batch() -> list[Entry]:
    """Five queries and eight documents: texts, pictures and both, short and long."""
    words = "The quick brown fox jumps over the lazy dog near the river bank. "
    return [
        Entry(Item("fox"), instruction="Find an image that matches the given text."),
        Entry(Item(words * 3)),
        Entry(Item("a picture", image=picture(90, 60, 1))),
        Entry(Item(image=picture(140, 300, 2))),
        Entry(Item("dog " * 20)),
        Entry(Item(image=picture(56, 56, 3)), "document"),
        Entry(Item(words), "document"),
        Entry(Item("pages hold many pictures", image=picture(200, 80, 4)), "document"),
        Entry(Item(words * 5), "document"),
        Entry(Item("river"), "document"),
        Entry(Item(image=picture(64, 128, 5)), "document"),
        Entry(Item(image=picture(140, 300, 2)), "document"),
        Entry(Item("bank"), "document"),
    ]


def contrast(rows: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(rows, dim=1)
    return F.cross_entropy(unit[:5] @ unit[5:].T / 0.3, torch.arange(5))


def gradients(encoder: TrainableEncoder) -> torch.Tensor:
    found = [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
    return torch.cat(found).double()


def plain(folder: Path, *, pack: bool, full: bool = False) -> tuple[float, torch.Tensor]:
    """One forward pass and one backward pass over the whole batch."""
    encoder = encoder_of(folder, pack=pack, full=full)
    items = list(encoder.prepared(batch()))
    pictures = [picture for item in items for picture in item.pictures]
    rows = encoder.backbone.pooled(items, encoder.backbone.features(pictures), packed=encoder.packed)
    loss = contrast(rows)
    loss.backward()
    return loss.item(), gradients(encoder)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


CUTS: list[dict[str, int]] = [
    {"max_tokens": 1},
    {"max_tokens": 200},
    {"max_tokens": 400, "feature_bytes": 0},
    {"max_tokens": 10**6, "max_entries": 3},
    {"max_tokens": 200, "feature_bytes": 15_000},
    {"max_tokens": 10**6},
]


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_gradients_are_those_of_one_step_whatever_the_chunks(folder: Path, pack: bool) -> None:
    loss, expected = plain(folder, pack=pack)
    _, padded = plain(folder, pack=False)
    counts = set()
    for cut in CUTS:
        encoder = encoder_of(folder, pack=pack)
        step = GradCache(encoder, **cut).step(batch(), lambda rows: [contrast(rows)])
        assert abs(step.loss.item() - loss) < 1e-5 * loss
        # Padded, a row's rounding depends on how far its neighbours reach.
        assert distance(gradients(encoder), expected) < (1e-6 if pack else 2e-6), cut
        assert distance(gradients(encoder), padded) < 2e-6, cut  # other kernels, other rounding
        counts.add(step.chunks)
    assert len(counts) > 2


def test_gradients_of_the_vision_tower_are_right_where_it_is_trained(folder: Path) -> None:
    if "llava" in folder.name:
        pytest.skip("only adapters are trained in this family")
    _, expected = plain(folder, pack=True, full=True)
    encoder = encoder_of(folder, full=True)
    step = GradCache(encoder, max_tokens=200).step(batch(), lambda rows: [contrast(rows)])
    assert step.chunks > 1
    assert distance(gradients(encoder), expected) < 2e-6
    trained = {name for name, part in encoder.model.named_parameters() if part.grad is not None}
    assert "visual.patch_embed.proj.weight" in trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_in_the_vision_tower_are_right(folder: Path, checkpointing: bool) -> None:
    whole = encoder_of(folder, vision=True)
    items = list(whole.prepared(batch()))
    contrast(whole(items)).backward()
    encoder = encoder_of(folder, vision=True)
    if checkpointing:
        keep_no_activations(encoder.backbone)
    GradCache(encoder, max_tokens=200).step(batch(), lambda rows: [contrast(rows)])
    assert distance(gradients(encoder), gradients(whole)) < 2e-6
    trained = [name for name, part in encoder.named_parameters() if part.grad is not None]
    assert any("visual" in name or "vision_tower" in name for name in trained)


def test_a_loss_per_chunk_has_another_gradient(folder: Path) -> None:
    _, expected = plain(folder, pack=True)
    encoder = encoder_of(folder)
    first, second = batch()[:5], batch()[5:]
    parts = [first[:3] + second[:4], first[3:] + second[4:]]
    for entries, queries in zip(parts, (3, 2), strict=True):

        def own(rows: torch.Tensor, queries: int = queries) -> Iterator[torch.Tensor]:
            unit = F.normalize(rows, dim=1)
            scores = unit[:queries] @ unit[queries:].T / 0.1
            yield F.cross_entropy(scores, torch.arange(queries), reduction="sum") / 5

        GradCache(encoder, max_tokens=200).step(entries, own)
    assert distance(gradients(encoder), expected) > 0.01


def test_dropout_is_the_same_in_both_passes(folder: Path) -> None:
    encoder = encoder_of(folder, dropout=0.3)
    cache = GradCache(encoder, max_tokens=200)
    torch.manual_seed(5)
    step = cache.step(batch(), lambda rows: [contrast(rows)])
    after = torch.rand(1)
    again = encoder_of(folder, dropout=0.3)
    torch.manual_seed(5)
    # The same chunks under the same random states, all activations kept.
    chunks = list(GradCache(again, max_tokens=200)._cut(batch()))
    rows = [again(chunk.items, again.features(chunk.items)) for chunk in chunks]
    order = torch.tensor([number for chunk in chunks for number in chunk.numbers])
    loss = contrast(torch.cat(rows)[order.argsort()])
    loss.backward()
    assert len(chunks) > 1
    assert abs(step.loss.item() - loss.item()) < 1e-6 * loss.item()
    assert distance(gradients(encoder), gradients(again)) < 1e-6
    assert torch.equal(after, torch.rand(1))  # a step moves the random state as one forward pass does
    torch.manual_seed(6)
    other = cache.step(batch(), lambda rows: [contrast(rows)])
    assert other.loss != step.loss


def test_a_learned_temperature_gets_its_gradient(folder: Path) -> None:
    def scaled(rows: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(rows, dim=1)
        return F.cross_entropy(unit[:5] @ unit[5:].T / log.exp(), torch.arange(5))

    log = torch.nn.Parameter(torch.tensor(math.log(0.1)))
    encoder = encoder_of(folder)
    items = list(encoder.prepared(batch()))
    scaled(encoder(items), log).backward()
    expected, log.grad = log.grad, None
    GradCache(encoder, max_tokens=200).step(batch(), lambda rows, copy: [scaled(rows, copy)], [log])
    assert expected is not None
    assert log.grad is not None
    assert abs(log.grad - expected) < 1e-5 * abs(expected)


def test_losses_add_up(folder: Path) -> None:
    one, two = encoder_of(folder), encoder_of(folder)
    GradCache(one, max_tokens=200).step(batch(), lambda rows: [contrast(rows)])
    GradCache(two, max_tokens=200).step(batch(), lambda rows: (contrast(rows) / 4 for _ in range(4)))
    assert distance(gradients(two), gradients(one)) < 1e-6


def test_frozen_pictures_are_encoded_once_within_the_budget_and_twice_beyond_it(folder: Path) -> None:
    encoder = encoder_of(folder)
    runs: list[int] = []
    features = encoder.backbone.features

    def counted(pictures: list[object]) -> object:
        runs.append(len(pictures))
        return features(pictures)  # type: ignore[arg-type]

    encoder.backbone.features = counted  # type: ignore[assignment,method-assign]
    step = GradCache(encoder, max_tokens=1).step(batch(), lambda rows: [contrast(rows)])
    assert (sum(runs), step.recomputed) == (6, 0)
    runs.clear()
    step = GradCache(encoder, max_tokens=1, feature_bytes=0).step(batch(), lambda rows: [contrast(rows)])
    assert (sum(runs), step.recomputed) == (11, 5)  # the last chunk's activations were kept


def test_tokens_and_cut_texts_are_counted(folder: Path) -> None:
    encoder = encoder_of(folder)
    entries = [*batch(), Entry(Item("word " * 3000), "document", max_length=64)]
    step = GradCache(encoder, max_tokens=10**6).step(entries, lambda rows: [contrast(rows)])
    lengths = [item.length for item in encoder.prepared(entries)]
    assert (step.tokens, step.truncated) == (sum(lengths), 1)
    assert lengths[-1] == 64
    assert step.embeddings.shape == (len(entries), encoder.backbone.hidden_size)


def test_a_picture_that_is_lost_is_named_and_leaves_no_gradient(folder: Path) -> None:
    encoder = encoder_of(folder)
    entries = [*batch(), Entry(Item(image=folder / "gone.png"), "document", where="train.jsonl:7")]
    with pytest.raises(ItemError, match=r"train\.jsonl:7.*gone\.png|train\.jsonl:7"):
        GradCache(encoder, max_tokens=200).step(entries, lambda rows: [contrast(rows)])
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_vectors_are_those_of_the_embedder(folder: Path) -> None:
    from umr_plugins import Embedder

    encoder = TrainableEncoder(backbone_of(folder)).train()
    with torch.no_grad():
        found = F.normalize(encoder(list(encoder.prepared(batch()))), dim=1).numpy()
    embedder = Embedder(folder, device="cpu", dtype="float32", **limits(folder))
    queries = embedder.encode_queries(
        [Item(each.item.text, each.item.image, instruction=each.instruction) for each in batch()[:5]]
    )
    documents = embedder.encode_documents([each.item for each in batch()[5:]])
    assert np.abs(found - np.concatenate([queries, documents])).max() < 1e-5


def test_memory_is_given_back_when_the_process_has_grown_and_left_alone_otherwise() -> None:
    heap, sizes = Heap(), iter([100, 80, 82, 83, 90, 85])
    heap.resident = lambda: next(sizes)  # type: ignore[method-assign]
    heap._trim = lambda pad: 1
    assert [heap.tidy(), heap.tidy(), heap.tidy(), heap.tidy()] == [True, False, False, True]
    heap._trim = None
    assert not heap.tidy()
    assert Heap().resident() > 10**7
