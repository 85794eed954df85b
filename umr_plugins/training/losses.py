"""Losses as pure functions of embeddings; they know neither models nor data.

Every function takes raw pooled states of any float type and brings them to unit length itself, in float32
(float64 stays float64), also inside autocast. So a slice of the columns is a valid input, which is all that
Matryoshka learning needs, and a cached or gathered batch is one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from umr_plugins.errors import InputError

_TYPES = {"known": torch.bool, "positive": torch.long, "owner": torch.long, "source": torch.long}


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Relations:
    """What belongs to what in a batch of q queries and d documents.

    Args:
        positive: long `[q]`, the document each query is pulled to.
        owner: long `[d]`, the query a document was given for, as its positive or as its own negative.
        known: bool `[q, d]`, documents known to answer the query (equal to a positive of it): never its
            negatives. A query's own `positive` counts as known whether it is marked or not.
        source: long `[q]`, the number of the data source of each query.
        scores: float `[d]`, a reranker's score of (owner, document); NaN where there is none.

    Raises:
        InputError: a shape or type does not fit, an index points outside the batch, or there is no query.
    """

    positive: torch.Tensor
    owner: torch.Tensor
    known: torch.Tensor | None = None
    source: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    def __post_init__(self) -> None:
        q, d = self.positive.numel(), self.owner.numel()
        if q == 0 or d == 0:
            raise InputError(f"a loss needs at least one query and one document, got {q} and {d}")
        shapes = {"positive": (q,), "owner": (d,), "known": (q, d), "source": (q,), "scores": (d,)}
        for name, shape in shapes.items():
            tensor: torch.Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{name} must have shape {shape} for {q} queries and {d} documents, "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.dtype != _TYPES.get(name, tensor.dtype):
                raise InputError(f"{name} must be {_TYPES[name]}, got {tensor.dtype}")
        for name, count, of in (("positive", d, "documents"), ("owner", q, "queries")):
            low, high = (int(bound) for bound in torch.aminmax(getattr(self, name)))
            if low < 0 or high >= count:
                raise InputError(
                    f"{name} holds positions of {of}, 0 to {count - 1} here; got {low if low < 0 else high}"
                )

    def to(self, device: torch.device) -> Relations:
        """The same relations on a device; itself if they are there already."""
        if self.positive.device == device:
            return self
        known, source, scores = (
            None if each is None else each.to(device) for each in (self.known, self.source, self.scores)
        )
        return Relations(self.positive.to(device), self.owner.to(device), known, source, scores)


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    relations: Relations,
    *,
    temperature: float | torch.Tensor = 0.03,
    in_batch: bool = True,
    same_source_only: bool = False,
    query_query: bool = False,
    document_document: bool = False,
    false_negative_margin: float | None = None,
    rows: slice | None = None,
) -> torch.Tensor:
    """Contrastive loss: each query is to be nearer to its positive than to its negatives.

    `L_i = -log(exp(s_ip / t) / (exp(s_ip / t) + sum_j exp(s_ij / t)))`, the mean over queries; s are cosines,
    t the temperature, p the positive of query i and j its negatives. Negatives are the query's own hard
    negatives (`owner == i`) and the other documents of the batch, never those known to answer it. A query
    without any negative has loss 0 and gradient 0.

    Sources: own hard negatives and temperature 0.03 in GME (arXiv 2412.16855), all candidates of the batch as
    negatives in MM-Embed (arXiv 2411.02571), the query-query and document-document terms and the margin in
    the technical reports of Qwen3-Embedding (arXiv 2506.05176) and Qwen3-VL-Embedding.

    Args:
        queries: `[q, h]`, raw.
        documents: `[d, h]`, raw.
        relations: what belongs to what.
        temperature: a number above 0, or a tensor with one element, which may be learned.
        in_batch: whether documents of other queries are negatives too.
        same_source_only: of other queries and their documents, use only those of the query's own source.
        query_query: adds `exp(s(q_i, q_j) / t)` over the other queries j, but those whose positive is known
            to answer query i.
        document_document: adds `exp(s(d_p, d_j) / t)` over the documents j that are not known to answer query
            i, hard negatives included.
        false_negative_margin: leaves out whatever is more similar than `s_ip` plus this, in every term, own
            hard negatives included: it is likely to be an answer that nobody marked. Not differentiated.
        rows: sums only these queries and still divides by q, so that the losses of slices that cover all
            queries add up to the whole, with `[len(rows), d]` numbers in memory and not `[q, d]`.

    Returns:
        A scalar in float32 (float64 for float64 states).

    Raises:
        InputError: the temperature or margin is not allowed, shapes do not fit, or sources are missing.
    """
    scale = _temperature("temperature", temperature)
    if false_negative_margin is not None and not math.isfinite(false_negative_margin):
        raise InputError(
            "false_negative_margin must be a finite number, or None for no margin, "
            f"got {false_negative_margin}"
        )
    queries, documents, relations = _ready(queries, documents, relations)
    chosen = torch.arange(len(queries), device=queries.device)[rows or slice(None)]
    positive = relations.positive[chosen, None]  # [r, 1]
    known = torch.zeros(len(chosen), len(documents), dtype=torch.bool, device=queries.device)
    if relations.known is not None:
        known |= relations.known[chosen]
    known = known.scatter(1, positive, True)  # [r, d]; also what keeps the positive out of its own negatives
    near_queries = near_documents = torch.ones((), dtype=torch.bool, device=queries.device)
    if same_source_only:
        if relations.source is None:
            raise InputError("same_source_only needs relations.source, the source of each query")
        near_queries = relations.source == relations.source[chosen, None]  # [r, q]
        near_documents = near_queries[:, relations.owner]  # [r, d]

    cosines = _cosines(queries[chosen], documents)  # [r, d]
    target = cosines.gather(1, positive)  # [r, 1]
    candidates = near_documents if in_batch else relations.owner == chosen[:, None]  # own ones are near, too
    terms = [(cosines, candidates & ~known)]
    if query_query:  # `known` at a query's own positive is set, so this leaves out the query itself as well
        terms.append((_cosines(queries[chosen], queries), near_queries & ~known[:, relations.positive]))
    if document_document:
        terms.append((_cosines(documents[positive[:, 0]], documents), near_documents & ~known))

    logits = [target / scale]
    for similarities, allowed in terms:
        left_out = ~allowed
        if false_negative_margin is not None:  # asked this way round, NaN stays in and is seen in the loss
            left_out |= similarities.detach() > target.detach() + false_negative_margin
        # Masked after the division: the temperature's gradient at -inf would be NaN.
        logits.append((similarities / scale).masked_fill(left_out, -math.inf))
    losses = torch.logsumexp(torch.cat(logits, dim=1), dim=1) - logits[0][:, 0]
    return losses.sum() / len(queries)


def distillation(
    queries: torch.Tensor,
    documents: torch.Tensor,
    relations: Relations,
    *,
    temperature: float | torch.Tensor = 0.03,
    teacher_temperature: float = 1.0,
    rows: slice | None = None,
) -> torch.Tensor:
    """Learn a reranker's judgement: KL(softmax(scores / T) || softmax(cosines / t)), mean over queries.

    Both are over a query's own documents, those with `owner == i` and a finite score. Queries with fewer than
    two of them have nothing to order: they count nothing, and the mean is over the others. Differs from
    `info_nce` in that how much better one document is than another is taken from the scores.

    Args:
        queries: `[q, h]`, raw.
        documents: `[d, h]`, raw.
        relations: with `scores`.
        temperature: t, of the cosines: a number above 0, or a tensor with one element, which may be learned.
        teacher_temperature: T, of the scores, a number above 0.
        rows: sums only these queries and still divides by the number of all that count; see `info_nce`.

    Returns:
        A scalar in float32 (float64 for float64 states).

    Raises:
        InputError: a temperature is not allowed, shapes do not fit, or no query has two scored documents.
    """
    scale = _temperature("temperature", temperature)
    teacher_scale = _temperature("teacher_temperature", teacher_temperature)
    queries, documents, relations = _ready(queries, documents, relations)
    if relations.scores is None:
        raise InputError("distillation needs relations.scores, a reranker's score of each document")
    scored, counts = relations.scores.isfinite(), judged(relations)
    total = int(counts.sum())
    if total == 0:
        raise InputError(
            "distillation needs a query with at least two scored documents of its own; none of "
            f"{len(queries)} queries has them ({int(scored.sum())} of {len(documents)} documents are scored)"
        )
    chosen = torch.arange(len(queries), device=queries.device)[rows or slice(None)]
    chosen = chosen[counts[chosen]]
    left_out = ~(scored & (relations.owner == chosen[:, None]))  # [r, d]
    student = (_cosines(queries[chosen], documents) / scale).masked_fill(left_out, -math.inf)
    scores = relations.scores.detach().to(queries.dtype) / teacher_scale
    teacher = scores.expand(len(chosen), -1).masked_fill(left_out, -math.inf).log_softmax(dim=1)
    gaps = (teacher - student.log_softmax(dim=1)).masked_fill(left_out, 0)  # -inf less -inf is NaN
    return (teacher.exp() * gaps).sum() / total


def judged(relations: Relations) -> torch.Tensor:
    """Bool `[q]`: the queries with two scored documents of their own, which `distillation` learns from."""
    count = len(relations.positive)
    if relations.scores is None:
        return torch.zeros(count, dtype=torch.bool, device=relations.positive.device)
    scored = relations.owner[relations.scores.isfinite()]
    return torch.bincount(scored, minlength=count) >= 2


def matryoshka(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dims: Mapping[int, float]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A loss at several widths at once, so that vectors can be cut (MRL, arXiv 2205.13147).

    The sum over dims of weight times the loss of the first `dim` columns. Weights are used as they are, not
    normalised: `{64: 1, 256: 1}` gives about twice the loss and gradient of one width. The full width counts
    only if it is named.

    Args:
        loss: of queries `[q, h]` and documents `[d, h]`, such as `info_nce` with everything else bound. It
            must normalise what it is given, as all losses here do.
        dims: weight by number of columns, 1 to h.

    Raises:
        InputError: here, no dims, a dim below 1, or a weight that is not a finite number above 0; when the
            loss is computed, a dim larger than h.
    """
    for dim, weight in dims.items():
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise InputError(f"a matryoshka dim is a whole number of at least 1, got {dim!r}")
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(
                f"a matryoshka weight must be a finite number above 0; that of dim {dim} is {weight}"
            )
    if not dims:
        raise InputError("matryoshka needs at least one dim, as in {64: 1.0, 256: 1.0}")
    weights = dict(dims)

    def at_all_widths(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        width = min(queries.shape[-1], documents.shape[-1])
        if max(weights) > width:
            raise InputError(f"matryoshka dim {max(weights)} is larger than the model's vectors of {width}")
        parts = [weight * loss(queries[:, :dim], documents[:, :dim]) for dim, weight in weights.items()]
        return torch.stack(parts).sum()

    return at_all_widths


def _temperature(name: str, value: float | torch.Tensor) -> float | torch.Tensor:
    """A number or 0-d tensor, checked."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise InputError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    number = value.detach().item() if isinstance(value, torch.Tensor) else value
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} must be a finite number above 0, got {number}")
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def _ready(
    queries: torch.Tensor, documents: torch.Tensor, relations: Relations
) -> tuple[torch.Tensor, torch.Tensor, Relations]:
    """Both at unit length in the type to compute in, and the relations beside them."""
    q, d = len(relations.positive), len(relations.owner)
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise InputError(
            "queries [q, h] and documents [d, h] must be matrices of one width, got shapes "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    if (len(queries), len(documents)) != (q, d):
        raise InputError(
            f"relations are of {q} queries and {d} documents, got {len(queries)} and {len(documents)}"
        )
    dtype = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    return (
        F.normalize(queries.to(dtype), dim=1),
        F.normalize(documents.to(dtype), dim=1),
        relations.to(queries.device),
    )


def _cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[m, h]` and `[n, h]` of unit length to `[m, n]`."""
    with torch.autocast(left.device.type, enabled=False):  # it would multiply in bfloat16
        return left @ right.T
