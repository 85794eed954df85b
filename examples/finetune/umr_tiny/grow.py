"""Go on with a narrower model: widen it for a larger bag of words, summed up in the first layer.

python grow.py --cache DIR --model FOLDER --out FILE

Takes over all that a trained model knows of drawings: the picture tower, and whatever the language model does
outside the bag's dimensions. The bag keeps its directions and gets further singular vectors for the new ones.
``train.py --start FILE`` trains on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from bag import BAG_WIDTH, WEIGHT_CENTRE, WEIGHT_SPREAD, Bag, rarity, singular_directions, sum_in_first_layer
from concepts import load_concepts
from model import END, SPECIAL, build_model
from texts import Texts
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2VLModel

NEW_HEADS = 0.3
"""Size of a new head's noise; nothing is written by it at first."""
BAG_WEIGHT = 28.4
"""Of the last norm: the bag has 0.45 of the energy of a question's vector."""
SPECIAL_WEIGHT = 0.15
"""Of the tokens around a text, which say nothing about it."""


def wider_bag(old: Qwen2VLModel, tokenizer: Tokenizer, texts: Texts, was: int) -> Bag:
    """The model's own directions and weights, and the singular vectors that come after as many."""
    unit = F.normalize(old.language_model.embed_tokens.weight[:, :was], dim=1)
    weights = (unit[:, 0] / WEIGHT_SPREAD + WEIGHT_CENTRE).exp()
    weights[: len(SPECIAL)] = SPECIAL_WEIGHT
    entries, paragraphs = texts.entries(), texts.paragraphs()
    every = singular_directions(
        tokenizer, entries + paragraphs, rarity(tokenizer, entries, paragraphs), BAG_WIDTH - 1
    )
    parts = (unit[:, 1:], every[:, was - 1 :])
    sized = [F.normalize(part, dim=1) * (part.shape[1] / (BAG_WIDTH - 1)) ** 0.5 for part in parts]
    return Bag(torch.cat(sized, 1), weights)


def placed(
    values: torch.Tensor, like: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """``values`` in these rows and columns of a matrix of zeros."""
    target = torch.zeros_like(like)
    target[rows[:, None], columns] = values
    return target


def strongest(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the ``count`` largest, in order."""
    return sizes.topk(count).indices.sort().values


def grow_attention(old: nn.Module, new: nn.Module, dims: torch.Tensor, was: int, first: bool) -> None:
    """Take over the heads; in the first layer the bag's take the place of the weakest."""
    size, total = new.head_dim, new.o_proj.weight.shape[1] // new.head_dim
    before = old.o_proj.weight.shape[1] // size
    if first:
        written = old.o_proj.weight.view(-1, before, size).norm(dim=(0, 2))
        read = old.v_proj.weight.view(before, size, -1).norm(dim=(1, 2))
        heads = strongest(written * read, total - BAG_WIDTH // size)
        places = torch.arange(BAG_WIDTH // size, total)
    else:
        heads = torch.arange(before)
        places = torch.cat([torch.arange(was // size), torch.arange(BAG_WIDTH // size, total)])
    inside = torch.arange(size)
    source, target = ((part[:, None] * size + inside).flatten() for part in (heads, places))
    for name in ("q_proj", "k_proj", "v_proj"):
        have, get = getattr(old, name), getattr(new, name)
        get.weight *= NEW_HEADS
        get.weight[target] = 0
        get.weight[target[:, None], dims] = have.weight[source]
        get.bias[target] = have.bias[source]
    new.o_proj.weight.copy_(placed(old.o_proj.weight[:, source], new.o_proj.weight, dims, target))
    new.o_proj.weight[:BAG_WIDTH] = 0


def grow_mlp(old: nn.Module, new: nn.Module, dims: torch.Tensor) -> None:
    """Take over as many neurons as there is room for, those with the largest weights."""
    size = (
        old.down_proj.weight.norm(dim=0) * old.gate_proj.weight.norm(dim=1) * old.up_proj.weight.norm(dim=1)
    )
    kept = strongest(size, new.down_proj.weight.shape[1])
    places = torch.arange(len(kept))
    for name in ("gate_proj", "up_proj"):
        get = getattr(new, name).weight
        get.copy_(placed(getattr(old, name).weight[kept], get, places, dims))
    new.down_proj.weight.copy_(placed(old.down_proj.weight[:, kept], new.down_proj.weight, dims, places))
    new.down_proj.weight[:BAG_WIDTH] = 0


@torch.no_grad()
def grow(old: Qwen2VLModel, bag: Bag, was: int, seed: int) -> Qwen2VLModel:
    """The wider model, its bag's dimensions first: ``was`` old ones and new ones, then all others."""
    new = build_model(seed)
    dims = torch.cat([torch.arange(was), torch.arange(BAG_WIDTH, new.config.text_config.hidden_size)])
    last = "merger.mlp.2."
    tower = {name: value for name, value in old.visual.state_dict().items() if not name.startswith(last)}
    new.visual.load_state_dict(tower, strict=False)
    have, get = old.visual.merger.mlp[2], new.visual.merger.mlp[2]
    for part in (get.weight, get.bias):
        part.zero_()
    get.weight[dims], get.bias[dims] = have.weight, have.bias
    new.language_model.embed_tokens.weight[:, dims] = old.language_model.embed_tokens.weight
    new.language_model.norm.weight[dims] = old.language_model.norm.weight
    new.language_model.norm.weight[:BAG_WIDTH] = BAG_WEIGHT
    pairs = zip(old.language_model.layers, new.language_model.layers, strict=True)
    for number, (before, after) in enumerate(pairs):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(after, name).weight[dims] = getattr(before, name).weight
        grow_attention(before.self_attn, after.self_attn, dims, was, first=number == 0)
        grow_mlp(before.mlp, after.mlp, dims)
    sum_in_first_layer(new, bag, END)
    return new


def main() -> None:
    """Write the wider model's weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the narrower model")
    parser.add_argument("--out", type=Path, required=True, help="file for the weights")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    old = Qwen2VLModel.from_pretrained(arguments.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    texts = Texts(arguments.cache, load_concepts(arguments.cache))
    added = build_model(arguments.seed).config.text_config.hidden_size - old.config.text_config.hidden_size
    was = BAG_WIDTH - added
    if not 0 < was < BAG_WIDTH:
        parser.error(f"{arguments.model} has {old.config.text_config.hidden_size} dimensions: not narrower")
    torch.manual_seed(arguments.seed)
    bag = wider_bag(old, tokenizer, texts, was)
    torch.save(grow(old, bag, was, arguments.seed).state_dict(), arguments.out)


if __name__ == "__main__":
    main()
