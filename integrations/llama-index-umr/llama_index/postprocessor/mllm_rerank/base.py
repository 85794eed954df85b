"""`MLLMRerank`: the rerankers of umr-plugins for LlamaIndex; their options, and how copies share them."""

from __future__ import annotations

import sys
from os import PathLike
from typing import Any, Literal, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.embeddings.gme.options import plain
from llama_index.embeddings.gme.roots import Roots
from llama_index.embeddings.gme.worker import in_worker
from llama_index.postprocessor.mllm_rerank.judging import JudgedNode, judge, query_of
from llama_index_instrumentation import get_dispatcher

from umr_plugins.errors import InputError
from umr_plugins.media.roots import absolute_roots
from umr_plugins.ranking import check_rank
from umr_plugins.types import Item, PairScorer

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
_OPTIONS = (
    "prompt",
    "answers",
    "domain",
    "calibrate",
    "device",
    "dtype",
    "min_image_tokens",
    "max_image_tokens",
    "max_images",
    "max_length",
    "max_batch_tokens",
    "revision",
    "adapter",
)
_dispatcher = get_dispatcher(__name__)


class MLLMRerank(BaseNodePostprocessor):
    """Judges nodes (text, picture, picture with text, PDF page) against a query of text, picture or both.

    A multimodal LLM reads query and node together and says how likely the node answers the query. The
    result is a list of `JudgedNode`: new objects around the given nodes, which are not changed. A node that
    can't be judged (its picture is missing, say) is not lost: it keeps the rank the first stage gave it, has
    the reason in `error`, and a warning in the log counts all of them.

    The model is loaded on first use, once per process and set of options: copies and unpickled instances
    share it. Coroutines run it in a thread of its own.

    What a node holds is read as for `GMEEmbedding`: text with the metadata that embedding models see, and
    pictures where LlamaIndex puts them. No metadata value is ever taken for the path of a picture, and a file
    that a node names is opened only if this package opened it when it was indexed in a `UMRVectorStore`, if
    the node is one that was just embedded here (not one that came back from another store), or if the file
    lies below one of `roots`: whoever can write to another store could name any file.

    Args:
        model: checkpoint folder or hub id.
        top_n: most nodes to return.
        weight: how much relevance counts beside the first stage's score: a number, `"pure"` for relevance
            alone, or None for the task's own.
        instruction: what counts as an answer; the prompt's own by default.
        prompt: name or template of the prompt; the model's own by default. Other kinds of prompts go into a
            `Reranker` of your own, given as `reranker`.
        answers: the positive and the negative answer that are compared; the prompt's own by default.
        domain: which questions are asked: `"general"`, `"news"`, `"fashion"` or `"everyday"`.
        calibrate: take off the prompt's bias, measured with query and document that say nothing.
        device: where the model runs, such as `"cpu"` or `"cuda"`.
        dtype: such as `"float32"` or `"bfloat16"`.
        min_image_tokens: lower limit of tokens per picture.
        max_image_tokens: upper limit of tokens per picture.
        max_images: most pictures in one prompt.
        max_length: longest prompt in tokens; longer documents are cut.
        max_batch_tokens: tokens per forward pass; does not change scores.
        revision: revision of a hub checkpoint.
        adapter: folder or hub id of a LoRA adapter.
        roots: folders below which pictures and PDFs may lie that nodes of other stores name, links followed;
            a relative path counts from each in turn.
        reranker: a ready `Reranker` or other `PairScorer` instead of a model by name. Not part of
            `to_dict()`; the options that it records are.
        callback_manager: see `BaseNodePostprocessor`.

    Raises:
        InputError: `top_n`, `weight`, `prompt` or `roots` is not one of the allowed values, or `reranker` is
            together with options of the model.

    Example:
        >>> index.as_query_engine(similarity_top_k=20, node_postprocessors=[MLLMRerank(top_n=4)])
    """

    # Every option is a field, because LlamaIndex rebuilds and dumps components by their fields.

    model: str = Field(default=DEFAULT_MODEL, description="Checkpoint folder or hub id.")
    top_n: int = Field(default=5, description="Most nodes to return.")
    weight: float | Literal["pure"] | None = Field(default=None, description="How much relevance counts.")
    instruction: str | None = Field(default=None, description="What counts as an answer.")
    prompt: str | None = Field(default=None, description="Name or template of the prompt.")
    answers: tuple[str, str] | None = Field(default=None, description="The positive and the negative answer.")
    domain: str | None = Field(default=None, description="Which questions are asked.")
    calibrate: bool = Field(default=False, description="Take off the prompt's bias.")
    device: str | None = Field(default=None, description="Where the model runs.")
    dtype: str | None = Field(default=None, description="Number format of the weights.")
    min_image_tokens: int | None = Field(default=None, description="Lower limit of tokens per picture.")
    max_image_tokens: int | None = Field(default=None, description="Upper limit of tokens per picture.")
    max_images: int | None = Field(default=None, description="Most pictures in one prompt.")
    max_length: int | None = Field(default=None, description="Longest prompt in tokens.")
    max_batch_tokens: int | None = Field(default=None, description="Tokens per forward pass.")
    revision: str | None = Field(default=None, description="Revision of a hub checkpoint.")
    adapter: str | None = Field(default=None, description="Folder or hub id of a LoRA adapter.")
    roots: tuple[str, ...] = Field(default=(), description="Folders whose files nodes may name.")

    _reranker: PairScorer | None = PrivateAttr(default=None)
    _reranker_options: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        top_n: int = 5,
        weight: float | Literal["pure"] | None = None,
        instruction: str | None = None,
        prompt: str | None = None,
        answers: tuple[str, str] | None = None,
        domain: str | None = None,
        calibrate: bool = False,
        device: Any = None,
        dtype: Any = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_images: int | None = None,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        revision: str | None = None,
        adapter: str | PathLike[str] | None = None,
        roots: Roots = (),
        reranker: PairScorer | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        arguments = locals()
        given = {name: plain(arguments[name]) for name in _OPTIONS if _set(arguments[name])}
        if top_n is None:
            raise InputError("top_n must be a whole number of at least 1, got None")
        check_rank(0, top_n, None, weight)
        if prompt is not None and not isinstance(prompt, str):
            raise InputError(
                "prompt must be a name or a template, so that it can be dumped; give a Reranker with a "
                f"{type(prompt).__name__} as reranker="
            )
        if reranker is not None:
            if model is not None or given:
                names = ", ".join(["model"] * (model is not None) + list(given))
                raise InputError(f"reranker has its own options: give either it or {names}")
            if not isinstance(reranker, PairScorer):
                raise InputError(
                    f"reranker must have score() and rank() as PairScorer has; got {type(reranker).__name__}"
                )
            config = _config(reranker)
            model = config.pop("model")
            given = {name: plain(config[name]) for name in _OPTIONS if _set(config.get(name))}
        super().__init__(  # type: ignore[call-arg]  # pydantic fields
            model=DEFAULT_MODEL if model is None else plain(model),
            top_n=top_n,
            weight=weight,
            instruction=instruction,
            roots=tuple(str(root) for root in absolute_roots(roots)),
            callback_manager=callback_manager or CallbackManager([]),
            **given,
        )
        self._reranker, self._reranker_options = reranker, self._model_options()

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "MLLMRerank"

    @property
    def reranker(self) -> PairScorer:
        """The judge: the one given as `reranker`, or the shared one, which is loaded on first use."""
        options = self._model_options()
        if self._reranker is not None and self._reranker_options == options:
            return self._reranker  # a copy whose options were changed has a model of its own
        from umr_plugins.reranker import shared_reranker  # imports torch

        shared: PairScorer = shared_reranker(**options)
        return shared

    def _model_options(self) -> dict[str, Any]:
        given = {name: value for name in _OPTIONS if _set(value := getattr(self, name))}
        return {"model": self.model, **given}

    # Parameter names must be those of the base class: tracing binds them by name.

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = query_of(query_bundle, self.instruction)
        return [*self._observed(query, query_bundle, list(nodes))] if nodes else []

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        # A cancelled call that still waits for the thread never runs; one that runs ends unheard.
        return await in_worker("rerank", self._postprocess_nodes, list(nodes), query_bundle)

    def _observed(
        self, query: Item, bundle: QueryBundle | None, nodes: list[NodeWithScore]
    ) -> list[JudgedNode]:
        """`judge`, between a start and an end in both of LlamaIndex's event systems."""
        start = ReRankStartEvent(query=bundle, nodes=nodes, top_n=self.top_n, model_name=self.model)
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query.text or "",
            EventPayload.TOP_K: self.top_n,
        }
        _dispatcher.event(start)
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            judged = judge(self.reranker, query, nodes, self.top_n, self.weight, self.roots)
            event.on_end(payload={EventPayload.NODES: judged})
        _dispatcher.event(ReRankEndEvent(nodes=[*judged]))
        return judged

    # Copies share the weights. Pickles and dumps hold options only, never a loaded model.

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        names = [name for name in self.model_dump() if name != "class_name"]
        foreign = None if _recreatable(self._reranker) else self._reranker
        return {"options": {name: getattr(self, name) for name in names}, "reranker": foreign}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])  # type: ignore[misc]  # as BaseComponent does
        self._reranker = state["reranker"]


def _set(value: Any) -> bool:
    """Whether an option differs from its default; one that is passed on would load another model."""
    return value is not None and value is not False


def _config(reranker: PairScorer) -> dict[str, Any]:
    """What a reranker says of itself, `model` at least, as far as a dump can hold it."""
    name = getattr(reranker, "model", None)
    name = name if isinstance(name, str | PathLike) else type(reranker).__name__
    config: dict[str, Any] = {"model": name} | dict(getattr(reranker, "config", {}))
    if not isinstance(config.get("prompt"), str):
        config["prompt"] = None
    return config


def _recreatable(reranker: PairScorer | None) -> bool:
    """Whether the options say everything about the reranker, so that it need not be pickled."""
    module = sys.modules.get("umr_plugins.reranker")  # not imported yet: then it is no Reranker
    if reranker is None or module is None or not isinstance(reranker, module.Reranker):
        return reranker is None
    config = getattr(reranker, "config", None)
    return config is not None and isinstance(config.get("prompt"), str | None)
