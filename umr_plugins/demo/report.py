"""The demo's results as a table for the terminal and as a self-contained HTML page."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from umr_plugins import html
from umr_plugins.cli.console import DEMO_NOTE, place, table
from umr_plugins.demo import ROOT
from umr_plugins.demo.queries import Query
from umr_plugins.demo.run import Asked, Comparison, DemoResult, K, Row
from umr_plugins.types import Hit

SHOWN_RIGHT, SHOWN_WRONG = 3, 2
"""Example queries per type: found ones, and misses where there are any. Always the first of the file."""

_HEAD = ("query to answer", "n", "hit@1", f"hit@{K}", "95 % interval", "random", "BM25")
_PURPOSE = {
    "text_to_picture": "Words find a drawing, which has no text of its own.",
    "picture_to_text": "A picture finds the note that tells about it.",
    "picture_to_picture": "A picture finds another drawing of the same thing, in another style.",
    "fused_to_picture": "A picture and words together find a variation that neither would.",
    "text_to_page": "Words find the page of a PDF.",
    "text_to_text": "Words find a note that says it in other words.",
}
_LEAD = (
    "{queries} queries with known answers, each over all {items} items of the sample corpus. "
    "Every figure was computed in this run."
)
_LEGEND = (
    f"hit@{K}: a right answer is among the first {K}. The thin line is the 95 % interval (Wilson; the "
    f"average's is put together from those of the types). Random: what {K} items drawn blindly would give. "
    "BM25 ranks the texts of all items by the words of the query; a dash where queries have no words, which "
    "counts as 0 in the average."
)
_EXAMPLES = (
    f"The first queries of each type, found and missed, with the first {K} answers; right ones are framed."
)


def spoken(name: str) -> str:
    """`text_to_page` as people say it."""
    return name.replace("_", " ")


def as_text(result: DemoResult, report: Path) -> str:
    """Table, comparison with the frameworks, and what to try next."""
    rows = [_cells(row) for row in (*result.rows, result.macro)]
    lines = [
        "",
        f"umr-tiny (a demonstration model) on {result.items} items, every query over all of them:",
        "",
        table(_HEAD, rows, right=range(1, len(_HEAD))),
        "",
    ]
    lines += [f"Of these, {_sentence(row)}" for row in result.subsets]
    lines += [result.bm25_note] if result.bm25_note else []
    lines += [_agreement(part, len(result.asked)) for part in result.comparisons]
    lines += ["", DEMO_NOTE, "", f"Report with pictures: {report}", "", "Try next:"]
    return "\n".join([*lines, *(f"  {command}" for command in next_steps(result))])


def next_steps(result: DemoResult) -> list[str]:
    """Commands that go on from here."""
    umr, db = _program(), shlex.quote(place(result.db, None, ""))
    pictures = (each.query.item.image for each in result.asked)
    picture = next((each for each in pictures if isinstance(each, Path)), None)
    return [
        f'{umr} search "a boat on the water" --db {db} --html boat.html',
        *([f"{umr} search --image {shlex.quote(place(picture, None, ''))} --db {db}"] if picture else []),
        f"{umr} index YOUR_FOLDER --db my.db  # GME-2B, downloaded on first use; offline: --model umr-tiny",
    ]


def _program() -> str:
    """How this command is called here: in an environment that is not activated, by its path."""
    called = Path(sys.argv[0]).absolute()
    return place(called, None, "") if called.name == "umr" and shutil.which("umr") is None else "umr"


def write_report(target: Path, result: DemoResult) -> Path:
    """Write the HTML page and return its path."""
    queries = len(result.asked)
    parts = [
        "<h1>One vector space for pictures, pages and text</h1>",
        html.paragraph(_LEAD.format(queries=queries, items=result.items), "lead"),
        html.paragraph(DEMO_NOTE, "caveat"),
        "<h2>How often a right answer is found</h2>",
        _figures(result),
        *(html.paragraph(f"Of these, {_sentence(row)}") for row in result.subsets),
        html.paragraph(f"{_LEGEND} {result.bm25_note}", "quiet"),
        "<h2>The same through the frameworks</h2>",
        *(html.paragraph(_agreement(part, queries)) for part in result.comparisons),
        "<h2>Examples</h2>",
        html.paragraph(_EXAMPLES, "quiet"),
    ]
    for row in result.rows:
        asked = [each for each in result.asked if each.query.type == row.name]
        parts += [f"<h3>{html.escape(spoken(row.name)).capitalize()}</h3>"]
        parts += [html.paragraph(_PURPOSE.get(row.name, ""), "quiet")]
        parts += [_example(each) for each in examples(asked)]
    parts += ["<h2>Try next</h2>"]
    parts += [f"<p><code>{html.escape(command)}</code></p>" for command in next_steps(result)]
    return html.write(target, "umr demo", "".join(parts))


def examples(asked: Sequence[Asked]) -> list[Asked]:
    """Some found and some missed queries, in the order of the file."""
    right = [each for each in asked if each.rank is not None][:SHOWN_RIGHT]
    wrong = [each for each in asked if each.rank is None][:SHOWN_WRONG]
    return right + wrong


def _figures(result: DemoResult) -> str:
    rows = []
    for row in (*result.rows, result.macro):
        cells = list(_cells(row))
        name = html.escape(cells[0])
        cells[0] = f'<span class="sum">{name}</span>' if row is result.macro else name
        cells[3] = _bar(row) + cells[3]
        rows.append(cells)
    return html.table(_HEAD, rows)


def _bar(row: Row) -> str:
    low, high = row.interval
    return (
        f'<span class="bar"><i style="width:{row.hit_at_5:.1%}"></i>'
        f'<s style="left:{low:.1%};width:{high - low:.1%}"></s></span>'
    )


def _cells(row: Row) -> tuple[str, ...]:
    low, high = row.interval
    return (
        spoken(row.name),
        str(row.n),
        f"{row.hit_at_1:.2f}",
        f"{row.hit_at_5:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{row.random_at_5:.2f}",
        "–" if row.bm25_at_5 is None else f"{row.bm25_at_5:.2f}",
    )


def _sentence(row: Row) -> str:
    low, high = row.interval
    kind, _, subset = row.name.partition(": ")
    return (
        f"{row.n} queries are {spoken(kind)} with a {subset} as the answer: hit@{K} {row.hit_at_5:.2f} "
        f"({low:.2f} to {high:.2f})."
    )


def _agreement(part: Comparison, queries: int) -> str:
    if part.same is None:
        return f"{part.name}: {part.note}"
    if part.same == queries:
        return f"{part.name}: the same {K} answers as the core, in the same order, for all {queries} queries."
    return f"{part.name}: other answers than the core for {queries - part.same} of {queries} queries."


def _example(asked: Asked) -> str:
    verdict = f"found at rank {asked.rank}" if asked.rank else f"missed: {_wanted(asked.query)}"
    kind = "verdict right" if asked.rank else "verdict"
    cards = [
        html.card(
            hit.item,
            [ROOT],
            title=_name(hit),
            note=f"{rank}. {hit.score:.2f}" + (" · right" if asked.query.is_right(hit) else ""),
            kind="right" if asked.query.is_right(hit) else "",
        )
        for rank, hit in enumerate(asked.hits, start=1)
    ]
    question = html.query(asked.query.item, [ROOT]) + html.paragraph(verdict, kind)
    return f'<div class="asked"><div>{question}</div>{html.grid(cards)}</div>'


def _name(hit: Hit) -> str:
    if hit.path is None:
        return hit.id
    return f"{hit.path.name}, page {hit.page}" if hit.page else hit.path.name


def _wanted(query: Query) -> str:
    names = [answer.id or (answer.path or "").rpartition("/")[2] for answer in query.answers]
    pages = [f", page {answer.page}" if answer.page else "" for answer in query.answers]
    shown = [name + page for name, page in zip(names, pages, strict=True)]
    return " or ".join(shown[:2]) + (f" or {len(shown) - 2} others" if len(shown) > 2 else "")
