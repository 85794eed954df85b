"""Whether a model can be asked a prompt: its tokens for the chat form, for pictures and for answers."""

from __future__ import annotations

import re

from umr_plugins.backbones.base import Backbone
from umr_plugins.errors import CheckpointError, InputError
from umr_plugins.prompts.rerank import RerankPrompt

_TOKENS = re.compile(r"<\|\w+\|>|</?s>|<image>")


def check_rendering(backbone: Backbone, prompt: RerankPrompt) -> None:
    """Check that a model has every token that its chat form and prompt are written with.

    Raises:
        CheckpointError: a token of the chat form is missing.
        InputError: the template holds a picture token; pictures go where query and document do.
    """
    spec = backbone.spec
    slot = _TOKENS.findall(spec.image_slot)
    for name in (*_TOKENS.findall(spec.template), *slot):
        if name not in backbone.added_tokens:
            raise CheckpointError(
                f"the chat form of {spec.name} can't be written: its tokenizer has no token {name!r}. If it "
                "is asked in another form, write that as `template` into an umr.json beside the checkpoint"
            )
    held = [name for name in slot if name in prompt.template]
    if held:
        raise InputError(
            f"the prompt template holds the picture token {held[0]!r}; pictures are put in at {{query}} and "
            "{document} by themselves"
        )


def answer_ids(backbone: Backbone, prompt: RerankPrompt) -> tuple[list[int], list[int]]:
    """Token ids of the positive and of the negative answer.

    Args:
        backbone: knows the model's tokens.
        prompt: has the answers, and says whether both spellings count.

    Raises:
        InputError: an answer is no single token, or the two share one.
    """
    found: list[list[int]] = []
    for answer in prompt.answers:
        ids = sorted(backbone.single_tokens(answer, blank=prompt.spellings == "both"))
        if not ids:
            raise InputError(
                f"the answer {answer!r} is not a single token of this model; use short common words such as "
                '("True", "False"), ("Yes", "No") or ("A", "B")'
            )
        found.append(ids)
    if set(found[0]) & set(found[1]):
        raise InputError(
            f"the answers {prompt.answers[0]!r} and {prompt.answers[1]!r} share a token, so they can't be "
            "told apart; use two different words"
        )
    return found[0], found[1]
