"""Every way LangChain adds to a vector store, on one `Index`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.runnables.config import run_in_executor

from langchain_umr.documents import fill_ids, label, named, same_length
from langchain_umr.inputs import document_item, to_items
from langchain_umr.searching import StoreReader
from umr_plugins.errors import BatchError, InputError, ItemError
from umr_plugins.index.rows import check_metadata
from umr_plugins.types import ImageSource, Item, OnError

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
        documents = [
            Document(page_content=text, metadata=metadata or {})
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

        Args:
            documents: any iterable of documents.
            ids: instead of the documents' own ids. A missing id is made of content and metadata, so that
                adding the same document again adds nothing.
            on_error: `"raise"` adds nothing if a document can't be embedded; `"skip"` adds the others.
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
        listed = list(documents)
        given = same_length("ids", ids, len(listed), "document") or [document.id for document in listed]
        labels = [label(one, document.page_content) for one, document in zip(given, listed, strict=True)]
        items: list[Item] = []
        errors: list[ItemError] = []
        kept: list[int] = []
        for index, document in enumerate(listed):
            try:
                items.append(self._item(document))
                kept.append(index)
            except ItemError as error:
                errors.append(error.at(index))
        if errors and on_error != "skip":
            raise named(BatchError(errors, len(listed)), labels)
        metadatas = [_own(listed[index].metadata, item) for index, item in zip(kept, items, strict=True)]
        kept_ids, kept_labels = [given[index] for index in kept], [labels[index] for index in kept]
        return self._add(items, metadatas, kept_ids, on_error, show_progress, kept_labels)

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

        Pictures in memory are kept in the index. Arguments, result and errors are those of `add_documents`.
        """
        listed = to_items(items)
        filled = same_length("metadatas", metadatas, len(listed), "item") or [None] * len(listed)
        given = same_length("ids", ids, len(listed), "item")
        return self._add(listed, [dict(one or {}) for one in filled], given, on_error, show_progress)

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

    async def aadd_items(self, items: Iterable[Any], *args: Any, **kwargs: Any) -> list[str]:
        """`add_items` in a thread."""
        return await run_in_executor(None, self.add_items, items, *args, **kwargs)

    async def aadd_images(self, uris: Iterable[ImageSource], *args: Any, **kwargs: Any) -> list[str]:
        """`add_images` in a thread."""
        return await run_in_executor(None, self.add_images, uris, *args, **kwargs)

    async def aadd_files(self, paths: Iterable[str | Path], **kwargs: Any) -> FolderReport:
        """`add_files` in a thread."""
        return await run_in_executor(None, self.add_files, paths, **kwargs)

    async def aadd_folder(self, root: str | Path, **kwargs: Any) -> FolderReport:
        """`add_folder` in a thread."""
        return await run_in_executor(None, self.add_folder, root, **kwargs)

    def _item(self, document: Document) -> Item:
        """A picture row of this index that comes back (say, with other metadata) keeps its picture."""
        stored = self._stored(document)
        if stored is not None:
            item = stored.item
            return Item(document.page_content or None, item.image, item.images, item.video)
        return document_item(document, self.image_keys)

    def _add(
        self,
        items: list[Item],
        metadatas: list[dict[str, Any]],
        ids: list[str | None] | None,
        on_error: OnError,
        show_progress: bool,
        labels: list[str] | None = None,
    ) -> list[str]:
        if not items:
            return []
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


def _own(metadata: dict[str, Any], item: Item) -> dict[str, Any]:
    """The user's metadata, without the modality that a picture row was given when it was read."""
    picture = item.modality != "text" and metadata.get("modality") in ("image", "fused")
    return {key: value for key, value in metadata.items() if not (picture and key == "modality")}
