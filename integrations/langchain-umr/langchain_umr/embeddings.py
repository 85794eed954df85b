"""`GMEEmbeddings`: LangChain's `Embeddings`, for pictures too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from langchain_umr.inputs import to_item, to_items
from langchain_umr.ready import Ready, checked
from langchain_umr.threads import in_thread
from umr_plugins.errors import BatchError, InputError
from umr_plugins.types import Encoded, Encoder, FloatArray, ImageSource, Item, Role


def _plain(value: object) -> object:
    """Paths and torch's devices and dtypes as the plain strings that a configuration is made of."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__.partition(".")[0] == "torch":
        return str(value).removeprefix("torch.")
    return value


_REMEDY = 'Mend them, or leave them out; UMRVectorStore.add_items can skip them with on_error="skip".'

Name = Annotated[str, BeforeValidator(_plain)]


class GMEEmbeddings(BaseModel, Embeddings):
    """Embeds text, pictures, and text with a picture, into one vector space.

    Setup:
        `pip install langchain-umr`. The model is downloaded and loaded on first use, once per process: copies
        and pickles of this object share it.

    Instantiate:
        ```python
        from langchain_umr import GMEEmbeddings

        embeddings = GMEEmbeddings()                    # Alibaba-NLP/gme-Qwen2-VL-2B-Instruct
        embeddings = GMEEmbeddings(model="umr-tiny")    # bundled demonstration model: runs anywhere, offline
        ```

    Embed:
        ```python
        embeddings.embed_documents(["some text", {"text": "a caption", "image": "photo.jpg"}])
        embeddings.embed_image(uris=["photo.jpg"])
        embeddings.embed_query({"text": "like this, but red", "image": "photo.jpg"})
        ```

    Async:
        ```python
        await embeddings.aembed_documents(["some text"])
        ```

    Vectors are lists of Python floats, of unit length. A plain string is text, never a path. Web addresses of
    pictures are refused. To change an option, take `model_copy(update={...})`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Name = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
    """Bundled alias, folder of a checkpoint, or hub id."""
    device: Name | None = None
    """Torch device; the best one there is by default."""
    dtype: Name | None = None
    """`"float32"`, `"bfloat16"` or `"float16"`; what the device does well by default."""
    dim: int | None = Field(default=None, gt=0)
    """Length of the vectors; the model's own by default."""
    min_image_tokens: int | None = Field(default=None, gt=0)
    """Smallest number of tokens that a picture is resized to."""
    max_image_tokens: int | None = Field(default=None, gt=0)
    """Largest number of tokens that a picture is resized to."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest input in tokens; longer texts are cut."""
    max_batch_tokens: int | None = Field(default=None, gt=0)
    """Tokens in one forward pass; lower it when memory runs out."""
    positions: Literal["sequential", "mrope"] | None = None
    """Position ids; what the checkpoint was trained with by default."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository."""
    adapter: Name | None = None
    """Folder of a LoRA adapter."""
    instruction: str | None = None
    """Task description for queries; documents never get it."""

    _ready: Ready[Encoder] | None = PrivateAttr(default=None)

    @classmethod
    def from_encoder(cls, encoder: Encoder, *, instruction: str | None = None) -> Self:
        """Embeddings of an encoder that is ready: an `Embedder`, a `RemoteEmbedder`, a test double."""
        config = getattr(encoder, "config", None) or {"model": type(encoder).__name__}
        known = {key: value for key, value in config.items() if key in cls.model_fields}
        made = cls(**{**known, "instruction": instruction})
        made._ready = Ready(encoder, made.config)
        return made

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other options, checked as the constructor checks them.

        Raises:
            pydantic.ValidationError: an unknown option, or a value that it does not take.
        """
        return super().model_copy(update=checked(self, update or {}), deep=deep)

    @property
    def config(self) -> dict[str, Any]:
        """The options of the model that are set, as `umr_plugins.Embedder` takes them."""
        return self.model_dump(exclude={"instruction"}, exclude_none=True)

    @property
    def encoder(self) -> Encoder:
        """The model, loaded when it is first asked for and shared in the process."""
        if self._ready is not None and self._ready.model is not None and self._ready.config == self.config:
            return self._ready.model
        from umr_plugins.embedder import shared_embedder  # imports torch: not before it is needed

        return shared_embedder(**self.config)

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self.encoder.dim

    def embed_documents(self, texts: Iterable[Any]) -> list[list[float]]:
        """One vector per document: strings, mappings with `text` and `image`, items, `Document`s, blocks.

        Raises:
            BatchError: lists every document that can't be embedded.
        """
        return self.embed_items(texts)

    def embed_query(self, text: Any) -> list[float]:
        """The vector of one query, with the instruction.

        Args:
            text: a string, a mapping with `text` and `image`, content blocks, a message, a `Document` or a
                picture. A picture file that a `Document` names in its metadata is opened, wherever it lies:
                give only documents of your own, none from a store that others write to.

        Raises:
            ItemError: it can't be embedded.
        """
        try:
            return self._embed("query", [to_item(text)])[0]
        except BatchError as error:
            raise error.errors[0] from error

    def embed_image(self, uris: Iterable[ImageSource]) -> list[list[float]]:
        """One vector per picture: paths, data URIs, `PIL.Image`s, encoded bytes.

        Raises:
            BatchError: lists every picture that can't be embedded.
        """
        if isinstance(uris, str | bytes | os.PathLike | Mapping) or not isinstance(uris, Iterable):
            raise InputError(
                f"uris is a list of pictures, got one {type(uris).__name__}; pass uris=[picture]"
            )
        listed = list(uris)
        empty = [
            index
            for index, uri in enumerate(listed)
            if uri is None or (isinstance(uri, str | bytes) and not uri)
        ]
        if empty:
            raise InputError(f"uris {empty[:10]} are empty; give a path, data URI, PIL.Image or bytes each")
        return self._embed("document", [Item(image=uri) for uri in listed])

    def embed_images(self, uris: Iterable[ImageSource]) -> list[list[float]]:
        """The same as `embed_image`, under the name that some stores look for."""
        return self.embed_image(uris)

    def embed_items(self, items: Iterable[Any], *, role: Role = "document") -> list[list[float]]:
        """One vector per item of any form, as documents or as queries.

        Raises:
            BatchError: lists every item that can't be embedded.
        """
        if role not in ("query", "document"):
            raise InputError(f'role must be "query" or "document", got {role!r}')
        try:
            read = to_items(items)
        except BatchError as error:
            raise BatchError(error.errors, error.total, remedy=_REMEDY) from error
        return self._embed(role, read)

    async def aembed_documents(self, texts: Iterable[Any]) -> list[list[float]]:
        """`embed_documents` in a thread: one call of the model, and the event loop goes on."""
        return await in_thread("document", self.embed_documents, texts)

    async def aembed_query(self, text: Any) -> list[float]:
        """`embed_query` in a thread."""
        return await in_thread("query", self.embed_query, text)

    async def aembed_image(self, uris: Iterable[ImageSource]) -> list[list[float]]:
        """`embed_image` in a thread."""
        return await in_thread("document", self.embed_image, uris)

    async def aembed_images(self, uris: Iterable[ImageSource]) -> list[list[float]]:
        """`embed_images` in a thread."""
        return await in_thread("document", self.embed_images, uris)

    async def aembed_items(self, items: Iterable[Any], *, role: Role = "document") -> list[list[float]]:
        """`embed_items` in a thread."""
        return await in_thread("query" if role == "query" else "document", self.embed_items, items, role=role)

    def _embed(self, role: Role, items: list[Item]) -> list[list[float]]:
        if not items:
            return []
        try:
            if role == "query":
                return _rows(self.encoder.encode_queries(items, self.instruction))
            return _rows(self.encoder.encode_documents(items))
        except BatchError as error:
            raise BatchError(error.errors, error.total, remedy=_REMEDY) from error


def _rows(result: FloatArray | Encoded) -> list[list[float]]:
    vectors = result.vectors if isinstance(result, Encoded) else result
    rows: list[list[float]] = vectors.tolist()
    return rows
