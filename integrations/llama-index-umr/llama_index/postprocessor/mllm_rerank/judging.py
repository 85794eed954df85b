"""What a reranker of the core library is asked about nodes, and its answer as nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.embeddings.gme.nodes import as_picture, error_of
from llama_index.embeddings.gme.roots import Roots, allowed_item

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.ranking import Weight, check_rank
from umr_plugins.types import Item, PairScorer, as_item

_log = logging.getLogger(__name__)


class JudgedNode(NodeWithScore):
    """A reranked node. What the judge said is beside the node, never in its metadata.

    So the node's hash, and what LLMs and embedding models see of it, stay as they were.

    Args:
        node: the very node that was given.
        score: what it is ordered by: its first-stage score plus the weight times its relevance, or its
            relevance alone.
        relevance: the model's probability that it answers the query, in [0, 1]; None if it was not judged.
        retrieval_score: its score before, from the first stage.
        error: why it was not judged; it keeps the rank the first stage gave it.
    """

    relevance: float | None = Field(default=None, description="Probability that it answers the query.")
    retrieval_score: float | None = Field(default=None, description="Its score before reranking.")
    error: str | None = Field(default=None, description="Why it was not judged.")

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "JudgedNode"


def query_of(bundle: QueryBundle | None, instruction: str | None) -> Item:
    """The query as an item: `query_str` (or `custom_embedding_strs` alone), the picture, or both.

    Raises:
        InputError: there is no query, or it has neither text nor picture.
        ItemError: the picture is a URL.
    """
    if bundle is None:
        raise InputError(
            "reranking needs the query: pass query_str=..., or query_bundle=QueryBundle(text, "
            "image_path=...) for one with a picture"
        )
    picture = None if bundle.image_path is None else as_picture(bundle.image_path)
    words = bundle.query_str
    text = words if words and words.strip() else "\n".join(bundle.embedding_strs).strip() or None
    if text is None and picture is None:
        raise InputError(
            "the query is empty: give the QueryBundle a query_str, an image_path, or both; a vector alone "
            "can't be judged"
        )
    return as_item(Item(text=text, image=picture, instruction=instruction))


def judge(
    reranker: PairScorer,
    query: Item,
    nodes: Sequence[NodeWithScore],
    top_n: int,
    weight: Weight,
    roots: Roots = (),
) -> list[JudgedNode]:
    """The `top_n` best nodes, best first; those that can't be judged keep their first-stage rank.

    Args:
        reranker: the judge.
        query: what to judge against.
        nodes: what to judge; none is changed. Their scores are the first stage's; if one has none, the
            order of the list is what the first stage said.
        top_n: most nodes to return.
        weight: see `umr_plugins.ranking.Weight`.
        roots: folders below which files may lie that nodes name; see `allowed_picture`.

    Raises:
        ItemError: the query's picture can't be read.
        InputError: an option out of range, or a score that is not a finite number.
    """
    # On the whole list, so that scores of nodes that are no items are scaled like the others'.
    first = check_rank(len(nodes), top_n, [each.score for each in nodes], weight)
    _check_pictures(query)
    items: dict[int, Item] = {}
    errors: dict[int, ItemError] = {}
    for position, each in enumerate(nodes):
        try:
            items[position] = allowed_item(each.node, roots)
        except ItemError as error:
            errors[position] = error.at(position)
    places = list(items)
    scores = None if first is None else [first[place] for place in places]
    ranked = reranker.rank(query, list(items.values()), first_stage=scores, weight=weight) if items else []
    best = iter(ranked)
    out: list[JudgedNode] = []
    for position in sorted(range(len(nodes)), key=lambda place: 0.0 if first is None else -first[place]):
        if position in errors:
            score = 0.0 if first is None else first[position]
            out.append(_judged(nodes[position], score, None, errors[position]))
            continue
        found = next(best)
        place = places[found.index]
        if found.error is not None:
            errors[place] = error_of(found.error, place, nodes[place].node)
        out.append(_judged(nodes[place], found.score, found.relevance, errors.get(place)))
    _report(errors, len(nodes))
    return out[:top_n]


def _check_pictures(query: Item) -> None:
    """Else every single document would seem to be at fault, with some rerankers."""
    for picture in query.pictures:
        try:
            load_image(picture)
        except ItemError as error:
            raise error.at(name="the query's picture") from None


def _judged(
    given: NodeWithScore, score: float, relevance: float | None, error: ItemError | None
) -> JudgedNode:
    return JudgedNode(
        node=given.node,
        score=float(score),  # numpy's floats are no JSON
        relevance=None if relevance is None else float(relevance),
        retrieval_score=given.score,
        error=None if error is None else str(error),
    )


def _report(errors: dict[int, ItemError], total: int) -> None:
    if errors:
        _log.warning(
            "%d of %d nodes could not be judged and keep their first-stage rank, such as %s",
            len(errors),
            total,
            errors[min(errors)],
        )
