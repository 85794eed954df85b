"""Nodes as rows of the index and back, with every picture."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    Node,
    TextNode,
)
from llama_index.embeddings.gme import PageNode, item_of
from llama_index.embeddings.gme.nodes import name_of
from llama_index.embeddings.gme.roots import vouch, vouched

from umr_plugins.errors import ItemError
from umr_plugins.types import Hit, Item, PageImage

REF_DOC_ID = "ref_doc_id"
"""Metadata key under which a row names the document its node came from."""

_OPENED = "opened"
_ADDED = ("image", "fused")

_CLASSES: dict[str, type[BaseNode]] = {
    known.class_name(): known
    for known in (PageNode, ImageNode, IndexNode, TextNode, ImageDocument, Document, Node)
}


@dataclass(frozen=True)
class Row:
    """A node as `Index.add` takes it.

    Args:
        item: what was embedded; the index keeps pictures that have no file.
        metadata: what filters see.
        payload: the whole node as JSON, without vector and without picture data; `opened` says whether its
            file may be opened when it comes back, since a node may have come from anywhere with its vector.
    """

    item: Item
    metadata: dict[str, Any]
    payload: str


def row_of(node: BaseNode) -> Row:
    """The row of a node.

    Raises:
        ItemError: the node has neither text nor picture, or one that can't be read; it has fields that would
            be lost, or metadata that name another document than its own; names the node.
    """
    kind, known = next((name, known) for name, known in _CLASSES.items() if isinstance(node, known))
    if lost := ", ".join(sorted(type(node).model_fields.keys() - known.model_fields.keys())):
        raise _refused(
            node, f"it would come back as a {kind} without its own fields ({lost}); put them into metadata"
        )
    try:
        data = node.model_dump(mode="json", exclude={"embedding"})
    except ValueError as error:  # such as an object in IndexNode.obj
        raise _refused(node, f"it can't be written as JSON: {error}") from None
    data |= {"class_name": kind, _OPENED: vouched(node)}
    if isinstance(node, ImageNode):
        data["image"] = None
    metadata = dict(node.metadata)
    if metadata.get("modality") in _ADDED and "modality" in node.excluded_llm_metadata_keys:
        # `node_of` said it of a node that may have changed since.
        del metadata["modality"], data["metadata"]["modality"]
    ref_doc_id = node.ref_doc_id or (node.node_id if isinstance(node, Document) else None)
    if metadata.get(REF_DOC_ID, ref_doc_id) != ref_doc_id:
        raise _refused(
            node,
            f"its metadata have {REF_DOC_ID}={metadata[REF_DOC_ID]!r}, under which documents are deleted, "
            "and it is no part of that document; use another key, or make that document its source",
        )
    if ref_doc_id is not None:
        metadata[REF_DOC_ID] = ref_doc_id
    return Row(item_of(node), metadata, json.dumps(data, ensure_ascii=False))


def node_of(hit: Hit) -> BaseNode:
    """The node of a row: the one that was added, or one made for a row that came from a file.

    `metadata` is the user's own. Rows from files add `path` and, for PDFs, `page`; pictures add `modality`
    (`"image"` or `"fused"`). What is added is never embedded again. Rerankers and engines may open its file
    if the index itself opened it, or if the node was vouched for when it was added.

    A row that was not added as a node (a file's, LangChain's) was embedded without its metadata. Nodes hold
    one picture: of several, or of a video, it is the first, and `pictures` in the metadata counts them.
    """
    data = None if hit.payload is None else json.loads(hit.payload)
    opened = data is None or data.pop(_OPENED, False)
    node = _from_file(hit) if data is None else _from_payload(hit, data)
    added: dict[str, Any] = {}
    if hit.path is not None:
        added["path"] = str(hit.path)
        if hit.page is not None:
            added["page"] = hit.page
    if shown := (*hit.item.pictures, *hit.item.video):
        added["modality"] = hit.modality
        if len(shown) > 1:
            added["pictures"] = len(shown)
    node.metadata = added | node.metadata
    apart = added if hit.payload is not None else node.metadata
    node.excluded_embed_metadata_keys = [*dict.fromkeys([*node.excluded_embed_metadata_keys, *apart])]
    if "modality" in added:
        node.excluded_llm_metadata_keys = [*dict.fromkeys([*node.excluded_llm_metadata_keys, "modality"])]
    if opened:
        vouch(node)
    return node


def _refused(node: BaseNode, reason: str) -> ItemError:
    return ItemError("unsupported", reason, stage="store", name=name_of(node))


def _from_payload(hit: Hit, data: dict[str, Any]) -> BaseNode:
    kind = _CLASSES[data["class_name"]]
    picture = hit.item.image
    if picture is not None and not isinstance(picture, PageImage):
        place = _place_of(picture)
        if issubclass(kind, ImageNode):
            data |= {"image": place["data"], "image_path": place["path"]}
        else:
            data["image_resource"] = (data.get("image_resource") or {}) | place
    return kind.from_dict(data)


def _from_file(hit: Hit) -> BaseNode:
    common: dict[str, Any] = {"id_": hit.id, "text": hit.text or "", "metadata": dict(hit.metadata)}
    picture = next(iter((*hit.item.pictures, *hit.item.video)), None)
    if picture is None:
        return TextNode(**common)
    if isinstance(picture, PageImage):
        return PageNode(page_path=str(picture.path), page=picture.page, **common)
    place = _place_of(picture)
    return ImageNode(image=place["data"], image_path=place["path"], **common)


def _place_of(picture: Any) -> dict[str, str | None]:
    """A stored picture as LlamaIndex holds one: the path of its file, or its bytes in base64."""
    if isinstance(picture, bytes):
        return {"data": base64.b64encode(picture).decode("ascii"), "path": None}
    return {"data": None, "path": str(Path(picture))}
