"""The model: a small ``Qwen2VLModel``, its tokenizer, and a fast forward pass for training on a CPU."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import get_vision_position_ids

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END, START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
VOCABULARY, MAX_LENGTH = 6144, 512
CONFIG = {
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 320,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 4,
        "embed_dim": 160,
        "num_heads": 5,
        "mlp_ratio": 4,
        "hidden_size": 320,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": True,
}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE that lower-cases, with Qwen2-VL's special tokens at the front of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    return tokenizer


def build_model(seed: int) -> Qwen2VLModel:
    """The model in fp32 with fan-in initialisation."""
    torch.manual_seed(seed)
    model = Qwen2VLModel(Qwen2VLConfig(**CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter.shape[1:].numel() if "embed_tokens" not in name else parameter.shape[1]
            nn.init.normal_(parameter, std=1 / math.sqrt(fan_in))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def sequence(text_ids: list[int], visual: int) -> list[int]:
    """``<|im_start|>{body}<|endoftext|>``, ``visual`` picture tokens first; text is cut, the tail kept."""
    head = [START, VISION_START, *[IMAGE] * visual, VISION_END] if visual else [START]
    return head + text_ids[: MAX_LENGTH - 1 - len(head)] + [END]


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos + turned * sin


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        length = scores.shape[-1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ value


class FastModel(nn.Module):
    """The same function as ``Qwen2VLModel`` for rows of equal shape, several times as fast in training.

    Rows are padded on the right: attention is causal, so what follows the pooled token changes nothing. The
    two temporal copies of a still picture share one patch projection, the sum of both halves.
    """

    def __init__(self, model: Qwen2VLModel, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        wrap: Callable = torch.compile(dynamic=True) if compiled else lambda function: function
        self._vision_block, self._text_block = wrap(self.vision_block), wrap(self.text_block)
        self._text_last, self._merge = wrap(self.text_last), wrap(self.merge)

    @staticmethod
    def vision_block(
        block: nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """One layer of the picture tower on ``[B, P, D]``."""
        batch, length, width = states.shape
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(states)).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin)
        mixed = _attend(query, key, qkv[2], causal=False)
        states = states + block.attn.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = block.mlp.fc1(block.norm2(states))
        return states + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))

    @staticmethod
    def text_block(
        layer: nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """One layer of the language model on ``[B, L, D]``."""
        batch, length, width = states.shape
        attention = layer.self_attn
        normed = layer.input_layernorm(states)

        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, length, -1, attention.head_dim).transpose(1, 2)

        query = _rotate(split(attention.q_proj(normed)), cos, sin)
        key = _rotate(split(attention.k_proj(normed)), cos, sin)
        value = split(attention.v_proj(normed))
        groups = attention.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mixed = _attend(query, key, value, causal=True)
        states = states + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return states + layer.mlp(layer.post_attention_layernorm(states))

    @staticmethod
    def text_last(
        layer: nn.Module,
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """The last layer, computed at the pooled tokens only: ``[B, L, D]`` to ``[B, D]``."""
        batch, length, width = states.shape
        attention = layer.self_attn
        normed = layer.input_layernorm(states)
        query = attention.q_proj(normed[rows, ends]).view(batch, -1, 1, attention.head_dim)
        query = _rotate(query, cos[0, ends][:, None, None], sin[0, ends][:, None, None])
        key = attention.k_proj(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        value = attention.v_proj(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        groups = attention.num_key_value_groups
        key = _rotate(key, cos, sin).repeat_interleave(groups, 1)
        scores = (query * key).sum(-1) * attention.head_dim**-0.5
        later = torch.arange(length, device=states.device)[None, None, :] > ends[:, None, None]
        share = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed = (share[..., None] * value.repeat_interleave(groups, 1)).sum(2)
        pooled = states[rows, ends] + attention.o_proj(mixed.reshape(batch, width))
        return pooled + layer.mlp(layer.post_attention_layernorm(pooled))

    @staticmethod
    def merge(merger: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Four patches to one visual token."""
        merged = merger.ln_q(states).view(states.shape[0], -1, merger.hidden_size)
        return merger.mlp(merged)

    def pictures(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patches ``[B, P, 588]`` to visual tokens ``[B, N, D]``."""
        visual = self.model.visual
        kernel = visual.patch_embed.proj.weight
        states = F.linear(patches, kernel.sum(2).flatten(1))
        places = get_vision_position_ids(torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]), 2)
        cos, sin = visual.rotary_pos_emb(states, places)
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        for block in visual.blocks:
            states = self._vision_block(block, states, cos, sin)
        return self._merge(visual.merger, states)

    def pool(self, rows: list[list[int]], visual: torch.Tensor | None = None) -> torch.Tensor:
        """Token rows, their picture slots filled in order from ``visual`` ``[n, D]``, to unit vectors."""
        language = self.model.language_model
        longest = max(map(len, rows))
        ids = torch.tensor([row + [END] * (longest - len(row)) for row in rows])
        ends = torch.tensor([len(row) - 1 for row in rows])
        states = language.embed_tokens(ids)
        if visual is not None:
            states = states.masked_scatter((ids == IMAGE)[..., None], visual.to(states.dtype))
        cos, sin = language.rotary_emb(states, torch.arange(longest)[None, None].expand(3, 1, -1))
        for layer in language.layers[:-1]:
            states = self._text_block(layer, states, cos, sin)
        pooled = self._text_last(language.layers[-1], states, cos, sin, torch.arange(len(rows)), ends)
        return F.normalize(language.norm(pooled), dim=-1)


def save_model(model: Qwen2VLModel, tokenizer: Tokenizer, out: Path) -> None:
    """An ordinary checkpoint folder in bf16, with tokenizer, image processor settings and ``umr.json``."""
    temporary = out.with_name(out.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    copy = Qwen2VLModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save(str(temporary / "tokenizer.json"))
    write = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_LENGTH,
            "padding_side": "right",
            "eos_token": SPECIAL[END],
            "pad_token": SPECIAL[END],
            "bos_token": None,
            "unk_token": None,
            "extra_special_tokens": list(SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 3136, "longest_edge": 3136},
            "min_pixels": 3136,
            "max_pixels": 3136,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
        },
        "umr.json": {
            "format": 1,
            "name": "umr-tiny",
            "role": "embedder",
            "family": "qwen2_vl",
            "template": "<|im_start|>{body}<|endoftext|>",
            "positions": "sequential",
            "pooling": "last",
            "min_image_tokens": 4,
            "max_image_tokens": 4,
            "max_length": MAX_LENGTH,
            "resampler": "torch",
            "dtype": "float32",
            "pages": "fused",
            "demo": True,
            "license": "Apache-2.0",
        },
    }
    for name, value in write.items():
        (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in temporary.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    temporary.rmdir()
