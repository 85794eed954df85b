"""Cuts a text into pieces that a model reads whole, at headings, paragraphs, sentences, then words.

No character but blanks between pieces is lost. Markdown headings (`#` and underlined) start a new piece,
except in fenced code and front matter; each piece knows the headings above it. A table or code block stays
whole while it fits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from umr_plugins.errors import InputError

_LONGEST_HEADING: Final = 200  # characters; a longer line is a paragraph, whatever it begins with
_HASHES: Final = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?")
_UNDERLINE: Final = re.compile(r" {0,3}(=+|-+)[ \t\r]*")
_FENCE: Final = re.compile(r"[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)*(`{3,}(?=[^`]*$)|~{3,})")
_NO_TITLE: Final = re.compile(r"[ \t]*([-*+>|#]|\d+[.)]|$)|[ ]{4}|\t")
_SENTENCE: Final = re.compile(r"[.!?…]['\"”’)\]]*\s+|[。！？｡]+[」』）]*")
_LINE: Final = re.compile(r"\n+")
_WORD: Final = re.compile(r"\s+")
_ROWS: Final = re.compile(r"\s*([|`~])")  # what a table or fenced code begins with
_FULL_ENOUGH: Final = 0.6  # of the budget: then a guess of where to cut is not refined
_WIDEST: Final = 32  # characters per token: a longer text is cut without being counted as a whole


@dataclass(frozen=True)
class Chunk:
    """A piece of a text.

    Args:
        text: the piece as it stands in the source.
        headings: the headings above it, outermost first.
        passage: what to embed: the headings that are not in `text`, as one line `A > B`, then `text`.
    """

    text: str
    headings: tuple[str, ...]
    passage: str


@dataclass
class _Section:
    """Blocks under one heading path. The last `shown` headings of the path are in the first blocks."""

    headings: tuple[str, ...]
    shown: int
    blocks: list[str] = field(default_factory=list)


def split_text(
    text: str, count_tokens: Callable[[str], int], *, max_tokens: int = 512, markdown: bool
) -> list[Chunk]:
    """Cut `text` so that no passage has more than `max_tokens` tokens.

    Neighbouring paragraphs under the same headings are joined while they fit. (One character of more tokens
    than allowed can't be cut and stays.)

    Args:
        text: any text.
        count_tokens: the model's counter. It is called on pieces of bounded length, about twice for each.
        max_tokens: most tokens of a `passage`, at least 1.
        markdown: look for headings, fenced code and front matter.

    Raises:
        InputError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    packer = _Packer(count_tokens, max_tokens)
    sections = _markdown(text) if markdown else [_Section((), 0, _paragraphs(text))]
    return [chunk for section in sections for chunk in packer.pack(section)]


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n(?:[ \t\r]*\n)+", text) if part.strip()]


def _markdown(text: str) -> list[_Section]:
    sections = [_Section((), 0)]
    path: list[tuple[int, str]] = []
    for level, title, block in _blocks(text.split("\n")):
        if level == 0:
            sections[-1].blocks.append(block)
            continue
        # Headings with nothing between them share a piece, so that no piece is a heading alone.
        bare = len(sections) > 1 and len(sections[-1].blocks) == sections[-1].shown
        while path and path[-1][0] >= level:
            path.pop()
        path.append((level, title))
        headings = tuple(name for _, name in path)
        if bare and len(headings) > len(sections[-1].headings):
            sections[-1].headings = headings
            sections[-1].shown += 1
            sections[-1].blocks.append(block)
        else:
            sections.append(_Section(headings, 1, [block]))
    return sections


def _blocks(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """(heading level or 0, title, the block's source), in order."""
    block: list[str] = []
    start = _front_matter(lines)
    if start:
        yield 0, "", "\n".join(lines[:start])
    fence = ""
    for line in lines[start:]:
        if fence:
            block.append(line)
            if _closes(line, fence):
                fence = ""
                yield 0, "", "\n".join(block)
                block = []
            continue
        opening = _FENCE.match(line)
        heading = _heading(line, block)
        if opening is None and heading is None and line.strip():
            block.append(line)
            continue
        if heading is not None and block and heading[2]:
            line = f"{block.pop()}\n{line}"
        if block:
            yield 0, "", "\n".join(block)
            block = []
        if opening is not None:
            fence = opening[1]
            block = [line]
        elif heading is not None:
            yield heading[0], heading[1], line
    if block:
        yield 0, "", "\n".join(block)


def _front_matter(lines: list[str]) -> int:
    """Number of lines of a YAML head between two lines `---`."""
    if lines[0].rstrip() != "---":
        return 0
    for number, line in enumerate(lines[1:200], 2):
        if line.rstrip() in ("---", "..."):
            return number
    return 0


def _closes(line: str, fence: str) -> bool:
    line = line.strip() if len(line) <= _LONGEST_HEADING else line
    return len(line) >= len(fence) and not line.strip(fence[0])


def _heading(line: str, before: list[str]) -> tuple[int, str, bool] | None:
    """(level, title, whether `line` only underlines the line before it) if `line` makes a heading."""
    if len(line) > _LONGEST_HEADING:
        return None
    hashes = _HASHES.fullmatch(line)
    if hashes is not None:
        title = re.sub(r"(^|[ \t]+)#+[ \t]*$", "", hashes[2] or "").strip()
        return (len(hashes[1]), title, False) if title else None
    underline = _UNDERLINE.fullmatch(line)
    if (
        underline is None
        or len(before) != 1
        or len(before[0]) > _LONGEST_HEADING
        or _NO_TITLE.match(before[0])
    ):
        return None
    return (1 if underline[1][0] == "=" else 2), before[0].strip(), True


class _Packer:
    """Joins and cuts blocks to a budget of tokens, counting each character about twice."""

    def __init__(self, count: Callable[[str], int], most: int) -> None:
        self._count = count
        self._most = most
        self._gap = max(1, count("\n\n"))
        self._density = 4.0  # characters per token, as seen last

    def pack(self, section: _Section) -> Iterator[Chunk]:
        kept = self._kept(section.headings)
        full, outer = _path_line(kept), _path_line(kept[: max(0, len(kept) - section.shown)])
        budget = max(1, self._most - (self._count(full) if full else 0))
        for number, text in enumerate(self._pieces(section, budget)):
            yield Chunk(text, section.headings, (outer if number == 0 else full) + text)

    def _kept(self, headings: tuple[str, ...]) -> tuple[str, ...]:
        """The headings, without the outer ones where they would take over half of the budget."""
        for first in range(len(headings)):
            if self._count(_path_line(headings[first:])) * 2 <= self._most:
                return headings[first:]
        return ()

    def _pieces(self, section: _Section, budget: int) -> Iterator[str]:
        """Blocks joined while they fit; what does not fit alone is cut, its end joined to what follows."""
        held: list[str] = []
        size = 0
        for number, block in enumerate(section.blocks):
            tokens = self._count(block) if len(block) <= _WIDEST * budget else budget + 1
            if held and size + self._gap + tokens > budget and tokens <= budget and number > section.shown:
                yield from self._joined(held, budget)
                held, size = [], 0
            held.append(block)
            size += tokens + (self._gap if len(held) > 1 else 0)
            # Also headings and the first paragraph, so that no piece is headings alone.
            if tokens > budget or (size > budget and number <= section.shown):
                *pieces, last = self._cut("\n\n".join(held), budget, bool(_ROWS.match(block)))
                yield from pieces
                held, size = [last], self._count(last)
        if held:
            yield from self._joined(held, budget)

    def _joined(self, blocks: list[str], budget: int) -> Iterator[str]:
        text = "\n\n".join(blocks).strip("\n")
        # Tokens of a sum can be more than the sum of the tokens, if only by a few.
        if len(blocks) == 1 or self._count(text) <= budget:
            yield text
        else:
            yield from self._cut(text, budget)

    def _cut(self, text: str, budget: int, rows: bool = False) -> Iterator[str]:
        cuts = (_LINE, _WORD) if rows else (_SENTENCE, _LINE, _WORD)
        start = 0
        while start < len(text):
            end = start + self._reach(text, start, budget)
            if end < len(text):
                end = _boundary(text, start, end, cuts)
            piece = text[start:end].strip("\n")
            start = end
            if piece.strip():
                yield piece

    def _reach(self, text: str, start: int, budget: int) -> int:
        """How many characters from `start` fit the budget, nearly the most; at least one."""
        rest = len(text) - start
        fits, over = 0, rest + 1
        size = min(rest, max(1, int(budget * self._density * 0.9)))
        for turn in range(64):
            tokens = self._count(text[start : start + size])
            if tokens <= budget:
                fits = size
                self._density = min(64.0, size / max(1, tokens))
                if size == rest or tokens >= _FULL_ENOUGH * budget:
                    break
            else:
                over = size
            if over - fits <= 1:
                break
            guess = int(size * min(4.0, 0.9 * budget / max(1, tokens)))
            if turn > 4 and over <= rest:
                guess = (fits + over) // 2
            size = min(max(guess, fits + 1), over - 1)
        return max(1, fits)


def _path_line(headings: tuple[str, ...]) -> str:
    return " > ".join(headings) + "\n\n" if headings else ""


def _boundary(text: str, start: int, end: int, cuts: tuple[re.Pattern[str], ...]) -> int:
    """The best place to cut in the second half of what fits."""
    for cut in cuts:
        last = 0
        for match in cut.finditer(text, start + (end - start) // 2, end):
            last = match.end()
        if last:
            return last
    # Within a word: at least not between a letter and its accent.
    for place in range(end, max(start, end - 8), -1):
        if not unicodedata.combining(text[place]):
            return place
    return end
