"""MM-Embed and plain LLaVA-NeXT equal a plain computation with torch, transformers, numpy and PIL alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlavaNextConfig, LlavaNextModel, PreTrainedTokenizerFast

from umr_plugins.backbones.base import Input
from umr_plugins.backbones.latent_attention import LatentAttention
from umr_plugins.backbones.registry import write_sidecar
from umr_plugins.embedder import Embedder
from umr_plugins.errors import BatchError, CheckpointError, InputError

TASK = "Find a picture that"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pool_in_float64(tensors: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """The latent-attention equations, written out: states `[n, d]` to `[n, d]`, float64, nothing folded."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x, latents = states.double(), t["latents"]

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        part = f"cross_attend_blocks.{name}"
        return F.layer_norm(values, values.shape[-1:], t[f"{part}.weight"], t[f"{part}.bias"], 1e-5)

    queries = norm(x, "0.norm") @ t["cross_attend_blocks.0.fn.to_q.weight"].T
    both = norm(latents, "0.norm_context") @ t["cross_attend_blocks.0.fn.to_kv.weight"].T
    keys, values = both.chunk(2, -1)
    size = queries.shape[1] // 8
    heads = []
    for head in range(8):
        part = slice(head * size, (head + 1) * size)
        shares = (queries[:, part] @ keys[:, part].T / size**0.5).softmax(-1)
        heads.append(shares @ values[:, part])
    x = x + torch.cat(heads, -1) @ t["cross_attend_blocks.0.fn.to_out.weight"].T
    feed = "cross_attend_blocks.1.fn.net"
    wide = norm(x, "1.norm") @ t[f"{feed}.0.weight"].T + t[f"{feed}.0.bias"]
    up, gate = wide.chunk(2, -1)
    return x + (up * F.gelu(gate)) @ t[f"{feed}.2.weight"].T + t[f"{feed}.2.bias"]


class Reference:
    """One item at a time: whole string, native classes, an explicit mask of zeros, no padding."""

    def __init__(self, folder: Path, mm_embed: bool) -> None:
        self.mm_embed = mm_embed
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        raw = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        config = LlavaNextConfig(**{key: raw[key] for key in ("text_config", "vision_config")})
        self.image = int(raw["image_token_index"])
        own = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        own = {name.replace("vision_model.", "").replace("language_model.model.", "language_model."): tensor
               for name, tensor in own.items()}  # fmt: skip
        config.text_config.vocab_size = len(own["language_model.embed_tokens.weight"])
        self.model = LlavaNextModel._from_config(config, attn_implementation="eager").eval()
        model = {name: tensor for name, tensor in own.items() if not name.startswith(("latent", "lm_head",
                 "language_model.lm_head"))}  # fmt: skip
        self.model.load_state_dict(model)
        prefix = "latent_attention_model."
        self.pooler = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    @torch.no_grad()
    def encode(self, string: str, image: Image.Image | None = None, instruction: str | None = None) -> Any:
        ids = self.tokenizer(string, add_special_tokens=not string.startswith("<s>")).input_ids
        ids = [token for t in ids for token in ([t] * 577 if t == self.image else [t])]
        table = self.model.language_model.embed_tokens.weight
        embeds = torch.stack([table[0 if token == self.image else token] for token in ids])[None]
        if image is not None:
            pixels = np.asarray(image.resize((336, 336), Image.Resampling.BICUBIC)) / 255
            pixels = torch.from_numpy((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]
            states = self.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            features = self.model.multi_modal_projector(states[:, 1:])[0]
            features = torch.cat([features, self.model.image_newline[None]])
            embeds[0, [at for at, token in enumerate(ids) if token == self.image]] = features
        length = len(ids)
        mask = torch.zeros(1, 1, length, length)
        if not self.mm_embed:
            mask = mask.masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo(torch.float32).min)
        hidden = self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(length)[None]
        ).last_hidden_state[0]
        if not self.mm_embed:
            return F.normalize(hidden[-1], dim=0).numpy()
        # The released count of the instruction has beginning and end tokens, one position too many.
        skipped = len(self.tokenizer(f"Instruct: {instruction}").input_ids) if instruction else 0
        pooled = pool_in_float64(self.pooler, hidden)[skipped:].mean(0)
        return F.normalize(pooled, dim=0).float().numpy()


