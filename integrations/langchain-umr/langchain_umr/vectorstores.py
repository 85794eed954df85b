"""`UMRVectorStore`: LangChain's `VectorStore` on the core `Index`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from langchain_umr.embeddings import GMEEmbeddings
from langchain_umr.encoders import TextEncoder
from langchain_umr.inputs import IMAGE_KEYS
from langchain_umr.threads import in_thread
from langchain_umr.writing import StoreWriter
from umr_plugins.errors import InputError
from umr_plugins.types import Encoder


class UMRVectorStore(StoreWriter):
    """Keeps and searches text, pictures, picture-with-text and document pages.

    Setup:
        `pip install langchain-umr`; no server and no account.

    Instantiate:
        ```python
        from langchain_umr import GMEEmbeddings, UMRVectorStore

        store = UMRVectorStore(GMEEmbeddings())               # in memory
        store = UMRVectorStore(GMEEmbeddings(), path="db")    # in a folder, survives a crash
        ```

    Add:
        ```python
        store.add_files(["report.pdf", "photo.jpg"])
        store.add_texts(["some text"])
        store.add_images(["photo.jpg"], captions=["a red kite"])
        store.add_documents([Document("a red kite", metadata={"image": "photo.jpg"})])  # one fused vector
        ```

    Search:
        ```python
        store.similarity_search("a kite", k=4, filter={"lang": "en"})
        store.as_retriever().invoke({"text": "the same in blue", "image": "photo.jpg"})
        ```

    Copies share the rows. A pickle of a store in a folder opens the folder again; one process at a time may.

    Args:
        embedding: `GMEEmbeddings`, any other LangChain embeddings (text only), or an `umr_plugins` encoder.
            Leave it out for a folder that exists: its own model is used.
        path: folder of the index, or URL of a Chroma server; None keeps everything in memory.
        collection: name of the collection in the index.
        ledger: folder for the ledger, if it is not to be in `path`.
        image_key: metadata key, or keys, under which documents name their picture; the first set counts.

    Raises:
        FingerprintError: the folder was made with another model or other vector options.
        IndexLockedError: another process has it open.
    """

    def __init__(
        self,
        embedding: Embeddings | Encoder | None = None,
        path: str | Path | None = None,
        *,
        collection: str = "umr",
        ledger: Path | None = None,
        image_key: str | Sequence[str] = IMAGE_KEYS,
    ) -> None:
        if embedding is None and path is None:
            raise InputError(
                "give an embedding, as in UMRVectorStore(GMEEmbeddings()), or the path of an index"
            )
        self.image_keys = (image_key,) if isinstance(image_key, str) else tuple(image_key)
        self._embeddings, encoder = _both(embedding)
        if isinstance(self._embeddings, GMEEmbeddings):
            self.instruction = self._embeddings.instruction
        from umr_plugins.index.index import Index  # imports chromadb: not before it is needed

        self.index = Index(path, encoder, collection=collection, ledger=ledger)

    @property
    def embeddings(self) -> Embeddings | None:
        """The embeddings this store was made with; None if it was opened by its folder alone."""
        return self._embeddings

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        embedding: Embeddings | Encoder,
        metadatas: Iterable[dict[str, Any]] | None = None,
        *,
        ids: Iterable[str | None] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store with these texts; further arguments are those of the constructor."""
        store = cls(embedding, **kwargs)
        try:
            store.add_texts(texts, metadatas, ids=ids)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        embedding: Embeddings | Encoder,
        *,
        ids: Iterable[str | None] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store with these documents; further arguments are those of the constructor."""
        store = cls(embedding, **kwargs)
        try:
            store.add_documents(documents, ids=ids)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    async def afrom_documents(
        cls, documents: Iterable[Document], embedding: Embeddings | Encoder, **kwargs: Any
    ) -> Self:
        """`from_documents` in a thread."""
        return await in_thread("document", cls.from_documents, documents, embedding, **kwargs)

    @classmethod
    async def afrom_texts(
        cls, texts: Iterable[str], embedding: Embeddings | Encoder, *args: Any, **kwargs: Any
    ) -> Self:
        """`from_texts` in a thread."""
        return await in_thread("document", cls.from_texts, texts, embedding, *args, **kwargs)

    def delete(
        self, ids: Iterable[str] | None = None, *, filter: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> bool:
        """Delete by ids, or all that a metadata filter matches; without both, everything (LangChain's rule).

        Ids that are not there are passed over.

        Raises:
            InputError: an empty filter, which would match everything.
        """
        if kwargs:
            raise InputError(f"unknown arguments {sorted(kwargs)}; allowed are ids and filter")
        if isinstance(ids, str):
            raise InputError("ids is a list of ids, got one str: delete([id])")
        if filter is not None and not filter:
            raise InputError("an empty filter matches everything; delete() without arguments deletes all")
        if ids is None and filter is None:
            self.index.delete(self.index.ids())
        else:
            self.index.delete(None if ids is None else list(ids), where=filter)
        return True

    async def adelete(self, ids: Iterable[str] | None = None, **kwargs: Any) -> bool:
        """`delete` in a thread."""
        return await in_thread("document", self.delete, ids, **kwargs)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids; those that are not there are left out."""
        if isinstance(ids, str):
            raise InputError("ids is a list of ids, got one str: get_by_ids([id])")
        return [self._document(hit) for hit in self.index.get(list(dict.fromkeys(ids)))]

    def close(self) -> None:
        """Close the index, so that another process can open the folder."""
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __copy__(self) -> Self:
        return self  # rows are kept once; a copy would be another name for them

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        facts = self.index.info()
        if facts["path"] is None:
            raise InputError(
                "a store in memory can't be pickled: its rows live in this process only; make it with path=, "
                "which is opened again where the pickle is read"
            )
        folder, server = Path(facts["path"]), facts["server"]
        place = {"path": server or folder, "ledger": folder if server else None}
        return _reopened, (
            type(self),
            self._embeddings,
            place | {"collection": facts["collection"]},
            self.image_keys,
        )

    def __exit__(self, *unused: object) -> None:
        self.close()


def _reopened(
    kind: type[UMRVectorStore], embedding: Embeddings | None, place: Mapping[str, Any], keys: tuple[str, ...]
) -> UMRVectorStore:
    return kind(embedding, **place, image_key=keys)


def _both(embedding: Embeddings | Encoder | None) -> tuple[Embeddings | None, Encoder | None]:
    """The two faces of one embedding: LangChain's and the core's."""
    if embedding is None:
        return None, None
    if isinstance(embedding, GMEEmbeddings):
        return embedding, embedding.encoder
    if isinstance(embedding, Embeddings):
        return embedding, TextEncoder(embedding)
    if isinstance(embedding, Encoder):
        return GMEEmbeddings.from_encoder(embedding), embedding
    raise InputError(
        "embedding must be GMEEmbeddings, another LangChain Embeddings or an Encoder, got "
        f"{type(embedding).__name__}"
    )
