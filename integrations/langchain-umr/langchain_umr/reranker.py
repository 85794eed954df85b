"""`MLLMReranker`: a multimodal language model as LangChain's document compressor and as a chain step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from langchain_umr.embeddings import Name
from langchain_umr.inputs import IMAGE_KEYS, to_item
from langchain_umr.judging import (
    Scores,
    first_stage,
    judged,
    listed_documents,
    one_each,
    read_request,
    warn_unjudged,
)
from langchain_umr.ready import Ready, checked
from langchain_umr.references import guarded_item, shown
from langchain_umr.threads import in_thread
from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.media.roots import absolute_roots
from umr_plugins.types import Item, PairScorer

_OPTIONS = (
    *("prompt", "answers", "domain", "calibrate", "device", "dtype", "min_image_tokens", "max_image_tokens"),
    *("max_images", "max_length", "max_batch_tokens", "revision", "adapter"),
)


def _ready(value: object) -> object:
    if value is None or isinstance(value, Ready):
        return value
    if not callable(getattr(value, "rank", None)):
        raise ValueError(
            f"reranker must have a method rank, as umr_plugins.Reranker does; got {type(value).__name__}"
        )
    return Ready(value, {})


def _keys(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class MLLMReranker(RunnableSerializable[Any, list[Document]], BaseDocumentCompressor):
    """Judges documents against a query with a multimodal language model, and puts the best first.

    Documents may be text, pictures, text with a picture, and pages of PDFs; so may the query.

    Setup:
        `pip install langchain-umr`. The model is downloaded and loaded on first use, once per process: copies
        and pickles of this object share it.

    Instantiate:
        ```python
        from langchain_umr import MLLMReranker

        reranker = MLLMReranker(top_n=5, roots=["photos"])    # Qwen/Qwen2-VL-2B-Instruct
        ```

    Rerank:
        ```python
        reranker.compress_documents(documents, "a red kite")
        reranker.invoke({"query": {"text": "the same in blue", "image": "kite.jpg"}, "documents": documents})
        ```

    Chain:
        ```python
        {"query": RunnablePassthrough(), "documents": retriever} | reranker
        ```

    Async:
        ```python
        await reranker.acompress_documents(documents, "a red kite")
        ```

    What comes back are copies, best first: id, page content and metadata as they were, with
    `relevance_score` and `rerank_model` added to the metadata. A document that can't be judged is not lost:
    it keeps the place that the first stage gave it, has `relevance_score` None and the reason in
    `rerank_error`, and one warning is logged.

    First-stage scores (higher is better) count too where every document has one in its metadata under
    `score_key`: documents are then ordered by that score plus `weight` times the relevance. If one is
    missing, relevance alone counts.

    Metadata that comes from a vector store may have been written by anyone, so a document's picture is opened
    only if it is a data URI or lies below one of `roots`. `RerankingRetriever` over an `UMRVectorStore`
    needs no roots: there the store itself knows which pictures were added to it. Pictures of a query are
    opened as they are given, unless the query is a `Document`.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), arbitrary_types_allowed=True
    )

    name: str | None = "rerank"
    """Name of the run in traces."""
    model: Name = "Qwen/Qwen2-VL-2B-Instruct"
    """Bundled alias, folder of a checkpoint, or hub id."""
    top_n: int | None = Field(default=5, ge=1)
    """Most documents to return; None for all."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["pure"] | None = None
    """What a relevance counts beside a first-stage score; `"pure"` for relevance alone, None for the
    task's own."""
    instruction: str | None = None
    """What counts as an answer, in words."""
    roots: Annotated[tuple[Path, ...], BeforeValidator(absolute_roots)] = ()
    """Folders below which pictures that documents name may be opened. Relative names count from them."""
    score_key: str | None = "score"
    """Metadata key of the first-stage score; None to ignore them."""
    image_key: Annotated[tuple[str, ...], BeforeValidator(_keys)] = IMAGE_KEYS
    """Metadata key, or keys, that name a document's picture; the first that is set counts."""
    prompt: str | None = None
    """Name of a prompt or a template of your own; the model's own by default."""
    answers: tuple[str, str] | None = None
    """What the model says of a relevant document and of another; the prompt's own by default."""
    domain: Literal["general", "news", "fashion", "everyday"] | None = None
    """Which questions the model is asked; general ones by default."""
    calibrate: bool = False
    """Subtract what the model says when there is nothing to judge."""
    device: Name | None = None
    """Torch device; the best one there is by default."""
    dtype: Name | None = None
    """`"float32"`, `"bfloat16"` or `"float16"`; what the device does well by default."""
    min_image_tokens: int | None = Field(default=None, gt=0)
    """Smallest number of tokens that a picture is resized to."""
    max_image_tokens: int | None = Field(default=None, gt=0)
    """Largest number of tokens that a picture is resized to."""
    max_images: int | None = Field(default=None, gt=0)
    """Most pictures in one prompt; with 1, those of query and document go onto one canvas."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest prompt in tokens; longer documents are cut."""
    max_batch_tokens: int | None = Field(default=None, gt=0)
    """Tokens in one forward pass; lower it when memory runs out."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository."""
    adapter: Name | None = None
    """Folder of a LoRA adapter."""
    reranker: Annotated[Any, BeforeValidator(_ready)] = Field(default=None, exclude=True, repr=False)
    """One that is ready, instead of `model` and its options: anything with the `rank` of
    `umr_plugins.Reranker`. Read it from `scorer`."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in ("model", *_OPTIONS) if getattr(self, name) != fields[name].default]
        if self.reranker is not None and given:
            raise ValueError(f"a reranker that is ready takes no options of a model, got {given}; drop one")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other options, checked as the constructor checks them.

        Raises:
            pydantic.ValidationError: an unknown option, or a value that it does not take.
        """
        return super().model_copy(update=checked(self, update or {}), deep=deep)

    @property
    def config(self) -> dict[str, Any]:
        """The model and those of its options that are set, as `umr_plugins.Reranker` takes them."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return {"model": self.model} | {
            name: one for name, one in options.items() if one not in (None, False)
        }

    @property
    def scorer(self) -> PairScorer:
        """The model, loaded when it is first asked for and shared in the process.

        Raises:
            InputError: this object came from another process, and its ready reranker could not come along.
        """
        if self.reranker is None:
            from umr_plugins.reranker import shared_reranker  # imports torch: not before it is needed

            loaded: PairScorer = shared_reranker(**self.config)
            return loaded
        ready: Any = self.reranker.model if isinstance(self.reranker, Ready) else self.reranker
        if ready is None:
            raise InputError(
                "the ready reranker of this object could not be pickled; make it anew here and pass it with "
                'model_copy(update={"reranker": ...}), or use model=, which is loaded where it is needed'
            )
        scorer: PairScorer = ready
        return scorer

    @property
    def rerank_model(self) -> str:
        """Name of the model, as judged documents carry it; nothing is loaded for it."""
        if self.reranker is None:
            return self.model
        scorer = self.scorer
        name = getattr(scorer, "model", None)
        return str(name) if isinstance(name, str | Path) else type(scorer).__name__

    def compress_documents(
        self, documents: Sequence[Document], query: Any, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best `top_n` documents, best first; see the class for what comes back.

        Args:
            documents: what a first stage found, best first. Ties keep this order.
            query: a string, a mapping with `text` and `image`, content blocks, a message, a `Document` or a
                picture.
            callbacks: of the caller; the work appears there as a run named `rerank`.

        Raises:
            ItemError: the query is empty, or its picture can't be read.
            InputError: `documents` are no documents.
        """
        return self.rerank(query, documents, config={"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: Any, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """`compress_documents` in a thread; the event loop goes on."""
        return await self.arerank(query, documents, config={"callbacks": callbacks})

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """`compress_documents` as a step of a chain.

        Args:
            input: a mapping with `query`, `documents` and, if there are any, first-stage `scores`; or the
                tuple `(query, documents)`. Other keys of a mapping are passed over.
            config: of the run.
            kwargs: none; an unknown one is refused.
        """
        query, documents, scores = read_request(input, kwargs)
        return self.rerank(query, documents, scores=scores, config=config)

    async def ainvoke(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any
    ) -> list[Document]:
        """`invoke` in a thread."""
        query, documents, scores = read_request(input, kwargs)
        return await self.arerank(query, documents, scores=scores, config=config)

    def rerank(
        self,
        query: Any,
        documents: Iterable[Document],
        *,
        scores: Scores | None = None,
        items: Sequence[Item | None] | None = None,
        config: RunnableConfig | None = None,
    ) -> list[Document]:
        """`compress_documents` with what is known about the documents beside what they hold themselves.

        Args:
            query: see `compress_documents`.
            documents: see `compress_documents`.
            scores: one of the first stage for each document, instead of those in the metadata.
            items: what to judge for each document, trusted as it is; None for the document itself.
            config: of the run.
        """
        listed = listed_documents(documents)
        return self._call_with_config(
            lambda _: self._ranked(query, listed, scores, items),
            {"query": shown(query), "documents": listed},
            config,
        )

    async def arerank(
        self,
        query: Any,
        documents: Iterable[Document],
        *,
        scores: Scores | None = None,
        items: Sequence[Item | None] | None = None,
        config: RunnableConfig | None = None,
    ) -> list[Document]:
        """`rerank` in a thread."""
        listed = listed_documents(documents)

        async def ranked(_: Any) -> list[Document]:
            return await in_thread("rerank", self._ranked, query, listed, scores, items)

        return await self._acall_with_config(ranked, {"query": shown(query), "documents": listed}, config)

    def _ranked(
        self,
        query: Any,
        documents: list[Document],
        scores: Scores | None,
        items: Sequence[Item | None] | None,
    ) -> list[Document]:
        if not documents:
            return []
        asked = self._query(query)
        first = first_stage(documents, scores, self.score_key)
        known = one_each("items", items, documents) or [None] * len(documents)
        readable: dict[int, Item] = {}
        outcomes: dict[int, float | ItemError] = {}
        for place, (document, item) in enumerate(zip(documents, known, strict=True)):
            try:
                readable[place] = item or guarded_item(document, self.roots, self.image_key)
            except ItemError as error:
                outcomes[place] = error
        # Those that can't be read stay where the first stage put them; the rest fill the other places.
        base = sorted(range(len(documents)), key=lambda place: 0.0 if first is None else -first[place])
        order = {place: place for place in outcomes}
        scorer, places = self.scorer, list(readable)
        ranked = (
            scorer.rank(
                asked,
                list(readable.values()),
                first_stage=None if first is None else [first[place] for place in places],
                weight=self.weight,
            )
            if readable
            else []
        )
        for slot, one in zip((place for place in base if place in readable), ranked, strict=True):
            order[slot] = places[one.index]
            unjudged = one.error or ItemError("model", "the model gave no judgement", stage="encode")
            outcomes[places[one.index]] = unjudged if one.relevance is None else float(one.relevance)
        warn_unjudged(outcomes)
        model = self.rerank_model
        return [judged(documents[order[slot]], outcomes[order[slot]], model) for slot in base][: self.top_n]

    def _query(self, query: Any) -> Item:
        try:
            guarded = isinstance(query, Document)
            item = guarded_item(query, self.roots, self.image_key) if guarded else to_item(query)
            for picture in (*item.pictures, *item.video):
                load_image(picture)  # a query that can't be read is one error, not one per document
        except ItemError as error:
            what = f"{error.name}: {error.reason}" if error.name else error.reason
            raise ItemError(error.code, what, stage=error.stage, name="the query") from error
        return item if item.instruction else replace(item, instruction=self.instruction)
