"""Starting weights that already are a search engine: a bag of words, weighted by how rare they are.

Rare words tell texts apart, and words that occur together mean like things. A small language model need
not learn that from noise, its weights can say so at the start. Every token has a direction, first from
the singular vectors of what occurs in which text (latent semantic analysis), then bent so that queries
find their passages; the first layer's attention sums the directions in proportion to a weight, first the
inverse document frequency. Training of the whole model then adds pictures.

The sum is made in the first layer because there each token has the size that it was given. In a later one
training has added to the other dimensions, by different amounts, and the norm before the attention hands that
on to the weights, until they say little about the words.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2VLModel

TOKEN_SIZE, END_SIZE = 0.5, 0.01
WEIGHT_SPREAD, WEIGHT_CENTRE, WEIGHT_FLOOR = 0.15, 1.5, 0.3
QUIET, SUM_SIZE = 0.05, 0.3
BAG_WIDTH = 192
"""Dimensions of the model that hold the bag, its weights' one included; whole heads."""
# A random part keeps words apart that the leading singular vectors would merge.
RANDOM_PART, SINGULAR_POWER = 0.5, 0.25
PAIRS, RATE, TEMPERATURE = 1024, 0.004, 0.05


class Bag(NamedTuple):
    """Unit directions of the tokens ``[V, D]`` and their weights ``[V]``, above 0."""

    directions: torch.Tensor
    weights: torch.Tensor


def rarity(tokenizer: Tokenizer, *collections: Sequence[str]) -> torch.Tensor:
    """Inverse document frequency of every token, ``[V]``: natural logarithm, at least ``WEIGHT_FLOOR``.

    A token is as common as in the collection where it is commonest: dictionaries hardly say "how" or "my".
    One that is in none gets the floor.
    """
    values = torch.full((tokenizer.get_vocab_size(),), math.inf)
    for texts in collections:
        seen = torch.zeros(len(values))
        for encoding in tokenizer.encode_batch(texts):
            seen[list(set(encoding.ids))] += 1
        values = values.minimum(torch.where(seen > 0, ((len(texts) + 1) / (seen + 1)).log(), math.inf))
    return values.where(values.isfinite(), 0.0).clamp(min=WEIGHT_FLOOR)


def singular_directions(
    tokenizer: Tokenizer, texts: Sequence[str], idf: torch.Tensor, width: int
) -> torch.Tensor:
    """Unit directions ``[V, width]``: right singular vectors of the text-token matrix.

    Its columns are scaled to one length, so that rare words count as much as common ones.
    """
    places, values = [], []
    for number, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids, counts = torch.tensor(encoding.ids, dtype=torch.long).unique(return_counts=True)
        row = (1 + counts.log()) * idf[ids]
        places.append(torch.stack([torch.full_like(ids, number), ids]))
        values.append(row / row.norm().clamp(min=1e-9))
    place, value = torch.cat(places, 1), torch.cat(values)
    length = torch.zeros(len(idf)).index_add_(0, place[1], value**2).sqrt()
    value = value / length[place[1]].clamp(min=1e-9)
    matrix = torch.sparse_coo_tensor(place, value, (len(texts), len(idf)), check_invariants=True)
    _, sizes, vectors = torch.svd_lowrank(matrix, q=width, niter=6)
    directions = F.normalize(vectors * sizes**SINGULAR_POWER, dim=1)
    return F.normalize(directions + RANDOM_PART * F.normalize(torch.randn(directions.shape), dim=1), dim=1)


def sums(tokenizer: Tokenizer, texts: Sequence[str], bag: Bag) -> torch.Tensor:
    """Unit vectors of texts, ``[N, D]``: the weighted sums of their tokens' directions."""
    rows = [torch.tensor(encoding.ids, dtype=torch.long) for encoding in tokenizer.encode_batch(texts)]
    ids, starts = torch.cat(rows), torch.tensor([0] + [len(row) for row in rows[:-1]]).cumsum(0)
    total = F.embedding_bag(ids, bag.directions, starts, mode="sum", per_sample_weights=bag.weights[ids])
    return F.normalize(total, dim=1)