@pytest.fixture(scope="module")
def exact(photo: Image.Image) -> Image.Image:
    return photo.resize((336, 336))


@pytest.fixture(scope="module")
def pair(mm_embed_folder: Path) -> tuple[Embedder, Reference]:
    return Embedder(mm_embed_folder, dtype="float32"), Reference(mm_embed_folder, mm_embed=True)


def test_documents(pair: tuple[Embedder, Reference], exact: Image.Image) -> None:
    embedder, reference = pair
    items = ["a river bank", {"image": exact}, "x", {"text": "the lazy dog", "image": exact}]
    theirs = [
        reference.encode("a river bank"),
        reference.encode("<image>\n", exact),
        reference.encode("x"),
        reference.encode("<image>\nthe lazy dog", exact),
    ]
    assert np.abs(embedder.encode_documents(items) - np.stack(theirs)).max() < 1e-5


def test_queries_with_and_without_instruction(pair: tuple[Embedder, Reference], exact: Image.Image) -> None:
    embedder, reference = pair
    items = ["fox", {"image": exact}, {"text": "over the dog", "image": exact}]
    told = [
        reference.encode(f"Instruct: {TASK}\nQuery: fox", None, TASK),
        reference.encode(f"Instruct: {TASK}\nQuery: <image>\n", exact, TASK),
        reference.encode(f"Instruct: {TASK}\nQuery: <image>\nover the dog", exact, TASK),
    ]
    assert np.abs(embedder.encode_queries(items, TASK) - np.stack(told)).max() < 1e-5
    untold = [
        reference.encode("Query: fox"),
        reference.encode("Query: <image>\n", exact),
        reference.encode("Query: <image>\nover the dog", exact),
    ]
    assert np.abs(embedder.encode_queries(items) - np.stack(untold)).max() < 1e-5
    assert np.abs(np.stack(told) - np.stack(untold)).max() > 1e-3


def test_a_vector_does_not_depend_on_its_batch(pair: tuple[Embedder, Reference], photo: Image.Image) -> None:
    embedder, _ = pair
    items = ["fox", {"image": photo}, "a much longer text " * 30, {"text": "dog", "image": photo}]
    alone = np.concatenate([embedder.encode_queries([item], TASK) for item in items])
    assert np.abs(embedder.encode_queries(items, TASK) - alone).max() < 1e-5


def test_a_resized_picture_agrees_with_pillow(pair: tuple[Embedder, Reference], photo: Image.Image) -> None:
    embedder, reference = pair
    theirs = reference.encode("<image>\n", photo)
    assert float(embedder.encode_documents([photo])[0] @ theirs) > 0.9995


def test_plain_llava_next_pools_the_last_token(llava_next_folder: Path, exact: Image.Image) -> None:
    embedder = Embedder(llava_next_folder, dtype="float32")
    reference = Reference(llava_next_folder, mm_embed=False)
    items = ["a river bank", {"text": "dog", "image": exact}]
    theirs = [reference.encode("a river bank"), reference.encode("<image>\ndog", exact)]
    assert np.abs(embedder.encode_documents(items) - np.stack(theirs)).max() < 1e-5
    told = reference.encode(f"Instruct: {TASK}\nQuery: fox")
    assert np.abs(embedder.encode_queries(["fox"], TASK)[0] - told).max() < 1e-5


