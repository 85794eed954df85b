"""The options of `GMEEmbedding`, the model they name, and what of it is copied, dumped and pickled."""

from __future__ import annotations

import sys
from typing import Any, Literal, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.embeddings.gme.observing import NeverCached

from umr_plugins.errors import InputError
from umr_plugins.types import Encoder

DEFAULT_MODEL = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
_OPTIONS = (
    "device",
    "dtype",
    "dim",
    "min_image_tokens",
    "max_image_tokens",
    "max_length",
    "positions",
    "max_batch_tokens",
    "revision",
    "adapter",
)


class ModelOptions(MultiModalEmbedding):
    """Every option is a field, because LlamaIndex rebuilds, dumps and hashes components by their fields.

    The model itself is no part of them: it is loaded on first use and shared by the whole process.
    """

    model_name: str = Field(default=DEFAULT_MODEL, description="Bundled alias, checkpoint folder or hub id.")
    device: str | None = Field(default=None, description="Where the model runs.")
    dtype: str | None = Field(default=None, description="Number format of the weights.")
    dim: int | None = Field(default=None, description="Shorter vectors, for models trained for it.")
    min_image_tokens: int | None = Field(default=None, description="Lower limit of tokens per picture.")
    max_image_tokens: int | None = Field(default=None, description="Upper limit of tokens per picture.")
    max_length: int | None = Field(default=None, description="Longest input in tokens.")
    positions: Literal["sequential", "mrope"] | None = Field(default=None, description="Position ids.")
    max_batch_tokens: int | None = Field(default=None, description="Tokens per forward pass.")
    revision: str | None = Field(default=None, description="Revision of a hub checkpoint.")
    adapter: str | None = Field(default=None, description="Folder or hub id of a LoRA adapter.")
    instruction: str | None = Field(default=None, description="What queries ask for.")

    _encoder: Encoder | None = PrivateAttr(default=None)
    _encoder_options: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        model_name: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        dim: int | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_length: int | None = None,
        positions: Literal["sequential", "mrope"] | None = None,
        max_batch_tokens: int | None = None,
        revision: str | None = None,
        adapter: str | None = None,
        instruction: str | None = None,
        encoder: Encoder | None = None,
        embed_batch_size: int = 256,
        num_workers: int | None = None,
        rate_limiter: Any = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: None = None,
    ) -> None:
        if embeddings_cache is not None:
            raise InputError(
                "embeddings_cache is not supported: LlamaIndex keys it by text alone, so a query would get a "
                "document's vector and one model another's. Keep vectors in a store (UMRVectorStore) instead."
            )
        given = {name: value for name, value in locals().items() if name in _OPTIONS and value is not None}
        if encoder is not None:
            if model_name is not None or given:
                names = ", ".join(["model_name"] * (model_name is not None) + list(given))
                raise InputError(f"encoder has its own options: give either it or {names}")
            config = dict(getattr(encoder, "config", {}))
            model_name = str(config.get("model", type(encoder).__name__))
            given = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
        super().__init__(
            model_name=DEFAULT_MODEL if model_name is None else model_name,
            instruction=instruction,
            embed_batch_size=embed_batch_size,
            num_workers=num_workers,
            rate_limiter=rate_limiter,
            callback_manager=callback_manager or CallbackManager([]),
            **given,
        )
        self._encoder, self._encoder_options = encoder, self._model_options()

    @property
    def encoder(self) -> Encoder:
        """The model: the one given as `encoder`, or the shared one, which is loaded on first use."""
        options = self._model_options()
        if (
            self._encoder is not None and self._encoder_options == options
        ):  # a changed copy has a model of its own
            return self._encoder
        from umr_plugins.embedder import shared_embedder  # imports torch

        return shared_embedder(**options)

    def _model_options(self) -> dict[str, Any]:
        given = {name: value for name in _OPTIONS if (value := getattr(self, name)) is not None}
        return {"model": self.model_name, **given}

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """All options as JSON values; `from_dict` makes an equal embedding of them."""
        data: dict[str, Any] = super().to_dict(**kwargs)
        return data | {"class_name": NeverCached(self.class_name())}

    # Copies share the weights. Pickles and dumps hold options only, never a loaded model.

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def __getstate__(self) -> dict[str, Any]:
        names = [name for name in self.model_dump() if name not in ("class_name", "embeddings_cache")]
        foreign = None if _recreatable(self._encoder) else self._encoder
        return {"options": {name: getattr(self, name) for name in names}, "encoder": foreign}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"])  # type: ignore[misc]  # as BaseComponent does
        self._encoder = state["encoder"]


def _recreatable(encoder: Encoder | None) -> bool:
    """Whether the options say everything about the encoder, so that it need not be pickled."""
    module = sys.modules.get("umr_plugins.embedder")  # not imported yet: then it is no Embedder
    return encoder is None or (module is not None and isinstance(encoder, module.Embedder))
