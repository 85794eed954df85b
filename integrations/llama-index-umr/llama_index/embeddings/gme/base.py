"""`GMEEmbedding`: the models of umr-plugins for LlamaIndex; their options, and how copies share them."""

from __future__ import annotations

import sys
from os import PathLike
from typing import Any, Literal, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.storage.kvstore.types import BaseKVStore
from llama_index.embeddings.gme.cache import CachedEncoder
from llama_index.embeddings.gme.encoding import ItemEmbedding
from llama_index.embeddings.gme.observing import NeverCached
from llama_index.embeddings.gme.options import plain

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


class GMEEmbedding(ItemEmbedding):
    """Embeds text, pictures and picture-with-text into one vector space.

    `GMEEmbedding()` is GME-2B. The model is loaded on first use, once per process and set of options:
    copies and unpickled instances share it. Coroutines run it in a thread of its own.

    Nodes are embedded as what they are: `embed_nodes`, an `IngestionPipeline` and `MultimodalIndex` fuse a
    picture with its text. A plain `VectorStoreIndex` embeds text only, whatever the embedding model.

    Args:
        model_name: bundled alias (`"umr-tiny"`), checkpoint folder or hub id.
        device: where the model runs, such as `"cpu"` or `"cuda"`.
        dtype: such as `"float32"` or `"bfloat16"`.
        dim: shorter vectors, for models trained for it.
        min_image_tokens: lower limit of tokens per picture.
        max_image_tokens: upper limit of tokens per picture.
        max_length: longest input in tokens; longer texts are cut.
        positions: `"sequential"` or `"mrope"`; what the checkpoint was trained with by default.
        max_batch_tokens: tokens per forward pass; does not change vectors.
        revision: revision of a hub checkpoint.
        adapter: folder or hub id of a LoRA adapter.
        instruction: what queries ask for; the model's own by default. Documents never get it.
        encoder: a ready `Embedder`, `RemoteEmbedder` or other encoder instead of a model by name. Not part
            of `to_dict()`; the options that it records are.
        embed_batch_size: texts per call of the model in the batch methods of LlamaIndex.
        num_workers: see `BaseEmbedding`; the model takes one batch at a time all the same.
        rate_limiter: see `BaseEmbedding`.
        callback_manager: see `BaseEmbedding`.
        embeddings_cache: a key-value store of LlamaIndex that keeps the vectors of documents, by a hash of
            the text, the pictures' bytes and the model. Queries are not kept. Neither dumped nor pickled.

    Raises:
        InputError: `encoder` together with options of the model.
    """

    # Every option is a field, because LlamaIndex rebuilds, dumps and hashes components by their fields.

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

    _encoder: Encoder | None = PrivateAttr(default=None)
    _encoder_options: dict[str, Any] = PrivateAttr(default_factory=dict)
    _vectors: BaseKVStore | None = PrivateAttr(default=None)

    def __init__(
        self,
        model_name: str | PathLike[str] | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        dim: int | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_length: int | None = None,
        positions: Literal["sequential", "mrope"] | None = None,
        max_batch_tokens: int | None = None,
        revision: str | None = None,
        adapter: str | PathLike[str] | None = None,
        instruction: str | None = None,
        encoder: Encoder | None = None,
        embed_batch_size: int = 256,
        num_workers: int | None = None,
        rate_limiter: Any = None,
        callback_manager: CallbackManager | None = None,
        embeddings_cache: BaseKVStore | None = None,
    ) -> None:
        arguments = locals()
        given = {name: plain(arguments[name]) for name in _OPTIONS if arguments[name] is not None}
        if encoder is not None:
            if model_name is not None or given:
                names = ", ".join(["model_name"] * (model_name is not None) + list(given))
                raise InputError(f"encoder has its own options: give either it or {names}")
            config = dict(getattr(encoder, "config", {}))
            model_name = str(config.get("model", type(encoder).__name__))
            given = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
        super().__init__(
            model_name=DEFAULT_MODEL if model_name is None else plain(model_name),
            instruction=instruction,
            embed_batch_size=embed_batch_size,
            num_workers=num_workers,
            rate_limiter=rate_limiter,
            callback_manager=callback_manager or CallbackManager([]),
            **given,
        )
        self._encoder, self._encoder_options = encoder, self._model_options()
        # Not in LlamaIndex's field of that name, which is keyed by text alone: a query would get a document's
        # vector, and one model another's.
        self._vectors = embeddings_cache

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex serialises the class."""
        return "GMEEmbedding"

    @property
    def encoder(self) -> Encoder:
        """The model: the one given as `encoder`, or the shared one, which is loaded on first use."""
        return self._model() if self._vectors is None else CachedEncoder(self._model(), self._vectors)

    def _model(self) -> Encoder:
        options = self._model_options()
        if self._encoder is not None and self._encoder_options == options:
            return self._encoder  # a copy whose options were changed has a model of its own
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