def test_a_one_word_prompt_is_a_sidecar_away(
    llava_next_folder: Path, tmp_path: Path, exact: Image.Image
) -> None:
    """The paper's other ablation asks for one word and pools the prompt's last token: a template, no code."""
    for path in llava_next_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    form = "<s>[INST] {body}\nThe river in one word: [/INST]"
    spec = Embedder(llava_next_folder, dtype="float32").spec
    own = dataclasses.replace(spec, template=form, bare_template=None, document_template=None)
    write_sidecar(tmp_path, own)
    embedder = Embedder(tmp_path, dtype="float32", max_length=700)
    reference = Reference(llava_next_folder, mm_embed=False)
    theirs = [
        reference.encode(form.format(body="a fox")),
        reference.encode(form.format(body="<image>\n"), exact),
        reference.encode(form.format(body="<image>\na fox"), exact),
    ]
    items = ["a fox", {"image": exact}, {"text": "a fox", "image": exact}]
    assert np.abs(embedder.encode_documents(items) - np.stack(theirs)).max() < 1e-5
    backbone: Any = embedder._engine.backbone
    (cut,) = backbone.prepare([Input("the lazy dog " * 900, (), None, "document")])
    tail = backbone.tokenizer.text(["x\nThe river in one word: [/INST]"])[0][-8:]
    assert cut.truncated
    assert cut.ids[-8:].tolist() == tail  # text is cut, what asks for the word never


def test_text_can_spell_no_token(pair: tuple[Embedder, Reference]) -> None:
    embedder, _ = pair
    backbone: Any = embedder._engine.backbone
    slot = backbone.tokenizer.slot
    (made,) = backbone.prepare([Input(f"<image> </s> <s> {slot[:-1]}", (), None, "document")])
    assert made.ids.tolist().count(backbone._image_id) == 0
    assert (made.ids[0], made.ids[-1], (made.ids == 2).sum()) == (1, 2, 1)


def test_long_text_is_cut_and_the_end_token_kept(mm_embed_folder: Path, exact: Image.Image) -> None:
    embedder = Embedder(mm_embed_folder, dtype="float32", max_length=640)
    backbone: Any = embedder._engine.backbone
    picture = backbone.picture(exact)
    for text in ("the quick brown fox " * 200, " " * 50_000 + "x" * 3000):
        (made,) = backbone.prepare([Input(text, (picture,), TASK, "query")])
        assert made.truncated
        assert 600 < made.length <= 640
        assert made.ids[-1] == 2
    (whole,) = backbone.prepare([Input("short", (picture,), TASK, "query")])
    assert not whole.truncated
    with pytest.raises(BatchError, match="leave no room within max_length=640"):
        embedder.encode_queries([{"text": "x", "image": exact}], "instruction " * 200)


def test_the_pooler_equals_its_equations(mm_embed_folder: Path) -> None:
    prefix = "latent_attention_model."
    tensors = load_file(mm_embed_folder / "model.safetensors")
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    states = torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 17, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, :5] = False
    ours = LatentAttention(own, torch.float32)(states, mask)
    for row in range(3):
        theirs = pool_in_float64(own, states[row])[mask[row]].mean(0)
        assert (ours[row] - theirs).abs().max() < 1e-5


def test_limits_of_a_picture_are_fixed(mm_embed_folder: Path) -> None:
    with pytest.raises(InputError, match="sees every picture as 577 tokens"):
        Embedder(mm_embed_folder, min_image_tokens=256, max_image_tokens=256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("latent_attention_model.latents", "missing tensors.*latent_attention_model.latents"),
        ("image_newline", "missing tensors: image_newline"),
        ("+latent_attention_model.extra", "unexpected tensors.*latent_attention_model.extra"),
        ("+stranger", "unexpected tensors: stranger"),
    ],
)
def test_every_tensor_is_accounted_for(
    mm_embed_folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    tensors = load_file(mm_embed_folder / "model.safetensors")
    if change.startswith("+"):
        tensors[change[1:]] = torch.zeros(2)
    else:
        del tensors[change]
    for path in mm_embed_folder.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        Embedder(tmp_path)


def test_another_choice_of_vision_features_is_refused(llava_next_folder: Path, tmp_path: Path) -> None:
    for path in llava_next_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "vision_feature_select_strategy": "full"}))
    with pytest.raises(CheckpointError, match=r"vision_feature_select_strategy='full'.*not supported"):
        Embedder(tmp_path)
