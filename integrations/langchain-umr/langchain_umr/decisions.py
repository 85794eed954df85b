"""`JudgeModel`: a multimodal reranker as a decision model of langchain-core 1.8 and newer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

from langchain_core import __version__ as core_version
from langchain_core.documents import Document
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from langchain_umr.inputs import to_item
from langchain_umr.references import guarded_item, guarded_pictures
from langchain_umr.reranker import MLLMReranker
from langchain_umr.threads import in_thread
from umr_plugins.errors import InputError, ItemError, MissingExtraError
from umr_plugins.types import Item

try:
    from langchain_core.decisions import BaseDecisionModel, ClassifierResponse, Noul, Question
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "JudgeModel is a decision model, which langchain-core has from 1.8 on; installed is "
        f'langchain-core {core_version}. Run pip install --upgrade "langchain-core>=1.8"; everything else of '
        "langchain_umr works with the version that is installed"
    ) from error

_QUESTION: TypeAdapter[Any] = TypeAdapter(Question)


def _judge(value: object) -> object:
    if value is None or isinstance(value, MLLMReranker):
        return value
    return MLLMReranker(reranker=value)


class JudgeModel(BaseDecisionModel):
    """Answers yes/no questions about a query and a document with a probability.

    Both may be text, pictures, or both. The answer to a `Noul` is the reranker's probability that the
    document answers the query, where the question's `instructions` (and its criteria, if it has any) say what
    counts as an answer. A reranker makes this one judgement, so other kinds of question are refused.

    ```python
    from langchain_core.decisions import Noul
    from langchain_umr import JudgeModel, MLLMReranker

    judge = JudgeModel(reranker=MLLMReranker(roots=["photos"]))    # Qwen/Qwen2-VL-2B-Instruct
    state = {"query": "a red kite", "document": {"text": "at the beach", "image": "kite.jpg"}}
    questions = {"fits": Noul(instructions="Does the photo show it?")}
    judge.invoke({"state": state, "questions": questions}).nouls["fits"].noul    # 0 to 1
    ```

    Query and document may be strings, content blocks, messages, `Document`s, or mappings with `text` and
    `image`. Files that a document names are opened only below the reranker's `roots`, as when it reranks;
    those of a query are opened as they are given, unless the query is a `Document`.

    What can't be judged raises an error: no probability is made up for it.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    model: str = ""
    """Name in answers and traces; the reranker's own by default."""
    reranker: Annotated[MLLMReranker, BeforeValidator(_judge)] = Field(default_factory=MLLMReranker)
    """What judges: `MLLMReranker`, or anything with the `rank` of `umr_plugins.Reranker`."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        self.model = self.model or self.reranker.rerank_model
        return self

    @property
    def _provider(self) -> str:
        return "umr"

    def _classify(self, state: Any, questions: Mapping[str, Any]) -> ClassifierResponse:
        """Probabilities by the questions' ids.

        Raises:
            InputError: another state, or a question that is no `Noul`.
            ItemError: query or document is empty, or its picture can't be read.
        """
        if not questions:
            raise InputError("there is no question; pass questions={id: Noul(instructions=...)}")
        asked = {name: _instruction(name, question) for name, question in questions.items()}
        query, document = self._pair(state)
        answers = {
            name: {"type": "noul", "noul": self._probability(query, document, instruction)}
            for name, instruction in asked.items()
        }
        return ClassifierResponse.model_validate({"model": self.model, "answers": answers})

    async def _aclassify(self, state: Any, questions: Mapping[str, Any]) -> ClassifierResponse:
        return await in_thread("rerank", self._classify, state, questions)

    def _pair(self, state: Any) -> tuple[Item, Item]:
        if not isinstance(state, Mapping) or set(state) != {"query", "document"}:
            what = (
                f"the keys {sorted(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            )
            raise InputError(f'state must be {{"query": ..., "document": ...}}, got {what}')
        return self._item("query", state["query"]), self._item("document", state["document"])

    def _item(self, name: str, value: Any) -> Item:
        roots, keys = self.reranker.roots, self.reranker.image_key
        try:
            if isinstance(value, Document):
                return guarded_item(value, roots, keys)
            # Nobody knows who wrote a document; the question is the user's own.
            return to_item(value) if name == "query" else guarded_pictures(to_item(value), roots)
        except ItemError as error:
            raise _of(error, name) from error

    def _probability(self, query: Item, document: Item, instruction: str) -> float:
        [judged] = self.reranker.scorer.rank(replace(query, instruction=instruction), [document])
        if judged.relevance is None:
            unjudged = judged.error or ItemError("model", "the model gave no judgement", stage="encode")
            raise _of(unjudged, "document")
        return float(judged.relevance)


def _instruction(name: str, question: Any) -> str:
    try:
        asked = _QUESTION.validate_python(question)
    except ValidationError as error:
        raise InputError(f"the question {name!r} is none of langchain_core.decisions: {error}") from None
    if not isinstance(asked, Noul):
        raise InputError(
            f"the question {name!r} is a {type(asked).__name__}; a reranker judges how likely a document "
            "answers a query, so only Noul questions can be asked"
        )
    parts: list[Any] = [asked.instructions]
    if asked.criteria is not None:
        for said, words in (("Yes", asked.criteria.true), ("No", asked.criteria.false)):
            parts += [] if words is None else [words if not isinstance(words, str) else f"{said}: {words}"]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise InputError(f"the question {name!r} must be asked in words: instructions and criteria are str")
    return "\n".join(parts)


def _of(error: ItemError, name: str) -> ItemError:
    what = f"{error.name}: {error.reason}" if error.name else error.reason
    return ItemError(error.code, what, stage=error.stage, name=f"the {name}")
