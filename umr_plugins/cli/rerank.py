"""Judge candidates against a query with a multimodal language model, and print them best first.

Candidates are items in JSON: the output of `umr search --json`, or one object a line. Of each, `text` and
`image` (a path) are judged; `id`, `path`, `page` and `score` (the first stage's) are used as `umr search`
writes them. Nothing is lost: what can't be judged keeps its place and says why.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umr_plugins.cli.arguments import RERANK_MODEL, add_weight, folder, positive
from umr_plugins.cli.console import DONE, SOME_REFUSED, emit, note, place, say, table
from umr_plugins.errors import InputError
from umr_plugins.types import Item, PageImage, RankedItem

if TYPE_CHECKING:
    from collections.abc import Sequence

HELP = "judge candidates against a query with a multimodal language model"

_KEYS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "text": (str,),
    "image": (str,),
    "path": (str,),
    "page": (int,),
    "score": (int, float),
    "modality": (str,),
    "relevance": (int, float),
    "error": (str,),
    "prompt": (str,),
}
"""What a candidate may hold: also what an earlier reranking wrote."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[TEXT] --image --candidates -n --model --weight --instruction --explain."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the query, in words")
    parser.add_argument("--image", type=folder, metavar="FILE", help="the query's picture")
    parser.add_argument(
        "--candidates", default="-", metavar="FILE", help="JSON candidates; - is standard input (default)"
    )
    parser.add_argument("-n", type=positive, metavar="N", help="number of answers (default: all)")
    parser.add_argument("--model", default=RERANK_MODEL, help=f"hub id or folder (default: {RERANK_MODEL})")
    add_weight(parser)
    parser.add_argument("--instruction", metavar="S", help="tell the model what counts as an answer")
    parser.add_argument("--explain", action="store_true", help="also give the exact prompts (with --json)")


def run(args: argparse.Namespace) -> int:
    """Read the candidates, judge and print them."""
    if not (args.text and args.text.strip()) and args.image is None:
        args.fail("give a TEXT, an --image FILE, or both")
    candidates = read(args.candidates)
    query = Item(text=args.text, image=args.image, instruction=args.instruction)
    scores = [row.get("score") for row in candidates]
    from umr_plugins.reranker import Reranker

    ranked = Reranker(args.model).rank(
        query, [item_of(row) for row in candidates], args.n, scores, args.weight, args.explain
    )
    rows = [row_of(candidates[each.index], each, explain=args.explain) for each in ranked]
    if args.json:
        emit(rows)
    else:
        say(as_table(rows) if rows else "No candidates.")
    refused = [row for row in rows if row["error"]]
    for row in refused:
        note(f"not judged: {row['error']}")
    return SOME_REFUSED if refused else DONE


def read(source: str) -> list[dict[str, Any]]:
    """Candidates of a JSON array, or one object a line.

    Raises:
        InputError: not JSON, another shape, or a key that is not known; names the line.
    """
    if source == "-":
        raw = sys.stdin.read()
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise InputError(f"there is no file {source}; --candidates takes JSON, or - for standard input")
        try:
            raw = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{source} is not UTF-8 ({error}); --candidates takes JSON") from None
    if raw.lstrip().startswith("["):
        numbered = list(enumerate(_parsed(raw, "the candidates"), start=1))
    else:
        lines = [(number, line) for number, line in enumerate(raw.split("\n"), start=1) if line.strip()]
        numbered = [(number, _parsed(line, f"line {number}")) for number, line in lines]
    for number, row in numbered:
        if not isinstance(row, dict) or set(row) - set(_KEYS):
            found = sorted(set(row) - set(_KEYS)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"candidate {number}: got {found}; allowed are objects with {list(_KEYS)}")
        for key, value in row.items():
            kinds = _KEYS[key]
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                named = " or ".join(kind.__name__ for kind in kinds)
                raise InputError(f"candidate {number}: {key} must be {named} or absent, got {value!r}")
    return [row for _, row in numbered]


def _parsed(raw: str, where: str) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def item_of(row: dict[str, Any]) -> Any:
    """What is judged of a candidate: its text and picture, or the page or picture that `path` names."""
    picture: Any = row.get("image")
    kind = row.get("modality")
    if picture is None and row.get("path") and kind in ("image", "fused"):
        path = Path(row["path"])
        picture = path if row.get("page") is None else PageImage(path, int(row["page"]))
    text = None if kind == "image" else row.get("text")
    return {"text": text, "image": Path(picture) if isinstance(picture, str) else picture}


def row_of(given: dict[str, Any], ranked: RankedItem, *, explain: bool = False) -> dict[str, Any]:
    """A judged candidate as JSON: what was given, with the new score and the relevance."""
    row = {key: given.get(key) for key in ("id", "path", "page", "modality", "text")}
    row |= {"score": ranked.score, "relevance": ranked.relevance}
    row["error"] = str(ranked.error) if ranked.error is not None else None
    if given.get("image"):
        row["image"] = given["image"]
    return row | ({"prompt": ranked.prompt} if explain else {})


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The judged candidates as aligned columns."""
    cells = [
        (
            str(rank),
            f"{row['score']:.3f}",
            "-" if row["relevance"] is None else f"{row['relevance']:.3f}",
            place(
                Path(row["path"]) if row["path"] else None,
                row["page"],
                str(row["id"] or row.get("image") or ""),
            ),
            row["text"] or "",
        )
        for rank, row in enumerate(rows, start=1)
    ]
    return table(("", "score", "relevance", "where", "text"), cells, right=(0, 1, 2))
