"""Which engine answers over an index: ours, or one of LlamaIndex's where only that one knows the options."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.llms.utils import LLMType
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.indices.umr.chat import MultimodalChatEngine
from llama_index.indices.umr.llms import chosen_llm
from llama_index.indices.umr.query_engine import MultimodalQueryEngine
from llama_index.vector_stores.umr import UMRVectorStore

from umr_plugins.errors import InputError

_log = logging.getLogger(__name__)

_AGENTS = (ChatMode.REACT, ChatMode.OPENAI)


def _options(*functions: Callable[..., Any]) -> frozenset[str]:
    """The options of functions; what an index fills in itself is none."""
    filled = {"self", "cls", "index", "object_map", "retriever", "query_engine", "llm", "kwargs"}
    return frozenset(name for each in functions for name in inspect.signature(each).parameters) - filled


_RETRIEVER = _options(VectorIndexRetriever.__init__) - {"callback_manager"} | {"vector_store_kwargs"}
_QUERY = _options(MultimodalQueryEngine.__init__)
_CHAT = _options(MultimodalChatEngine.__init__)
_STOCK_QUERY = _options(RetrieverQueryEngine.from_args)
_STOCK_SIMPLE = _options(SimpleChatEngine.from_defaults)
_STOCK_CONDENSE = _options(CondenseQuestionChatEngine.from_defaults)


def query_engine(index: VectorStoreIndex, llm: LLMType | None, options: dict[str, Any]) -> BaseQueryEngine:
    """A `MultimodalQueryEngine`, or LlamaIndex's own if an option is given that only that knows.

    LlamaIndex's own shows pictures to LLMs that chat (`multimodal=True`) by default if the nodes are in a
    `UMRVectorStore`. Over other stores it has to be asked for, since that engine opens any file.

    Raises:
        InputError: an option that nothing knows; options of both engines; no LLM.
    """
    _refuse_others(options, _RETRIEVER | _QUERY | _STOCK_QUERY, "as_query_engine")
    retriever = index.as_retriever(**_some(options, _RETRIEVER))
    stock = options.keys() & (_STOCK_QUERY - _QUERY - _RETRIEVER)
    if not stock:
        ours_given = {"callback_manager": index._callback_manager} | _some(options, _QUERY)
        return MultimodalQueryEngine(retriever, llm, **ours_given)
    ours = options.keys() & (_QUERY - _STOCK_QUERY)
    if ours:
        raise InputError(
            f"{_listed(stock)} make it LlamaIndex's own RetrieverQueryEngine, which does not know "
            f"{_listed(ours)}; give either the former or the latter"
        )
    given = _some(options, _STOCK_QUERY)
    if (synthesizer := options.get("response_synthesizer")) is not None:
        llm = synthesizer._llm if llm is None else llm  # from_args asks for one that it does not use then
        return RetrieverQueryEngine.from_args(retriever, llm=chosen_llm(llm), **given)
    chosen = chosen_llm(llm)
    if "multimodal" not in given and chosen.metadata.is_chat_model:
        if isinstance(index.vector_store, UMRVectorStore):
            given["multimodal"] = True
        else:  # that engine opens whatever file a node names, and anyone may have written these nodes
            _log.warning(
                "%s make it LlamaIndex's own RetrieverQueryEngine, which shows no pictures here; "
                "multimodal=True shows them, and opens every file that a node of %s names",
                _listed(stock),
                type(index.vector_store).__name__,
            )
    return RetrieverQueryEngine.from_args(retriever, llm=chosen, **given)


def chat_engine(
    index: VectorStoreIndex, mode: ChatMode | str, llm: LLMType | None, options: dict[str, Any]
) -> BaseChatEngine:
    """A `MultimodalChatEngine`, or LlamaIndex's own for the modes that do not retrieve themselves.

    Raises:
        InputError: a mode that there is not; an option that nothing knows; no LLM.
    """
    mode = _mode(mode)
    if mode == ChatMode.SIMPLE:
        _refuse_others(options, _STOCK_SIMPLE, 'as_chat_engine("simple")')
        return SimpleChatEngine.from_defaults(llm=chosen_llm(llm), **options)
    if mode == ChatMode.CONDENSE_QUESTION:
        known = _STOCK_CONDENSE | _RETRIEVER | _QUERY | _STOCK_QUERY
        _refuse_others(options, known, 'as_chat_engine("condense_question")')
        rest = {name: value for name, value in options.items() if name not in _STOCK_CONDENSE}
        engine = query_engine(index, None if rest.get("extractive") else chosen_llm(llm), rest)
        talk = _some(options, _STOCK_CONDENSE)
        return CondenseQuestionChatEngine.from_defaults(engine, llm=chosen_llm(llm), **talk)
    _refuse_others(
        options,
        _RETRIEVER | _CHAT,
        "as_chat_engine",
        ". LlamaIndex's own chat engines take index.as_retriever() and options of their own",
    )
    given = {"callback_manager": index._callback_manager, "condense": mode != ChatMode.CONTEXT}
    retriever = index.as_retriever(**_some(options, _RETRIEVER))
    return MultimodalChatEngine(retriever, llm, **(given | _some(options, _CHAT)))


def _mode(mode: ChatMode | str) -> ChatMode:
    allowed = [each.value for each in ChatMode if each not in _AGENTS]
    if mode in allowed:
        return ChatMode(mode)
    agents = "; LlamaIndex has removed its agents from here: give one the query engine as a tool"
    raise InputError(
        f"there is no chat_mode {mode!r}; allowed are {_listed(allowed)}"
        + (agents if mode in _AGENTS else "")
    )


def _some(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _refuse_others(options: dict[str, Any], known: frozenset[str], function: str, more: str = "") -> None:
    if unknown := options.keys() - known:
        raise InputError(f"{function} has no option {_listed(unknown)}; it takes {_listed(known)}{more}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
