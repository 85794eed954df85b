"""The objective: encode a step's rows, InfoNCE over all of them, and what keeps the bag of words useful."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bag import BAG_WIDTH
from batches import Share, Step
from model import FastModel

TEMPERATURE = 0.05
WEIGHTS = {"share": 8.0, "sameness": 0.2, "named": 1.5}
LENGTH_EDGES = (8, 12, 18, 28, 44, 64, 96, 144, 208)


def encode(fast: FastModel, share: Share) -> torch.Tensor:
    """Unit vectors of a share's rows, in its order; rows of like length run together."""
    visual: dict[int, torch.Tensor] = {}
    for grid, (places, patches) in share.groups.items():
        visual.update(zip(places, fast.pictures(patches, grid).unbind(0), strict=True))
    vectors: dict[int, torch.Tensor] = {}
    low = 0
    for high in (*LENGTH_EDGES, 1 << 30):
        part = [n for n, row in enumerate(share.rows) if low < len(row) <= high]
        low = high
        if part:
            filled = [visual[n] for n in part if n in visual]
            pooled = fast.pool([share.rows[n] for n in part], torch.cat(filled) if filled else None)
            vectors.update(zip(part, pooled.unbind(0), strict=True))
    return torch.stack([vectors[n] for n in range(len(share.rows))])


def gather(own: torch.Tensor, shares: list[list[int]], worker: int) -> torch.Tensor:
    """All workers' vectors in row order. Only this worker's carry gradients; their sum is complete."""
    total = torch.empty(sum(map(len, shares)), own.shape[1])
    if len(shares) > 1:
        longest = max(map(len, shares))
        padded = torch.zeros(longest, own.shape[1])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        for rows, part in zip(shares, parts, strict=True):
            total[torch.tensor(rows)] = part[: len(rows)]
    return total.index_copy(0, torch.tensor(shares[worker]), own)


def loss_of(vectors: torch.Tensor, batch: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE over everything in the step, whatever its modality; and the share of pairs ranked first.

    A row's negatives leave out itself, every row of the same concept and, except among near neighbours that
    are there to be told apart, every row of the same family.
    """
    concept = torch.tensor([row.concept if row.concept >= 0 else -2 - n for n, row in enumerate(batch.rows)])
    family = torch.tensor([row.family if row.family >= 0 else -2 - n for n, row in enumerate(batch.rows)])
    strict = torch.tensor([row.strict for row in batch.rows])
    same = concept[:, None] == concept[None, :]
    near = (family[:, None] == family[None, :]) & ~(strict[:, None] & strict[None, :])
    excluded = same | near
    partners = torch.zeros_like(excluded)
    source, target, weight = (torch.tensor(column) for column in zip(*batch.pairs, strict=True))
    partners[source, target] = True
    scores = vectors @ vectors.T / TEMPERATURE
    negatives = scores.masked_fill(excluded | partners, float("-inf"))
    mass = negatives.logsumexp(1)
    positive = scores[source, target]
    losses = torch.logaddexp(positive, mass[source]) - positive
    weight = weight.to(losses.dtype)
    hits = (positive > negatives.max(1).values[source]).float()
    return (losses * weight).sum() / weight.sum(), (hits * weight).sum() / weight.sum()


def terms(vectors: torch.Tensor, batch: Step) -> dict[str, torch.Tensor]:
    """What is added to the loss, each times its weight in ``WEIGHTS``.

    ``share``: mean squared distance of the bag's share of a text's vector from the wanted one, since learning
    drawings makes the other dimensions ever larger, until the bag no longer counts.

    ``sameness``: squared length of the mean of prose's unit vectors outside the bag. Questions about prose
    are never answered by a drawing in training, so these dimensions come to say "this is prose" and nothing
    else, which does not hold for other questions.

    ``named``: InfoNCE between drawings and their texts in the bag's dimensions alone.
    """
    share = vectors[:, :BAG_WIDTH].square().sum(1)
    pictured = torch.tensor([row.picture >= 0 for row in batch.rows])
    wanted = torch.tensor([row.share for row in batch.rows])
    prose = torch.tensor([row.concept < 0 for row in batch.rows])
    drawing = [row.picture >= 0 and not row.text for row in batch.rows]
    named = [
        (source, target, weight)
        for source, target, weight in batch.pairs
        if {drawing[source], drawing[target]} == {True, False} and not (pictured[source] and pictured[target])
    ]
    return {
        "share": (share - wanted)[wanted > 0].square().mean(),
        "sameness": F.normalize(vectors[prose, BAG_WIDTH:], dim=1).mean(0).square().sum(),
        "named": loss_of(F.normalize(vectors[:, :BAG_WIDTH], dim=1), Step(batch.rows, named))[0],
    }
