"""From template and user text to token ids, so that no text can forge a picture slot or end a turn.

Template ids are fixed when the model is loaded. User text is tokenised on its own by a copy of the tokenizer
that knows no added token: `<|im_end|>` typed by a user is seven ordinary tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from umr_plugins.errors import CheckpointError

# Longest prefix of a text that is tokenised: far more characters than `max_length` tokens can cover, so
# that a book in one string costs milliseconds. Whitespace runs are the longest tokens of Qwen's vocabulary.
_CHARACTERS_PER_TOKEN = 64


class TextTokenizer:
    """Tokenises template parts (added tokens recognised) and user text (never)."""

    def __init__(self, folder: Path) -> None:
        raw = _load(folder)
        added = {str(token["content"]): int(token["id"]) for token in raw["added_tokens"]}
        self.added = added
        """Added tokens by name."""
        self._flags = {str(token["content"]): token for token in raw["added_tokens"]}
        raw["truncation"] = raw["padding"] = raw["post_processor"] = None
        # The vocabulary is large: hash before building, once.
        self.sha256 = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
        self._plain = Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
        names = "|".join(re.escape(name) for name in sorted(added, key=len, reverse=True))
        self._names = re.compile(names or r"(?!)")

    def text(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Ids of user texts; no id is that of an added token.

        With a `limit`, a longer text may come back cut, but never to fewer than `limit` + 1 ids: so much
        decides whether and where it is cut, and a book in one string costs milliseconds.
        """
        if limit is None:
            return [each.ids for each in self._plain.encode_batch(texts, add_special_tokens=False)]
        prefixes = [bounded(text, limit) for text in texts]
        ids = self.text(prefixes)
        # A prefix that yields too few tokens (long runs of blanks) decides nothing: take the whole text.
        short = [
            place
            for place, (text, prefix) in enumerate(zip(texts, prefixes, strict=True))
            if len(prefix) < len(text) and len(ids[place]) <= limit
        ]
        for place, whole in zip(short, self.text([texts[place] for place in short]), strict=True):
            ids[place] = whole
        return ids

    def template(self, part: str) -> list[int]:
        """Ids of a fixed template part, added tokens recognised."""
        ids: list[int] = []
        end = 0
        for match in self._names.finditer(part):
            ids += self._plain.encode(part[end : match.start()], add_special_tokens=False).ids
            ids.append(self.added[match.group()])
            end = match.end()
        return ids + self._plain.encode(part[end:], add_special_tokens=False).ids

    def prompt(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of a prompt of (words, fixed) parts in order; only in fixed ones are added tokens recognised.

        What stands between two added tokens is tokenised as one string, as if the prompt had been typed.
        """
        ids: list[int] = []
        plain = ""
        for words, fixed in parts:
            end = 0
            for match in self._names.finditer(words) if fixed else ():
                ids += self._encode(plain + words[end : match.start()])
                ids.append(self.added[match.group()])
                plain, end = "", match.end()
            plain += words[end:]
        return ids + self._encode(plain)

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []

    def single(self, word: str, *, blank: bool = True) -> set[int]:
        """Ids of the tokens that are a word alone; with `blank` also with a blank before it. Maybe none."""
        found = {ids[0] for ids in self.text([word, " " + word] if blank else [word]) if len(ids) == 1}
        marks = ("", "▁") if blank else ("",)  # Llama's tokenizers mark blanks
        pieces = (self._plain.token_to_id(mark + word) for mark in marks)
        return found | {piece for piece in pieces if piece is not None}

    def without_last(self, text: str, count: int) -> str:
        """The text without its last `count` tokens, shorter by a character at least."""
        starts = [start for start, _ in self._plain.encode(text, add_special_tokens=False).offsets]
        end = starts[-count] if count < len(starts) else 0
        return text[: min(end, len(text) - 1)]

    def id_of(self, name: str) -> int:
        """Id of an added token.

        Raises:
            CheckpointError: the tokenizer has no such token.
        """
        try:
            return self.added[name]
        except KeyError:
            raise CheckpointError(f"the tokenizer has no added token {name!r}") from None


class SlotTokenizer(TextTokenizer):
    """For families whose tokenizer joins text with what stands before it: whole strings, one slot recognised.

    Slots are random strings that stand for added tokens, new each time, so no text can spell them.

    Args:
        folder: of the checkpoint.
        picture: name of the picture token.
        names: of the other tokens that a form can hold; all must be added tokens.
    """

    slot_id = -1
    """What a picture's slot becomes among the ids of `slotted`."""

    def __init__(self, folder: Path, picture: str, names: tuple[str, ...] = ("<s>", "</s>")) -> None:
        super().__init__(folder)
        self._slots = {name: f"\ufdd0{secrets.token_hex(16)}\ufdd1" for name in (*names, picture)}
        self.slot = self._slots[picture]
        self._slotted = Tokenizer.from_str(self._plain.to_str())
        ids = {}
        for name, slot in self._slots.items():
            ids[slot] = self.id_of(name)
            flags = {flag: bool(self._flags[name].get(flag)) for flag in ("lstrip", "rstrip")}
            self._slotted.add_special_tokens([AddedToken(slot, normalized=False, **flags)])
        # Slots have numbers of their own here, which stand for other tokens in the checkpoint.
        self._real = {self._slotted.token_to_id(slot): number for slot, number in ids.items()}
        self._real[self._slotted.token_to_id(self.slot)] = self.slot_id

    def slotted(self, strings: list[str]) -> list[list[int]]:
        """Ids of whole strings without their ends; `slot_id` where a picture goes."""
        rows = self._slotted.encode_batch(strings, add_special_tokens=False)
        return [[self._real.get(token, token) for token in row.ids] for row in rows]

    def fixed(self, part: str) -> str:
        """A fixed part of a prompt with a slot for each of its added tokens, for `slotted`."""
        return self._names.sub(lambda match: self._slots.get(match.group(), match.group()), part)

    def bare(self, form: str) -> str:
        """A form without the `<s>` and `</s>` at its ends."""
        return form.removeprefix("<s>").removesuffix("</s>")

    def ends(self, form: str) -> tuple[list[int], list[int]]:
        """Ids of the `<s>` and `</s>` at the ends of a form, each a list of one or none."""
        return (
            [self.added["<s>"]] if form.startswith("<s>") else [],
            [self.added["</s>"]] if form.endswith("</s>") else [],
        )


def bounded(text: str, limit: int) -> str:
    """The prefix of `text` that can matter to `limit` tokens."""
    return text[: max(4096, limit * _CHARACTERS_PER_TOKEN)]


def _load(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} can't be read as JSON") from error
    else:  # vocab.json and merges.txt: let transformers build the fast tokenizer
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
        except Exception as error:  # transformers raises many kinds here
            raise CheckpointError(f"{folder} has no tokenizer that transformers can open") from error
        raw = json.loads(backend.to_str())
    if not isinstance(raw, dict) or not isinstance(raw.get("added_tokens"), list) or "model" not in raw:
        raise CheckpointError(f"{path} is not a tokenizers file")
    return raw
