"""Writes small random checkpoints of the true architectures to disk, as the released ones are laid out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# Qwen2's pre-tokenisation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ANSWERS = ("True", "False", "Yes", "No", "yes", "no")

_CORPUS = [
    "You are a helpful assistant. Find an image that matches the given text.",
    "system user assistant The quick brown fox jumps over the lazy dog near the river bank.",
    "A picture is worth a thousand words, and a page of a report holds many pictures.",
    *(f"{word}\n{word} {word}" for word in ANSWERS for _ in range(3)),
] * 20


def tokenizer() -> Tokenizer:
    """A byte-level BPE with Qwen2's normaliser, pre-tokenisation and special tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])  # as in Qwen's own
    return made


def write_qwen_vl(
    folder: Path, family: str = "qwen2_vl", *, gme: bool = False, seed: int = 0, layers: int = 2
) -> Path:
    """A random Qwen-VL with language-model head, saved as its `ForConditionalGeneration` saves it."""
    made = _save_tokenizer(folder)
    ids = {name: made.token_to_id(name) for name in SPECIAL}
    text = {
        "vocab_size": made.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
    }
    special = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    vision: dict[str, object] = {"depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "qwen2_vl":
            vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
            config = Qwen2VLConfig(text_config=text, vision_config=vision, **special)
            model = Qwen2VLForConditionalGeneration(config)
        elif family == "qwen2_5_vl":
            # Layer 0 attends within windows of 2 x 2 tokens, layer 1 everywhere.
            vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
            vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
            model = Qwen2_5_VLForConditionalGeneration(config)
        else:
            vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "patch_size": 16}
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
            config = Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config=vision, **special)
            model = Qwen3VLForConditionalGeneration(config)
        _widen(model)
    model.save_pretrained(folder)
    if gme:
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        raw["auto_map"] = {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VLForVision"}
        path.write_text(json.dumps(raw))
    return folder


def llama_tokenizer(*, chatml: bool = False) -> Tokenizer:
    """A byte-fallback BPE that marks blanks, prepends one, and has Llama's and LLaVA's special tokens.

    With `chatml` also those of LLaVA-NeXT 34B's chat form.
    """
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.train_from_iterator(
        [line.replace(" ", "▁") for line in [*_CORPUS, "Instruct: Query: Find a picture that"]]
        + [word for word in ANSWERS for _ in range(400)],
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    raw = json.loads(made.to_str())  # bytes are ordinary pieces, not added tokens
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < 3]
    made = Tokenizer.from_str(json.dumps(raw))
    extra = ("<|im_start|>", "<|im_end|>") if chatml else ()
    made.add_special_tokens([AddedToken(name, normalized=False) for name in ("<image>", "<pad>", *extra)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def write_llava_next(folder: Path, *, mm_embed: bool = True, chatml: bool = False, seed: int = 0) -> Path:
    """A random LLaVA-NeXT in the layout of nvidia/MM-Embed, or of an off-the-shelf checkpoint.

    As released, MM-Embed's language model has no `model.` in its names and no head, its embedding table has
    no rows for picture and padding tokens, and the latent-attention pooler stands beside it. With `chatml`
    the language model and the tokens are those of the 34B.
    """
    made = llama_tokenizer(chatml=chatml)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", "add_eos_token": True})
    )
    image, rows = made.token_to_id("<image>"), made.get_vocab_size()
    width = 64
    config = LlavaNextConfig(
        text_config={
            "model_type": "llama" if chatml else "mistral",
            "vocab_size": image if mm_embed else rows,
            "hidden_size": width,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **({} if chatml else {"sliding_window": None}),
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 32,
        },
        image_token_index=image,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
        _widen(model)
        if not mm_embed:
            model.save_pretrained(folder)
            return folder
        inner = 8 * width
        shapes = {
            "latents": (24, width),
            "cross_attend_blocks.0.fn.to_q.weight": (inner, width),
            "cross_attend_blocks.0.fn.to_kv.weight": (2 * inner, width),
            "cross_attend_blocks.0.fn.to_out.weight": (width, inner),
            "cross_attend_blocks.1.fn.net.0.weight": (8 * width, width),
            "cross_attend_blocks.1.fn.net.0.bias": (8 * width,),
            "cross_attend_blocks.1.fn.net.2.weight": (width, 4 * width),
            "cross_attend_blocks.1.fn.net.2.bias": (width,),
            **{
                f"cross_attend_blocks.{norm}.{part}": (width,)
                for norm in ("0.norm", "0.norm_context", "1.norm")
                for part in ("weight", "bias")
            },
        }
        pooler = {
            f"latent_attention_model.{name}": torch.randn(shape) * 0.15 for name, shape in shapes.items()
        }
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head"):
            continue
        short = name.removeprefix("model.")
        if short.startswith("vision_tower.") and "vision_model" not in short:
            short = short.replace("vision_tower.", "vision_tower.vision_model.")
        tensors[short] = tensor.contiguous()
    save_file({**tensors, **pooler}, folder / "model.safetensors", metadata={"format": "pt"})
    raw = config.to_dict()
    raw["text_config"]["vocab_size"] = rows  # as released: LLaVA's number, not that of the weights
    raw |= {"architectures": ["NVMMEmbedModel"], "retriever": "nvidia/NV-Embed-v1"}
    raw["auto_map"] = {"AutoModel": "modeling_nvmmembed.NVMMEmbedModel"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _save_tokenizer(folder: Path) -> Tokenizer:
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768, "pad_token": "<|endoftext|>"}
        )
    )
    return made


def _widen(model: torch.nn.Module) -> None:
    """Wider than the default 0.02, so that inputs matter."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
