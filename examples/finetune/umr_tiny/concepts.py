"""What there is to draw: concepts with labels and tags, their weights, and families that differ by a word."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from sources import read_json

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
STOP = frozenset("a an and as at by for from in into is it its of on or over that the to up with".split())
# Drawings that change their meaning in a mirror.
ONE_WAY = re.compile(
    r"arrow|left|right|flag|clock|thirty|button|letter|keycap|sign\b|mark\b|play|fast|reverse|number|"
    r"moon|leftwards|rightwards|facing|magnifying|speaker|cinema|symbol|numbers|capital|input"
)
GROUP_WEIGHTS = {0: 0.9, 1: 0.35, 3: 1.5, 4: 1.5, 5: 1.3, 6: 1.3, 7: 1.3, 8: 0.5, 9: 0.2}
PERSON_GROUP, FLAG_GROUP = 1, 9
TONE_WEIGHT = 0.02


@dataclass
class Concept:
    """One emoji: ``index`` in the table, ``family`` the index of the emoji without skin tones."""

    index: int
    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: int
    family: int
    tone: bool = False
    aliases: tuple[str, ...] = ()
    words: frozenset[str] = field(default_factory=frozenset)

    @property
    def mirrors(self) -> bool:
        """Whether a mirrored drawing still means the same."""
        return self.group not in (8, FLAG_GROUP) and not ONE_WAY.search(self.label)

    @property
    def weight(self) -> float:
        """How often it is drawn: everyday things most, skin tones and flags least."""
        return TONE_WEIGHT if self.tone else GROUP_WEIGHTS.get(self.group, 0.3)


def words_of(text: str) -> list[str]:
    """Lower-case words, hyphens kept."""
    return re.findall(r"[a-z0-9][a-z0-9\-']*", text.lower().replace("’", "'").replace("o'clock", "oclock"))


def load_concepts(cache: Path) -> list[Concept]:
    """All emoji of emojibase with a group, each followed by its skin-tone variants."""
    table: list[Concept] = []
    shortcodes = read_json(cache, "emojibase-data", "en/shortcodes/emojibase.json")
    assert isinstance(shortcodes, dict)

    def add(entry: dict, tags: list[str], group: int, family: int, tone: bool) -> None:
        names = shortcodes.get(entry["hexcode"], [])
        names = [names] if isinstance(names, str) else names
        aliases = tuple(name.replace("_", " ") for name in names if "tone" not in name)
        label = entry["label"].replace("’", "'")
        words = frozenset(words_of(label)) - STOP
        position = len(table)
        table.append(
            Concept(
                position,
                entry["hexcode"],
                label,
                tuple(tags),
                group,
                family if family >= 0 else position,
                tone,
                aliases,
                words,
            )
        )

    for entry in read_json(cache, "emojibase-data", "en/data.json"):
        if "group" not in entry or entry["group"] == 2:
            continue
        base = len(table)
        add(entry, entry.get("tags", []), entry["group"], -1, False)
        for variant in entry.get("skins", []):
            add(variant, entry.get("tags", []), entry["group"], base, True)
    return table


def families(table: list[Concept]) -> list[list[int]]:
    """Groups of three or more concepts whose labels share their main words and differ in a few others.

    Skin tones of one person; the same activity by a man or a woman; hearts and books by colour; clock hours;
    arrows by direction.
    """
    by_key: dict[str, set[int]] = defaultdict(set)
    for concept in table:
        if concept.tone:
            by_key[f"tone {concept.family}"].update((concept.family, concept.index))
            continue
        words = [word for word in words_of(concept.label) if word not in STOP]
        for word in sorted(set(words)):
            rest = " ".join(other for other in words if other != word)
            if rest:
                by_key[f"but-one {rest}"].add(concept.index)
        if len(words) > 1 and concept.group != FLAG_GROUP:
            by_key[f"last {words[-1]}"].add(concept.index)
            by_key[f"first {words[0]}"].add(concept.index)
        if words[-1:] and (words[-1] in ("oclock", "thirty") or "-thirty" in words[-1]):
            by_key["clock"].add(concept.index)
    for concept in table:  # the plain thing belongs to the family of its adjectives: "heart", "red heart"
        words = [word for word in words_of(concept.label) if word not in STOP]
        if len(words) == 1:
            for prefix in ("but-one", "last"):
                if f"{prefix} {words[0]}" in by_key:
                    by_key[f"{prefix} {words[0]}"].add(concept.index)
    return [sorted(members) for members in by_key.values() if len(members) >= 3]


def difference(have: Concept, want: Concept) -> tuple[str, str]:
    """The words that ``want``'s label has and ``have``'s lacks, in order, and the other way round."""
    gained = " ".join(word for word in words_of(want.label) if word not in have.words and word not in STOP)
    lost = " ".join(word for word in words_of(have.label) if word not in want.words and word not in STOP)
    return gained.replace("oclock", "o'clock"), lost.replace("oclock", "o'clock")
