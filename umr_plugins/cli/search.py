"""Search an index by text, by a picture, or by both together (fused into one query)."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from umr_plugins.cli.arguments import (
    RERANK_MODEL,
    add_db,
    add_weight,
    folder,
    json_object,
    open_existing,
    positive,
)
from umr_plugins.cli.console import DEMO_NOTE, DONE, SOME_REFUSED, emit, hit_row, note, place, say, table
from umr_plugins.types import Hit, Item, RankedItem

HELP = "search an index by text, picture or both"
RERANK_DEPTH = 10
"""Answers that are judged at the least, as MM-Embed's reranker does (arXiv 2411.02571)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[TEXT] --image --db -k --where --instruction --rerank --rerank-model --weight --html."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for, in words")
    parser.add_argument("--image", type=folder, metavar="FILE", help="what to look for, as a picture")
    add_db(parser)
    parser.add_argument("-k", type=positive, default=10, metavar="N", help="number of answers (default 10)")
    parser.add_argument("--where", type=json_object, metavar="JSON", help='metadata filter: {"year": 2024}')
    parser.add_argument("--instruction", metavar="S", help="tell the model what counts as an answer")
    parser.add_argument(
        "--model", help="only for models that the index can't load by itself; it says so then"
    )
    parser.add_argument(
        "--rerank",
        action="store_true",
        help=f"judge the best answers ({RERANK_DEPTH}, or as many as -k asks for) with a multimodal language "
        "model and order them anew",
    )
    parser.add_argument(
        "--rerank-model", metavar="M", help=f"hub id or folder of that model (default: {RERANK_MODEL})"
    )
    add_weight(parser)
    parser.add_argument("--html", type=folder, metavar="FILE", help="also write a page with previews")


def run(args: argparse.Namespace) -> int:
    """Search and print the answers, best first."""
    if not (args.text and args.text.strip()) and args.image is None:
        args.fail("give a TEXT, an --image FILE, or both")
    if not args.rerank and (args.rerank_model is not None or args.weight is not None):
        args.fail("--rerank-model and --weight need --rerank")
    query = Item(text=args.text, image=args.image, instruction=args.instruction)
    with open_existing(args.db, args.model) as index:
        hits = index.search(query, max(args.k, RERANK_DEPTH) if args.rerank else args.k, where=args.where)
        facts = index.info()
        ranked = rerank(query, hits, args) if args.rerank else None
        if ranked is not None:
            hits = [dataclasses.replace(hits[each.index], score=each.score) for each in ranked]
        if args.html is not None:
            write_page(args.html, query, hits, [Path(root) for root in facts["roots"]], demo=facts["demo"])
    refused = [(hit, each.error) for hit, each in zip(hits, ranked or [], strict=False) if each.error]
    for hit, error in refused:
        note(f"not judged: {place(hit.path, hit.page, hit.id)}: {error.reason} [{error.code}]")
    code = SOME_REFUSED if refused else DONE
    if args.json:
        emit([hit_row(hit) for hit in hits] if ranked is None else [*map(judged_row, hits, ranked)])
        return code
    if facts["demo"]:
        note(f"Note: {DEMO_NOTE}")
    say(as_table(hits, ranked) if hits else "Nothing found.")
    if args.html is not None:
        note(f"Page with previews: {args.html}")
    return code


def rerank(query: Item, hits: list[Hit], args: argparse.Namespace) -> list[RankedItem]:
    """The answers judged by a language model, best first, as many as were asked for."""
    from umr_plugins.reranker import Reranker

    if not hits:
        return []
    reranker = Reranker(args.rerank_model or RERANK_MODEL)
    return reranker.rank(
        query, [hit.embedded for hit in hits], args.k, [hit.score for hit in hits], weight=args.weight
    )


def judged_row(hit: Hit, ranked: RankedItem) -> dict[str, Any]:
    """A judged hit as JSON: as of a search, with its relevance, or why it has none."""
    error = None if ranked.error is None else str(ranked.error)
    return {**hit_row(hit), "relevance": ranked.relevance, "error": error}


def as_table(hits: list[Hit], ranked: list[RankedItem] | None = None) -> str:
    """The answers as aligned columns."""
    head, rows = ["", "score", "kind", "where", "text"], []
    for rank, hit in enumerate(hits, start=1):
        row = [str(rank), f"{hit.score:.3f}", hit.modality, place(hit.path, hit.page, hit.id), hit.text or ""]
        if ranked is not None:
            relevance = ranked[rank - 1].relevance
            row.insert(2, "-" if relevance is None else f"{relevance:.3f}")
        rows.append(row)
    if ranked is not None:
        head.insert(2, "relevance")
    return table(head, rows, right=(0, 1) if ranked is None else (0, 1, 2))


def write_page(target: Path, query: Item, hits: list[Hit], roots: list[Path], *, demo: bool) -> None:
    """Write the answers as a self-contained HTML page."""
    from umr_plugins import html

    cards = [
        html.card(
            hit.item,
            roots,
            title=hit.id if hit.path is None else place(Path(hit.path.name), hit.page, ""),
            hint=place(hit.path, hit.page, hit.id),
            note=f"{rank}. {hit.score:.3f} {hit.modality}",
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    # The query's picture was named on the command line, so its own folder is a root.
    asked = html.query(query, [query.image.parent] if isinstance(query.image, Path) else [])
    caveat = html.paragraph(DEMO_NOTE, kind="caveat") if demo else ""
    body = f"<h1>Search</h1>{caveat}{asked}<h2>{len(hits)} answers</h2>{html.grid(cards)}"
    html.write(target, "Search", body)
