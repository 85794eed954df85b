"""Documents as plain text: what an answer without an LLM consists of."""

from __future__ import annotations

from collections.abc import Iterable

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.embeddings.gme import PageNode
from llama_index.embeddings.gme.nodes import describe, node_picture

from umr_plugins.errors import ItemError
from umr_plugins.types import Item

_PLACES = (("path", "page"), ("file_path", "page_label"), ("file_name", "page_label"))


def passages(nodes: Iterable[NodeWithScore], length: int) -> tuple[str, list[NodeWithScore]]:
    """The documents as numbered passages, and those documents that are among them.

    Each has its number, the file and page that its metadata name, its text, and the name of its picture. No
    picture is opened, so the same nodes always give the same text.

    Args:
        nodes: documents, best first. One with neither text nor picture is left out.
        length: characters of a text beyond which it is cut, visibly.
    """
    parts: list[str] = []
    shown: list[NodeWithScore] = []
    for each in nodes:
        text, picture = each.node.get_content(MetadataMode.NONE).strip(), _picture(each.node)
        if text or picture:
            shown.append(each)
            lines = [f"[{len(shown)}] {place_of(each.node)}".rstrip(), _cut(text, length), picture]
            parts.append("\n".join(line for line in lines if line))
    return "\n\n".join(parts), shown


def place_of(node: BaseNode) -> str:
    """The file and page that a node or its metadata name; empty if they name none."""
    if isinstance(node, PageNode):
        return f"{node.page_path}, page {node.page}"
    for path, page in _PLACES:
        if node.metadata.get(path):
            number = node.metadata.get(page)
            return f"{node.metadata[path]}" + ("" if number is None else f", page {number}")
    return ""


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    return f"{text[:length].rstrip()} […] (the first {length} of {len(text)} characters)"


def _picture(node: BaseNode) -> str:
    try:
        picture = node_picture(node)
    except ItemError as error:
        return f"[picture that can't be read: {error.reason}]"
    return "" if picture is None else f"[picture: {describe([Item(image=picture)])[0]}]"
