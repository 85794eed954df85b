"""One training step's rows: who is encoded, and which pairs belong together."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from concepts import Concept, difference, families
from model import sequence
from pictures import OTHER_GRIDS, SQUARE, PictureBank, augment, fake_pages, on_white, prepare
from texts import HOW, PAGE_WORDS, PASSAGE_WORDS, QUESTIONS, Texts, excerpt_query
from tokenizers import Tokenizer

OTHER_GRID_ROWS, FAMILY_SIZE = 14, 4
CARD_WORDS = (8, 45)
# What share of a text's vector its words should have. Drawings have next to no words, so the more of them a
# question has, the less it is drawn to a drawing; a note must be found by drawings too.
NAME, NOTE, QUESTION, PROSE = 0.35, 0.45, 0.75, 0.65
CHANGES = (
    "{gained}",
    "{gained}",
    "{gained}",
    "but {gained}",
    "the same, {gained}",
    "make it {gained}",
    "with {gained}",
    "{gained} instead",
    "{gained} instead of {lost}",
    "not {lost} but {gained}",
    "change to {gained}",
)
REMOVALS = ("without {lost}", "not {lost}", "no {lost}", "plain, without {lost}")


class Mix(NamedTuple):
    """What a step holds: how many of each, and the weight of pairs with a document."""

    concepts: int
    families: int
    cards: int
    notes: int
    passages: int
    pages: int
    documents: float


# Drawings take long to learn; texts find each other from the first step (bag.py).
MIX = Mix(concepts=96, families=8, cards=14, notes=24, passages=20, pages=6, documents=1.5)


@dataclass
class Row:
    """One thing to encode.

    ``family`` -1: like nothing else; ``strict``: its own family's negatives count; ``share``: of its vector's
    energy that the bag of words should have, 0 for as it comes.
    """

    text: str = ""
    picture: int = -1
    mirrors: bool = False
    grid: tuple[int, int] = SQUARE
    page: bool = False
    concept: int = -1
    family: int = -1
    strict: bool = False
    share: float = 0.0


@dataclass
class Step:
    """Rows and the positive pairs among them, both as indices, with a weight for each pair."""

    rows: list[Row] = field(default_factory=list)
    pairs: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, row: Row) -> int:
        self.rows.append(row)
        return len(self.rows) - 1

    def both(self, first: int, second: int, weight: float = 1.0) -> None:
        self.pairs += [(first, second, weight), (second, first, weight)]


class Share(NamedTuple):
    """What one worker encodes: token rows, patches by grid with their rows, every worker's row numbers."""

    rows: list[list[int]]
    groups: dict[tuple[int, int], tuple[list[int], torch.Tensor]]
    shares: list[list[int]]


