"""`UMREmbeddingFunction`: our models inside Chroma's own collections."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from chromadb.api.types import Embeddable, EmbeddingFunction, Space
from chromadb.utils.embedding_functions import register_embedding_function

from umr_plugins.backbones.spec import KNOWN, Positions
from umr_plugins.chroma.config import allow, check_allowed, check_hub_ids, checked, difference, named
from umr_plugins.chroma.inputs import REMEDY, not_empty, read_items
from umr_plugins.chroma.ready import identity, recall, remember
from umr_plugins.chroma.stamp import Stamp
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.types import Encoded, Encoder, FloatArray, Item, Role

_DEFAULT: Final = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
_Vectors = list[FloatArray]


@register_embedding_function
class UMREmbeddingFunction(EmbeddingFunction[Embeddable]):
    """Embeds texts and pictures in `collection.add` and `collection.query`, into one vector space.

    Making one loads nothing: Chroma makes many. The weights are loaded at the first embedding, once per
    process for equal options. Importing `umr_plugins.chroma` registers the class under the name `"umr"`, so
    that Chroma can rebuild it from what a collection records; nothing else of the library imports it.

    Recorded is what changes vectors: model, revision, adapter, dim, instruction, positions and limits. Not
    recorded are device, dtype and `max_batch_tokens`, which belong to the machine, nor the fingerprint of the
    weights, which is known only after they are loaded: `create_collection` of this package loads them and
    writes it into the collection's metadata. Of what is recorded Chroma compares the name `"umr"` only:
    `client.get_collection` takes a function with another model, `open_collection` of this package refuses it.

    Chroma embeds either documents or pictures. For text with a picture in one vector, embed it first:
    `collection.add(ids, embeddings=fn.embed_items(items), documents=texts, uris=paths)`.

    Args:
        model: bundled alias (`"umr-tiny"`), folder, or Hugging Face id; the default is GME-2B.
        revision: branch, tag or commit of a hub id.
        dim: length of the vectors; the model's own by default.
        instruction: what queries search for; documents never get it.
        positions: `"sequential"` or `"mrope"`; what the checkpoint was trained with by default.
        min_image_tokens: fewest visual tokens of a picture.
        max_image_tokens: most visual tokens of a picture.
        max_length: tokens per item; longer text is cut.
        adapter: folder or hub id of a LoRA adapter.
        device: torch device; the GPU when there is one.
        dtype: `"float32"` or `"bfloat16"`; what the machine does well by default.
        max_batch_tokens: budget of one forward pass.
        encoder: an encoder that is ready (`Embedder`, a test double), in place of all options but
            `instruction`. An `Embedder` is recorded by its options, any other by its name and fingerprint: a
            collection of such can only be opened while the program holds an equal encoder in this class.

    Raises:
        InputError: an option has a value that is not allowed, or is given beside `encoder`.

    Example:
        >>> from umr_plugins.chroma import UMREmbeddingFunction
        >>> function = UMREmbeddingFunction("umr-tiny")  # a demonstration model; leave it out for GME-2B
        >>> len(function(["a red apple"]))
        1
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = _DEFAULT,
        *,
        revision: str | None = None,
        dim: int | None = None,
        instruction: str | None = None,
        positions: Positions | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_length: int | None = None,
        adapter: str | os.PathLike[str] | None = None,
        device: Any = None,
        dtype: Any = None,
        max_batch_tokens: int | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "revision": revision,
            "dim": dim,
            "positions": positions,
            "min_image_tokens": min_image_tokens,
            "max_image_tokens": max_image_tokens,
            "max_length": max_length,
            "adapter": None if adapter is None else named(adapter),
        }
        machine = {"device": device, "dtype": dtype, "max_batch_tokens": max_batch_tokens}
        self._machine = {key: _plain(value) for key, value in machine.items() if value is not None}
        if encoder is None:
            chosen = {"model": named(model), **options}
        else:
            given = sorted(key for key, value in {**options, **machine}.items() if value is not None)
            if given or model != _DEFAULT:
                raise InputError(
                    f"{', '.join(given) or 'model'} can't be given beside a ready encoder; make the encoder "
                    "with them"
                )
            chosen = identity(encoder)
        self._config = checked({**chosen, "instruction": instruction})
        self._encoder = encoder
        self._stamp: Stamp | None = None
        self._remember()

    @property
    def encoder(self) -> Encoder:
        """The model, loaded when it is first asked for and shared in the process.

        Raises:
            FingerprintError: this function belongs to an opened collection that another model has filled.
            InputError: a folder has come to lie where a hub id would be looked for first.
        """
        encoder = self._encoder
        if encoder is None:
            from umr_plugins.embedder import shared_embedder  # imports torch: not before it is needed

            check_hub_ids(self._config)
            options = {key: value for key, value in self._config.items() if key != "instruction"}
            encoder = shared_embedder(**options, **self._machine)
        if self._stamp is not None:
            self._stamp.check(encoder)
        return encoder

    def __call__(self, input: Embeddable) -> Any:
        """One float32 vector `[dim]` per document: texts, or pictures as arrays.

        Args:
            input: strings, or arrays `[height, width]` or `[height, width, 1..4]`: uint8 (RGB, grey, with
                alpha), wider integers, floats within 0 to 1 or 0 to 255, booleans.

        Raises:
            BatchError: lists every position that can't be embedded: a blank text, no picture, NaN, None.
            InputError: no list, or an empty one.
            FingerprintError: as `encoder`.
        """
        return self._embed(not_empty(read_items(input)), "document")

    def embed_query(self, input: Embeddable) -> Any:
        """One float32 vector `[dim]` per query, with the instruction; `input` and errors as for a call."""
        return self._embed(not_empty(read_items(input)), "query")

    def embed_items(self, items: Iterable[Any], role: Role = "document") -> list[FloatArray]:
        """One float32 vector `[dim]` per item of any form, fused ones included; for `embeddings=`.

        Args:
            items: strings, arrays, `Item`s, mappings with `text` and `image`, `PIL.Image`s, `Path`s. A query
                may bring its own `instruction`.
            role: `"document"`, or `"query"` for `query_embeddings=`.

        Raises:
            BatchError: lists every item that can't be embedded.
        """
        if role not in ("query", "document"):
            raise InputError(f'role must be "query" or "document", got {role!r}')
        return self._embed(read_items(items), role)

    def _embed(self, items: list[Item], role: Role) -> _Vectors:
        if not items:
            return []
        encoder = self.encoder
        try:
            if role == "query":
                encoded = encoder.encode_queries(items, self._config.get("instruction"))
            else:
                encoded = encoder.encode_documents(items)
        except BatchError as error:
            raise BatchError(error.errors, error.total, remedy=REMEDY) from error
        vectors = np.asarray(encoded.vectors if isinstance(encoded, Encoded) else encoded, np.float32)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            what = "the model gave values that are no number (NaN or infinity)"
            errors = [ItemError("model", what, stage="encode", index=int(at)) for at in wrong]
            raise BatchError(errors, len(items), remedy=REMEDY)
        return list(vectors)

    @staticmethod
    def name() -> str:
        """The name under which collections record this class."""
        return "umr"

    def default_space(self) -> Space:
        """Cosine."""
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        """All three: vectors have unit length, so they rank alike; distances differ in scale."""
        return ["cosine", "ip", "l2"]

    def get_config(self) -> dict[str, Any]:
        """What a collection records: the options that change vectors, as far as they are set."""
        return dict(self._config)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> UMREmbeddingFunction:
        """The function that a collection has recorded. Loads nothing.

        Only bundled models, models known by their hub id (at their default revision, without adapter), and
        what this program has named itself, in a constructor or through `allow`, are taken.

        Raises:
            InputError: an unknown key (`trust_remote_code`, `kwargs`), another model, or a value that is not
                allowed.
        """
        config = checked(config)
        machine, encoder = recall(config)
        if "encoder" not in config:
            check_allowed(config)
        elif encoder is None:
            raise InputError(
                f"the collection was made with an encoder of the program's own, {config['encoder']!r} "
                f"(fingerprint {config['fingerprint'][:12]}), which can't be rebuilt. Make it again and keep "
                "it: UMREmbeddingFunction(encoder=...)"
            )
        made = UMREmbeddingFunction.__new__(UMREmbeddingFunction)
        made._config, made._machine, made._encoder, made._stamp = config, machine, encoder, None
        return made

    @staticmethod
    def validate_config(config: dict[str, Any]) -> None:
        """Raise `InputError` for a configuration that `build_from_config` would not take."""
        UMREmbeddingFunction.build_from_config(config)

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Raise `InputError` if anything changed: the rows of the collection are of the old model.

        Chroma 1.5.9 asks only after it has stored the change; `open_collection` notices it by the
        fingerprint.
        """
        changed = difference(checked(old_config), checked(new_config))
        if changed:
            raise InputError(
                f"the embedding function of a collection can't be changed ({changed}); make a new collection"
            )

    @classmethod
    def allow(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
    ) -> None:
        """Let collections load this model in this process, as a constructor with it does."""
        given = {"model": named(model), "revision": revision, "adapter": adapter and named(adapter)}
        allow(checked(given))

    def stamped(self, stamp: Stamp) -> UMREmbeddingFunction:
        """The same function for one collection: compared with its stamp before anything is embedded.

        Raises:
            FingerprintError: they differ already in what is known without loading the model.
        """
        model = self._config.get("model")
        dim = self._config.get("dim") or (KNOWN[model].dim if model in KNOWN else 0)
        if dim:
            stamp.check_dim(dim)
        if self._encoder is not None:
            stamp.check(self._encoder)
        made = copy.copy(self)
        made._stamp = stamp
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> UMREmbeddingFunction:
        return copy.copy(self)  # nothing in it ever changes, and weights are shared

    def __getstate__(self) -> dict[str, Any]:
        # An Embedder is what its options say; any other encoder has to travel itself.
        return {**self.__dict__, "_encoder": self._encoder if "encoder" in self._config else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._encoder is None:
            self._encoder = recall(self._config)[1]
        self._remember()

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self._config.items())
        return f"{type(self).__name__}({options})"

    def _remember(self) -> None:
        if "encoder" not in self._config:
            allow(self._config)
        remember(self._config, self._machine, self._encoder)


def _plain(value: Any) -> Any:
    """Torch's devices and dtypes as the strings that options are made of."""
    return str(value).removeprefix("torch.") if type(value).__module__.startswith("torch") else value
