"""What a reranking model is asked, as data: one question per (query, document, domain).

The query comes first in every prompt, so that its part is computed once for all documents. The questions
follow MM-Embed's zero-shot reranker (arXiv 2411.02571), whose published prompts cover captions;
the others are our wording. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from umr_plugins.errors import InputError
from umr_plugins.types import Modality

Domain = Literal["general", "news", "fashion", "everyday"]
DOMAINS: tuple[Domain, ...] = ("general", "news", "fashion", "everyday")

Question = tuple[Modality, Modality, Domain]
"""Modality of the query, modality of the document, domain."""

_PAIRS: dict[tuple[Modality, Modality], str] = {
    ("text", "text"): "Does the candidate contain the answer to the query?",
    (
        "text",
        "fused",
    ): "Does the candidate, picture and text together, contain the answer to the query?",
    ("image", "image"): "Do the two pictures look nearly identical?",
    ("image", "fused"): "Does the candidate show or describe what the query's picture shows?",
    ("fused", "text"): "Does the candidate answer the query about the query's picture?",
    ("fused", "image"): "Does applying the query's words to the first picture give the second picture?",
    (
        "fused",
        "fused",
    ): "Does the candidate, picture and text together, answer the query about the first picture?",
}
_KIND: dict[Domain, str] = {"general": "", "news": "news ", "fashion": "fashion ", "everyday": "daily-life "}

QUESTIONS: dict[Question, str] = {
    **{(*pair, domain): words for pair, words in _PAIRS.items() for domain in DOMAINS},
    **{
        ("text", "image", domain): f"Does the candidate {kind}picture fit the query as its caption?"
        for domain, kind in _KIND.items()
    },
    **{
        ("image", "text", domain): f"Does the candidate describe the {kind}picture of the query?"
        for domain, kind in _KIND.items()
    },
}
"""The question that ends a prompt."""

CANVAS = "The query's picture is on the left, the candidate's on the right. "
"""Said before the question where both pictures had to go onto one canvas."""

WORDS = "{positive} or {negative}"
CHOICE = "{positive}: it fully does. {negative}: it does not, or only in part. {positive} or {negative}"
"""How word answers and lettered choices are offered."""

CONTENT_FREE = "N/A"
"""Stands for query and document when the bias of a prompt is measured (arXiv 2102.09690)."""

SLOTS = ("instruction", "query", "document", "question", "answers")


@dataclass(frozen=True)
class RerankPrompt:
    """How a query and a document are put to a model.

    Args:
        name: for people.
        template: the user turn; `{query}` and then `{document}` once each, `{instruction}`, `{question}` and
            `{answers}` at most once.
        instruction: fills `{instruction}` unless the query has its own.
        answers: the positive and the negative answer.
        spellings: whether an answer counts with and without a blank before it (`both`), or as it is written
            (`exact`), as models trained on one token need it.
        questions: fill `{question}`.
        empty: stands for a missing text.
        instruct_query: whether the query's own instruction goes before its words, where the template has no
            slot for it.
    """

    name: str
    template: str
    instruction: str = ""
    answers: tuple[str, str] = ("True", "False")
    spellings: Literal["both", "exact"] = "both"
    questions: Mapping[Question, str] = field(default_factory=lambda: QUESTIONS)
    empty: str = ""
    instruct_query: bool = False

    def parts(self) -> Iterator[tuple[str, str]]:
        """The template as (literal, slot) pairs in order; the last slot is empty."""
        pieces = re.split(r"\{(" + "|".join(SLOTS) + r")\}", self.template)
        yield from zip(pieces[::2], [*pieces[1::2], ""], strict=True)

    def offered(self) -> str:
        """What fills `{answers}`."""
        positive, negative = self.answers
        form = CHOICE if len(positive) == len(negative) == 1 else WORDS
        return form.format(positive=positive, negative=negative)


PROMPTS: dict[str, RerankPrompt] = {
    "judge": RerankPrompt(
        "judge",
        "{instruction}\nQuery: {query}\nCandidate: {document}\n{question} {answers}",
        "Judge a candidate against a query.",
    ),
    "qwen3-vl-reranker": RerankPrompt(
        "qwen3-vl-reranker",
        "<Instruct>: {instruction}<Query>:{query}\n<Document>:{document}",
        "Given a search query, retrieve relevant candidates that answer the query.",
        ("yes", "no"),
        "exact",
        empty="NULL",
    ),
    # LamRA's training prompt, its misspelling and its run of blanks included (arXiv 2412.01720).
    "lamra": RerankPrompt(
        "lamra",
        "I will provide you with a query and a candidate. Please evaluate whether the candidate"
        + " " * 24
        + "meets the requirements of the query. If it does, respond with 'Yes'; if it doesn't, responed with "
        "'No'.Query:{query}Candidate:{document}",
        answers=("Yes", "No"),
        spellings="exact",
        instruct_query=True,
    ),
}
"""Prompts by name."""


def choose_prompt(
    prompt: str | RerankPrompt | None, answers: tuple[str, str] | None, default: str
) -> RerankPrompt:
    """The prompt that was asked for, checked: a name, a template with slots, or a `RerankPrompt`.

    Raises:
        InputError: an unknown name or slot, a slot that is missing, doubled or before the query's.
    """
    if isinstance(prompt, RerankPrompt):
        chosen = prompt
    elif prompt is None or prompt in PROMPTS:
        chosen = PROMPTS[prompt or default]
    elif isinstance(prompt, str) and "{" in prompt:
        # Without a slot of its own an instruction goes before the query's words: it is never dropped.
        chosen = dataclasses.replace(
            PROMPTS["judge"],
            name="custom",
            template=prompt,
            instruct_query="{instruction}" not in prompt,
        )
    else:
        near = difflib.get_close_matches(str(prompt), PROMPTS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"prompt must be one of {sorted(PROMPTS)} or a template with {{query}} and {{document}}, got "
            f"{prompt!r}{meant}"
        )
    if answers is not None and chosen.name in PROMPTS and "{answers}" not in chosen.template:
        raise InputError(
            f"the prompt {chosen.name!r} was trained with {chosen.answers[0]!r} and {chosen.answers[1]!r} "
            f"and offers no others; leave answers away, or give a template of your own; got {answers!r}"
        )
    chosen = dataclasses.replace(chosen, answers=_two(chosen.answers if answers is None else answers))
    _check(chosen)
    return chosen


def _two(answers: object) -> tuple[str, str]:
    good = isinstance(answers, tuple | list) and len(answers) == 2
    if not good or not all(isinstance(each, str) and each.strip() for each in answers):  # type: ignore[attr-defined]
        raise InputError(
            f'answers must be the positive and the negative answer, such as ("Yes", "No"); got {answers!r}'
        )
    positive, negative = (each.strip() for each in answers)  # type: ignore[attr-defined]
    return positive, negative


def _check(prompt: RerankPrompt) -> None:
    found = re.findall(r"\{(\w*)\}", prompt.template)
    unknown = sorted(set(found) - set(SLOTS))
    if unknown:
        raise InputError(f"the prompt template has unknown slots {unknown}; allowed are {list(SLOTS)}")
    for slot in SLOTS:
        count = found.count(slot)
        if count > 1 or (count == 0 and slot in ("query", "document")):
            raise InputError(
                f"the prompt template needs {{query}} and {{document}} once each and any other slot at most "
                f"once; it has {{{slot}}} {count} times: {prompt.template!r}"
            )
    if found.index("query") > found.index("document"):
        raise InputError(
            "the prompt template needs {query} before {document}: the query's part is computed once for all "
            f"documents; got {prompt.template!r}"
        )
    missing = set(QUESTIONS) - set(prompt.questions) if "question" in found else set()
    if missing:
        raise InputError(
            f"the prompt's template has {{question}}, but its questions lack {sorted(missing)[:3]} and so "
            f"on; there must be one for each of the {len(QUESTIONS)} keys of "
            "umr_plugins.prompts.rerank.QUESTIONS"
        )
    before = prompt.template.split("{document}")[0]
    late = [slot for slot in ("question", "answers") if f"{{{slot}}}" in before]
    if late:
        raise InputError(
            f"the prompt template has {{{late[0]}}} before {{document}}, but the question depends on the "
            "document; put it behind"
        )
