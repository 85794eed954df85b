"""From template and user text to token ids, so that no text can forge a picture slot or end a turn.

Template ids are fixed when the model is loaded. User text is tokenised on its own by a copy of the tokenizer
that knows no added token: `<|im_end|>` typed by a user is seven ordinary tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

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
        raw["truncation"] = raw["padding"] = raw["post_processor"] = None
        # The vocabulary is large: hash before building, once.
        self.sha256 = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
        self._plain = Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
        self._names = re.compile("|".join(re.escape(name) for name in sorted(added, key=len, reverse=True)))

    def text(self, texts: list[str]) -> list[list[int]]:
        """Ids of user texts, uncut. No id is that of an added token."""
        encoded = self._plain.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def template(self, part: str) -> list[int]:
        """Ids of a fixed template part, added tokens recognised."""
        ids: list[int] = []
        end = 0
        for match in self._names.finditer(part):
            ids += self._plain.encode(part[end : match.start()], add_special_tokens=False).ids
            ids.append(self.added[match.group()])
            end = match.end()
        return ids + self._plain.encode(part[end:], add_special_tokens=False).ids

    def id_of(self, name: str) -> int:
        """Id of an added token.

        Raises:
            CheckpointError: the tokenizer has no such token.
        """
        try:
            return self.added[name]
        except KeyError:
            raise CheckpointError(f"the tokenizer has no added token {name!r}") from None


def bounded(text: str, max_length: int) -> str:
    """The prefix of `text` that can matter to `max_length` tokens."""
    return text[: max(4096, max_length * _CHARACTERS_PER_TOKEN)]


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
