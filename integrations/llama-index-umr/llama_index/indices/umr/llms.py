"""Which LLM answers: never one that nobody asked for."""

from __future__ import annotations

from llama_index.core import Settings
from llama_index.core.llms import LLM
from llama_index.core.llms.utils import LLMType, resolve_llm

from umr_plugins.errors import InputError


def chosen_llm(llm: LLMType | None) -> LLM:
    """The LLM that was given, else the one in `Settings` if one was set there.

    LlamaIndex reads an unset `Settings.llm` as OpenAI's paid service. Here that is an error; the strings
    that LlamaIndex knows (`"default"`, `"local:..."`) mean what they mean there.

    Raises:
        InputError: there is none, or what was given is none.
    """
    if llm is None:
        if Settings._llm is None:  # reading Settings.llm would make one
            raise InputError(
                "there is no LLM: llm was not given, and Settings.llm is not set. Pass llm=..., set "
                "Settings.llm, or pass extractive=True for the passages themselves, without an LLM"
            )
        return Settings.llm
    if isinstance(llm, LLM):
        return llm
    if isinstance(llm, str) and llm != "default" and llm.partition(":")[0] != "local":
        raise InputError(
            f"llm is the name {llm!r}; LlamaIndex knows 'default' and 'local:PATH' only, so pass an LLM"
        )
    try:
        return resolve_llm(llm)
    except AssertionError:  # how LlamaIndex says it
        raise InputError(
            f"llm is a {type(llm).__name__}; pass an LLM of LlamaIndex, or a name that it knows"
        ) from None


def chat_llm(llm: LLMType | None) -> LLM:
    """`chosen_llm`, if it chats; others are sent text only.

    Raises:
        InputError: see `chosen_llm`; also an LLM that does not chat and would lose all pictures.
    """
    chosen = chosen_llm(llm)
    if not chosen.metadata.is_chat_model:
        raise InputError(
            f"{type(chosen).__name__} is no chat model (metadata.is_chat_model), so it would be sent text "
            "only; use one that reads ImageBlocks, or pass extractive=True for passages without an LLM"
        )
    return chosen
