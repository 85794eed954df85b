"""Starting weights that already are a search engine: a bag of words, weighted by how rare they are.

Rare words tell texts apart. A small language model need not learn that from noise, its weights can say so at the
start: every token has a random direction, and the last layer's attention sums the directions in proportion to
inverse document frequency. Training then bends this towards meaning and pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2VLModel

TOKEN_SIZE, END_SIZE = 0.5, 0.01
RARITY_SPREAD, RARITY_CENTRE = 0.15, 1.5
QUIET, LAST_QUIET = 0.05, 0.01


def rarity(tokenizer: Tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """Inverse document frequency of every token, ``[V]``: natural logarithm, 0.3 at least or if unseen."""
    texts = list(texts)
    seen: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(texts):
        seen.update(set(encoding.ids))
    values = [
        math.log((len(texts) + 1) / (seen[token] + 1)) if seen[token] else 0.0
        for token in range(tokenizer.get_vocab_size())
    ]
    return torch.tensor(values).clamp(min=0.3)


@torch.no_grad()
def start_as_bag(model: Qwen2VLModel, idf: torch.Tensor, end: int) -> None:
    """Set the language model's weights so that a text's vector is the idf-weighted sum of its directions.

    The first dimension of a token's embedding holds the logarithm of its idf. In the last layer each head's
    query is a constant on the slowest rotary pair, where positions turn next to nothing, and its key reads
    that first dimension, so attention is in proportion to idf. Values and output are a rotation and its
    inverse. All else starts quiet. Needs as many key-value heads as heads: the sum has no more dimensions.
    """
    language = model.language_model
    table = language.embed_tokens.weight
    width = table.shape[1]
    first = (RARITY_SPREAD * (idf.log() - RARITY_CENTRE)).clamp(-0.5, 0.5)
    directions = nn.functional.normalize(torch.randn(len(table), width - 1), dim=1)
    unit = torch.cat([first[:, None], directions * (1 - first**2).sqrt()[:, None]], 1)
    table.copy_(unit * TOKEN_SIZE * math.sqrt(width))
    table[end] *= END_SIZE / TOKEN_SIZE
    for layer in language.layers:
        layer.self_attn.o_proj.weight *= QUIET
        layer.mlp.down_proj.weight *= LAST_QUIET if layer is language.layers[-1] else QUIET
    attention = language.layers[-1].self_attn
    size = attention.head_dim
    rotation = torch.linalg.qr(torch.randn(width, width))[0]
    attention.v_proj.weight.copy_(rotation)
    attention.o_proj.weight.copy_(rotation.T)
    attention.q_proj.weight *= QUIET
    attention.k_proj.weight *= QUIET
    gain = math.sqrt(math.sqrt(size) / (math.sqrt(width) * RARITY_SPREAD))
    for head in range(width // size):
        slowest = head * size + size // 2 - 1
        attention.q_proj.bias[slowest] = gain
        attention.k_proj.weight[slowest] = 0
        attention.k_proj.weight[slowest, 0] = gain
