"""LlamaIndex's embedding interface on an `Encoder`: texts, pictures, nodes and queries."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import Field
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import BaseNode, ImageType, QueryBundle
from llama_index.embeddings.gme.checks import check_picture, check_vector
from llama_index.embeddings.gme.nodes import as_picture, describe, error_of, item_of, queries_of
from llama_index.embeddings.gme.observing import observed
from llama_index.embeddings.gme.roots import vouch
from llama_index.embeddings.gme.worker import in_worker

from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.media.images import load_image
from umr_plugins.types import (
    Encoded,
    Encoder,
    FloatArray,
    ImageSource,
    Item,
    ItemLike,
    OnError,
    Role,
    check_on_error,
    chunks,
)

_log = logging.getLogger(__name__)

_GROUP = 2048  # nodes per call of the model and per pair of events; the size LlamaIndex inserts in


class ItemEmbedding(MultiModalEmbedding):
    """Everything LlamaIndex asks of an embedding model, done by an `Encoder`."""

    instruction: str | None = Field(default=None, description="What queries ask for.")

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """What turns items into vectors."""

    # --- nodes ------------------------------------------------------------------------------------------

    def embed_nodes(
        self, nodes: Sequence[BaseNode], show_progress: bool = False, on_error: OnError = "raise"
    ) -> list[BaseNode]:
        """Set `embedding` of every node that has none, as text, picture or both, and return the nodes.

        Args:
            nodes: any mix of node kinds; changed in place.
            show_progress: show a progress bar.
            on_error: `"skip"` leaves nodes that can't be embedded out of the result, with a warning in the
                log for each.

        Raises:
            BatchError: with `on_error="raise"`; names the nodes. Nodes that were embedded keep their vector.
        """
        check_on_error(on_error)
        pending, errors = _pending(nodes)
        if errors and on_error == "raise":
            raise BatchError(self.refused(nodes, pictures=True), len(nodes))
        for group in chunks(pending, _GROUP):
            errors += self._embed_group(nodes, group, show_progress)
        if errors and on_error == "raise":
            raise BatchError(errors, len(nodes))
        for error in errors:
            _log.warning("left out: %s", error)
        refused = {error.index for error in errors}
        return [node for position, node in enumerate(nodes) if position not in refused]

    def refused(self, nodes: Sequence[BaseNode], pictures: bool = False) -> list[ItemError]:
        """What is wrong with nodes, as far as can be told without the model.

        Args:
            nodes: any mix of node kinds.
            pictures: open the pictures too.
        """
        pending, errors = _pending(nodes)
        for position, item in pending if pictures else ():
            try:
                for picture in item.pictures:
                    load_image(picture)
            except ItemError as error:
                errors.append(error_of(error, position, nodes[position]))
        return sorted(errors, key=lambda error: error.index or 0)

    def _embed_group(
        self, nodes: Sequence[BaseNode], group: list[tuple[int, Item]], show_progress: bool
    ) -> list[ItemError]:
        items = [item for _, item in group]
        with observed(self) as report:
            encoded = self.encoder.encode_documents(items, on_error="skip", show_progress=show_progress)
            assert isinstance(encoded, Encoded)  # what "skip" returns
            vectors = _lists(encoded.vectors)
            for kept, vector in zip(encoded.kept, vectors, strict=True):
                nodes[group[kept][0]].embedding = vector
                vouch(nodes[group[kept][0]])
            report(describe(items[kept] for kept in encoded.kept), vectors)
        return [
            error_of(error, position, nodes[position])
            for error in encoded.errors
            for position in [group[error.index or 0][0]]
        ]

    async def aembed_nodes(
        self, nodes: Sequence[BaseNode], show_progress: bool = False, on_error: OnError = "raise"
    ) -> list[BaseNode]:
        """`embed_nodes` for coroutines."""
        return await in_worker("document", self.embed_nodes, nodes, show_progress, on_error)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes as a step of an `IngestionPipeline`; options of `embed_nodes` are passed on."""
        return self.embed_nodes(nodes, kwargs.get("show_progress", False), kwargs.get("on_error", "raise"))

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """`__call__` for coroutines."""
        return await in_worker("document", self.__call__, nodes, **kwargs)

    # --- queries ----------------------------------------------------------------------------------------

    def get_query_bundle_embedding(self, bundle: QueryBundle) -> Embedding:
        """Vector of a query of text, picture (`image_path`) or both, with the instruction.

        Several `custom_embedding_strs` give the mean of their vectors, at unit length. A vector that the
        bundle already has comes back as it is.

        Raises:
            InputError: the bundle has neither text, picture nor vector.
        """
        if bundle.embedding is not None:
            return [float(value) for value in bundle.embedding]
        return self._query(queries_of(bundle))

    async def aget_query_bundle_embedding(self, bundle: QueryBundle) -> Embedding:
        """`get_query_bundle_embedding` for coroutines."""
        return await in_worker("query", self.get_query_bundle_embedding, bundle)

    def as_query(self, text: str | None = None, image: ImageSource | ImageType | None = None) -> QueryBundle:
        """A query of text, picture or both that any retriever of LlamaIndex takes: its vector is set.

        Args:
            text: what is searched for.
            image: path, data URI, bytes, `BytesIO` or `PIL.Image`. It is kept as `image_path`, so that
                rerankers and engines see it too: a path as text, as all of LlamaIndex expects it, and any
                other picture as it is.
        """
        picture = None if image is None else as_picture(image)
        place: Any = str(picture) if isinstance(picture, Path) else picture
        bundle = QueryBundle(query_str=text or "", image_path=place)
        bundle.embedding = self._query(queries_of(bundle))
        return bundle

    async def aas_query(
        self, text: str | None = None, image: ImageSource | ImageType | None = None
    ) -> QueryBundle:
        """`as_query` for coroutines."""
        return await in_worker("query", self.as_query, text, image)

    def _query(self, items: list[Item]) -> Embedding:
        with observed(self) as report:
            vectors = self._encode("query", items)
            lists = _lists(vectors)
            report(describe(items), lists)
        return lists[0] if len(lists) == 1 else _unit_mean(lists)

    def get_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """One vector for several queries: their mean at unit length, or what `agg_fn` makes of them.

        LlamaIndex's own mean is shorter than its parts, which makes scores of stores that do not measure the
        cosine incomparable.
        """
        return super().get_agg_embedding_from_queries(queries, agg_fn or _unit_mean)

    async def aget_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """`get_agg_embedding_from_queries` for coroutines."""
        return await super().aget_agg_embedding_from_queries(queries, agg_fn or _unit_mean)

    # --- pictures ---------------------------------------------------------------------------------------

    def get_fused_embedding(self, text: str, image: ImageSource | ImageType) -> Embedding:
        """Vector of a document of picture and text together."""
        return self._documents([Item(text=text, image=as_picture(image))])[0]

    async def aget_fused_embedding(self, text: str, image: ImageSource | ImageType) -> Embedding:
        """`get_fused_embedding` for coroutines."""
        return await in_worker("document", self.get_fused_embedding, text, image)

    def get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        """Vector of a document that is a picture: path, data URI, bytes, `BytesIO` or `PIL.Image`."""
        return self.get_image_embedding_batch([img_file_path])[0]

    async def aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        """`get_image_embedding` for coroutines."""
        return await in_worker("document", self.get_image_embedding, img_file_path)

    def get_image_embedding_batch(
        self, img_file_paths: list[ImageType], show_progress: bool = False
    ) -> list[Embedding]:
        """Vectors of pictures, in input order."""
        items = [Item(image=as_picture(picture)) for picture in img_file_paths]
        groups = chunks(items, _GROUP)
        return [vector for group in groups for vector in self._documents(group, show_progress)]

    async def aget_image_embedding_batch(
        self, img_file_paths: list[ImageType], show_progress: bool = False
    ) -> list[Embedding]:
        """`get_image_embedding_batch` for coroutines."""
        return await in_worker("document", self.get_image_embedding_batch, img_file_paths, show_progress)

    def _documents(self, items: list[Item], show_progress: bool = False) -> list[Embedding]:
        with observed(self) as report:
            vectors = _lists(self._encode("document", items, show_progress))
            report(describe(items), vectors)
        return vectors

    # --- what LlamaIndex asks for -----------------------------------------------------------------------

    def _get_query_embedding(self, query: str) -> Embedding:
        return _lists(self._encode("query", [query]))[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await in_worker("query", self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await in_worker("document", self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return _lists(self._encode("document", texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await in_worker("document", self._get_text_embeddings, texts)

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return await in_worker("document", self._get_image_embedding, img_file_path)

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return _lists(
            self._encode("document", [Item(image=as_picture(picture)) for picture in img_file_paths])
        )

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return await in_worker("document", self._get_image_embeddings, img_file_paths)

    def _encode(self, role: Role, items: Sequence[ItemLike], show_progress: bool = False) -> FloatArray:
        if role == "query":
            encoded = self.encoder.encode_queries(items, self.instruction, show_progress=show_progress)
        else:
            encoded = self.encoder.encode_documents(items, show_progress=show_progress)
        return encoded.vectors if isinstance(encoded, Encoded) else encoded


def _lists(vectors: FloatArray) -> list[Embedding]:
    """Python floats: numpy's are no JSON, and LlamaIndex does not convert them everywhere."""
    lists: list[Embedding] = np.asarray(vectors, dtype=np.float32).tolist()
    return lists


def _unit_mean(vectors: list[Embedding]) -> Embedding:
    if not vectors:
        raise InputError("no query was given; there is nothing to take the mean of")
    mean = np.asarray(vectors, dtype=np.float32).mean(axis=0)
    length = np.linalg.norm(mean)
    if not length:
        raise InputError("the queries' vectors cancel out, so their mean points nowhere; ask them one by one")
    return _lists(mean / length)


def _pending(nodes: Sequence[BaseNode]) -> tuple[list[tuple[int, Item]], list[ItemError]]:
    """Position and item of the nodes without a vector, and what is wrong with the others."""
    pending: list[tuple[int, Item]] = []
    errors: list[ItemError] = []
    for position, node in enumerate(nodes):
        try:
            if node.embedding is not None:
                check_vector(node)
                continue
            item = item_of(node)
            check_picture(node)
            pending.append((position, item))
        except ItemError as error:
            errors.append(error.at(position))
    return pending, errors
