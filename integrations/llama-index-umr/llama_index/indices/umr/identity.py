"""Which document a node came from and in what state: how an index knows that a document has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama_index.core.schema import BaseNode, Document, MetadataMode, NodeRelationship, RelatedNodeInfo
from llama_index.embeddings.gme.nodes import node_picture

from umr_plugins.errors import InputError, ItemError
from umr_plugins.media.images import content_key

_SHOWN = (
    "metadata",
    "excluded_embed_metadata_keys",
    "excluded_llm_metadata_keys",
    "metadata_template",
    "metadata_separator",
    "text_template",
)


def document_hash(document: BaseNode) -> str | None:
    """A hash over all that is embedded or stored of a document, its picture by content.

    `Document.hash` of LlamaIndex knows a picture's file by name only, and excluded metadata keys not at all.

    Returns:
        None for a picture that can't be read.
    """
    try:
        picture = node_picture(document)
        place = str(picture) if isinstance(picture, Path) else None
        content = None if picture is None else content_key(picture).hex()
    except ItemError:
        return None
    shown = [getattr(document, name, None) for name in _SHOWN]
    parts = [document.get_content(MetadataMode.NONE), shown, place, content]
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()


def own_source(document: Document) -> RelatedNodeInfo:
    """What a node that is its own document names as its source."""
    return _with_hash(document.as_related_node_info(), document_hash(document))


def as_own_source(document: Document) -> Document:
    """The document without the source that a reader gave it, such as the file that it is a page of.

    LlamaIndex's parsers would hand that source on to the chunks, and nothing would name the document.
    """
    if document.source_node is None:
        return document
    copy = document.model_copy()
    copy.relationships = {
        kind: other for kind, other in document.relationships.items() if kind != NodeRelationship.SOURCE
    }
    return copy


def document_of(node: BaseNode) -> str:
    """Id of the document that a node came from: its source, or itself."""
    return node.ref_doc_id or node.node_id


def with_hashes(nodes: Iterable[BaseNode], hashes: Mapping[str, str | None]) -> list[BaseNode]:
    """Copies of the nodes of documents whose source carries the document's `document_hash`.

    Stores keep a node's relationships, so the hash lies beside the vector that was made at that state.
    """
    marked: list[BaseNode] = []
    for node in nodes:
        name = document_of(node)
        source = node.source_node or (node.as_related_node_info() if isinstance(node, Document) else None)
        if source is None or name not in hashes:
            marked.append(node)
            continue
        copy = node.model_copy()
        copy.relationships = node.relationships | {
            NodeRelationship.SOURCE: _with_hash(source, hashes[name]),
        }
        marked.append(copy)
    return marked


def with_parts(node: BaseNode, parts: int) -> None:
    """Write beside the hash in a node's source of how many nodes the store gets of the document."""
    source = node.source_node
    if source is not None and source.hash is not None:
        node.relationships = node.relationships | {
            NodeRelationship.SOURCE: _with_hash(source, f"{source.hash}/{parts}")
        }


@dataclass
class Held:
    """What a store has of one document.

    Args:
        nodes: their ids.
        hashes: the states of the document that they were made from; None where a node does not say.
        parts: of how many nodes the document is, from each node that says so.
    """

    nodes: list[str] = field(default_factory=list)
    hashes: set[str | None] = field(default_factory=set)
    parts: list[int] = field(default_factory=list)

    def is_of(self, document: Document, digest: str | None) -> bool:
        """Whether it is the whole document, made from it as it is now."""
        if digest is None or (self.parts and len(self.parts) != min(self.parts)):
            return False
        # Nodes that came another way carry LlamaIndex's own hash, which says enough about a text.
        known = {digest} if document.image_resource is not None else {digest, document.hash}
        return self.hashes <= known


def held_of(nodes: Iterable[BaseNode]) -> dict[str, Held]:
    """Nodes by the document they came from."""
    held: dict[str, Held] = {}
    for node in nodes:
        of_one = held.setdefault(document_of(node), Held())
        of_one.nodes.append(node.node_id)
        source = node.source_node
        digest, _, parts = ((source and source.hash) or "").partition("/")
        of_one.hashes.add(digest or None)
        if parts:
            of_one.parts.append(int(parts))
    return held


def outdated(
    documents: Sequence[Document],
    hashes: Mapping[str, str | None],
    held: Mapping[str, Held] | None,
    recorded: Mapping[str, str | None],
) -> tuple[list[Document], list[Document]]:
    """The documents that are new, and those that have changed.

    Args:
        documents: as they are now.
        hashes: `document_hash` of each.
        held: what the store has of them; None where it can't be asked.
        recorded: the state in which each came last, for a store that can't be asked.
    """
    new: list[Document] = []
    changed: list[Document] = []
    for document in documents:
        name, digest = document.node_id, hashes[document.node_id]
        if held is None:
            known, same = recorded[name] is not None, digest is not None and recorded[name] == digest
        else:
            known, same = name in held, name in held and held[name].is_of(document, digest)
        if not same:
            (changed if known else new).append(document)
    return new, changed


def refuse_repeated(kind: str, nodes: Sequence[BaseNode]) -> None:
    """Make sure that no id comes twice in one call.

    Raises:
        InputError: names the ids. Stores would keep the first, the last, or fail.
    """
    seen: set[str] = set()
    twice = [node.node_id for node in nodes if node.node_id in seen or seen.add(node.node_id)]
    if twice:
        names = ", ".join(repr(name) for name in dict.fromkeys(twice[:10]))
        raise InputError(f"{kind} ids come twice in one call: {names}; give each {kind} an id of its own")


def _with_hash(source: RelatedNodeInfo, digest: str | None) -> RelatedNodeInfo:
    return source.model_copy(update={"hash": digest})
