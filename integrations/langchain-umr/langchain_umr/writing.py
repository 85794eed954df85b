"""Every way LangChain adds to a vector store, on one `Index`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document

from langchain_umr.documents import fill_ids, label, named, same_length
from langchain_umr.inputs import listed_inputs, to_item
from langchain_umr.judging import listed_documents
from langchain_umr.searching import StoreReader
from langchain_umr.threads import in_thread
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.index.rows import check_metadata
from umr_plugins.types import Hit, ImageSource, Item, OnError

if TYPE_CHECKING:
    from umr_plugins.index.index import FolderReport


class StoreWriter(StoreReader):
    """The adding half of `UMRVectorStore`."""

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Iterable[dict[str, Any]] | None = None,
        *,
        ids: Iterable[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add or replace texts, as `add_documents` does."""
        if isinstance(texts, str):
            raise InputError("texts is a list of texts, got one str: add_texts([text])")
        listed = list(texts)
        for index, text in enumerate(listed):
            if not isinstance(text, str):
                raise InputError(
                    f"texts[{index}] is a {type(text).__name__}; for pictures there is add_items"
                )
        filled = same_length("metadatas", metadatas, len(listed), "text") or [{}] * len(listed)
        for index, metadata in enumerate(filled):
            if metadata is not None and not isinstance(metadata, Mapping):
                raise InputError(f"metadata {index} must be a dict, got {type(metadata).__name__}")
        documents = [
            Document(page_content=text, metadata=dict(metadata or {}))
            for text, metadata in zip(listed, filled, strict=True)
        ]
        return self.add_documents(documents, ids=ids, **kwargs)

    def add_documents(
        self,
        documents: Iterable[Document],
        *,
        ids: Iterable[str | None] | None = None,
        on_error: OnError = "raise",
        show_progress: bool = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add documents; those with an id that is there are replaced, metadata and all.

        A document whose metadata names a picture (`image`, `image_uri` or `image_path`) is embedded with it:
        page content and picture fused into one vector, or the picture alone without page content. A list of
        paths there is several pictures of one document, for models that take them. Page content that is a
        picture as base64, as some stores return pictures, is embedded as that picture and not kept as text.
        Metadata are JSON values, nested as you like; strings, numbers, booleans and lists of one of these can
        be filtered on.

        A document that this store has returned stands for the row that it was read from: with the same page
        content it keeps its vector, and it keeps its picture even if that is in memory. Rows of `add_files`
        and `add_folder` follow their files and can't be replaced; under another id they can be copied.

        Args:
            documents: any iterable of documents.
            ids: instead of the documents' own ids. A missing id is made of content and metadata, so that
                adding the same document again adds nothing.
            on_error: `"raise"` adds nothing if a document can't be embedded; `"skip"` adds the others and
                logs what was left out and why.
            show_progress: a bar on stderr.
            batch_size: accepted for LangChain's `index()`; batches follow the model's token budget.
            kwargs: none; an unknown one is refused.

        Returns:
            The ids of what was added, in order.

        Raises:
            BatchError: names every document that can't be embedded.
            InputError: an id stands twice, the numbers of ids and documents differ, or metadata hold what
                JSON can't (bytes, dates, numpy scalars).
        """
        if kwargs:
            allowed = "ids, on_error, show_progress, batch_size"
            raise InputError(f"unknown arguments {sorted(kwargs)}; allowed are {allowed}")
        listed = listed_documents(documents)
        given = same_length("ids", ids, len(listed), "document") or [document.id for document in listed]
        labels = [label(one, document.page_content) for one, document in zip(given, listed, strict=True)]
        rows = self._rows([*given, *(document.id for document in listed)])
        return self._add(
            lambda index: self._read(listed[index], rows), given, rows, on_error, show_progress, labels
        )

    def add_items(
        self,
        items: Iterable[Any],
        metadatas: Iterable[dict[str, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> list[str]:
        """Add anything that can be embedded: `PIL.Image`s, paths, mappings with `text` and `image`, items.

        Pictures in memory are kept in the index. A `Document` brings its id and its metadata, unless an id or
        metadata are given for it here. Arguments, result and errors are those of `add_documents`.
        """
        listed = listed_inputs(items)
        filled = same_length("metadatas", metadatas, len(listed), "item") or [None] * len(listed)
        given = same_length("ids", ids, len(listed), "item") or [None] * len(listed)
        own = [value.id if isinstance(value, Document) else None for value in listed]
        given = [mine if one is None else one for one, mine in zip(given, own, strict=True)]
        rows = self._rows([*given, *own])

        def read(index: int) -> tuple[Item, dict[str, Any]]:
            value, metadata = listed[index], filled[index]
            if not isinstance(value, Document):
                return to_item(value), metadata or {}
            item, kept = self._read(value, rows)
            return item, kept if metadata is None else metadata

        return self._add(read, given, rows, on_error, show_progress)

    def add_images(
        self,
        uris: Iterable[ImageSource],
        metadatas: Iterable[dict[str, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        captions: Iterable[str | None] | None = None,
        on_error: OnError = "raise",
        show_progress: bool = False,
    ) -> list[str]:
        """Add pictures; with a caption, picture and caption are fused and the caption is the page content.

        Args:
            uris: paths, data URIs, `PIL.Image`s or bytes. Found documents have the path in their metadata.
            metadatas: one per picture.
            ids: one per picture.
            captions: one per picture; None for no caption.
            on_error: as in `add_documents`.
            show_progress: a bar on stderr.
        """
        if isinstance(uris, str | bytes | Path):
            raise InputError(f"uris is a list of pictures, got one {type(uris).__name__}; pass [picture]")
        listed = list(uris)
        texts = same_length("captions", captions, len(listed), "picture") or [None] * len(listed)
        items = [{"text": text or None, "image": uri} for text, uri in zip(texts, listed, strict=True)]
        return self.add_items(items, metadatas, ids, on_error=on_error, show_progress=show_progress)

    def add_files(self, paths: Iterable[str | Path], **kwargs: Any) -> FolderReport:
        """Add files: pictures, pages of PDFs, text and Markdown in pieces. Unchanged files cost nothing.

        Args:
            paths: the files.
            kwargs: `pages` (PDF pages are embedded as `"image"`, `"fused"` or `"text"`), `show_progress`.

        Returns:
            Counts of files and items, and what was refused and why; one bad file stops nothing.
        """
        if isinstance(paths, str | Path):
            raise InputError("paths is a list of files; for a folder there is add_folder")
        return self.index.add_files([Path(path) for path in paths], **kwargs)

    def add_folder(self, root: str | Path, **kwargs: Any) -> FolderReport:
        """Add all files under a folder as `add_files` does, and remove what has gone from the folder."""
        return self.index.add_folder(root, **kwargs)

    async def aadd_texts(self, texts: Iterable[str], *args: Any, **kwargs: Any) -> list[str]:
        """`add_texts` in a thread."""
        return await in_thread("document", self.add_texts, texts, *args, **kwargs)

    async def aadd_documents(self, documents: Iterable[Document], **kwargs: Any) -> list[str]:
        """`add_documents` in a thread."""
        return await in_thread("document", self.add_documents, documents, **kwargs)

    async def aadd_items(self, items: Iterable[Any], *args: Any, **kwargs: Any) -> list[str]:
        """`add_items` in a thread."""
        return await in_thread("document", self.add_items, items, *args, **kwargs)

    async def aadd_images(self, uris: Iterable[ImageSource], *args: Any, **kwargs: Any) -> list[str]:
        """`add_images` in a thread."""
        return await in_thread("document", self.add_images, uris, *args, **kwargs)

    async def aadd_files(self, paths: Iterable[str | Path], **kwargs: Any) -> FolderReport:
        """`add_files` in a thread."""
        return await in_thread("document", self.add_files, paths, **kwargs)

    async def aadd_folder(self, root: str | Path, **kwargs: Any) -> FolderReport:
        """`add_folder` in a thread."""
        return await in_thread("document", self.add_folder, root, **kwargs)

    def _read(self, document: Document, rows: Mapping[str, Hit]) -> tuple[Item, dict[str, Any]]:
        row = self._own_row(document, rows)
        item = self._item(document, row)
        return item, _own(document.metadata, item, row)

    def _add(
        self,
        read: Callable[[int], tuple[Item, dict[str, Any]]],
        ids: list[str | None],
        rows: Mapping[str, Hit],
        on_error: OnError,
        show_progress: bool,
        labels: list[str] | None = None,
    ) -> list[str]:
        if not ids:
            return []
        items: list[Item | ItemError] = []
        metadatas: list[dict[str, Any]] = []
        for index, name in enumerate(ids):
            item: Item | ItemError
            try:
                _check_replaceable(rows.get(name or ""))
                item, metadata = read(index)
            except ItemError as error:
                item, metadata = error.at(index, labels[index] if labels else name), {}
            items.append(item)
            metadatas.append(metadata)
        errors = [one for one in items if isinstance(one, ItemError)]
        if errors and on_error == "raise":
            raise BatchError(errors, len(items))
        _check_metadatas(metadatas, labels)
        filled = fill_ids(ids, items, metadatas)
        try:
            return self.index.add(
                items, ids=filled, metadatas=metadatas, on_error=on_error, show_progress=show_progress
            )
        except BatchError as error:
            if labels is None:
                raise
            raise named(error, labels, filled) from error


def _check_metadatas(metadatas: Sequence[dict[str, Any]], labels: Sequence[str] | None) -> None:
    for index, metadata in enumerate(metadatas):
        try:
            check_metadata(metadata, index)
        except InputError as error:
            raise InputError(f"{labels[index]}: {error}" if labels else str(error)) from None


def _check_replaceable(row: Hit | None) -> None:
    """A row of a file that was replaced would no longer go when its file goes."""
    if row is not None and row.path is not None:
        raise ItemError(
            "unsupported",
            f"this id belongs to a part of the file {row.path}, which add_files and add_folder keep as the "
            "file is; change the file and add it again, or give another id",
        )


def _own(metadata: dict[str, Any], item: Item, row: Hit | None) -> dict[str, Any]:
    """The user's metadata, without what a row was given when it was read."""
    given = set()
    if item.modality != "text" and metadata.get("modality") in ("image", "fused"):
        given.add("modality")
    if row is not None and row.path is None:  # the copy of a part of a file has its origin as metadata
        given.add("path")
    return {key: one for key, one in metadata.items() if key not in given or (row and key in row.metadata)}