class Sampler:
    """Draws steps from the pictures and texts; everything is decided by the step's number and the seed."""

    def __init__(
        self,
        bank: PictureBank,
        table: list[Concept],
        texts: Texts,
        tokenizer: Tokenizer,
        seed: int,
    ) -> None:
        self.bank, self.table, self.texts, self.tokenizer, self.seed = bank, table, texts, tokenizer, seed
        self.known = sorted(bank.rows)
        self.weights = [table[index].weight for index in self.known]
        usable = [[index for index in group if index in bank.rows] for group in families(table)]
        usable = [group for group in usable if len(group) >= 3]
        self.tones = [group for group in usable if any(table[index].tone for index in group)]
        self.others = [group for group in usable if not any(table[index].tone for index in group)]
        figures = on_white(
            bank.pixels[torch.randperm(len(bank.pixels), generator=torch.Generator().manual_seed(seed))[:400]]
        )
        self.pages = fake_pages(600, figures, seed)

    def picture(self, concept: Concept, rng: random.Random, avoid: int = -1) -> tuple[int, int]:
        """A drawing of the concept: (set, row), from another set than ``avoid`` where there is one."""
        rows = self.bank.rows[concept.index]
        return rng.choice([row for row in rows if row[0] != avoid] or rows)

    def draw(self, step: int) -> Step:
        """The rows and pairs of one step."""
        rng = random.Random(self.seed * 1_000_003 + step)
        batch, mix = Step(), MIX
        chosen: dict[int, Concept] = {}
        while len(chosen) < mix.concepts:
            for index in rng.choices(self.known, self.weights, k=mix.concepts - len(chosen)):
                chosen.setdefault(self.table[index].family, self.table[index])
        grid = rng.choice(OTHER_GRIDS)
        main: list[tuple[Concept, int, int, int]] = []
        for number, concept in enumerate(chosen.values()):
            style, first = self.picture(concept, rng)
            second = self.picture(concept, rng, style)[1]
            name = {"concept": concept.index, "family": concept.family}
            shape = grid if number < OTHER_GRID_ROWS else SQUARE
            one = batch.add(Row(picture=first, mirrors=concept.mirrors, **name))
            two = batch.add(Row(picture=second, mirrors=concept.mirrors, grid=shape, **name))
            text = batch.add(Row(text=self.texts.about(concept, rng), share=NAME, **name))
            batch.both(one, two, 0.6)
            batch.both(text, one)
            batch.both(text, two)
            main.append((concept, one, two, text))
        self._families(batch, mix, rng)
        self._documents(batch, mix, main, rng)
        return batch

    def _families(self, batch: Step, mix: Mix, rng: random.Random) -> None:
        """Near neighbours: a label must find its drawing, a drawing plus changed words another one."""
        for number in range(mix.families):
            group = rng.choice(self.tones if number < 3 else self.others)
            members = [self.table[index] for index in rng.sample(group, min(FAMILY_SIZE, len(group)))]
            style = rng.choice(self.bank.rows[members[0].index])[0]
            targets = []
            for concept in members:
                rows = self.bank.rows[concept.index]
                row = next((row for row in rows if row[0] == style), None) or rng.choice(rows)
                name = {"concept": concept.index, "family": concept.family, "strict": True}
                target = batch.add(Row(picture=row[1], **name))
                batch.both(target, batch.add(Row(text=concept.label, share=NAME, **name)), 0.7)
                targets.append(target)
            for position, have in enumerate(members):
                place = rng.choice([other for other in range(len(members)) if other != position])
                want = members[place]
                gained, lost = difference(have, want)
                if not gained and not lost:
                    continue
                forms = [form for form in CHANGES if lost or "{lost}" not in form] if gained else REMOVALS
                text = rng.choice(forms).format(gained=gained, lost=lost)
                query = batch.add(
                    Row(
                        text=text,
                        picture=self.picture(have, rng, style)[1],
                        concept=want.index,
                        family=want.family,
                        strict=True,
                    )
                )
                batch.pairs.append((query, targets[place], 1.5))

    def _documents(
        self, batch: Step, mix: Mix, main: list[tuple[Concept, int, int, int]], rng: random.Random
    ) -> None:
        """Notes, cards (drawing and text), passages and pages, each with what should find it."""
        picked = rng.sample(main, min(len(main), mix.cards + mix.notes))
        for concept, one, two, text in picked[: mix.notes]:
            name = {"concept": concept.index, "family": concept.family}
            note = batch.add(Row(text=self.texts.note(concept, rng), share=NOTE, **name))
            batch.both(one, note, mix.documents)
            batch.both(two, note, mix.documents)
            batch.both(text, note, 0.5 * mix.documents)
            if rng.random() < 0.5:  # so that a question's form does not say that prose is meant
                question = rng.choice(QUESTIONS + HOW).format(self.texts.about(concept, rng))
                asked = batch.add(Row(text=question, share=QUESTION, **name))
                batch.both(asked, note, 0.5 * mix.documents)
        for concept, one, two, text in picked[mix.notes :]:
            name = {"concept": concept.index, "family": concept.family}
            if rng.random() < 0.45:
                caption = self.texts.describe(concept, rng, short=rng.random() < 0.6)
                card = batch.add(Row(text=caption, picture=self.picture(concept, rng)[1], **name))
                batch.both(rng.choice((one, two)), card, 0.5)
                batch.both(text, card, 0.7)
                continue
            query, passage = self.texts.passages(1, CARD_WORDS, rng)[0]
            card = batch.add(Row(text=passage, share=NOTE, picture=self.picture(concept, rng)[1], **name))
            batch.both(rng.choice((one, two)), card, 0.4)
            batch.both(text, card, 0.4)
            batch.both(batch.add(Row(text=query, share=QUESTION)), card, 0.7)
            mixed = batch.add(
                Row(text=excerpt_query(passage, rng), picture=self.picture(concept, rng)[1], **name)
            )
            batch.pairs.append((mixed, card, 0.5))
        for query, passage in self.texts.passages(mix.passages, PASSAGE_WORDS, rng):
            asked = batch.add(Row(text=query, share=QUESTION))
            batch.both(asked, batch.add(Row(text=passage, share=PROSE)))
        for query, passage in self.texts.passages(mix.pages, PAGE_WORDS, rng):
            page = batch.add(
                Row(text=passage, picture=rng.randrange(len(self.pages)), grid=(2, 1), page=True, share=PROSE)
            )
            batch.both(batch.add(Row(text=query, share=QUESTION)), page)

    def tensors(self, batch: Step, step: int, worker: int = 0, workers: int = 1) -> Share:
        """This worker's share of the rows: every ``workers``-th of them in order of cost."""
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch([row.text for row in batch.rows])]
        cells = [row.grid[0] * row.grid[1] if row.picture >= 0 else 0 for row in batch.rows]
        order = sorted(range(len(encoded)), key=lambda n: (cells[n], batch.rows[n].grid, len(encoded[n])))
        shares = [order[start::workers] for start in range(workers)]
        mine = shares[worker]
        rng = torch.Generator().manual_seed((self.seed * 7919 + step) * 64 + worker)
        groups = {}
        rows = [batch.rows[n] for n in mine]
        for grid in sorted({row.grid for row in rows if row.picture >= 0}):
            here = [n for n, row in enumerate(rows) if row.picture >= 0 and row.grid == grid]
            drawn, paged = [n for n in here if not rows[n].page], [n for n in here if rows[n].page]
            patches = []
            if drawn:
                rgba = self.bank.pixels[torch.tensor([rows[n].picture for n in drawn])]
                mirrors = torch.tensor([rows[n].mirrors for n in drawn])
                patches.append(prepare(augment(rgba, mirrors, grid, rng), grid))
            if paged:
                patches.append(prepare(self.pages[torch.tensor([rows[n].picture for n in paged])], grid))
            groups[grid] = (drawn + paged, torch.cat(patches))
        return Share([sequence(encoded[n], cells[n]) for n in mine], groups, shares)
