"""Checkpoints that judge instead of embedding, as data: their chat form, picture rule and prompt.

Any instruct checkpoint of a supported family is a reranker (MM-Embed, arXiv 2411.02571, asks an
off-the-shelf LLaVA-NeXT); some are trained to be one. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from umr_plugins.backbones.spec import ModelSpec
from umr_plugins.errors import CheckpointError

_CHATML = "<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
_HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note "
    'that the answer can only be "yes" or "no".'
)

_INSTRUCT = ModelSpec(
    name="instruct",
    role="reranker",
    template=_HELPFUL + _CHATML,
    default_instruction=None,
    min_image_tokens=4,
    max_image_tokens=1280,
    two_steps=False,
    max_images=8,
    max_length=8192,
)

QWEN3_VL_RERANKER = dataclasses.replace(
    _INSTRUCT,
    name="Qwen3-VL-Reranker",
    family="qwen3_vl",
    template=f"<|im_start|>system\n{_JUDGE}<|im_end|>\n" + _CHATML,
    max_image_tokens=1800,
    max_images=64,
    max_length=10_240,
    license="apache-2.0",
    prompt="qwen3-vl-reranker",
)

_LLAVA = dataclasses.replace(
    _INSTRUCT,
    family="llava_next",
    template="<s>[INST] {body} [/INST]",
    image_slot="<image>\n",
    positions="sequential",
    min_image_tokens=577,
    max_image_tokens=577,
    max_images=4,
    max_length=4096,
)
_LLAVA_34B = (
    "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n{body}<|im_end|>"
    "<|im_start|>assistant\n"
)

INSTRUCT: dict[str, ModelSpec] = {
    "qwen2_vl": _INSTRUCT,
    "qwen2_5_vl": dataclasses.replace(_INSTRUCT, family="qwen2_5_vl"),
    "qwen3_vl": dataclasses.replace(_INSTRUCT, family="qwen3_vl", template=_CHATML),
    "llava_next": _LLAVA,
}
"""How an instruct checkpoint is asked, by `model_type`."""

KNOWN_RERANKERS: dict[str, ModelSpec] = {
    "Qwen/Qwen2-VL-2B-Instruct": dataclasses.replace(
        _INSTRUCT, name="Qwen2-VL-2B-Instruct", license="apache-2.0", parameters=2_208_985_600
    ),
    "Qwen/Qwen2-VL-7B-Instruct": dataclasses.replace(
        _INSTRUCT, name="Qwen2-VL-7B-Instruct", license="apache-2.0"
    ),
    "Qwen/Qwen3-VL-Reranker-2B": dataclasses.replace(QWEN3_VL_RERANKER, name="Qwen3-VL-Reranker-2B"),
    "Qwen/Qwen3-VL-Reranker-8B": dataclasses.replace(QWEN3_VL_RERANKER, name="Qwen3-VL-Reranker-8B"),
    "llava-hf/llava-v1.6-mistral-7b-hf": dataclasses.replace(
        _LLAVA, name="LLaVA-NeXT-7B-Mistral", license="apache-2.0"
    ),
    "llava-hf/llava-v1.6-34b-hf": dataclasses.replace(_LLAVA, name="LLaVA-NeXT-34B", template=_LLAVA_34B),
    "code-kunkun/LamRA-Rank": dataclasses.replace(_INSTRUCT, name="LamRA-Rank", prompt="lamra"),
}
"""Checkpoints by hub id; others of the families are asked as instruct models."""


def reranker_spec(folder: Path, config: dict[str, Any], model_type: str) -> ModelSpec:
    """How a checkpoint without `umr.json` is asked.

    LLaVA-NeXT's template goes by its language model.

    Raises:
        CheckpointError: an embedder, or a family or language model whose chat form is not known.
    """
    remote = json.dumps([config.get("auto_map"), config.get("architectures")]).lower()
    if re.search(r"\bgme|_gme|nvmmembed", remote):
        raise CheckpointError(
            f"{folder} is an embedder without a trained language-model head; rerank with an instruct "
            "checkpoint such as Qwen/Qwen2-VL-2B-Instruct"
        )
    if model_type not in INSTRUCT:
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} can't rerank; supported are {sorted(INSTRUCT)}"
        )
    spec = dataclasses.replace(INSTRUCT[model_type], name=folder.name)
    if is_reranker(folder, model_type):
        return dataclasses.replace(QWEN3_VL_RERANKER, name=folder.name, license="unknown")
    if model_type != "llava_next":
        return spec
    language = str(config.get("text_config", {}).get("model_type"))
    if language == "mistral":
        return spec
    if language == "llama" and "<|im_start|>" in _added_tokens(folder):
        return dataclasses.replace(spec, template=_LLAVA_34B)
    raise CheckpointError(
        f"{folder}: the chat form of a LLaVA-NeXT with a {language!r} language model is not known (known are "
        "those of the 7B with Mistral and of the 34B). Write an umr.json beside it with family, role "
        '"reranker" and its template, {body} where the prompt goes'
    )


def is_reranker(folder: Path, model_type: str) -> bool:
    """Whether it is a Qwen3-VL-Reranker, which its chat template tells from instruct models and embedders."""
    return model_type == "qwen3_vl" and "Judge whether the Document" in _chat_template(folder)


def _chat_template(folder: Path) -> str:
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    return "".join(_text(folder / name) for name in names)


def _added_tokens(folder: Path) -> set[str]:
    try:
        raw = json.loads(_text(folder / "tokenizer.json") or "{}")
    except ValueError:
        return set()
    return {str(token.get("content")) for token in raw.get("added_tokens", [])}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