def learn_bag(
    tokenizer: Tokenizer,
    start: Bag,
    pairs: Callable[[int, random.Random], list[tuple[str, str]]],
    steps: int,
    report: Callable[[int, float, Bag], None],
) -> Bag:
    """Bend directions and weights until queries find their passages (in-batch InfoNCE, both ways, Adam)."""
    rng, order = random.Random(0), torch.arange(PAIRS)
    directions = nn.Parameter(start.directions.clone())
    weights = nn.Parameter(start.weights.log())
    adam = torch.optim.Adam([directions, weights], lr=RATE, betas=(0.9, 0.98))
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        queries, passages = zip(*pairs(PAIRS, rng), strict=True)
        bag = Bag(F.normalize(directions, dim=1), weights.exp())
        scores = sums(tokenizer, queries, bag) @ sums(tokenizer, passages, bag).T / TEMPERATURE
        loss = (F.cross_entropy(scores, order) + F.cross_entropy(scores.T, order)) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        report(step + 1, loss.item(), Bag(*(part.detach() for part in bag)))
    with torch.no_grad():
        return Bag(F.normalize(directions, dim=1), weights.exp())


@torch.no_grad()
def start_as_bag(model: Qwen2VLModel, bag: Bag, end: int) -> None:
    """Make a language model of noise one whose texts are the bag's: all else starts quiet."""
    language = model.language_model
    nn.init.normal_(language.embed_tokens.weight)
    for layer in language.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight *= QUIET
            writer.weight[:BAG_WIDTH] = 0
    sum_in_first_layer(model, bag, end)


@torch.no_grad()
def sum_in_first_layer(model: Qwen2VLModel, bag: Bag, end: int) -> None:
    """Set the weights that put the bag into the first ``BAG_WIDTH`` dimensions of a text's vector.

    The first dimension of a token's embedding holds the logarithm of its weight, the next ones its direction,
    the rest what training makes of it. In the first layer each of the bag's heads has a constant for a query,
    on the slowest rotary pair, where positions turn next to nothing, and its key reads that first dimension,
    so attention is in proportion to the weight. Values and output are a rotation and its inverse, without the
    first dimension. Needs as many key-value heads as heads: the sum has no more dimensions.
    """
    language = model.language_model
    table, rows = language.embed_tokens.weight, slice(None, BAG_WIDTH)
    first = (WEIGHT_SPREAD * (bag.weights.log() - WEIGHT_CENTRE)).clamp(-0.5, 0.5)
    unit = torch.cat([first[:, None], bag.directions * (1 - first**2).sqrt()[:, None]], 1)
    table[:, rows] = unit * TOKEN_SIZE * math.sqrt(BAG_WIDTH)
    table[end, rows] *= END_SIZE / TOKEN_SIZE
    hold_sizes(model, end)
    layer = language.layers[0]
    attention = layer.self_attn
    layer.input_layernorm.weight[rows] = 1
    for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
        reader.weight[rows] = 0
        reader.bias[rows] = 0
    rotation = torch.linalg.qr(torch.randn(BAG_WIDTH, BAG_WIDTH))[0]
    attention.v_proj.weight[rows, rows] = rotation
    attention.o_proj.weight[rows] = 0
    attention.o_proj.weight[rows, rows] = SUM_SIZE * rotation.T
    attention.o_proj.weight[0] = 0
    size = attention.head_dim
    gain = math.sqrt(math.sqrt(size) / (math.sqrt(BAG_WIDTH) * WEIGHT_SPREAD))
    for head in range(BAG_WIDTH // size):
        slowest = head * size + size // 2 - 1
        attention.q_proj.bias[slowest] = gain
        attention.k_proj.weight[slowest, 0] = gain


@torch.no_grad()
def hold_sizes(model: Qwen2VLModel, end: int) -> None:
    """Give the trained part of every token's embedding its first length again: the norm sees both parts."""
    table = model.language_model.embed_tokens.weight
    free = F.normalize(table[:, BAG_WIDTH:], dim=1) * TOKEN_SIZE * math.sqrt(table.shape[1] - BAG_WIDTH)
    free[end] *= END_SIZE / TOKEN_SIZE
    table[:, BAG_WIDTH:] = free


def held_parts(model: Qwen2VLModel) -> list[tuple[nn.Parameter, Any, torch.Tensor]]:
    """What must not change for the bag to stay: (parameter, place, value); set back after every step."""
    language = model.language_model
    first, rows = language.layers[0], slice(None, BAG_WIDTH)
    parts: list[tuple[nn.Parameter, Any]] = [(language.embed_tokens.weight, (slice(None), rows))]
    parts += [(layer.self_attn.o_proj.weight, rows) for layer in language.layers]
    parts += [(layer.mlp.down_proj.weight, rows) for layer in language.layers]
    for reader in (first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj):
        parts += [(reader.weight, rows), (reader.bias, rows)]
    parts.append((first.input_layernorm.weight, rows))
    return [(parameter, place, parameter.detach()[place].clone()) for parameter, place in parts]
