"""What a node, a picture argument or a query is, as `Item`s of the core library.

LlamaIndex has many ways to hold a picture and several lose it in silence; every other module of this
package asks here what a node holds, so that nothing is embedded as something else.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode, ImageNode, MediaResource, MetadataMode, Node, QueryBundle
from llama_index.embeddings.gme.pages import PageNode

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.images import content_key
from umr_plugins.types import ImageSource, Item, PageImage, as_item

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def item_of(node: BaseNode) -> Item:
    """Read what `node` is: a text, a picture, or both, which will be fused into one vector.

    The text is the node's own with the metadata that LlamaIndex shows to embedding models
    (`MetadataMode.EMBED`), as for any other model. A picture without text stays a picture: metadata alone
    never turns it into a text.

    Raises:
        ItemError: names the node. `empty` for neither text nor picture, `unsupported` for audio, video,
            and pictures given as URL, `corrupt` for bytes that are not base64, `unreadable` for a picture
            whose bytes got lost on the way.
    """
    try:
        _refuse_other_media(node)
        picture = node_picture(node)
        text = node.get_content(MetadataMode.EMBED) if node.get_content(MetadataMode.NONE).strip() else None
        if picture is None and text is None:
            raise ItemError("empty", "the node has neither text nor picture; leave it out or give it one")
        return as_item(Item(text=text, image=picture))
    except ItemError as error:
        raise error.at(name=name_of(node)) from None


def name_of(node: BaseNode) -> str:
    """How errors call a node. Ids of chunks are made up, so their document is named too."""
    source = node.ref_doc_id
    return f"node {node.node_id}" + (f" of document {source!r}" if source not in (None, node.node_id) else "")


def error_of(error: ItemError, position: int, node: BaseNode) -> ItemError:
    """The error of an item, under the name of its node; the file that it named stays in the reason."""
    reason = f"{error.name}: {error.reason}" if error.name else error.reason
    return ItemError(error.code, reason, stage=error.stage, index=position, name=name_of(node))


def node_picture(node: BaseNode) -> ImageSource | None:
    """The picture of a node, unopened; `None` for a node that has none."""
    if isinstance(node, PageNode):
        return node.page_image
    if isinstance(node, ImageNode):
        if node.image:
            return node.image if node.image.startswith("data:") else _from_base64(node.image)
        return _path_or_url(node.image_path, node.image_url)
    resource = node.image_resource if isinstance(node, Node) else None
    return None if resource is None else _resource_picture(resource)


def as_picture(value: Any) -> ImageSource:
    """A picture argument of any form LlamaIndex users pass: path, data URI, bytes, `BytesIO`, `PIL.Image`.

    Raises:
        ItemError: `unsupported` for a URL.
    """
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, str):
        return value if value.startswith("data:") else _path(value)
    picture: ImageSource = value
    return picture


def describe(items: Iterable[Item]) -> list[str]:
    """One string per item for events and callbacks: text as it is, pictures by path or content hash."""
    return [" ".join(_describe_parts(item)) for item in items]


def queries_of(bundle: QueryBundle) -> list[Item]:
    """The items of a query: one per embedding string, each with the picture if there is one.

    Raises:
        InputError: the query has neither text nor picture. Stores answer such a query with arbitrary rows.
    """
    picture = None if bundle.image_path in (None, "") else as_picture(bundle.image_path)
    texts = [text for text in bundle.embedding_strs if text.strip()]
    if texts:
        return [Item(text=text, image=picture) for text in texts]
    if picture is None:
        raise InputError("the query is empty: give text, an image_path, or an embedding in the QueryBundle")
    return [Item(image=picture)]


def _refuse_other_media(node: BaseNode) -> None:
    for kind in ("audio", "video"):
        if getattr(node, f"{kind}_resource", None) is not None:
            raise ItemError("unsupported", f"the node has {kind}; only text and pictures can be embedded")
    words = node.text_resource if isinstance(node, Node) else None
    if words is not None and not words.text and (words.data or words.path or words.url):
        raise ItemError(
            "unsupported",
            "text_resource has no text but data, a path or a URL, which are not read; put the words into "
            "MediaResource(text=...)",
        )


def _resource_picture(resource: MediaResource) -> ImageSource:
    if resource.data:
        return _from_base64(resource.data)
    picture = _path_or_url(resource.path, resource.url)
    if picture is None:
        raise ItemError(
            "unreadable",
            "image_resource has no data, path or url. LlamaIndex leaves MediaResource.data out of every dump "
            "(docstores, caches, most vector stores): give a path, or ImageNode(image=<base64>)",
            stage="open",
        )
    return picture


def _path_or_url(path: object, url: object) -> ImageSource | None:
    given = path or url
    if not given:
        return None
    text = str(given)
    return text if text.startswith("data:") else _path(text)


def _path(text: str) -> Path:
    if _SCHEME.match(text):
        raise ItemError(
            "unsupported",
            f"the picture is a URL ({text[:80]!r}), and URLs are not fetched; download it and give the path "
            "or the bytes",
            stage="open",
        )
    return Path(text)


def _from_base64(data: str | bytes) -> bytes:
    try:
        encoded = data if isinstance(data, bytes) else data.encode()
        return base64.b64decode(b"".join(encoded.split()), validate=True)  # MIME breaks its lines
    except (binascii.Error, ValueError):
        raise ItemError(
            "corrupt", "the node's picture is not valid base64; encode the file's bytes", stage="decode"
        ) from None


def _describe_parts(item: Item) -> Iterable[str]:
    if item.text:
        yield item.text
    for picture in item.pictures:
        if isinstance(picture, PageImage):
            yield f"{picture.path}#page={picture.page}"
        elif isinstance(picture, Path) or (isinstance(picture, str) and not picture.startswith("data:")):
            yield str(picture)
        else:
            yield f"<image sha256:{_key(picture)}>"


def _key(picture: ImageSource) -> str:
    try:
        return content_key(picture).hex()
    except ItemError:
        return "unreadable"  # the model says what is wrong with it
