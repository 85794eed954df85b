"""Search an index by text, by a picture, or by both together (fused into one query)."""

from __future__ import annotations

import argparse
from pathlib import Path

from umr_plugins.cli.arguments import add_db, folder, json_object, open_existing, positive
from umr_plugins.cli.console import DEMO_NOTE, DONE, emit, hit_row, note, place, say, table
from umr_plugins.types import Hit, Item

HELP = "search an index by text, picture or both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[TEXT] --image --db -k --where --instruction --html."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for, in words")
    parser.add_argument("--image", type=folder, metavar="FILE", help="what to look for, as a picture")
    add_db(parser)
    parser.add_argument("-k", type=positive, default=10, metavar="N", help="number of answers (default 10)")
    parser.add_argument("--where", type=json_object, metavar="JSON", help='metadata filter: {"year": 2024}')
    parser.add_argument("--instruction", metavar="S", help="tell the model what counts as an answer")
    parser.add_argument(
        "--model", help="only for models that the index can't load by itself; it says so then"
    )
    parser.add_argument("--html", type=folder, metavar="FILE", help="also write a page with previews")


def run(args: argparse.Namespace) -> int:
    """Search and print the answers, best first."""
    if not (args.text and args.text.strip()) and args.image is None:
        args.fail("give a TEXT, an --image FILE, or both")
    query = Item(text=args.text, image=args.image, instruction=args.instruction)
    with open_existing(args.db, args.model) as index:
        hits = index.search(query, args.k, where=args.where)
        facts = index.info()
        if args.html is not None:
            write_page(args.html, query, hits, [Path(root) for root in facts["roots"]], demo=facts["demo"])
    if args.json:
        emit([hit_row(hit) for hit in hits])
        return DONE
    if facts["demo"]:
        note(f"Note: {DEMO_NOTE}")
    say(as_table(hits) if hits else "Nothing found.")
    if args.html is not None:
        note(f"Page with previews: {args.html}")
    return DONE


def as_table(hits: list[Hit]) -> str:
    """The answers as aligned columns."""
    rows = [
        (str(rank), f"{hit.score:.3f}", hit.modality, place(hit.path, hit.page, hit.id), hit.text or "")
        for rank, hit in enumerate(hits, start=1)
    ]
    return table(("", "score", "kind", "where", "text"), rows, right=(0, 1))


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
