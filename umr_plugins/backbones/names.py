"""One name for a weight, however the file or program that names it was laid out."""

from __future__ import annotations

import re

# In this order; what they lead to are the names of transformers 5's classes without head.
_RULES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"model\.", ""),  # classes with a head keep the rest below it
        (r"(?=(layers|embed_tokens|norm)\.)", "language_model."),  # Qwen2-VL and 2.5, as released
        (r"language_model\.model\.", "language_model."),  # LLaVA-NeXT, as released
        (r"language_model\.(?=lm_head\b)", ""),
        (r"vision_tower\.vision_model\.", "vision_tower."),
    )
]


def canonical(name: str) -> str:
    """The name of a tensor or module as a loaded model without head has it.

    Checkpoints keep the names of the program that wrote them, and so do adapters. A head, which such a model
    lacks, is `lm_head`. Names that follow no known layout stay as they are.

    >>> canonical("model.layers.0.mlp.up_proj.weight")
    'language_model.layers.0.mlp.up_proj.weight'
    >>> canonical("model.visual.merger.norm.bias"), canonical("language_model.lm_head.weight")
    ('visual.merger.norm.bias', 'lm_head.weight')
    """
    for pattern, replacement in _RULES:
        match = pattern.match(name)
        if match is not None:
            name = replacement + name[match.end() :]
    return name
